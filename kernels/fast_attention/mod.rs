//! Attention whose forward multiplies in 8 bits (`--fast_attention`): scores from int8 codes of queries and keys, on Hopper also
//! products with values in e4m3. Softmax and sums stay fp32. Backward is [`AttentionBackward`](crate::attention), in full, from
//! this forward's output and log-sum-exp.
//!
//! ```text
//! c = mean of up to 256 keys          a softmax does not change when all keys lose one vector; what keys share would
//!                                     otherwise take most of the codes' range. Scores then lack q·c, lse gets it back.
//! codes(x) = round(H·D·x / scale)     D: signs, H: the Hadamard matrix of 128; scale: max|H·D·x| / 127 of a tile of
//!                                     128 rows of a head
//! scores = codes(q)·codes(k − c)ᵀ · scale_q · scale_k / 128 / √128        sums of products of codes are exact
//! ```
//!
//! Values have one scale for 256 keys of a head, max|v| / 448, and probabilities are rounded to e4m3 as multiples of the
//! largest so far. Heads that are not 128 wide, fp32 tensors and cards before sm_80 compute as [`Attention`] does.

use candle_core::{DType, Device, Tensor};

use crate::attention::{Attention, AttentionArgs, AttentionOut};
#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::fp8::codec;
use crate::{Cost, Error, Exec, Op, Result};

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

/// Attention forward in 8 bits. The last key stands for itself alone.
pub struct FastAttention;

/// Tokens from which on 8 bits are worth their roundings: with Hopper's kernels, and elsewhere. On an H200 3600 tokens take
/// 0.40 ms and 0.10 of roundings instead of 0.43, 5400 0.87 and 0.13 instead of 0.97, 7200 1.40 and 0.17 instead of 1.70; with
/// `mma.sync` 1024 tokens 0.069 and 0.03 instead of 0.096, 2048 0.22 and 0.05 instead of 0.28. (Hopper's roundings there left
/// out half of the values.)
pub const FROM_TOKENS: [usize; 2] = [6144, 1536];

/// Whether 8 bits are worth it where this runs, for attention among `tokens` of a sample.
pub fn pays(exec: &Exec, tokens: usize) -> bool {
    match exec {
        #[cfg(feature = "cuda")]
        Exec::Cuda { gpu, .. } if gpu.hopper() => tokens >= FROM_TOKENS[0],
        _ => tokens >= FROM_TOKENS[1],
    }
}

/// Channels of a head, and rows of a tile.
const HEAD: usize = 128;
const TILE: usize = 128;
/// Rows of `c`'s sample, at most.
const SAMPLE: usize = 256;
const LARGEST: f32 = 127.0;
/// Scales are no smaller, so that they can be divided by.
const TINY: f32 = 1e-30;
/// Which channels change their sign: any fixed bits do.
const SIGNS: [u32; 4] = [0x8f1b_bcdc, 0x5a82_7999, 0xca62_c1d6, 0x6ed9_eba1];

impl Op for FastAttention {
    type Args<'a> = AttentionArgs<'a>;
    type Out = AttentionOut;
    const NAME: &'static str = "fast_attention";

    fn check(a: &AttentionArgs<'_>) -> Result<()> {
        Attention::check(a)?;
        match a.last_stands_for {
            1 => Ok(()),
            n => Err(Error::Argument { op: Self::NAME, what: format!("the last key stands for {n}; it takes one") }),
        }
    }

    fn cost(a: &AttentionArgs<'_>) -> Cost {
        Attention::cost(a)
    }

