//! Adding LoRAs to a base weight: `W' = W + strength · (alpha / rank) · up·down`, computed in fp32 and stored in the
//! base's dtype; without an alpha the factor is `strength`. LoHa, LoKr and whole differences (`.diff`) likewise. Every step
//! is defined to the bit: a model merged while it is loaded, on a card or not, is the one that was merged into a file.

use super::source::Fetch;
use crate::checkpoint::{product, LoraFile};
use crate::error::UserError;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
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
    let added = Added::to(key, base.dims(), merges, &|_, _| Ok(None), base.device())?;
    Ok(added.map(|added| added.sum(base)).transpose()?)
}

/// What LoRAs add to one tensor, read and checked, not multiplied out: rows of it are made when they are asked for.
pub(super) struct Added {
    /// The tensor as a matrix: its first axis, and all others.
    rows: usize,
    width: usize,
    /// Each with its factor, in the order of the LoRAs.
    parts: Vec<(Part, f64)>,
}

enum Part {
    LowRank { up_or: Tensor, down_ri: Tensor },
    Whole(Tensor),
}

impl Added {
    /// Elements that a thread of the CPU works on at a time: few enough that memory is used again, not asked for.
    const PIECE: usize = 1 << 19;
    /// The same for single additions and roundings.
    const STRETCH: usize = 1 << 14;

    /// Reads what is added to the tensor `key` of this shape, to `device`; `None` where nothing is.
    ///
    /// Errors: a change of another shape, with the LoRA and the tensor named.
    pub fn to(key: &str, dims: &[usize], merges: &[LoraMerge], fetch: Fetch, device: &Device) -> Result<Option<Self>> {
        let rows = dims.first().copied().unwrap_or(1);
        let width = dims.iter().skip(1).product();
        let mut parts = Vec::new();
        for merge in merges {
            let named = |e: candle_core::Error| {
                anyhow::Error::new(e).context(format!("{key}: merging {}", merge.file.path().display()))
            };
            let fits = |of: [usize; 2], shown: &[usize]| -> Result<()> {
                if of == [rows, width] {
                    return Ok(());
                }
                Err(UserError::new(format!(
                    "the LoRA {} does not fit the base model: its change of {key} has the shape {shown:?}, the weight \
                     {dims:?}",
                    merge.file.path().display(),
                ))
                .hint("merge a LoRA that was made for this model")
                .into())
            };
            let module = match key.strip_suffix(".weight") {
                Some(module) => merge.file.module_from(module, fetch)?,
                None => None,
            };
            if let Some(mut module) = module {
                if let Some(of) = module.shape() {
                    fits(of, &of)?;
                }
                for factor in module.factors.values_mut() {
                    *factor = factor.to_device(device).map_err(named)?;
                }
                let part = match module.low_rank().map_err(named)? {
                    Some((up_or, down_ri)) => Part::LowRank { up_or, down_ri },
                    None => Part::Whole(module.product().map_err(named)?),
                };
                parts.push((part, merge.strength * module.scale()));
            }
            if let Some(diff) = merge.file.diff_from(key, fetch)? {
                let of = [diff.dims().first().copied().unwrap_or(1), diff.dims().iter().skip(1).product()];
                fits(of, diff.dims())?;
                let diff =
                    diff.to_device(device).and_then(|d| d.to_dtype(DType::F32)).and_then(|d| d.reshape((rows, width)));
                parts.push((Part::Whole(diff.map_err(named)?), merge.strength));
            }
        }
        Ok((!parts.is_empty()).then_some(Self { rows, width, parts }))
    }

    /// Rows of each part, fp32, and its factor, in turn.
    fn each(
        &self,
        first: usize,
        count: usize,
        f: &mut dyn FnMut(Tensor, f64) -> candle_core::Result<()>,
    ) -> candle_core::Result<()> {
        self.parts.iter().try_for_each(|(part, factor)| {
            let delta = match part {
                Part::LowRank { up_or, down_ri } => product(&up_or.narrow(0, first, count)?, down_ri)?,
                Part::Whole(delta) => delta.narrow(0, first, count)?,
            };
            f(delta, *factor)
        })
    }

    /// Adds to whole rows of values from row `first` on, and rounds the sums to a 16-bit dtype. On the CPU.
    pub fn add(&self, first: usize, values: &mut [f32], dtype: DType) -> candle_core::Result<()> {
        self.each(first, values.len() / self.width.max(1), &mut |delta, factor| {
            let (delta, factor) = (delta.flatten_all()?.to_vec1::<f32>()?, factor as f32);
            let pieces = values.par_chunks_mut(Self::STRETCH).zip(delta.par_chunks(Self::STRETCH));
            pieces.for_each(|(values, delta)| values.iter_mut().zip(delta).for_each(|(v, d)| *v += d * factor));
            Ok(())
        })?;
        // A stretch at a time is converted by vector instructions, a number at a time is not.
        match dtype {
            DType::F16 => values.par_chunks_mut(Self::STRETCH).for_each_init(
                || vec![f16::ZERO; Self::STRETCH],
                |half, values| {
                    half[..values.len()].convert_from_f32_slice(values);
                    half[..values.len()].convert_to_f32_slice(values);
                },
            ),
            DType::BF16 => values.par_iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
            _ => {}
        }
        Ok(())
    }

    /// The base with everything added, in its own dtype: in one go on a card, some rows a thread on the CPU.
    pub fn sum(&self, base: &Tensor) -> candle_core::Result<Tensor> {
        let base_oi = base.reshape((self.rows, self.width))?;
        let some = |first: usize, count: usize| {
            let mut sum = base_oi.narrow(0, first, count)?.to_dtype(DType::F32)?;
            self.each(first, count, &mut |delta, factor| {
                sum = (&sum + delta.affine(factor, 0.0)?)?;
                Ok(())
            })?;
            sum.to_dtype(base.dtype())
        };
        if !base.device().is_cpu() {
            return some(0, self.rows)?.reshape(base.dims());
        }
        let piece = (Self::PIECE / self.width.max(1)).clamp(1, self.rows.max(1));
        let starts: Vec<usize> = (0..self.rows).step_by(piece).collect();
        let sums = starts.into_par_iter().map(|first| some(first, piece.min(self.rows - first)));
        Tensor::cat(&sums.collect::<candle_core::Result<Vec<_>>>()?, 0)?.reshape(base.dims())
    }
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
