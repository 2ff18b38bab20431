//! The difference of two DiTs as a LoRA: every linear of the blocks whose weights differ, by a randomised SVD of the
//! difference. Two matrices and their difference are in memory at a time.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use wan_models::keys;

use super::low_rank::{frobenius, reduce_matrix, Cut, Reduced};
use crate::error::UserError;
use crate::loader::Source;
use crate::report::{Progress, Work};

/// What came out of a comparison.
#[derive(Debug, Default)]
pub struct Extracted {
    /// Modules that differ, by name.
    pub modules: Vec<(String, Reduced)>,
    /// Linears of the blocks that are equal.
    pub equal: usize,
    /// Tensors outside a LoRA's reach that differ (embeddings, norms, biases, modulation, head), with the norm of the
    /// difference over that of the base.
    pub beyond: Vec<(String, f64)>,
}

/// A checkpoint's tensors by canonical name.
fn table(source: &Source) -> Result<BTreeMap<String, String>> {
    let mut names = BTreeMap::new();
    for raw in source.keys() {
        let Some(name) = keys::canonical(raw) else { continue };
        if !matches!(source.dtype(raw), Some(Dtype::F32 | Dtype::F16 | Dtype::BF16)) {
            return Err(UserError::new(format!(
                "{} cannot be compared: {raw} is stored as {:?}",
                source.path().display(),
                source.dtype(raw).unwrap_or(Dtype::U8)
            ))
            .hint("use the fp32, fp16 or bf16 files of both models")
            .into());
        }
        names.insert(name, raw.to_owned());
    }
    if names.is_empty() {
        return Err(UserError::new(format!("{} is no Wan DiT: none of its tensors is known", source.path().display()))
            .hint("give two DiTs of one model")
            .into());
    }
    Ok(names)
}

/// `tuned − base` as low-rank modules under the cut.
///
/// Errors: models of different tensors or shapes, fp8 files, numbers that are not finite, no difference at all.
pub fn extract(base: &Source, tuned: &Source, cut: Cut, progress: &dyn Progress) -> Result<Extracted> {
    let (of_base, of_tuned) = (table(base)?, table(tuned)?);
    let differ = |what: String| -> anyhow::Error {
        let (a, b) = (base.path().display(), tuned.path().display());
        UserError::new(format!("{a} and {b} cannot be compared: {what}")).hint("give two DiTs of one model").into()
    };
    for (has, lacks, source) in [(&of_base, &of_tuned, tuned), (&of_tuned, &of_base, base)] {
        if let Some(name) = has.keys().find(|n| !lacks.contains_key(*n)) {
            return Err(differ(format!("{} has no {name}", source.path().display())));
        }
    }
    for (name, raw) in &of_base {
        let (a, b) = (base.shape(raw), tuned.shape(&of_tuned[name]));
        if a != b {
            return Err(differ(format!("{name} has the shapes {:?} and {:?}", a.unwrap_or(&[]), b.unwrap_or(&[]))));
        }
    }
    let mut found = Extracted::default();
    let mut task = progress.begin(Work { what: "comparing", unit: "tensor", start: 0, total: of_base.len() as u64 });
    for (seed, (name, raw)) in of_base.iter().enumerate() {
        task.advance(1, name);
        let read = |source: &Source, key: &str| -> Result<Tensor> {
            Ok(source.read(key, &Device::Cpu)?.to_dtype(DType::F32)?)
        };
        let before = read(base, raw)?;
        let size = frobenius(&before)?;
        let change = (read(tuned, &of_tuned[name])? - before)?;
        let norm = frobenius(&change)?;
        if !norm.is_finite() {
            return Err(differ(format!("{name} holds numbers that are not finite")));
        }
        let module = name.strip_suffix(".weight").filter(|_| keys::is_quantisable(name) && change.rank() == 2);
        match (module, norm > 0.0) {
            (Some(module), true) => {
                found.modules.push((module.to_owned(), reduce_matrix(&change, cut, seed as u64)?));
            }
            (Some(_), false) => found.equal += 1,
            (None, true) => found.beyond.push((name.clone(), if size > 0.0 { norm / size } else { f64::INFINITY })),
            (None, false) => {}
        }
    }
    drop(task);
    if found.modules.is_empty() {
        return Err(differ("no linear of a block differs".into()));
    }
    Ok(found)
}
