//! Linear layers over the last axis: dense or block-scaled fp8 weight, forward and input gradient, and the weight
//! gradient that adapters need.
//!
//! Operands are rounded to `compute`, products summed in fp32, bias and `base` added in fp32, the result rounded once, to
//! `out`. An fp8 weight is expanded to its scale's dtype first (see [`crate::fp8`]), for each call anew.
//!
//! `base` is what the product is added to as it is written: an adapter's share, the gradient of another branch. It then
//! costs no pass of its own over the activations. On a card the result is written over it where dtype and layout allow, so
//! whoever calls owns `base` and reads it no more.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{fp8, gate, num, Cost, Op, Result};

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub mod eight;
#[cfg(feature = "cuda")]
pub use cuda::add_assign;
#[cfg(feature = "cuda")]
use cuda::Times;

pub use eight::{LinearEight, LinearEightArgs, LinearEightBackward, LinearEightBackwardArgs};

mod stack;
pub use stack::{LinearStackBackward, LinearStackBackwardArgs, Stack};

impl crate::Exec {
    /// A tensor of any float dtype and shape in the compute dtype; itself where it is already.
    pub fn cast(&self, t: &Tensor) -> Result<Tensor> {
        match self {
            crate::Exec::Reference { compute, .. } => Ok(t.to_dtype(*compute)?),
            #[cfg(feature = "cuda")]
            crate::Exec::Cuda { gpu, compute, .. } => gpu.timed("cast", || cuda::cast(gpu, "cast", t, *compute)),
        }
    }

    /// `t · factor`, in the dtype of `t`.
    pub fn scaled(&self, t: Tensor, factor: f64) -> Result<Tensor> {
        if factor == 1.0 {
            return Ok(t);
        }
        match self {
            crate::Exec::Reference { .. } => Ok((t * factor)?),
            #[cfg(feature = "cuda")]
            crate::Exec::Cuda { gpu, .. } => gpu.timed("scale", || cuda::scaled(gpu, &t, factor)),
        }
    }
}

/// The matrices of a LoRA, `down` [r, i] and `up` [o, r], as products take them best. On a card that is the compute dtype
/// and the rank filled up with zeros to a multiple of 16, since rows of 42 values are not aligned to what tensor cores
/// load: products take half the time or less. The gradients of the zeros are to be cut off again.
pub fn low_rank(exec: &crate::Exec, down_ri: &Tensor, up_or: &Tensor) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if let crate::Exec::Cuda { gpu, compute, .. } = exec {
        let (down_ri, ups_or) = gpu.timed("low_rank", || cuda::low_rank(gpu, &[(down_ri, up_or)], *compute))?;
        return Ok((down_ri, ups_or[0].clone()));
    }
    let _ = exec;
    Ok((down_ri.clone(), up_or.clone()))
}

/// Rows rounded to 8 bit once for several products, on a card: codes [l, i] U8, where `l` may be filled up to what
/// products take, and their scales [l] F32.
#[derive(Debug, Clone)]
pub struct Rounded {
    pub(crate) codes: Tensor,
    pub(crate) scales: Tensor,
}

impl Rounded {
    /// The gate of ops that are given it beside `x`.
    pub(crate) fn check(&self, op: &'static str, x: &Tensor) -> Result<()> {
        let (width, filled) = (last(x), self.codes.dims()[0]);
        gate::shape(op, "rounded's scales", &self.scales, &[x.elem_count() / width], "the rows of x")?;
        gate::shape(op, "rounded", &self.codes, &[filled, width], "the columns of x")
    }
}

/// `y = x·Wᵀ + bias + base`.
pub struct Linear;

/// `x` [.., i], `weight_oi` [o, i], `bias_o` [o], `base` [.., o]; the result is [.., o].
pub struct LinearArgs<'a> {
    pub x: &'a Tensor,
    pub weight_oi: &'a Tensor,
    pub bias_o: Option<&'a Tensor>,
    pub base: Option<Tensor>,
    /// Dtype of the result.
    pub out: DType,
}

/// `dx = dy·W + base`, the gradient of [`Linear`]'s input.
pub struct LinearBackward;

/// `dy` [.., o], `weight_oi` [o, i], `base` [.., i]; the result is [.., i].
pub struct LinearBackwardArgs<'a> {
    pub dy: &'a Tensor,
    pub weight_oi: &'a Tensor,
    pub base: Option<Tensor>,
    /// Dtype of `dx`.
    pub out: DType,
}

/// `dW = dyᵀ·x` of [`Linear`], summed over all rows; F32. For the two matrices of an adapter; base weights are frozen.
pub struct LinearWeightGrad;

/// `x` [.., i] and `dy` [.., o] with the same leading axes; the result is F32 [o, i].
pub struct LinearWeightGradArgs<'a> {
    pub x: &'a Tensor,
    pub dy: &'a Tensor,
}

/// [`Linear`] with an fp8 weight.
pub struct LinearFp8;

