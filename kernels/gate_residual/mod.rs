//! Where a branch joins the residual stream: gated (self-attention, feed-forward) or plain (cross-attention).
//!
//! Sums are fp32 and rounded once, to `out`: F32 keeps the stream as the official code has it, a 16-bit `out` gives the
//! 16-bit stream. `compute` plays no part. In both backwards `dx = dout`, which the caller already holds.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, num, Cost, Op, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// `out = x + gate·y`.
pub struct GateResidual;

/// `x_bld` and `y_bld` [b, l, d]; `gate` [b, d], or [b, l, d] where every token has its own timestep.
pub struct GateResidualArgs<'a> {
    pub x_bld: &'a Tensor,
    pub y_bld: &'a Tensor,
    pub gate: &'a Tensor,
    /// Dtype of the result.
    pub out: DType,
}

/// `dy = gate·dout` of [`GateResidual`]; the gate comes from frozen weights and the timestep and gets no gradient.
pub struct GateResidualBackward;

/// `dout_bld` [b, l, d], the forward's `gate`.
pub struct GateResidualBackwardArgs<'a> {
    pub dout_bld: &'a Tensor,
    pub gate: &'a Tensor,
    /// Dtype of `dy`.
    pub out: DType,
}

/// `out = x + y`; both gradients are `dout`.
pub struct Residual;

/// Two tensors of one shape.
pub struct ResidualArgs<'a> {
    pub x: &'a Tensor,
    pub y: &'a Tensor,
    /// Dtype of the result.
    pub out: DType,
}

impl Op for GateResidual {
    type Args<'a> = GateResidualArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "gate_residual";

    fn check(a: &GateResidualArgs<'_>) -> Result<()> {
        let bld = gate::dims::<3>(Self::NAME, "x_bld", a.x_bld, "[b, l, d], nothing empty")?;
        gate::float(Self::NAME, "x_bld", a.x_bld)?;
        gate::float(Self::NAME, "y_bld", a.y_bld)?;
        gate::shape(Self::NAME, "y_bld", a.y_bld, &bld, "[b, l, d]")?;
        gate::per_sample_or_token(Self::NAME, "gate", a.gate, bld)?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &GateResidualArgs<'_>) -> Cost {
        let elements = a.x_bld.elem_count() as f64;
        let bytes =
            gate::bytes(a.x_bld) + gate::bytes(a.y_bld) + gate::bytes(a.gate) + elements * a.out.size_in_bytes() as f64;
        Cost { flops: 2.0 * elements, bytes }
    }

    fn reference(a: &GateResidualArgs<'_>, _compute: DType) -> Result<Tensor> {
        let gated = num::f32(a.y_bld)?.broadcast_mul(&num::over_tokens(a.gate)?)?;
        Ok((num::f32(a.x_bld)? + gated)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &GateResidualArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !a.y_bld.dims()[2].is_multiple_of(8) {
            return Self::reference(a, compute);
        }
        cuda::gate(Self::NAME, gpu, Some(a.x_bld), a.y_bld, a.gate, a.out)
    }
}

impl Op for GateResidualBackward {
    type Args<'a> = GateResidualBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "gate_residual_backward";

    fn check(a: &GateResidualBackwardArgs<'_>) -> Result<()> {
        let bld = gate::dims::<3>(Self::NAME, "dout_bld", a.dout_bld, "[b, l, d], nothing empty")?;
        gate::float(Self::NAME, "dout_bld", a.dout_bld)?;
        gate::per_sample_or_token(Self::NAME, "gate", a.gate, bld)?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &GateResidualBackwardArgs<'_>) -> Cost {
        let elements = a.dout_bld.elem_count() as f64;
        let bytes = gate::bytes(a.dout_bld) + gate::bytes(a.gate) + elements * a.out.size_in_bytes() as f64;
        Cost { flops: elements, bytes }
    }

    fn reference(a: &GateResidualBackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        Ok(num::f32(a.dout_bld)?.broadcast_mul(&num::over_tokens(a.gate)?)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &GateResidualBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !a.dout_bld.dims()[2].is_multiple_of(8) {
            return Self::reference(a, compute);
        }
        cuda::gate(Self::NAME, gpu, None, a.dout_bld, a.gate, a.out)
    }
}

impl Op for Residual {
    type Args<'a> = ResidualArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "residual";

    fn check(a: &ResidualArgs<'_>) -> Result<()> {
        gate::float(Self::NAME, "x", a.x)?;
        gate::float(Self::NAME, "y", a.y)?;
        gate::shape(Self::NAME, "y", a.y, a.x.dims(), "the shape of x")?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &ResidualArgs<'_>) -> Cost {
        let elements = a.x.elem_count() as f64;
        let bytes = gate::bytes(a.x) + gate::bytes(a.y) + elements * a.out.size_in_bytes() as f64;
        Cost { flops: elements, bytes }
    }

    fn reference(a: &ResidualArgs<'_>, _compute: DType) -> Result<Tensor> {
        Ok((num::f32(a.x)? + num::f32(a.y)?)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &ResidualArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::residual(Self::NAME, gpu, a.x, a.y, a.out)
    }
}

#[cfg(test)]
mod tests;
