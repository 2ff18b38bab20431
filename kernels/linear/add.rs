//! Linears that add to a tensor as they write: `base + x·Wᵀ` and `base + dy·W`. An adapter's share then costs no pass of
//! its own over the activations. On a card the sum is written where `base` was.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda::{self, Times};
use super::{check_backward, check_forward, cost, times};
#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{fp8, gate, num, Cost, Op, Result};

/// `y = base + x·Wᵀ`.
pub struct LinearAdd;

/// `x` [.., i], `weight_oi` [o, i], `base` [.., o]; the result is like `base`. The op may write it over `base`: whoever
/// calls owns `base` and reads it no more.
pub struct LinearAddArgs<'a> {
    pub x: &'a Tensor,
    pub weight_oi: &'a Tensor,
    pub base: Tensor,
    /// Dtype of the result.
    pub out: DType,
}

/// `dx = base + dy·W`.
pub struct LinearBackwardAdd;

/// `dy` [.., o], `weight_oi` [o, i], `base` [.., i]; the result is like `base` and may be written over it.
pub struct LinearBackwardAddArgs<'a> {
    pub dy: &'a Tensor,
    pub weight_oi: &'a Tensor,
    pub base: Tensor,
    /// Dtype of the result.
    pub out: DType,
}

/// [`LinearBackwardAdd`] with an fp8 weight.
pub struct LinearFp8BackwardAdd;

/// `dy` [.., o], `weight` holding [o, i], `base` [.., i]; the result is like `base` and may be written over it.
pub struct LinearFp8BackwardAddArgs<'a> {
    pub dy: &'a Tensor,
    pub weight: &'a fp8::Weight,
    pub base: Tensor,
    /// Dtype of the result.
    pub out: DType,
}

impl Op for LinearAdd {
    type Args<'a> = LinearAddArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_add";

    fn check(a: &LinearAddArgs<'_>) -> Result<()> {
        let oi = gate::dims::<2>(Self::NAME, "weight_oi", a.weight_oi, "[o, i], nothing empty")?;
        gate::float(Self::NAME, "weight_oi", a.weight_oi)?;
        check_forward(Self::NAME, a.x, oi, None, a.out)?;
        check_base(Self::NAME, &a.base, a.x, oi[0])
    }

    fn cost(a: &LinearAddArgs<'_>) -> Cost {
        let Cost { flops, bytes } = cost(a.x, a.weight_oi.dims()[0], gate::bytes(a.weight_oi), a.out);
        Cost { flops, bytes: bytes + gate::bytes(&a.base) }
    }

    fn reference(a: &LinearAddArgs<'_>, compute: DType) -> Result<Tensor> {
        let y = times(a.x, &a.weight_oi.t()?, None, DType::F32, compute)?;
        Ok((num::f32(&a.base)? + y)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearAddArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let (op, weight_oi) = (Self::NAME, cuda::Weight::Dense(a.weight_oi));
        let times = Times { op, left: a.x, weight_oi, transposed: true, bias: None, add: Some(&a.base), out: a.out };
        cuda::times(gpu, &times, compute)
    }
}

impl Op for LinearBackwardAdd {
    type Args<'a> = LinearBackwardAddArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_backward_add";

    fn check(a: &LinearBackwardAddArgs<'_>) -> Result<()> {
        let [o, i] = gate::dims::<2>(Self::NAME, "weight_oi", a.weight_oi, "[o, i], nothing empty")?;
        gate::float(Self::NAME, "weight_oi", a.weight_oi)?;
        check_backward(Self::NAME, a.dy, o, a.out)?;
        check_base(Self::NAME, &a.base, a.dy, i)
    }

    fn cost(a: &LinearBackwardAddArgs<'_>) -> Cost {
        let Cost { flops, bytes } = cost(a.dy, a.weight_oi.dims()[1], gate::bytes(a.weight_oi), a.out);
        Cost { flops, bytes: bytes + gate::bytes(&a.base) }
    }

    fn reference(a: &LinearBackwardAddArgs<'_>, compute: DType) -> Result<Tensor> {
        let dx = times(a.dy, a.weight_oi, None, DType::F32, compute)?;
        Ok((num::f32(&a.base)? + dx)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearBackwardAddArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let (op, weight_oi) = (Self::NAME, cuda::Weight::Dense(a.weight_oi));
        let times = Times { op, left: a.dy, weight_oi, transposed: false, bias: None, add: Some(&a.base), out: a.out };
        cuda::times(gpu, &times, compute)
    }
}

impl Op for LinearFp8BackwardAdd {
    type Args<'a> = LinearFp8BackwardAddArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_fp8_backward_add";

    fn check(a: &LinearFp8BackwardAddArgs<'_>) -> Result<()> {
        let [o, i] = a.weight.shape();
        check_backward(Self::NAME, a.dy, o, a.out)?;
        check_base(Self::NAME, &a.base, a.dy, i)
    }

    fn cost(a: &LinearFp8BackwardAddArgs<'_>) -> Cost {
        let Cost { flops, bytes } = cost(a.dy, a.weight.shape()[1], a.weight.bytes(), a.out);
        Cost { flops, bytes: bytes + gate::bytes(&a.base) }
    }

    fn reference(a: &LinearFp8BackwardAddArgs<'_>, compute: DType) -> Result<Tensor> {
        let dx = times(a.dy, &a.weight.dequantize()?, None, DType::F32, compute)?;
        Ok((num::f32(&a.base)? + dx)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearFp8BackwardAddArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let (op, weight_oi) = (Self::NAME, cuda::Weight::Fp8(a.weight));
        let times = Times { op, left: a.dy, weight_oi, transposed: false, bias: None, add: Some(&a.base), out: a.out };
        cuda::times(gpu, &times, compute)
    }
}

/// `base` has the leading axes of `like` and `columns`.
fn check_base(op: &'static str, base: &Tensor, like: &Tensor, columns: usize) -> Result<()> {
    let mut want = like.dims().to_vec();
    want[like.rank() - 1] = columns;
    gate::float(op, "base", base)?;
    gate::shape(op, "base", base, &want, "the other operand's leading axes and the weight's other axis")
}
