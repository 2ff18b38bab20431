//! fp8 (e4m3fn) weights with a scale for each group of inputs, held as U8 tensors.
//!
//! A group's scale is `max|w| / 448`, computed in fp32 and stored in the checkpoint's dtype. Dequantisation multiplies
//! code and scale and rounds the product to the scale's dtype: an fp16 checkpoint therefore yields fp16 weights.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, Cost, Error, Op, Result};

#[cfg(feature = "cuda")]
pub(crate) mod cuda;

pub mod codec;
#[cfg(test)]
mod tests;

/// Inputs that share one scale.
pub const BLOCK: usize = 64;

/// Smallest scale; in fp16 it underflows to 0.
const MIN_SCALE: f32 = 1e-8;

/// Which weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    /// 64 consecutive inputs of one output; `Channel` where the inputs do not divide by 64.
    Block,
    /// All inputs of one output.
    Channel,
    /// The whole matrix.
    Tensor,
}

impl Granularity {
    /// Weights to a scale in a matrix [o, i].
    pub fn group(self, [o, i]: [usize; 2]) -> usize {
        match self {
            Granularity::Block if i % BLOCK == 0 => BLOCK,
            Granularity::Block | Granularity::Channel => i,
            Granularity::Tensor => o * i,
        }
    }

    /// Shape of the scale tensor of a matrix [o, i]: [o, i/64, 1], [o, 1] or [1].
    pub fn scale_shape(self, [o, i]: [usize; 2]) -> Vec<usize> {
        match self {
            Granularity::Block if i % BLOCK == 0 => vec![o, i / BLOCK, 1],
            Granularity::Block | Granularity::Channel => vec![o, 1],
            Granularity::Tensor => vec![1],
        }
    }
}

/// Quantises whole groups of weights: `weights` and `codes` of one length, a multiple of `group`; one scale a group,
/// exactly representable in `scale_dtype` (F32, BF16 or F16: the checkpoint's).
///
/// Rows of a matrix can be handed over in any split that keeps groups whole, so a loader need not hold a tensor.
/// Errors: `Argument` on lengths that do not fit, `Dtype` on another dtype.
pub fn quantize_rows(
    weights: &[f32],
    group: usize,
    scale_dtype: DType,
    codes: &mut [u8],
    scales: &mut [f32],
) -> Result<()> {
    const NAME: &str = "fp8_quantize";
    let fits = group > 0 && weights.len() == codes.len() && weights.len() == scales.len() * group;
    if !fits {
        let what = format!(
            "{} weights in groups of {group} do not fit {} codes and {} scales",
            weights.len(),
            codes.len(),
            scales.len()
        );
        return Err(Error::Argument { op: NAME, what });
    }
    let round = rounder(NAME, scale_dtype)?;
    let groups_a_piece = ((1 << 15) / group).max(1);
    let piece = groups_a_piece * group;
    let parts = codes.par_chunks_mut(piece).zip(scales.par_chunks_mut(groups_a_piece));
    weights.par_chunks(piece).zip(parts).for_each(|(weights, (codes, scales))| {
        for ((weights, codes), scale) in weights.chunks(group).zip(codes.chunks_mut(group)).zip(scales) {
            *scale = quantize_group(weights, round, codes);
        }
    });
    Ok(())
}

/// Returns the stored scale.
fn quantize_group(weights: &[f32], round: fn(f32) -> f32, codes: &mut [u8]) -> f32 {
    let max = weights.iter().fold(0f32, |max, w| max.max(w.abs()));
    let scale = round(max / codec::MAX).max(round(MIN_SCALE));
    for (code, &weight) in codes.iter_mut().zip(weights) {
        let scaled = weight / scale;
        // 0/0 of a zero block whose scale underflowed; any other quotient saturates.
        let scaled = if scaled.is_nan() { 0.0 } else { scaled.clamp(-codec::MAX, codec::MAX) };
        *code = codec::encode(scaled);
    }
    scale
}

fn rounder(op: &'static str, dtype: DType) -> Result<fn(f32) -> f32> {
    match dtype {
        DType::F32 => Ok(|x| x),
        DType::BF16 => Ok(|x| bf16::from_f32(x).to_f32()),
        DType::F16 => Ok(|x| f16::from_f32(x).to_f32()),
        got => Err(Error::Dtype { op, tensor: "scale", got, want: "F32, BF16 or F16" }),
    }
}

/// An fp8 matrix [o, i] and its scales.
#[derive(Debug, Clone)]
pub struct Weight {
    codes_oi: Tensor,
    scale: Tensor,
}

impl Weight {
    const NAME: &'static str = "fp8_weight";

    /// `codes_oi` U8 [o, i]; `scale` F32, BF16 or F16 of shape [o, i/64, 1], [o, 1] or [o], [] or [1].
    pub fn new(codes_oi: Tensor, scale: Tensor) -> Result<Self> {
        let oi = gate::dims::<2>(Self::NAME, "codes_oi", &codes_oi, "[o, i], nothing empty")?;
        gate::dtype(Self::NAME, "codes_oi", &codes_oi, DType::U8)?;
        gate::float(Self::NAME, "scale", &scale)?;
        let known = [Granularity::Block, Granularity::Channel, Granularity::Tensor].map(|g| g.scale_shape(oi));
        let scale = match scale.dims() {
            [] => scale.reshape(1)?,
            [o] if *o > 1 && *o == oi[0] => scale.unsqueeze(1)?,
            _ => scale,
        };
        if !known.iter().any(|shape| shape == scale.dims()) {
            let want = format!("one of {known:?} for a weight of {oi:?}");
            return Err(Error::Shape { op: Self::NAME, tensor: "scale", got: scale.shape().clone(), want });
        }
        Ok(Weight { codes_oi: codes_oi.contiguous()?, scale: scale.contiguous()? })
    }

