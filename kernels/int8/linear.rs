//! Linears with an int8 weight, see the module: forward and input gradient.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda;
use super::{rotate_row, rounded, scale_of, Weight};
#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::linear::{check_backward, check_forward, cost, finished, Rounded};
use crate::{num, Cost, Op, Result};

/// `x` [.., i] as [`LinearInt8`] rounds it. `None` off the card, where each product rounds for itself.
pub fn round(exec: &crate::Exec, x: &Tensor) -> Result<Option<Rounded>> {
    #[cfg(feature = "cuda")]
    if let crate::Exec::Cuda { gpu, .. } = exec {
        return gpu.timed(LinearInt8::NAME, || Ok(Some(cuda::rounded_rows(gpu, LinearInt8::NAME, x, [0, 0])?)));
    }
    let _ = (exec, x);
    Ok(None)
}

/// `y = x·Wᵀ + bias + base` by int8 products.
pub struct LinearInt8;

/// `x` [.., i], `weight` [o, i], `bias_o` [o], `base` [.., o], see [`crate::linear`]; the result is [.., o].
pub struct LinearInt8Args<'a> {
    pub x: &'a Tensor,
    /// `x` after [`round`], where several products share it.
    pub rounded: Option<&'a Rounded>,
    pub weight: &'a Weight,
    pub bias_o: Option<&'a Tensor>,
    pub base: Option<Tensor>,
    /// Dtype of the result.
    pub out: DType,
}

/// `dx = dy·W + base` by int8 products.
pub struct LinearInt8Backward;

/// `dy` [.., o], `weight` [o, i], `base` [.., i]; the result is [.., i].
pub struct LinearInt8BackwardArgs<'a> {
    pub dy: &'a Tensor,
    pub weight: &'a Weight,
    pub base: Option<Tensor>,
    /// Dtype of `dx`.
    pub out: DType,
}

impl Op for LinearInt8 {
    type Args<'a> = LinearInt8Args<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_int8";

    fn check(a: &LinearInt8Args<'_>) -> Result<()> {
        if let Some(rounded) = a.rounded {
            rounded.check(Self::NAME, a.x)?;
        }
        check_forward(Self::NAME, a.x, a.weight.shape(), a.bias_o, a.base.as_ref(), a.out)
    }

    fn cost(a: &LinearInt8Args<'_>) -> Cost {
        cost(a.x, a.weight.shape()[0], a.weight.bytes(), a.base.as_ref(), a.out)
    }

    /// The codes are a card's; only the order of sums past 2^24 differs, and these are exact there.
    fn reference(a: &LinearInt8Args<'_>, _compute: DType) -> Result<Tensor> {
        let [o, i] = a.weight.shape();
        let (codes, outer, inner) = a.weight.parts()?;
        let (x, scales) = rounded_rows(a.x, i, None)?;
        let codes_oi = Tensor::from_vec(codes, (o, i), &Device::Cpu)?;
        let mut y = num::matmul(&x, &codes_oi.t()?, DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        y.par_chunks_mut(o).zip(&scales).for_each(|(row, scale)| {
            row.iter_mut().zip(&inner).for_each(|(v, inner)| *v = *v * scale * inner);
            rotate_row(row);
            row.iter_mut().zip(&outer).for_each(|(v, outer)| *v *= outer);
        });
        shaped(y, a.x, o, [a.bias_o, a.base.as_ref()], a.out)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearInt8Args<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::forward(gpu, Self::NAME, a)
    }
}

impl Op for LinearInt8Backward {
    type Args<'a> = LinearInt8BackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_int8_backward";

    fn check(a: &LinearInt8BackwardArgs<'_>) -> Result<()> {
        check_backward(Self::NAME, a.dy, a.weight.shape(), a.base.as_ref(), a.out)
    }

    fn cost(a: &LinearInt8BackwardArgs<'_>) -> Cost {
        cost(a.dy, a.weight.shape()[1], a.weight.bytes(), a.base.as_ref(), a.out)
    }

    fn reference(a: &LinearInt8BackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        let [o, i] = a.weight.shape();
        let (codes, outer, inner) = a.weight.parts()?;
        let (dy, scales) = rounded_rows(a.dy, o, Some((&outer, &inner)))?;
        let codes_oi = Tensor::from_vec(codes, (o, i), &Device::Cpu)?;
        let mut dx = num::matmul(&dy, &codes_oi, DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        dx.par_chunks_mut(i).zip(&scales).for_each(|(row, scale)| {
            row.iter_mut().for_each(|v| *v *= scale);
            rotate_row(row);
        });
        shaped(dx, a.dy, i, [None, a.base.as_ref()], a.out)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearInt8BackwardArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::backward(gpu, Self::NAME, a)
    }
}

/// Rows of codes as F32 [l, width] on the CPU and their scales: times `outer`, rotated, times `inner`, rounded.
fn rounded_rows(t: &Tensor, width: usize, factors: Option<(&[f32], &[f32])>) -> Result<(Tensor, Vec<f32>)> {
    let mut values = num::f32(&t.to_device(&Device::Cpu)?)?.flatten_all()?.to_vec1::<f32>()?;
    let mut scales = vec![0f32; values.len() / width];
    values.par_chunks_mut(width).zip(&mut scales).for_each(|(row, scale)| {
        if let Some((outer, _)) = factors {
            row.iter_mut().zip(outer).for_each(|(v, outer)| *v *= outer);
        }
        rotate_row(row);
        if let Some((_, inner)) = factors {
            row.iter_mut().zip(inner).for_each(|(v, inner)| *v *= inner);
        }
        *scale = scale_of(row);
        let inverse = 1.0 / *scale;
        row.iter_mut().for_each(|v| *v = f32::from(rounded(*v, inverse)));
    });
    Ok((Tensor::from_vec(values, (scales.len(), width), &Device::Cpu)?, scales))
}

fn shaped(values: Vec<f32>, like: &Tensor, columns: usize, added: [Option<&Tensor>; 2], out: DType) -> Result<Tensor> {
    let y = Tensor::from_vec(values, ((), columns), &Device::Cpu)?.to_device(like.device())?;
    finished(y, like, added, out)
}
