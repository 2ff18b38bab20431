//! The VAE's norm: each position's channel vector scaled to length sqrt(C), times `gamma`; optionally SiLU behind it.

use super::cpu::{with_slice, Element};
#[cfg(feature = "cuda")]
use super::cuda;
#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{Cost, Error, Op, Result};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

/// Floor of the length that divides, as in the definition of the norm.
const EPS: f32 = 1e-12;

/// `y = x / max(|x|, 1e-12) * sqrt(C) * gamma`, the length taken over channels, then `y * sigmoid(y)` where asked.
pub struct ChannelNormArgs<'a> {
    /// `[b,c,...]`, contiguous, f32/bf16/f16.
    pub x: &'a Tensor,
    /// `[c]`.
    pub gamma: &'a Tensor,
    pub silu: bool,
}

pub struct ChannelNorm;

impl Op for ChannelNorm {
    type Args<'a> = ChannelNormArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "channel_norm";

    fn check(a: &Self::Args<'_>) -> Result<()> {
        if a.x.rank() < 3 {
            let want = "[b,c,...]".to_owned();
            return Err(Error::Shape { op: Self::NAME, tensor: "x", got: a.x.shape().clone(), want });
        }
        if a.gamma.dims() != [a.x.dim(1)?] {
            let want = format!("[{}]", a.x.dim(1)?);
            return Err(Error::Shape { op: Self::NAME, tensor: "gamma", got: a.gamma.shape().clone(), want });
        }
        for (tensor, t) in [("x", a.x), ("gamma", a.gamma)] {
            if !matches!(t.dtype(), DType::F32 | DType::BF16 | DType::F16) {
                return Err(Error::Dtype { op: Self::NAME, tensor, got: t.dtype(), want: "f32, bf16 or f16" });
            }
        }
        Ok(())
    }

    fn cost(a: &Self::Args<'_>) -> Cost {
        let n = a.x.elem_count() as f64;
        Cost { flops: n * if a.silu { 9.0 } else { 4.0 }, bytes: 2.0 * n * a.x.dtype().size_in_bytes() as f64 }
    }

    /// fp32 inside; input, `gamma` and the result are rounded to `compute`.
    fn reference(a: &Self::Args<'_>, compute: DType) -> Result<Tensor> {
        if !a.x.device().is_cpu() {
            return plain(a, compute);
        }
        let x = a.x.to_dtype(compute)?.contiguous()?;
        let gamma = a.gamma.to_dtype(compute)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        match compute {
            DType::F32 => direct::<f32>(&x, &gamma, a.silu),
            DType::BF16 => direct::<bf16>(&x, &gamma, a.silu),
            DType::F16 => direct::<f16>(&x, &gamma, a.silu),
            got => Err(Error::Dtype { op: Self::NAME, tensor: "compute", got, want: "f32, bf16 or f16" }),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &Self::Args<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        match cuda::norm_takes(a, compute) {
            true => cuda::norm(a, gpu, compute),
            false => Self::reference(a, compute),
        }
    }
}

/// The definition.
pub(super) fn plain(a: &ChannelNormArgs<'_>, compute: DType) -> Result<Tensor> {
    let x = a.x.to_dtype(compute)?.to_dtype(DType::F32)?;
    let c = x.dim(1)?;
    let mut wide = vec![1; x.rank()];
    wide[1] = c;
    let gamma = (a.gamma.to_dtype(compute)?.to_dtype(DType::F32)?.reshape(wide)? * (c as f64).sqrt())?;
    let length = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(EPS as f64)?;
    let y = x.broadcast_div(&length)?.broadcast_mul(&gamma)?;
    let y = if a.silu { y.silu()? } else { y };
    Ok(y.to_dtype(compute)?)
}

/// e^x to about one unit in the last place, in operations that compilers turn into vector code (a call of the C
/// library's `expf` took a tenth of the encoder's time). Saturates at the ends of the fp32 range.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first exact in few bits, so that n * ln 2 loses nothing.
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    // Taylor series to the seventh power: the next term is below 6e-9.
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // 2^n by its exponent bits.
    p * f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23)
}

/// Positions worked on at a time: their sums of squares stay in the first-level cache.
const BLOCK: usize = 1024;

fn direct<E: Element>(x: &Tensor, gamma: &[f32], silu: bool) -> Result<Tensor> {
    let (b, c) = (x.dim(0)?, x.dim(1)?);
    let n = x.elem_count() / (b * c).max(1);
    let root = (c as f32).sqrt();
    let out = with_slice::<E, _>(x, |src| {
        let scale: Vec<f32> = (0..b * n.div_ceil(BLOCK))
            .into_par_iter()
            .flat_map_iter(|task| {
                let (bi, p0) = (task / n.div_ceil(BLOCK), task % n.div_ceil(BLOCK) * BLOCK);
                let len = BLOCK.min(n - p0);
                let mut sum = vec![0f32; len];
                for ci in 0..c {
                    for (s, v) in sum.iter_mut().zip(&src[(bi * c + ci) * n + p0..][..len]) {
                        let v = v.widen();
                        *s += v * v;
                    }
                }
                sum.into_iter().map(|s| root / s.sqrt().max(EPS))
            })
            .collect();
        let mut out = E::zeros(src.len());
        out.par_chunks_mut(n.max(1)).enumerate().for_each(|(row, out)| {
            let (bi, g) = (row / c, gamma[row % c]);
            let src = &src[row * n..][..n];
            for ((o, v), s) in out.iter_mut().zip(src).zip(&scale[bi * n..][..n]) {
                let y = v.widen() * s * g;
                *o = E::narrow(if silu { y / (1.0 + exp(-y)) } else { y });
            }
        });
        Ok(out)
    })?;
    Ok(Tensor::from_vec(out, x.dims(), &Device::Cpu)?)
}

#[test]
fn exp_is_good_to_the_last_bits() {
    for i in -88_000..88_000 {
        let x = i as f32 * 1e-3;
        let (got, want) = (exp(x) as f64, (x as f64).exp());
        assert!(x < -87.3 || ((got - want) / want).abs() < 2.5e-7, "e^{x} = {want}, got {got}");
    }
    assert!(exp(-1e9) > 0.0 && exp(-1e9) < 1e-37 && exp(1e9) > 1e38 && exp(1e9).is_finite());
    assert_eq!(exp(0.0), 1.0);
}
