//! Activations. The feed-forward uses the tanh GELU, so only that one has a backward; the exact GELU (CLIP, img_emb) and
//! SiLU (time embedding) stand on frozen paths that no gradient passes.
//!
//! Computed in fp32, results in the dtype of `x` (forward) or of `dy` (backward); `compute` plays no part.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, num, Cost, Op, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// √(2/π), and the weight of the cube, in `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`. With `u` the argument of tanh
/// that is `x·sigmoid(2u)`: one exponential, which is cheaper than a tanh and loses nothing far from zero.
const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const CUBE: f64 = 0.044_715;

/// One tensor of any shape.
pub struct ActivationArgs<'a> {
    pub x: &'a Tensor,
}

/// GELU in its tanh form.
pub struct GeluTanh;

/// `dx` of [`GeluTanh`].
pub struct GeluTanhBackward;

/// The forward's input, and `dy` like it.
pub struct GeluTanhBackwardArgs<'a> {
    pub x: &'a Tensor,
    pub dy: &'a Tensor,
}

/// `gelu_tanh(gate)·x`: the gated feed-forward of T5.
pub struct GeluTanhGate;

/// Two tensors of one shape.
pub struct GeluTanhGateArgs<'a> {
    pub gate: &'a Tensor,
    pub x: &'a Tensor,
}

/// GELU by the error function: `x·Φ(x)`.
pub struct GeluErf;

/// `x·sigmoid(x)`.
pub struct Silu;

impl Op for GeluTanh {
    type Args<'a> = ActivationArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "gelu_tanh";

    fn check(a: &ActivationArgs<'_>) -> Result<()> {
        gate::float(Self::NAME, "x", a.x)
    }

    fn cost(a: &ActivationArgs<'_>) -> Cost {
        Cost { flops: 9.0 * a.x.elem_count() as f64, bytes: 2.0 * gate::bytes(a.x) }
    }

    fn reference(a: &ActivationArgs<'_>, _compute: DType) -> Result<Tensor> {
        let x = num::f32(a.x)?;
        let sigmoid = sigmoid_2u(&x, &x.sqr()?)?;
        Ok((x * sigmoid)?.to_dtype(a.x.dtype())?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &ActivationArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::forward(Self::NAME, "gelu_tanh_fwd", gpu, a.x)
    }
}

impl Op for GeluTanhBackward {
    type Args<'a> = GeluTanhBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "gelu_tanh_backward";

    fn check(a: &GeluTanhBackwardArgs<'_>) -> Result<()> {
        gate::float(Self::NAME, "x", a.x)?;
        gate::float(Self::NAME, "dy", a.dy)?;
        gate::shape(Self::NAME, "dy", a.dy, a.x.dims(), "the shape of x")
    }

    fn cost(a: &GeluTanhBackwardArgs<'_>) -> Cost {
        Cost { flops: 16.0 * a.x.elem_count() as f64, bytes: gate::bytes(a.x) + 2.0 * gate::bytes(a.dy) }
    }

    fn reference(a: &GeluTanhBackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        let x = num::f32(a.x)?;
        let x2 = x.sqr()?;
        let sigmoid = sigmoid_2u(&x, &x2)?;
        // d/dx x·σ(2u) = σ + x·σ·(1 − σ)·2u', 2u' = 2·√(2/π)·(1 + 3·0.044715·x²)
        let slope = (x * x2.affine(6.0 * SQRT_2_OVER_PI * CUBE, 2.0 * SQRT_2_OVER_PI)?)?;
        let rest = (slope * sigmoid.affine(-1.0, 1.0)?)?.affine(1.0, 1.0)?;
        let dgelu = (sigmoid * rest)?;
        Ok((dgelu * num::f32(a.dy)?)?.to_dtype(a.dy.dtype())?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &GeluTanhBackwardArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::two(Self::NAME, "gelu_tanh_bwd", gpu, a.x, a.dy)
    }
}

impl Op for GeluTanhGate {
    type Args<'a> = GeluTanhGateArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "gelu_tanh_gate";

    fn check(a: &GeluTanhGateArgs<'_>) -> Result<()> {
        gate::float(Self::NAME, "gate", a.gate)?;
        gate::float(Self::NAME, "x", a.x)?;
        gate::shape(Self::NAME, "gate", a.gate, a.x.dims(), "the shape of x")
    }

    fn cost(a: &GeluTanhGateArgs<'_>) -> Cost {
        Cost { flops: 10.0 * a.x.elem_count() as f64, bytes: 2.0 * gate::bytes(a.x) + gate::bytes(a.gate) }
    }

    fn reference(a: &GeluTanhGateArgs<'_>, _compute: DType) -> Result<Tensor> {
        let gate = num::f32(a.gate)?;
        let sigmoid = sigmoid_2u(&gate, &gate.sqr()?)?;
        Ok(((gate * sigmoid)? * num::f32(a.x)?)?.to_dtype(a.x.dtype())?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &GeluTanhGateArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::two(Self::NAME, "gelu_tanh_gate", gpu, a.gate, a.x)
    }
}

impl Op for GeluErf {
    type Args<'a> = ActivationArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "gelu_erf";

    fn check(a: &ActivationArgs<'_>) -> Result<()> {
        gate::float(Self::NAME, "x", a.x)
    }

    fn cost(a: &ActivationArgs<'_>) -> Cost {
        Cost { flops: 9.0 * a.x.elem_count() as f64, bytes: 2.0 * gate::bytes(a.x) }
    }

    fn reference(a: &ActivationArgs<'_>, _compute: DType) -> Result<Tensor> {
        Ok(num::f32(a.x)?.gelu_erf()?.to_dtype(a.x.dtype())?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &ActivationArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::forward(Self::NAME, "gelu_erf_fwd", gpu, a.x)
    }
}

impl Op for Silu {
    type Args<'a> = ActivationArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "silu";

    fn check(a: &ActivationArgs<'_>) -> Result<()> {
        gate::float(Self::NAME, "x", a.x)
    }

    fn cost(a: &ActivationArgs<'_>) -> Cost {
        Cost { flops: 4.0 * a.x.elem_count() as f64, bytes: 2.0 * gate::bytes(a.x) }
    }

    fn reference(a: &ActivationArgs<'_>, _compute: DType) -> Result<Tensor> {
        Ok(num::f32(a.x)?.silu()?.to_dtype(a.x.dtype())?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &ActivationArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::forward(Self::NAME, "silu_fwd", gpu, a.x)
    }
}

/// `1 / (1 + exp(−2u))`; the exponential may overflow to infinity, which is the right answer 0.
fn sigmoid_2u(x: &Tensor, x2: &Tensor) -> Result<Tensor> {
    let minus_2u = (x * x2.affine(-2.0 * SQRT_2_OVER_PI * CUBE, -2.0 * SQRT_2_OVER_PI)?)?;
    Ok((minus_2u.exp()? + 1.0)?.recip()?)
}

#[cfg(test)]
mod tests;
