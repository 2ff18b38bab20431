//! Adding LoRAs to a base weight: `W' = W + strength · (alpha / rank) · up·down`, computed in fp32 and stored in the
//! base's dtype; without an alpha the factor is `strength`. LoHa, LoKr and whole differences (`.diff`) likewise.

use super::source::Fetch;
use crate::checkpoint::LoraFile;
use crate::error::UserError;
use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};

/// A LoRA to merge into the base while it is loaded.
#[derive(Debug)]
pub struct LoraMerge {
    pub file: LoraFile,
    pub strength: f64,
}

impl LoraMerge {
    /// Whether the LoRA changes the tensor `key`.
    pub fn touches(&self, key: &str) -> bool {
        self.file.diffs().any(|d| d == key) || key.strip_suffix(".weight").is_some_and(|m| self.file.adapts(m))
    }

    /// Refuses a LoRA that adapts what the base does not have: part of it would be lost in silence.
    pub fn check(&self, base: &BTreeSet<&str>) -> Result<()> {
        let weights = self.file.modules().map(|m| format!("{m}.weight"));
        let absent: Vec<String> =
            weights.chain(self.file.diffs().map(str::to_owned)).filter(|k| !base.contains(k.as_str())).collect();
        if absent.is_empty() {
            return Ok(());
        }
        Err(UserError::new(format!(
            "the LoRA {} does not fit the base model: {} of its targets do not exist there, such as {}",
            self.file.path().display(),
            absent.len(),
            absent[0]
        ))
        .hint("merge a LoRA that was made for this model")
        .into())
    }
}

/// Adds every LoRA that touches the tensor `key` (`blocks.0.ffn.0.weight`) to it. The sum is formed in fp32 and rounded
/// once, to the base's dtype: whoever has an fp8 base hands over its values in fp32. `None` where no LoRA touches the
/// tensor.
pub fn merge_into(base: &Tensor, key: &str, merges: &[LoraMerge]) -> Result<Option<Tensor>> {
    merge_from(base, key, merges, &|_, _| Ok(None))
}

/// The same where the base lies (products of factors too), with the LoRAs' tensors from whoever reads ahead.
pub(super) fn merge_from(base: &Tensor, key: &str, merges: &[LoraMerge], fetch: Fetch) -> Result<Option<Tensor>> {
    let device = base.device();
    let mut sum: Option<Tensor> = None;
    for merge in merges {
        let module = match key.strip_suffix(".weight") {
            Some(module) => merge.file.module_from(module, fetch)?,
            None => None,
        };
        let named = |e: candle_core::Error| {
            anyhow::Error::new(e).context(format!("{key}: merging {}", merge.file.path().display()))
        };
        let mut deltas = Vec::new();
        if let Some(mut module) = module {
            for factor in module.factors.values_mut() {
                *factor = factor.to_device(device)?;
            }
            deltas.push((module.product().map_err(named)?, merge.strength * module.scale()));
        }
        if let Some(diff) = merge.file.diff_from(key, fetch)? {
            deltas.push((diff.to_device(device)?.to_dtype(DType::F32)?, merge.strength));
        }
        for (delta, factor) in deltas {
            if delta.elem_count() != base.elem_count() || delta.dims()[0] != base.dims()[0] {
                return Err(UserError::new(format!(
                    "the LoRA {} does not fit the base model: its change of {key} has the shape {:?}, the weight {:?}",
                    merge.file.path().display(),
                    delta.dims(),
                    base.dims()
                ))
                .hint("merge a LoRA that was made for this model")
                .into());
            }
            let delta = delta.affine(factor, 0.0)?.reshape(base.dims())?;
            let so_far = match sum.take() {
                Some(t) => t,
                None => base.to_dtype(DType::F32)?,
            };
            sum = Some((so_far + delta)?);
        }
    }
    sum.map(|t| t.to_dtype(base.dtype()).context("rounding a merged weight")).transpose()
}

/// Merges one LoRA into tensors in memory (canonical names) and returns how many changed. In compatibility mode a file
/// of which nothing maps changes nothing, as the old merge gave up there.
pub fn merge_map(base: &mut BTreeMap<String, Tensor>, lora: LoraFile, strength: f64) -> Result<usize> {
    let merges = [LoraMerge { file: lora, strength }];
    let mut changed = 0;
    for (key, tensor) in base.iter_mut() {
        if let Some(merged) = merge_into(tensor, key, &merges)? {
            *tensor = merged;
            changed += 1;
        }
    }
    Ok(changed)
}
