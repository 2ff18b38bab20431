//! Seeded random weights in the manner of the reference numbers: every path of the model matters to its output.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use wan_kernels::philox::{stream, Philox};

use super::{BlockWeights, ResidentWeights, WanWeights};
use crate::arch::WanArch;
use crate::keys;
use crate::linear::Weight;
use crate::{Error, Result};

/// Adapters start from step 0 of the same stream: a base of the same seed must not share their numbers.
const STEP: u32 = u32::MAX;

/// Every tensor of a DiT under its official name, fp32 on the CPU. Norm weights 1 ± 0.2 (of queries and keys 1.4 ± 0.3),
/// modulation ± 0.25, biases ± 0.1, matrices N(0, 1/fan_in), head not zero. The same on every machine for a seed.
pub fn random_weights(arch: &WanArch, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    arch.validate()?;
    let mut tensors = BTreeMap::new();
    for (item, spec) in keys::expected(arch).into_iter().enumerate() {
        let fan_in = spec.shape[1..].iter().product::<usize>().max(1) as f64;
        let (mean, std) = match spec.key.as_str() {
            k if k.ends_with("norm_q.weight") || k.ends_with("norm_k.weight") || k.ends_with("norm_k_img.weight") => {
                (1.4, 0.3)
            }
            k if k.ends_with("modulation") => (0.0, 0.25),
            k if k.ends_with("emb_pos") => (0.0, 0.1),
            k if k.ends_with(".bias") => (0.0, 0.1),
            _ if spec.shape.len() == 1 => (1.0, 0.2),
            _ => (0.0, 1.0 / fan_in.sqrt()),
        };
        let unit = Philox::new(seed, stream::INIT, STEP, item as u32).normal(&spec.shape, &Device::Cpu)?;
        tensors.insert(spec.key, unit.affine(std, mean)?);
    }
    Ok(tensors)
}

impl WanWeights {
    /// Splits a whole model held in memory into its outer weights and its blocks.
    pub fn from_tensors(arch: &WanArch, tensors: &BTreeMap<String, Tensor>) -> Result<(Self, ResidentWeights)> {
        let mut get = |key: &str| match tensors.get(key) {
            Some(t) => Ok(Weight::Dense(t.clone())),
            None => Err(Error::MissingWeight { model: "wan", key: key.to_string() }),
        };
        let rest = Self::from_getter(arch, &mut get)?;
        let blocks: Result<Vec<_>> =
            (0..arch.num_layers).map(|i| BlockWeights::from_getter(arch, i, &mut get)).collect();
        Ok((rest, ResidentWeights::new(blocks?)))
    }
}

/// Converts every tensor, e.g. to the dtype a checkpoint would have.
pub fn cast_all(tensors: &BTreeMap<String, Tensor>, dtype: DType) -> Result<BTreeMap<String, Tensor>> {
    tensors.iter().map(|(k, t)| Ok((k.clone(), t.to_dtype(dtype)?))).collect()
}
