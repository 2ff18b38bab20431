//! fp8 on the card, see `fp8.cu`.

use candle_core::{DType, Tensor};

use super::{Granularity, Weight};
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::{gate, Result};

const NAME: &str = "fp8_dequantize";

fn dequantize_to(gpu: &Gpu, w: &Weight, out: Arg) -> Result<()> {
    let n = w.codes_oi.elem_count();
    let (codes, scale) = (View::new(NAME, &w.codes_oi)?, View::new(NAME, &w.scale)?);
    let group = n / w.scale.elem_count();
    let args = [Arg::ptr(codes.address), Arg::tensor(&scale), Arg::i64(group), out, Arg::i64(n)];
    gpu.launch("fp8/fp8", "fp8_dequantize", Launch::over(n, 16), &args)
}

/// The matrix [o, i] in `out`.
pub(super) fn dequantize(gpu: &Gpu, w: &Weight, out: DType) -> Result<Tensor> {
    let full_oi = gpu.empty(w.codes_oi.shape(), out)?;
    dequantize_to(gpu, w, Arg::tensor(&View::new(NAME, &full_oi)?))?;
    Ok(full_oi)
}

/// The same into the scratch that all products share: its address, good for the next product.
pub(crate) fn dequantize_to_scratch(gpu: &Gpu, w: &Weight, out: DType) -> Result<u64> {
    let address = gpu.scratch("weight", w.codes_oi.elem_count() * out.size_in_bytes())?;
    let code = match out {
        DType::BF16 => 1,
        DType::F16 => 2,
        _ => 0,
    };
    dequantize_to(gpu, w, Arg::pointers(&[address], &[code]))?;
    Ok(address)
}

/// [`Weight::quantize`] on the card, to the same bits. One block a group: not for `Granularity::Tensor`.
pub(super) fn quantize(gpu: &Gpu, weight_oi: &Tensor, granularity: Granularity) -> Result<Weight> {
    const NAME: &str = "fp8_quantize";
    let oi = gate::dims::<2>(NAME, "weight_oi", weight_oi, "[o, i], nothing empty")?;
    let group = granularity.group(oi);
    let codes_oi = gpu.empty(&oi[..], DType::U8)?;
    let scale = gpu.empty(granularity.scale_shape(oi), weight_oi.dtype())?;
    let args = [
        Arg::tensor(&View::new(NAME, weight_oi)?),
        Arg::ptr(View::new(NAME, &codes_oi)?.address),
        Arg::tensor(&View::new(NAME, &scale)?),
        Arg::i64(group),
    ];
    let groups = oi[0] * oi[1] / group;
    gpu.launch("fp8/fp8", "fp8_quantize", Launch::blocks((groups, 1, 1), 128), &args)?;
    Weight::new(codes_oi, scale)
}
