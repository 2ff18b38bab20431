//! RMSNorm over the full width, for q and k before the heads are split, alone or followed by rotary embedding.

use candle_core::{DType, Tensor, D};

#[cfg(feature = "cuda")]
use super::cuda::{self, Kind};
use super::rms_dx;
#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, num, Cost, Error, Op, Result};

/// `y = x / rms(x) · weight`.
pub struct RmsNorm;

/// `x` [.., d], `weight_d` [d].
pub struct RmsNormArgs<'a> {
    pub x: &'a Tensor,
    pub weight_d: &'a Tensor,
    pub eps: f64,
    /// Dtype of the result.
    pub out: DType,
}

/// `dx` of [`RmsNorm`].
pub struct RmsNormBackward;

/// `x`, `weight_d`, `eps` as in the forward, `dy` like `x`.
pub struct RmsNormBackwardArgs<'a> {
    pub x: &'a Tensor,
    pub weight_d: &'a Tensor,
    pub dy: &'a Tensor,
    pub eps: f64,
    /// Dtype of `dx`.
    pub out: DType,
}

/// [`RmsNorm`] over `d = n·h`, then each head's adjacent pairs (2k, 2k+1) turned by the token's k-th angle.
pub struct RmsNormRope;

/// `x_bld` [b, l, d], `weight_d` [d], `cos_lk` and `sin_lk` F32 [l, h/2], shared by heads and samples. The head width is
/// read off the tables. The result is [b, l, n, h].
pub struct RmsNormRopeArgs<'a> {
    pub x_bld: &'a Tensor,
    pub weight_d: &'a Tensor,
    pub cos_lk: &'a Tensor,
    pub sin_lk: &'a Tensor,
    pub eps: f64,
    /// Dtype of the result.
    pub out: DType,
}

/// `dx` [b, l, d] of [`RmsNormRope`].
pub struct RmsNormRopeBackward;

/// `x_bld`, `weight_d`, tables and `eps` as in the forward, `dy_blnh` [b, l, n, h].
pub struct RmsNormRopeBackwardArgs<'a> {
    pub x_bld: &'a Tensor,
    pub weight_d: &'a Tensor,
    pub cos_lk: &'a Tensor,
    pub sin_lk: &'a Tensor,
    pub dy_blnh: &'a Tensor,
    pub eps: f64,
    /// Dtype of `dx`.
    pub out: DType,
}

impl Op for RmsNorm {
    type Args<'a> = RmsNormArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "rms_norm";

    fn check(a: &RmsNormArgs<'_>) -> Result<()> {
        check_weight(Self::NAME, a.x, a.weight_d)?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &RmsNormArgs<'_>) -> Cost {
        let elements = a.x.elem_count() as f64;
        let bytes = gate::bytes(a.x) + gate::bytes(a.weight_d) + elements * a.out.size_in_bytes() as f64;
        Cost { flops: 4.0 * elements, bytes }
    }

    fn reference(a: &RmsNormArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (xhat, _) = normalise(a.x, a.eps)?;
        Ok(xhat.broadcast_mul(&num::f32(a.weight_d)?)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &RmsNormArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !cuda::fits(a.weight_d.elem_count(), None) {
            return Self::reference(a, compute);
        }
        cuda::forward(Self::NAME, gpu, a.x, a.weight_d, Kind::Rms, None, a.eps, (a.out, a.x.dims()))
    }
}

impl Op for RmsNormBackward {
    type Args<'a> = RmsNormBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "rms_norm_backward";

    fn check(a: &RmsNormBackwardArgs<'_>) -> Result<()> {
        check_weight(Self::NAME, a.x, a.weight_d)?;
        gate::float(Self::NAME, "dy", a.dy)?;
        gate::shape(Self::NAME, "dy", a.dy, a.x.dims(), "[.., d]")?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &RmsNormBackwardArgs<'_>) -> Cost {
        let elements = a.x.elem_count() as f64;
        let bytes =
            gate::bytes(a.x) + gate::bytes(a.dy) + gate::bytes(a.weight_d) + elements * a.out.size_in_bytes() as f64;
        Cost { flops: 10.0 * elements, bytes }
    }

    fn reference(a: &RmsNormBackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (xhat, rstd) = normalise(a.x, a.eps)?;
        let g = num::f32(a.dy)?.broadcast_mul(&num::f32(a.weight_d)?)?;
        Ok(rms_dx(&xhat, &rstd, &g)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &RmsNormBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !cuda::fits(a.weight_d.elem_count(), None) {
            return Self::reference(a, compute);
        }
        cuda::backward(Self::NAME, gpu, a.x, a.weight_d, Kind::Rms, a.dy, None, None, a.eps, a.out)
    }
}

impl Op for RmsNormRope {
    type Args<'a> = RmsNormRopeArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "rms_norm_rope";

    fn check(a: &RmsNormRopeArgs<'_>) -> Result<()> {
        check_rope(Self::NAME, a.x_bld, a.weight_d, a.cos_lk, a.sin_lk)?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &RmsNormRopeArgs<'_>) -> Cost {
        let elements = a.x_bld.elem_count() as f64;
        let bytes = gate::bytes(a.x_bld)
            + gate::bytes(a.weight_d)
            + gate::bytes(a.cos_lk)
            + gate::bytes(a.sin_lk)
            + elements * a.out.size_in_bytes() as f64;
        Cost { flops: 7.0 * elements, bytes }
    }