/// `x` [.., i], `weight` holding [o, i], `bias_o` [o], `base` [.., o]; the result is [.., o].
pub struct LinearFp8Args<'a> {
    pub x: &'a Tensor,
    pub weight: &'a fp8::Weight,
    pub bias_o: Option<&'a Tensor>,
    pub base: Option<Tensor>,
    /// Dtype of the result.
    pub out: DType,
}

/// [`LinearBackward`] with an fp8 weight.
pub struct LinearFp8Backward;

/// `dy` [.., o], `weight` holding [o, i], `base` [.., i]; the result is [.., i].
pub struct LinearFp8BackwardArgs<'a> {
    pub dy: &'a Tensor,
    pub weight: &'a fp8::Weight,
    pub base: Option<Tensor>,
    /// Dtype of `dx`.
    pub out: DType,
}

impl Op for Linear {
    type Args<'a> = LinearArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear";

    fn check(a: &LinearArgs<'_>) -> Result<()> {
        let oi = gate::dims::<2>(Self::NAME, "weight_oi", a.weight_oi, "[o, i], nothing empty")?;
        gate::float(Self::NAME, "weight_oi", a.weight_oi)?;
        check_forward(Self::NAME, a.x, oi, a.bias_o, a.base.as_ref(), a.out)
    }

    fn cost(a: &LinearArgs<'_>) -> Cost {
        cost(a.x, a.weight_oi.dims()[0], gate::bytes(a.weight_oi), a.base.as_ref(), a.out)
    }

    fn reference(a: &LinearArgs<'_>, compute: DType) -> Result<Tensor> {
        times(a.x, &a.weight_oi.t()?, [a.bias_o, a.base.as_ref()], a.out, compute)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let times = Times {
            op: Self::NAME,
            left: a.x,
            weight_oi: cuda::Weight::Dense(a.weight_oi),
            transposed: true,
            bias: a.bias_o,
            add: a.base.as_ref(),
            out: a.out,
        };
        cuda::times(gpu, &times, compute)
    }
}

impl Op for LinearBackward {
    type Args<'a> = LinearBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_backward";

    fn check(a: &LinearBackwardArgs<'_>) -> Result<()> {
        let oi = gate::dims::<2>(Self::NAME, "weight_oi", a.weight_oi, "[o, i], nothing empty")?;
        gate::float(Self::NAME, "weight_oi", a.weight_oi)?;
        check_backward(Self::NAME, a.dy, oi, a.base.as_ref(), a.out)
    }

    fn cost(a: &LinearBackwardArgs<'_>) -> Cost {
        cost(a.dy, a.weight_oi.dims()[1], gate::bytes(a.weight_oi), a.base.as_ref(), a.out)
    }

    fn reference(a: &LinearBackwardArgs<'_>, compute: DType) -> Result<Tensor> {
        times(a.dy, a.weight_oi, [None, a.base.as_ref()], a.out, compute)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let times = Times {
            op: Self::NAME,
            left: a.dy,
            weight_oi: cuda::Weight::Dense(a.weight_oi),
            transposed: false,
            bias: None,
            add: a.base.as_ref(),
            out: a.out,
        };
        cuda::times(gpu, &times, compute)
    }
}

impl Op for LinearWeightGrad {
    type Args<'a> = LinearWeightGradArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_weight_grad";

    fn check(a: &LinearWeightGradArgs<'_>) -> Result<()> {
        gate::rows(Self::NAME, "x", a.x)?;
        let (_, o) = gate::rows(Self::NAME, "dy", a.dy)?;
        gate::float(Self::NAME, "x", a.x)?;
        gate::float(Self::NAME, "dy", a.dy)?;
        let mut want = a.x.dims().to_vec();
        want[a.x.rank() - 1] = o;
        gate::shape(Self::NAME, "dy", a.dy, &want, "x's leading axes and o")
    }

    fn cost(a: &LinearWeightGradArgs<'_>) -> Cost {
        let (i, o) = (last(a.x), last(a.dy));
        let bytes = gate::bytes(a.x) + gate::bytes(a.dy) + (4 * i * o) as f64;
        Cost { flops: 2.0 * a.x.elem_count() as f64 * o as f64, bytes }
    }

    fn reference(a: &LinearWeightGradArgs<'_>, compute: DType) -> Result<Tensor> {
        num::matmul(&as_rows(a.dy)?.t()?, &as_rows(a.x)?, compute)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearWeightGradArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        cuda::weight_grad(Self::NAME, gpu, a.x, a.dy, compute)
    }
}

impl Op for LinearFp8 {
    type Args<'a> = LinearFp8Args<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_fp8";

    fn check(a: &LinearFp8Args<'_>) -> Result<()> {
        check_forward(Self::NAME, a.x, a.weight.shape(), a.bias_o, a.base.as_ref(), a.out)
    }

    fn cost(a: &LinearFp8Args<'_>) -> Cost {
        cost(a.x, a.weight.shape()[0], a.weight.bytes(), a.base.as_ref(), a.out)
    }