    /// Quantises a matrix [o, i], where it lies if that is a card (but a single scale on the CPU); scales take its dtype.
    pub fn quantize(weight_oi: &Tensor, granularity: Granularity) -> Result<Self> {
        let oi = gate::dims::<2>(Self::NAME, "weight_oi", weight_oi, "[o, i], nothing empty")?;
        gate::float(Self::NAME, "weight_oi", weight_oi)?;
        #[cfg(feature = "cuda")]
        if let (Some(gpu), Granularity::Block | Granularity::Channel) = (Gpu::of(weight_oi.device()), granularity) {
            return cuda::quantize(&gpu, weight_oi, granularity);
        }
        let weights = weight_oi.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let group = granularity.group(oi);
        let (mut codes, mut scales) = (vec![0u8; weights.len()], vec![0f32; weights.len() / group]);
        quantize_rows(&weights, group, weight_oi.dtype(), &mut codes, &mut scales)?;
        let device = weight_oi.device();
        let scale = Tensor::from_vec(scales, granularity.scale_shape(oi), device)?.to_dtype(weight_oi.dtype())?;
        Self::new(Tensor::from_vec(codes, &oi, device)?, scale)
    }

    pub fn codes_oi(&self) -> &Tensor {
        &self.codes_oi
    }

    pub fn scale(&self) -> &Tensor {
        &self.scale
    }

    /// [o, i].
    pub fn shape(&self) -> [usize; 2] {
        [self.codes_oi.dims()[0], self.codes_oi.dims()[1]]
    }

    /// Bytes held.
    pub fn bytes(&self) -> f64 {
        gate::bytes(&self.codes_oi) + gate::bytes(&self.scale)
    }

    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Weight { codes_oi: self.codes_oi.to_device(device)?, scale: self.scale.to_device(device)? })
    }

    /// The matrix [o, i] in the scale's dtype.
    pub fn dequantize(&self) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = Gpu::of(self.codes_oi.device()) {
            return cuda::dequantize(&gpu, self, self.scale.dtype());
        }
        if self.codes_oi.device().is_cpu() {
            match self.scale.dtype() {
                DType::BF16 => self.dequantize_cpu(bf16::from_f32, bf16::to_f32),
                DType::F16 => self.dequantize_cpu(f16::from_f32, f16::to_f32),
                _ => self.dequantize_cpu(|x: f32| x, |x| x),
            }
        } else {
            self.dequantize_plain()
        }
    }

    /// The definition in plain candle ops, for any device.
    fn dequantize_plain(&self) -> Result<Tensor> {
        let ([o, i], device) = (self.shape(), self.codes_oi.device());
        let values = Tensor::new(&codec::VALUES, device)?.index_select(&self.codes_oi.flatten_all()?, 0)?;
        let groups = self.scale.elem_count();
        let scale = self.scale.to_dtype(DType::F32)?.reshape((groups, 1))?;
        let scaled = values.reshape((groups, o * i / groups))?.broadcast_mul(&scale)?;
        Ok(scaled.to_dtype(self.scale.dtype())?.reshape((o, i))?)
    }

    /// The same in one parallel pass.
    fn dequantize_cpu<T: WithDType>(
        &self,
        narrow: impl Fn(f32) -> T + Sync,
        widen: impl Fn(T) -> f32 + Sync,
    ) -> Result<Tensor> {
        let [o, i] = self.shape();
        let group = o * i / self.scale.elem_count();
        let mut full = vec![T::zero(); o * i];
        with_slice::<u8, _>(&self.codes_oi, |codes| {
            with_slice::<T, _>(&self.scale, |scales| {
                // A group each, and pieces of it where one scale serves the whole matrix.
                let piece = if scales.len() == 1 { group.min(1 << 15) } else { group };
                full.par_chunks_mut(piece).zip(codes.par_chunks(piece)).enumerate().for_each(|(at, (full, codes))| {
                    let scale = widen(scales[at * piece / group]);
                    for (full, &code) in full.iter_mut().zip(codes) {
                        *full = narrow(codec::decode(code) * scale);
                    }
                });
            })
        })??;
        Ok(Tensor::from_vec(full, (o, i), self.codes_oi.device())?)
    }
}

/// Lends the elements of a contiguous CPU tensor.
fn with_slice<T: WithDType, R>(t: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op: Weight::NAME }.into());
    };
    match &*storage {
        Storage::Cpu(cpu) => Ok(f(&slice_of::<T>(cpu)?[start..end])),
        _ => Err(Error::Argument { op: Weight::NAME, what: "the tensor is not on the CPU".to_string() }),
    }
}

fn slice_of<T: WithDType>(cpu: &CpuStorage) -> Result<&[T]> {
    Ok(cpu.as_slice::<T>()?)
}

/// The matrix of an fp8 weight, cast to `out`.
pub struct Dequantize;

pub struct DequantizeArgs<'a> {
    pub weight: &'a Weight,
    /// Dtype of the result; the product is rounded to the scale's dtype before.
    pub out: DType,
}

impl Op for Dequantize {
    type Args<'a> = DequantizeArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "fp8_dequantize";

    fn check(a: &DequantizeArgs<'_>) -> Result<()> {
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &DequantizeArgs<'_>) -> Cost {
        let elements = a.weight.codes_oi.elem_count() as f64;
        Cost { flops: elements, bytes: a.weight.bytes() + elements * a.out.size_in_bytes() as f64 }
    }

    fn reference(a: &DequantizeArgs<'_>, _compute: DType) -> Result<Tensor> {
        Ok(a.weight.dequantize()?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &DequantizeArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::dequantize(gpu, a.weight, a.out)
    }
}