    fn reference(a: &RmsNormRopeArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (b, l, d) = a.x_bld.dims3()?;
        let h = 2 * a.cos_lk.dim(1)?;
        let (xhat, _) = normalise(a.x_bld, a.eps)?;
        let y_blnh = xhat.broadcast_mul(&num::f32(a.weight_d)?)?.reshape((b, l, d / h, h))?;
        Ok(rotate(&y_blnh, a.cos_lk, a.sin_lk)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &RmsNormRopeArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let (b, l, d) = a.x_bld.dims3()?;
        let h = 2 * a.cos_lk.dim(1)?;
        if !cuda::fits(d, Some(h)) {
            return Self::reference(a, compute);
        }
        let kind = Kind::RmsRope { cos_lk: a.cos_lk, sin_lk: a.sin_lk };
        cuda::forward(Self::NAME, gpu, a.x_bld, a.weight_d, kind, None, a.eps, (a.out, &[b, l, d / h, h]))
    }
}

impl Op for RmsNormRopeBackward {
    type Args<'a> = RmsNormRopeBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "rms_norm_rope_backward";

    fn check(a: &RmsNormRopeBackwardArgs<'_>) -> Result<()> {
        let blnh = check_rope(Self::NAME, a.x_bld, a.weight_d, a.cos_lk, a.sin_lk)?;
        gate::float(Self::NAME, "dy_blnh", a.dy_blnh)?;
        gate::shape(Self::NAME, "dy_blnh", a.dy_blnh, &blnh, "[b, l, n, h]")?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &RmsNormRopeBackwardArgs<'_>) -> Cost {
        let elements = a.x_bld.elem_count() as f64;
        let bytes = gate::bytes(a.x_bld)
            + gate::bytes(a.dy_blnh)
            + gate::bytes(a.weight_d)
            + gate::bytes(a.cos_lk)
            + gate::bytes(a.sin_lk)
            + elements * a.out.size_in_bytes() as f64;
        Cost { flops: 13.0 * elements, bytes }
    }

    fn reference(a: &RmsNormRopeBackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (xhat, rstd) = normalise(a.x_bld, a.eps)?;
        // A rotation's gradient is the rotation back.
        let dy_blnh = rotate(&num::f32(a.dy_blnh)?, a.cos_lk, &a.sin_lk.neg()?)?;
        let g = dy_blnh.flatten_from(2)?.broadcast_mul(&num::f32(a.weight_d)?)?;
        Ok(rms_dx(&xhat, &rstd, &g)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &RmsNormRopeBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !cuda::fits(a.weight_d.elem_count(), Some(2 * a.cos_lk.dim(1)?)) {
            return Self::reference(a, compute);
        }
        let kind = Kind::RmsRope { cos_lk: a.cos_lk, sin_lk: a.sin_lk };
        cuda::backward(Self::NAME, gpu, a.x_bld, a.weight_d, kind, a.dy_blnh, None, None, a.eps, a.out)
    }
}

fn check_weight(op: &'static str, x: &Tensor, weight_d: &Tensor) -> Result<()> {
    let (_, d) = gate::rows(op, "x", x)?;
    gate::float(op, "x", x)?;
    gate::float(op, "weight_d", weight_d)?;
    gate::shape(op, "weight_d", weight_d, &[d], "[d]")
}

/// Returns `[b, l, n, h]`.
fn check_rope(
    op: &'static str,
    x_bld: &Tensor,
    weight_d: &Tensor,
    cos_lk: &Tensor,
    sin_lk: &Tensor,
) -> Result<[usize; 4]> {
    let [b, l, d] = gate::dims::<3>(op, "x_bld", x_bld, "[b, l, d], nothing empty")?;
    check_weight(op, x_bld, weight_d)?;
    let [_, k] = gate::dims::<2>(op, "cos_lk", cos_lk, "[l, h/2], nothing empty")?;
    gate::shape(op, "cos_lk", cos_lk, &[l, k], "[l, h/2]")?;
    gate::shape(op, "sin_lk", sin_lk, &[l, k], "[l, h/2]")?;
    gate::dtype(op, "cos_lk", cos_lk, DType::F32)?;
    gate::dtype(op, "sin_lk", sin_lk, DType::F32)?;
    if d % (2 * k) != 0 {
        let what = format!("width {d} is not a multiple of the head width {} of the rotary table", 2 * k);
        return Err(Error::Argument { op, what });
    }
    Ok([b, l, d / (2 * k), 2 * k])
}

/// x·rstd and rstd = 1/√(mean(x²) + eps), in fp32, over the last axis.
fn normalise(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let x = num::f32(x)?;
    let rstd = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok((x.broadcast_mul(&rstd)?, rstd))
}

/// Turns the pairs (2k, 2k+1) of [b, l, n, h] by the angles whose cosine and sine are given.
fn rotate(x_blnh: &Tensor, cos_lk: &Tensor, sin_lk: &Tensor) -> Result<Tensor> {
    let (b, l, n, h) = x_blnh.dims4()?;
    let pairs = x_blnh.reshape((b, l, n, h / 2, 2))?;
    let (re, im) = (pairs.narrow(4, 0, 1)?, pairs.narrow(4, 1, 1)?);
    let over_heads = |t: &Tensor| t.reshape((l, 1, h / 2, 1));
    let (cos, sin) = (over_heads(cos_lk)?, over_heads(sin_lk)?);
    let re_out = (re.broadcast_mul(&cos)? - im.broadcast_mul(&sin)?)?;
    let im_out = (re.broadcast_mul(&sin)? + im.broadcast_mul(&cos)?)?;
    Ok(Tensor::cat(&[re_out, im_out], 4)?.reshape((b, l, n, h))?)
}
