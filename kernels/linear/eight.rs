//! Linears whose products run on 8-bit tensor cores (`--fp8_fast`): activations are rounded to e4m3 with a scale for each
//! row, and weights hold one scale for each output ([`by_rows`]), see `eight.cu`. Twice the rate of 16-bit products, at the
//! error of two roundings to four significant bits.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda;
use super::{as_rows, check_backward, check_forward, cost, finished, Rounded};
#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::fp8::codec;
use crate::gelu::{ActivationArgs, GeluTanh, GeluTanhBackward, GeluTanhBackwardArgs};
use crate::{fp8, gate, num, Cost, Op, Result};

/// `x` [.., i] as [`LinearEight`] rounds it. `None` off the card, where each product rounds for itself.
pub fn round(exec: &crate::Exec, x: &Tensor) -> Result<Option<Rounded>> {
    #[cfg(feature = "cuda")]
    if let crate::Exec::Cuda { gpu, .. } = exec {
        return gpu.timed(LinearEight::NAME, || Ok(Some(cuda::rounded_rows(gpu, LinearEight::NAME, x, 0)?)));
    }
    let _ = (exec, x);
    Ok(None)
}

/// `x` as the products of forward round it, or those of backward with a weight.
#[cfg(feature = "cuda")]
pub(crate) fn round_for(exec: &crate::Exec, x: &Tensor, backward: Option<&fp8::Weight>) -> Result<Option<Rounded>> {
    let (crate::Exec::Cuda { gpu, .. }, Some(weight)) = (exec, backward) else { return round(exec, x) };
    let scale_o = crate::common::gpu::View::new(LinearEightBackward::NAME, weight.scale())?.address;
    Ok(Some(cuda::rounded_rows(gpu, LinearEightBackward::NAME, x, scale_o)?))
}

/// `gelu_tanh(x)`, and that as [`LinearEight`] rounds it, in one pass. `None` off the card, and for fp32.
pub fn gelu(exec: &crate::Exec, x: &Tensor) -> Result<Option<(Tensor, Rounded)>> {
    GeluTanh::check(&ActivationArgs { x })?;
    #[cfg(feature = "cuda")]
    if let (crate::Exec::Cuda { gpu, .. }, false) = (exec, x.dtype() == DType::F32) {
        let made = || cuda::rounded_gelu(gpu, GeluTanh::NAME, x, None, 0);
        return gpu.timed(GeluTanh::NAME, || made().map(Some));
    }
    let _ = exec;
    Ok(None)
}

/// `dx` of `gelu_tanh(x)`, and that as [`LinearEightBackward`] of `weight` rounds it, in one pass. `None` off the card, and
/// for fp32.
pub fn gelu_backward(
    exec: &crate::Exec,
    x: &Tensor,
    dy: &Tensor,
    weight: &fp8::Weight,
) -> Result<Option<(Tensor, Rounded)>> {
    GeluTanhBackward::check(&GeluTanhBackwardArgs { x, dy })?;
    check_weight(GeluTanhBackward::NAME, weight)?;
    gate::shape(
        GeluTanhBackward::NAME,
        "weight",
        weight.scale(),
        &[super::last(x), 1],
        "an output for each column of x",
    )?;
    #[cfg(feature = "cuda")]
    if let (crate::Exec::Cuda { gpu, .. }, false) = (exec, [x, dy].iter().any(|t| t.dtype() == DType::F32)) {
        let scale_o = crate::common::gpu::View::new(GeluTanhBackward::NAME, weight.scale())?.address;
        let made = || cuda::rounded_gelu(gpu, GeluTanhBackward::NAME, x, Some(dy), scale_o);
        return gpu.timed(GeluTanhBackward::NAME, || made().map(Some));
    }
    let _ = exec;
    Ok(None)
}

/// `y = x·Wᵀ + bias + base` by 8-bit products.
pub struct LinearEight;

