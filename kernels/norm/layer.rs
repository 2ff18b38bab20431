//! LayerNorm: without parameters but modulated (norm1, norm2, head), and affine (norm3, img_emb, CLIP).

use candle_core::{DType, Tensor, D};

#[cfg(feature = "cuda")]
use super::cuda::{self, Kind};
use super::{layer_dx, plus_residual};
#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, num, Cost, Op, Result};

/// `y = LayerNorm(x)·(1 + scale) + shift`.
pub struct LayerNormModulate;

/// `x_bld` [b, l, d]; `shift` and `scale` [b, d], or [b, l, d] where every token has its own timestep.
pub struct LayerNormModulateArgs<'a> {
    pub x_bld: &'a Tensor,
    pub shift: &'a Tensor,
    pub scale: &'a Tensor,
    pub eps: f64,
    /// Dtype of the result.
    pub out: DType,
}

/// `dx` of [`LayerNormModulate`]. Shift and scale come from frozen weights and the timestep: they get no gradient, per
/// sample or per token.
pub struct LayerNormModulateBackward;

/// `x_bld`, `scale`, `eps` as in the forward, `dy_bld` [b, l, d]; `dres_bld` [b, l, d] is added to `dx`.
pub struct LayerNormModulateBackwardArgs<'a> {
    pub x_bld: &'a Tensor,
    pub scale: &'a Tensor,
    pub dy_bld: &'a Tensor,
    pub dres_bld: Option<&'a Tensor>,
    pub eps: f64,
    /// Dtype of `dx`.
    pub out: DType,
}

/// `y = LayerNorm(x)·weight + bias`.
pub struct LayerNorm;

/// `x` [.., d], `weight_d` and `bias_d` [d].
pub struct LayerNormArgs<'a> {
    pub x: &'a Tensor,
    pub weight_d: &'a Tensor,
    pub bias_d: &'a Tensor,
    pub eps: f64,
    /// Dtype of the result.
    pub out: DType,
}

/// `dx` of [`LayerNorm`].
pub struct LayerNormBackward;

/// `x`, `weight_d`, `eps` as in the forward, `dy` like `x`; `dres` like `x` is added to `dx`.
pub struct LayerNormBackwardArgs<'a> {
    pub x: &'a Tensor,
    pub weight_d: &'a Tensor,
    pub dy: &'a Tensor,
    pub dres: Option<&'a Tensor>,
    pub eps: f64,
    /// Dtype of `dx`.
    pub out: DType,
}

impl Op for LayerNormModulate {
    type Args<'a> = LayerNormModulateArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "layer_norm_modulate";

    fn check(a: &LayerNormModulateArgs<'_>) -> Result<()> {
        let bld = gate::dims::<3>(Self::NAME, "x_bld", a.x_bld, "[b, l, d], nothing empty")?;
        gate::float(Self::NAME, "x_bld", a.x_bld)?;
        gate::per_sample_or_token(Self::NAME, "shift", a.shift, bld)?;
        gate::per_sample_or_token(Self::NAME, "scale", a.scale, bld)?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &LayerNormModulateArgs<'_>) -> Cost {
        let elements = a.x_bld.elem_count() as f64;
        let bytes = gate::bytes(a.x_bld)
            + gate::bytes(a.shift)
            + gate::bytes(a.scale)
            + elements * a.out.size_in_bytes() as f64;
        Cost { flops: 9.0 * elements, bytes }
    }

    fn reference(a: &LayerNormModulateArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (xhat, _) = normalise(a.x_bld, a.eps)?;
        let y = xhat.broadcast_mul(&(num::over_tokens(a.scale)? + 1.0)?)?;
        Ok(y.broadcast_add(&num::over_tokens(a.shift)?)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LayerNormModulateArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !cuda::fits(a.x_bld.dims()[2], None) {
            return Self::reference(a, compute);
        }
        let kind = Kind::Layer { one: 1.0, b: Some(a.shift) };
        cuda::forward(Self::NAME, gpu, a.x_bld, a.scale, kind, None, a.eps, (a.out, a.x_bld.dims()))
    }
}

impl Op for LayerNormModulateBackward {
    type Args<'a> = LayerNormModulateBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "layer_norm_modulate_backward";

    fn check(a: &LayerNormModulateBackwardArgs<'_>) -> Result<()> {
        let bld = gate::dims::<3>(Self::NAME, "x_bld", a.x_bld, "[b, l, d], nothing empty")?;
        gate::float(Self::NAME, "x_bld", a.x_bld)?;
        gate::float(Self::NAME, "dy_bld", a.dy_bld)?;
        gate::per_sample_or_token(Self::NAME, "scale", a.scale, bld)?;
        gate::shape(Self::NAME, "dy_bld", a.dy_bld, &bld, "[b, l, d]")?;
        if let Some(dres_bld) = a.dres_bld {
            gate::float(Self::NAME, "dres_bld", dres_bld)?;
            gate::shape(Self::NAME, "dres_bld", dres_bld, &bld, "[b, l, d]")?;
        }
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &LayerNormModulateBackwardArgs<'_>) -> Cost {
        let elements = a.x_bld.elem_count() as f64;
        let bytes = gate::bytes(a.x_bld)
            + gate::bytes(a.dy_bld)
            + gate::bytes(a.scale)
            + a.dres_bld.map_or(0.0, gate::bytes)
            + elements * a.out.size_in_bytes() as f64;
        Cost { flops: 15.0 * elements, bytes }
    }

