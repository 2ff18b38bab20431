//! Work on finished LoRA files, without a model: what one holds (`info`), sums (`merge`), a lower rank (`resize`), the
//! difference of two models as a LoRA (`extract`), and averages over checkpoints (`ema`). Conversion between the forms of
//! keys is `checkpoint::convert`. Everything written goes through `checkpoint::write_lora`, in names that ComfyUI loads.

pub mod ema;
pub mod extract;
pub mod info;
pub mod low_rank;
pub mod merge;
pub mod resize;
pub mod svd;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_core::DType;

use crate::checkpoint::{LoraFile, LoraModule};
use crate::error::UserError;

/// Refuses an output that is an input, or that exists and may not be replaced.
pub fn check_output(output: &Path, inputs: &[&Path], overwrite: bool) -> Result<(), UserError> {
    let same = |a: &Path| matches!((a.canonicalize(), output.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if inputs.iter().any(|i| same(i)) {
        return Err(UserError::usage(format!("{} is read and would be written over", output.display()))
            .hint("give another name for what is written"));
    }
    if output.is_dir() {
        return Err(UserError::usage(format!("{} is a directory", output.display())).hint("name a file in it"));
    }
    if output.exists() && !overwrite {
        return Err(
            UserError::usage(format!("{} exists", output.display())).hint("give another name, or add --overwrite")
        );
    }
    Ok(())
}

/// Every module of a file, read.
pub fn modules(file: &LoraFile) -> Result<BTreeMap<String, LoraModule>> {
    let mut all = BTreeMap::new();
    for name in file.modules() {
        if let Some(module) = file.module(name)? {
            all.insert(name.to_owned(), module);
        }
    }
    Ok(all)
}

/// The widest dtype among the factors: what a result loses nothing in.
pub fn widest<'a>(modules: impl IntoIterator<Item = &'a LoraModule>) -> DType {
    let mut dtypes = modules.into_iter().flat_map(|m| m.factors.values().map(|t| t.dtype()));
    let first = dtypes.next().unwrap_or(DType::F32);
    match dtypes.all(|d| d == first) && matches!(first, DType::F16 | DType::BF16) {
        true => first,
        false => DType::F32,
    }
}

/// Refuses a file that changes whole tensors (`.diff`): the work at hand has no place for them.
pub fn no_differences(file: &LoraFile, verb: &str) -> Result<(), UserError> {
    match file.diffs().next() {
        None => Ok(()),
        Some(tensor) => Err(UserError::new(format!(
            "{} cannot be {verb}: it changes {tensor} as a whole, not by low-rank factors",
            file.path().display()
        ))
        .hint("use a LoRA without .diff tensors")),
    }
}

/// Metadata of a file whose rank has changed.
pub fn with_rank(mut metadata: BTreeMap<String, String>, ranks: &[usize], note: &str) -> BTreeMap<String, String> {
    let first = ranks.first().copied().unwrap_or_default();
    let rank = match ranks.iter().all(|r| *r == first) {
        true => first.to_string(),
        false => "Dynamic".to_string(),
    };
    metadata.insert("ss_network_alpha".into(), rank.clone());
    metadata.insert("ss_network_dim".into(), rank);
    metadata.insert("ss_network_module".into(), "networks.lora_wan".into());
    let comment = match metadata.get("ss_training_comment").map(String::as_str) {
        None | Some("None" | "") => note.to_string(),
        Some(old) => format!("{old}; {note}"),
    };
    metadata.insert("ss_training_comment".into(), comment);
    metadata
}
