//! fp8 codes and their scales: read from a file, made of a tensor while it is read, decoded.

use super::merge::Added;
use super::source::{Fetch, Source};
use anyhow::{bail, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use wan_kernels::fp8;

/// e4m3 codes, read unless they are there.
pub(super) fn codes(source: &Source, raw: &str, there: Option<Tensor>) -> Result<Tensor> {
    match there {
        Some(codes) => Ok(codes),
        None => {
            let shape = source.shape(raw).unwrap_or_default();
            Ok(Tensor::from_vec(source.bytes(raw)?, shape, &Device::Cpu)?)
        }
    }
}

/// Their scale, beside them.
pub(super) fn scale(source: &Source, raw: &str, fetch: Fetch, device: &Device) -> Result<Tensor> {
    match fetch(source, raw)? {
        Some(there) => shaped(there),
        None => Ok(scale_tensor(source, raw)?.to_device(device)?),
    }
}

/// Quantises a matrix while reading it, some rows at a time, with what LoRAs add to them: neither the tensor nor its fp32
/// copy is ever whole in memory. Sums are rounded to the file's dtype first, as a merged file would hold them; scales take
/// that dtype, too. `None` where it does not allow it.
pub(super) fn quantize_in_pieces(
    source: &Source,
    raw: &str,
    added: Option<&Added>,
) -> Result<Option<(Tensor, Tensor)>> {
    /// A few MB at a time: large enough to read fast, small enough to stay in the allocator's hands.
    const PIECE: usize = 1 << 20;
    let (Some([rows, width]), Some(dtype)) = (source.shape(raw), source.dtype(raw)) else {
        return Ok(None);
    };
    let (oi, count) = ([*rows, *width], rows * width);
    let dtype = match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        _ => return Ok(None),
    };
    let group = fp8::Granularity::Block.group(oi);
    if count == 0 {
        return Ok(None);
    }
    let (mut codes, mut scales) = (vec![0u8; count], vec![0f32; count / group]);
    // Whole rows, of which groups are parts.
    let piece = (PIECE / oi[1]).max(1) * oi[1];
    let mut sum = Vec::new();
    let done = source.for_each_piece(raw, piece, &mut |first, values| {
        let (codes, scales) = (&mut codes[first..first + values.len()], &mut scales[first / group..]);
        let values = match added {
            None => values,
            Some(added) => {
                sum.clear();
                sum.extend_from_slice(values);
                added.add(first / oi[1], &mut sum, dtype)?;
                &sum
            }
        };
        Ok(fp8::quantize_rows(values, group, dtype, codes, &mut scales[..values.len() / group])?)
    })?;
    if !done {
        return Ok(None);
    }
    let scale = Tensor::from_vec(scales, fp8::Granularity::Block.scale_shape(oi), &Device::Cpu)?.to_dtype(dtype)?;
    Ok(Some((Tensor::from_vec(codes, &oi, &Device::Cpu)?, scale)))
}

/// fp32 values of e4m3 codes of any shape, times a scale of one number, one per row, or one per block of a row.
pub(super) fn dequantize(codes: &Tensor, scale: Option<Tensor>) -> Result<Tensor> {
    if codes.rank() == 2 {
        let scale = match scale {
            Some(scale) => scale,
            None => Tensor::ones((), DType::F32, codes.device())?,
        };
        return Ok(fp8::Weight::new(codes.clone(), scale)?.dequantize()?);
    }
    let bytes = codes.flatten_all()?.to_vec1::<u8>()?;
    let mut values = vec![0f32; bytes.len()];
    fp8::codec::decode_slice(&bytes, &mut values);
    let t = Tensor::from_vec(values, codes.dims(), &Device::Cpu)?;
    match scale {
        Some(s) if s.elem_count() == 1 => Ok(t.broadcast_mul(&s.to_dtype(DType::F32)?.reshape(())?)?),
        Some(s) => bail!("a scale of shape {:?} for a tensor of shape {:?}", s.dims(), codes.dims()),
        None => Ok(t),
    }
}

/// The plain cast to e4m3 (round to even, no saturation).
pub(super) fn encode(t: &Tensor) -> Result<Tensor> {
    let values = t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let mut codes = vec![0u8; values.len()];
    fp8::codec::encode_slice(&values, &mut codes);
    Ok(Tensor::from_vec(codes, t.dims(), &Device::Cpu)?)
}

/// A stored scale in the shape our kernels know: `[]`, `[o, 1]` or `[o, i/b, 1]`.
pub(super) fn scale_tensor(source: &Source, key: &str) -> Result<Tensor> {
    shaped(source.read(key, &Device::Cpu)?)
}

pub(super) fn shaped(t: Tensor) -> Result<Tensor> {
    let t = match t.dtype() {
        DType::F32 | DType::BF16 | DType::F16 => t,
        _ => t.to_dtype(DType::F32)?,
    };
    Ok(match *t.dims() {
        [1] | [1, 1] => t.reshape(())?,
        [rows] => t.reshape((rows, 1))?,
        _ => t,
    })
}