/// `x` [.., i], `weight` [o, i] [`by_rows`], `bias_o` [o], `base` [.., o], see the module above; the result is [.., o].
pub struct LinearEightArgs<'a> {
    pub x: &'a Tensor,
    /// `x` after [`round`], where several products share it.
    pub rounded: Option<&'a Rounded>,
    pub weight: &'a fp8::Weight,
    pub bias_o: Option<&'a Tensor>,
    pub base: Option<Tensor>,
    /// Dtype of the result.
    pub out: DType,
}

/// `dx = dy·W + base` by 8-bit products.
pub struct LinearEightBackward;

/// `dy` [.., o], `weight` [o, i] [`by_rows`], `base` [.., i]; the result is [.., i].
pub struct LinearEightBackwardArgs<'a> {
    pub dy: &'a Tensor,
    /// `dy` rounded for this weight, where it was made so: [`gelu_backward`].
    pub rounded: Option<&'a Rounded>,
    pub weight: &'a fp8::Weight,
    pub base: Option<Tensor>,
    /// Dtype of `dx`.
    pub out: DType,
}

/// What tensor cores and 16-byte loads ask of both axes of a weight.
const MULTIPLE: usize = 16;

/// The widest row that a block keeps in registers: six trips of 320 threads with eight values each.
pub(crate) const WIDEST: usize = 15360;

/// Whether a weight [o, i] can take part: both axes are multiples of 16 and none is beyond what one block rounds.
pub fn takes([o, i]: [usize; 2]) -> bool {
    o % MULTIPLE == 0 && i % MULTIPLE == 0 && o.max(i) <= WIDEST
}

/// The weight's codes made anew for one fp32 scale an output, [o, 1]: the largest of its scales.
pub fn by_rows(weight: &fp8::Weight) -> Result<fp8::Weight> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(weight.codes_oi().device()) {
        let [o, i] = weight.shape();
        if (o * i / weight.scale().elem_count()).is_multiple_of(MULTIPLE) {
            return cuda::by_rows(&gpu, weight);
        }
    }
    let ([o, i], cpu, device) = (weight.shape(), &Device::Cpu, weight.codes_oi().device());
    let codes = weight.codes_oi().to_device(cpu)?.flatten_all()?.to_vec1::<u8>()?;
    let scales = weight.scale().to_device(cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let group = codes.len() / scales.len();
    let (mut made, mut rows) = (vec![0u8; o * i], vec![0f32; o]);
    made.par_chunks_mut(i).zip(&mut rows).enumerate().for_each(|(row, (made, top))| {
        let of = |column: usize| scales[(row * i + column) / group];
        *top = (0..i).step_by(group.min(i)).map(of).fold(1e-30f32, f32::max);
        for (column, code) in made.iter_mut().enumerate() {
            let value = codec::decode(codes[row * i + column]) * (of(column) / *top);
            *code = codec::encode(value.clamp(-codec::MAX, codec::MAX));
        }
    });
    let (made, rows) = (Tensor::from_vec(made, (o, i), device)?, Tensor::from_vec(rows, (o, 1), device)?);
    fp8::Weight::new(made, rows)
}

fn check_weight(op: &'static str, weight: &fp8::Weight) -> Result<()> {
    let [o, _] = weight.shape();
    gate::dtype(op, "weight's scale", weight.scale(), DType::F32)?;
    gate::shape(op, "weight's scale", weight.scale(), &[o, 1], "[o, 1], one fp32 scale an output")?;
    match takes(weight.shape()) {
        true => Ok(()),
        false => {
            let want = format!("axes in multiples of {MULTIPLE}, {WIDEST} at most");
            Err(crate::Error::Shape { op, tensor: "weight", got: weight.codes_oi().shape().clone(), want })
        }
    }
}

impl Op for LinearEight {
    type Args<'a> = LinearEightArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_eight";

