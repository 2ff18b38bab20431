//! Linears whose products run on 8-bit tensor cores (`--fp8_fast`): activations are rounded to e4m3 with a scale for each
//! row, and the weight's codes are made anew for one scale for each output, see `eight.cu`. Twice the rate of 16-bit
//! products, at the error of two roundings to four significant bits.

use candle_core::{DType, Device, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{as_rows, check_backward, check_forward, cost};
#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::fp8::codec;
use crate::{fp8, num, Cost, Op, Result};

/// `y = x·Wᵀ + bias` by 8-bit products.
pub struct LinearEight;

/// `x` [.., i], `weight` [o, i], `bias_o` [o]; the result is [.., o].
pub struct LinearEightArgs<'a> {
    pub x: &'a Tensor,
    pub weight: &'a fp8::Weight,
    pub bias_o: Option<&'a Tensor>,
    /// Dtype of the result.
    pub out: DType,
}

/// `dx = dy·W` by 8-bit products.
pub struct LinearEightBackward;

/// `dy` [.., o], `weight` [o, i]; the result is [.., i].
pub struct LinearEightBackwardArgs<'a> {
    pub dy: &'a Tensor,
    pub weight: &'a fp8::Weight,
    /// Dtype of `dx`.
    pub out: DType,
}

/// What tensor cores and 16-byte loads ask of both axes of a weight.
const MULTIPLE: usize = 16;

/// The widest row that a block keeps in registers: six trips of 320 threads with eight values each.
pub(crate) const WIDEST: usize = 15360;

/// Whether a weight can take part: both axes and the groups of its scales are multiples of 16, and no axis is beyond
/// what one block rounds.
pub fn takes(weight: &fp8::Weight) -> bool {
    let [o, i] = weight.shape();
    let group = o * i / weight.scale().elem_count();
    [o, i, group].iter().all(|n| n % MULTIPLE == 0) && o.max(i) <= WIDEST && (group == o * i || i % group == 0)
}

impl Op for LinearEight {
    type Args<'a> = LinearEightArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_eight";

    fn check(a: &LinearEightArgs<'_>) -> Result<()> {
        check_forward(Self::NAME, a.x, a.weight.shape(), a.bias_o, a.out)
    }

    fn cost(a: &LinearEightArgs<'_>) -> Cost {
        cost(a.x, a.weight.shape()[0], a.weight.bytes(), a.out)
    }

    /// Codes are exact in fp32, and so are their products: only sums differ from a card's.
    fn reference(a: &LinearEightArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (x, scale_l1) = rounded_rows(a.x, None)?;
        let (w_oi, scale_o) = rounded_weight(a.weight)?;
        let mut y = (num::matmul(&x, &w_oi.t()?, DType::F32)?.broadcast_mul(&scale_l1)?).broadcast_mul(&scale_o)?;
        if let Some(bias_o) = a.bias_o {
            y = y.broadcast_add(&num::f32(bias_o)?)?;
        }
        shaped(y, a.x, a.weight.shape()[0], a.out)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearEightArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !takes(a.weight) {
            return super::LinearFp8::cuda(
                &super::LinearFp8Args { x: a.x, weight: a.weight, bias_o: a.bias_o, out: a.out },
                gpu,
                compute,
            );
        }
        cuda::eight(gpu, Self::NAME, a.x, a.weight, true, a.bias_o, (compute, a.out))
    }
}

impl Op for LinearEightBackward {
    type Args<'a> = LinearEightBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_eight_backward";

    fn check(a: &LinearEightBackwardArgs<'_>) -> Result<()> {
        check_backward(Self::NAME, a.dy, a.weight.shape()[0], a.out)
    }

    fn cost(a: &LinearEightBackwardArgs<'_>) -> Cost {
        cost(a.dy, a.weight.shape()[1], a.weight.bytes(), a.out)
    }

    fn reference(a: &LinearEightBackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (w_oi, scale_o) = rounded_weight(a.weight)?;
        let (dy, scale_l1) = rounded_rows(a.dy, Some(&scale_o))?;
        shaped(num::matmul(&dy, &w_oi, DType::F32)?.broadcast_mul(&scale_l1)?, a.dy, a.weight.shape()[1], a.out)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearEightBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !takes(a.weight) {
            let args = super::LinearFp8BackwardArgs { dy: a.dy, weight: a.weight, out: a.out };
            return super::LinearFp8Backward::cuda(&args, gpu, compute);
        }
        cuda::eight(gpu, Self::NAME, a.dy, a.weight, false, None, (compute, a.out))
    }
}

fn shaped(y: Tensor, like: &Tensor, columns: usize, out: DType) -> Result<Tensor> {
    let mut shape = like.dims().to_vec();
    shape[like.rank() - 1] = columns;
    Ok(y.to_dtype(out)?.reshape(shape)?)
}

/// The values of the codes of each row (times `columns`), and the rows' scales [l, 1].
fn rounded_rows(t: &Tensor, columns: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let mut rows = num::f32(&as_rows(t)?)?;
    if let Some(columns) = columns {
        rows = rows.broadcast_mul(columns)?;
    }
    let (l, width) = rows.dims2()?;
    let mut values = rows.flatten_all()?.to_vec1::<f32>()?;
    let mut scales = Vec::with_capacity(l);
    for row in values.chunks_mut(width) {
        let top = row.iter().fold(0f32, |top, v| top.max(v.abs()));
        let scale = if row.iter().any(|v| v.is_nan()) { f32::NAN } else { scale_of(top) };
        let inverse = 1.0 / scale_of(top);
        row.iter_mut().for_each(|v| *v = coded(*v * inverse));
        scales.push(scale);
    }
    let device = t.device();
    Ok((Tensor::from_vec(values, (l, width), device)?, Tensor::from_vec(scales, (l, 1), device)?))
}

/// The values of a weight's codes for one scale an output, and these scales [o].
fn rounded_weight(weight: &fp8::Weight) -> Result<(Tensor, Tensor)> {
    let ([o, i], cpu) = (weight.shape(), &Device::Cpu);
    let codes = weight.codes_oi().to_device(cpu)?.flatten_all()?.to_vec1::<u8>()?;
    let scales = weight.scale().to_device(cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let group = codes.len() / scales.len();
    let (mut values, mut rows) = (vec![0f32; o * i], Vec::with_capacity(o));
    for (row, values) in values.chunks_mut(i).enumerate() {
        let of = |column: usize| scales[(row * i + column) / group];
        let top = (0..i).step_by(group.min(i)).map(of).fold(1e-30f32, f32::max);
        for (column, value) in values.iter_mut().enumerate() {
            *value = coded(codec::decode(codes[row * i + column]) * (of(column) / top));
        }
        rows.push(top);
    }
    let device = weight.codes_oi().device();
    Ok((Tensor::from_vec(values, (o, i), device)?, Tensor::from_vec(rows, o, device)?))
}

/// The scale of a row whose largest magnitude is `top`; one of zeros keeps a scale that can be divided by.
fn scale_of(top: f32) -> f32 {
    (top / codec::MAX).max(1e-30)
}

fn coded(v: f32) -> f32 {
    codec::decode(codec::encode(v.clamp(-codec::MAX, codec::MAX)))
}
