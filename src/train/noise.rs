//! Random numbers of a sample: keyed by (seed, epoch, sample), so they do not depend on batch size, accumulation, order,
//! device or restarts.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use wan_kernels::philox::{self, stream, Philox};

use super::timesteps::Draws;

/// Draws for the timestep of one sample.
pub struct SampleDraws(philox::Draws);

impl SampleDraws {
    pub fn new(seed: u64, epoch: u64, sample: u32) -> Self {
        Self(Philox::new(seed, stream::TIMESTEP, epoch as u32, sample).draws())
    }
}

impl Draws for SampleDraws {
    fn uniform(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.0.uniform_f32()).collect()
    }

    fn normal(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.0.normal() as f32).collect()
    }
}

/// Standard normal noise `[c, F, h, w]` of one sample, fp32. `rounded` rounds it to the dtype of the cached latents, as
/// the old tool draws it. Made on `device`; the values are the same everywhere.
pub fn sample(
    seed: u64,
    epoch: u64,
    sample: u32,
    shape: &[usize],
    rounded: Option<DType>,
    device: &Device,
) -> Result<Tensor> {
    let noise = Philox::new(seed, stream::NOISE, epoch as u32, sample).normal(shape, device)?;
    Ok(match rounded {
        Some(dtype) => noise.to_dtype(dtype)?.to_dtype(DType::F32)?,
        None => noise,
    })
}