    fn check(a: &LinearEightArgs<'_>) -> Result<()> {
        check_weight(Self::NAME, a.weight)?;
        if let Some(rounded) = a.rounded {
            rounded.check(Self::NAME, a.x)?;
        }
        check_forward(Self::NAME, a.x, a.weight.shape(), a.bias_o, a.base.as_ref(), a.out)
    }

    fn cost(a: &LinearEightArgs<'_>) -> Cost {
        cost(a.x, a.weight.shape()[0], a.weight.bytes(), a.base.as_ref(), a.out)
    }

    /// Codes are exact in fp32, and so are their products: only sums differ from a card's.
    fn reference(a: &LinearEightArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (x, scale_l1) = rounded_rows(a.x, None)?;
        let (w_oi, scale_o) = parts(a.weight)?;
        let y = (num::matmul(&x, &w_oi.t()?, DType::F32)?.broadcast_mul(&scale_l1)?).broadcast_mul(&scale_o)?;
        finished(y, a.x, [a.bias_o, a.base.as_ref()], a.out)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearEightArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let added = [a.bias_o, a.base.as_ref()];
        match a.rounded {
            Some(rounded) => cuda::eight(gpu, Self::NAME, a.x, rounded, a.weight, true, added, (compute, a.out)),
            None => {
                let rounded = &cuda::rounded_rows(gpu, Self::NAME, a.x, 0)?;
                cuda::eight(gpu, Self::NAME, a.x, rounded, a.weight, true, added, (compute, a.out))
            }
        }
    }
}

impl Op for LinearEightBackward {
    type Args<'a> = LinearEightBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_eight_backward";

    fn check(a: &LinearEightBackwardArgs<'_>) -> Result<()> {
        check_weight(Self::NAME, a.weight)?;
        if let Some(rounded) = a.rounded {
            rounded.check(Self::NAME, a.dy)?;
        }
        check_backward(Self::NAME, a.dy, a.weight.shape(), a.base.as_ref(), a.out)
    }

    fn cost(a: &LinearEightBackwardArgs<'_>) -> Cost {
        cost(a.dy, a.weight.shape()[1], a.weight.bytes(), a.base.as_ref(), a.out)
    }

    fn reference(a: &LinearEightBackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (w_oi, scale_o) = parts(a.weight)?;
        let (dy, scale_l1) = rounded_rows(a.dy, Some(&scale_o))?;
        let dx = num::matmul(&dy, &w_oi, DType::F32)?.broadcast_mul(&scale_l1)?;
        finished(dx, a.dy, [None, a.base.as_ref()], a.out)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearEightBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let added = [None, a.base.as_ref()];
        match a.rounded {
            Some(rounded) => cuda::eight(gpu, Self::NAME, a.dy, rounded, a.weight, false, added, (compute, a.out)),
            None => {
                let scale_o = crate::common::gpu::View::new(Self::NAME, a.weight.scale())?.address;
                let rounded = &cuda::rounded_rows(gpu, Self::NAME, a.dy, scale_o)?;
                cuda::eight(gpu, Self::NAME, a.dy, rounded, a.weight, false, added, (compute, a.out))
            }
        }
    }
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

/// The values of a weight's codes, and its scales [o].
fn parts(weight: &fp8::Weight) -> Result<(Tensor, Tensor)> {
    let [o, i] = weight.shape();
    let codes = weight.codes_oi().to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
    let values: Vec<f32> = codes.into_iter().map(codec::decode).collect();
    let values = Tensor::from_vec(values, (o, i), weight.codes_oi().device())?;
    Ok((values, weight.scale().flatten_all()?))
}

/// The scale of a row whose largest magnitude is `top`; one of zeros keeps a scale that can be divided by.
fn scale_of(top: f32) -> f32 {
    (top / codec::MAX).max(1e-30)
}

fn coded(v: f32) -> f32 {
    codec::decode(codec::encode(v.clamp(-codec::MAX, codec::MAX)))
}