    fn reference(a: &LinearFp8Args<'_>, compute: DType) -> Result<Tensor> {
        times(a.x, &a.weight.dequantize()?.t()?, [a.bias_o, a.base.as_ref()], a.out, compute)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearFp8Args<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let times = Times {
            op: Self::NAME,
            left: a.x,
            weight_oi: cuda::Weight::Fp8(a.weight),
            transposed: true,
            bias: a.bias_o,
            add: a.base.as_ref(),
            out: a.out,
        };
        cuda::times(gpu, &times, compute)
    }
}

impl Op for LinearFp8Backward {
    type Args<'a> = LinearFp8BackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_fp8_backward";

    fn check(a: &LinearFp8BackwardArgs<'_>) -> Result<()> {
        check_backward(Self::NAME, a.dy, a.weight.shape(), a.base.as_ref(), a.out)
    }

    fn cost(a: &LinearFp8BackwardArgs<'_>) -> Cost {
        cost(a.dy, a.weight.shape()[1], a.weight.bytes(), a.base.as_ref(), a.out)
    }

    fn reference(a: &LinearFp8BackwardArgs<'_>, compute: DType) -> Result<Tensor> {
        times(a.dy, &a.weight.dequantize()?, [None, a.base.as_ref()], a.out, compute)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearFp8BackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let times = Times {
            op: Self::NAME,
            left: a.dy,
            weight_oi: cuda::Weight::Fp8(a.weight),
            transposed: false,
            bias: None,
            add: a.base.as_ref(),
            out: a.out,
        };
        cuda::times(gpu, &times, compute)
    }
}

pub(crate) fn check_forward(
    op: &'static str,
    x: &Tensor,
    [o, i]: [usize; 2],
    bias_o: Option<&Tensor>,
    base: Option<&Tensor>,
    out: DType,
) -> Result<()> {
    check_rows(op, "x", x, i, "[.., i]")?;
    if let Some(bias_o) = bias_o {
        gate::float(op, "bias_o", bias_o)?;
        gate::shape(op, "bias_o", bias_o, &[o], "[o]")?;
    }
    check_base(op, base, x, o)?;
    gate::out(op, out)
}

pub(crate) fn check_backward(
    op: &'static str,
    dy: &Tensor,
    [o, i]: [usize; 2],
    base: Option<&Tensor>,
    out: DType,
) -> Result<()> {
    check_rows(op, "dy", dy, o, "[.., o]")?;
    check_base(op, base, dy, i)?;
    gate::out(op, out)
}

/// `base` has the leading axes of `like` and `columns`.
fn check_base(op: &'static str, base: Option<&Tensor>, like: &Tensor, columns: usize) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    let mut want = like.dims().to_vec();
    want[like.rank() - 1] = columns;
    gate::float(op, "base", base)?;
    gate::shape(op, "base", base, &want, "the other operand's leading axes and the weight's other axis")
}

fn check_rows(op: &'static str, tensor: &'static str, t: &Tensor, width: usize, axes: &str) -> Result<()> {
    gate::float(op, tensor, t)?;
    let (_, got) = gate::rows(op, tensor, t)?;
    if got == width {
        return Ok(());
    }
    let want = format!("{axes} with {width} columns");
    Err(crate::Error::Shape { op, tensor, got: t.shape().clone(), want })
}

pub(crate) fn cost(a: &Tensor, columns: usize, weight_bytes: f64, base: Option<&Tensor>, out: DType) -> Cost {
    let rows = a.elem_count() / last(a);
    let bytes = gate::bytes(a) + weight_bytes + base.map_or(0.0, gate::bytes);
    let written = (rows * columns * out.size_in_bytes()) as f64;
    Cost { flops: 2.0 * a.elem_count() as f64 * columns as f64, bytes: bytes + written }
}

/// `a·b + bias + base` over the last axis of `a`.
fn times(a: &Tensor, b: &Tensor, [bias, base]: [Option<&Tensor>; 2], out: DType, compute: DType) -> Result<Tensor> {
    let y = num::matmul(&as_rows(a)?, b, compute)?;
    finished(y, a, [bias, base], out)
}

/// What becomes of a product `y` in F32, rows of `like`: bias and base added, in `out`.
pub(crate) fn finished(y: Tensor, like: &Tensor, [bias, base]: [Option<&Tensor>; 2], out: DType) -> Result<Tensor> {
    let mut shape = like.dims().to_vec();
    shape[like.rank() - 1] = last(&y);
    let mut y = y;
    if let Some(bias) = bias {
        y = y.broadcast_add(&num::f32(bias)?)?;
    }
    if let Some(base) = base {
        y = (num::f32(&as_rows(base)?)? + y)?;
    }
    Ok(y.to_dtype(out)?.reshape(shape)?)
}

/// [.., d] as a matrix; a tensor that is one already keeps its strides.
fn as_rows(t: &Tensor) -> Result<Tensor> {
    if t.rank() == 2 {
        return Ok(t.clone());
    }
    Ok(t.reshape(((), last(t)))?)
}

fn last(t: &Tensor) -> usize {
    t.dims().last().copied().unwrap_or(1)
}

#[cfg(test)]
mod tests;