    /// Rounds queries, keys and values; probabilities are not.
    fn reference(a: &AttentionArgs<'_>, compute: DType) -> Result<AttentionOut> {
        let (b, l, n, h) = a.q_blnh.dims4()?;
        if h != HEAD {
            return Attention::reference(a, compute);
        }
        let dtype = a.q_blnh.dtype();
        let mut q = Heads::of(a.q_blnh)?;
        let mut k = Heads::of(a.k_bmnh)?;
        let mut v = Heads::of(a.v_bmnh)?;
        let mut shift = vec![0f32; b * n * l];
        for pair in 0..b * n {
            let c = mean(k.head(pair));
            let dots = shift[pair * l..].iter_mut().zip(q.head(pair).chunks(HEAD));
            dots.for_each(|(shift, row)| *shift = row.iter().zip(&c).map(|(q, c)| q * c).sum());
            k.head(pair).chunks_mut(HEAD).for_each(|row| row.iter_mut().zip(&c).for_each(|(k, c)| *k -= c));
            for heads in [&mut q, &mut k] {
                heads.head(pair).chunks_mut(HEAD).for_each(rotate);
                heads.head(pair).chunks_mut(TILE * HEAD).for_each(round_int8);
            }
            v.head(pair).chunks_mut(2 * TILE * HEAD).for_each(round_e4m3);
        }
        // Both rows were made √128 times as long.
        q.values.iter_mut().for_each(|v| *v /= HEAD as f32);
        let (q, k, v) = (q.tensor()?, k.tensor()?, v.tensor()?);
        let rounded = AttentionArgs { q_blnh: &q, k_bmnh: &k, v_bmnh: &v, last_stands_for: 1 };
        let out = Attention::reference(&rounded, DType::F32)?;
        let shift = Tensor::from_vec(shift, (b, n, l), &Device::Cpu)?;
        let shift = (shift / (HEAD as f64).sqrt())?.to_device(a.q_blnh.device())?;
        let o_blnh = out.o_blnh.to_device(a.q_blnh.device())?.to_dtype(dtype)?;
        Ok(AttentionOut { o_blnh, lse_bnl: (out.lse_bnl.to_device(shift.device())? + shift)? })
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &AttentionArgs<'_>, gpu: &Gpu, compute: DType) -> Result<AttentionOut> {
        if !cuda::fits(gpu, a.q_blnh) {
            return Attention::cuda(a, gpu, compute);
        }
        cuda::forward(gpu, a)
    }
}

/// A tensor [b, l, n, h] on the CPU as fp32, its heads one after the other.
struct Heads {
    values: Vec<f32>,
    shape: [usize; 4],
}

impl Heads {
    fn of(t_blnh: &Tensor) -> Result<Self> {
        let (b, l, n, h) = t_blnh.dims4()?;
        let t_bnlh = t_blnh.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.transpose(1, 2)?.contiguous()?;
        Ok(Self { values: t_bnlh.flatten_all()?.to_vec1()?, shape: [b, n, l, h] })
    }

    /// [l, h] of a batch item's head.
    fn head(&mut self, pair: usize) -> &mut [f32] {
        let size = self.shape[2] * self.shape[3];
        &mut self.values[pair * size..][..size]
    }

    fn tensor(self) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.values, &self.shape[..], &Device::Cpu)?.transpose(1, 2)?.contiguous()?)
    }
}

/// The mean of every so manieth row.
fn mean(rows: &[f32]) -> [f32; HEAD] {
    let step = (rows.len() / HEAD).div_ceil(SAMPLE);
    let mut sum = [0f32; HEAD];
    let sample = rows.chunks(HEAD).step_by(step);
    let count = sample.len() as f32;
    sample.for_each(|row| sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += v));
    sum.map(|sum| sum / count)
}

/// `H·D·x`, H with entries of 1 and -1.
fn rotate(row: &mut [f32]) {
    for (channel, v) in row.iter_mut().enumerate() {
        // The kernel reads a word's bytes as chunks of eight channels, the first of a chunk in its lowest bit.
        if SIGNS[channel / 32] >> (channel % 32) & 1 == 1 {
            *v = -*v;
        }
    }
    let mut step = 1;
    while step < HEAD {
        for i in (0..HEAD).filter(|i| i & step == 0) {
            (row[i], row[i + step]) = (row[i] + row[i + step], row[i] - row[i + step]);
        }
        step *= 2;
    }
}

fn scale_of(values: &[f32], largest: f32) -> f32 {
    if values.iter().any(|v| v.is_nan()) {
        return f32::NAN;
    }
    (values.iter().fold(0f32, |top, v| top.max(v.abs())) / largest).max(TINY)
}

fn round_int8(tile: &mut [f32]) {
    let scale = scale_of(tile, LARGEST);
    let inverse = 1.0 / scale;
    tile.iter_mut().for_each(|v| *v = (*v * inverse).round_ties_even() * scale);
}

fn round_e4m3(tiles: &mut [f32]) {
    let scale = scale_of(tiles, codec::MAX);
    let inverse = 1.0 / scale;
    let round = |v: f32| codec::decode(codec::encode((v * inverse).clamp(-codec::MAX, codec::MAX)));
    tiles.iter_mut().for_each(|v| *v = round(*v) * scale);
}