    fn reference(a: &LayerNormModulateBackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (xhat, rstd) = normalise(a.x_bld, a.eps)?;
        let g = num::f32(a.dy_bld)?.broadcast_mul(&(num::over_tokens(a.scale)? + 1.0)?)?;
        Ok(plus_residual(layer_dx(&xhat, &rstd, &g)?, a.dres_bld)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LayerNormModulateBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !cuda::fits(a.x_bld.dims()[2], None) {
            return Self::reference(a, compute);
        }
        let kind = Kind::Layer { one: 1.0, b: None };
        cuda::backward(Self::NAME, gpu, a.x_bld, a.scale, kind, a.dy_bld, a.dres_bld, None, a.eps, a.out)
    }
}

impl Op for LayerNorm {
    type Args<'a> = LayerNormArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "layer_norm";

    fn check(a: &LayerNormArgs<'_>) -> Result<()> {
        let (_, d) = gate::rows(Self::NAME, "x", a.x)?;
        gate::float(Self::NAME, "x", a.x)?;
        gate::float(Self::NAME, "weight_d", a.weight_d)?;
        gate::float(Self::NAME, "bias_d", a.bias_d)?;
        gate::shape(Self::NAME, "weight_d", a.weight_d, &[d], "[d]")?;
        gate::shape(Self::NAME, "bias_d", a.bias_d, &[d], "[d]")?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &LayerNormArgs<'_>) -> Cost {
        let elements = a.x.elem_count() as f64;
        let bytes = gate::bytes(a.x)
            + gate::bytes(a.weight_d)
            + gate::bytes(a.bias_d)
            + elements * a.out.size_in_bytes() as f64;
        Cost { flops: 8.0 * elements, bytes }
    }

    fn reference(a: &LayerNormArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (xhat, _) = normalise(a.x, a.eps)?;
        let y = xhat.broadcast_mul(&num::f32(a.weight_d)?)?.broadcast_add(&num::f32(a.bias_d)?)?;
        Ok(y.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LayerNormArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !cuda::fits(a.weight_d.elem_count(), None) {
            return Self::reference(a, compute);
        }
        let kind = Kind::Layer { one: 0.0, b: Some(a.bias_d) };
        cuda::forward(Self::NAME, gpu, a.x, a.weight_d, kind, None, a.eps, (a.out, a.x.dims()))
    }
}

impl Op for LayerNormBackward {
    type Args<'a> = LayerNormBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "layer_norm_backward";

    fn check(a: &LayerNormBackwardArgs<'_>) -> Result<()> {
        let (_, d) = gate::rows(Self::NAME, "x", a.x)?;
        gate::float(Self::NAME, "x", a.x)?;
        gate::float(Self::NAME, "weight_d", a.weight_d)?;
        gate::float(Self::NAME, "dy", a.dy)?;
        gate::shape(Self::NAME, "weight_d", a.weight_d, &[d], "[d]")?;
        gate::shape(Self::NAME, "dy", a.dy, a.x.dims(), "[.., d]")?;
        if let Some(dres) = a.dres {
            gate::float(Self::NAME, "dres", dres)?;
            gate::shape(Self::NAME, "dres", dres, a.x.dims(), "[.., d]")?;
        }
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &LayerNormBackwardArgs<'_>) -> Cost {
        let elements = a.x.elem_count() as f64;
        let bytes = gate::bytes(a.x)
            + gate::bytes(a.dy)
            + gate::bytes(a.weight_d)
            + a.dres.map_or(0.0, gate::bytes)
            + elements * a.out.size_in_bytes() as f64;
        Cost { flops: 14.0 * elements, bytes }
    }

    fn reference(a: &LayerNormBackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (xhat, rstd) = normalise(a.x, a.eps)?;
        let g = num::f32(a.dy)?.broadcast_mul(&num::f32(a.weight_d)?)?;
        Ok(plus_residual(layer_dx(&xhat, &rstd, &g)?, a.dres)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LayerNormBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !cuda::fits(a.weight_d.elem_count(), None) {
            return Self::reference(a, compute);
        }
        let kind = Kind::Layer { one: 0.0, b: None };
        cuda::backward(Self::NAME, gpu, a.x, a.weight_d, kind, a.dy, a.dres, None, a.eps, a.out)
    }
}

/// (x − mean)·rstd and rstd, in fp32, over the last axis; the variance is the biased one.
fn normalise(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let x = num::f32(x)?;
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let rstd = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok((centred.broadcast_mul(&rstd)?, rstd))
}
