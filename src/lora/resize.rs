//! A LoRA of lower rank: each module's best approximation, found from its factors.

use anyhow::Result;
use rayon::prelude::*;

use super::low_rank::{reduce, Cut, Reduced};
use crate::checkpoint::LoraFile;
use crate::report::{Progress, Work};

/// Every module under the cut, several at a time.
pub fn resize(file: &LoraFile, cut: Cut, progress: &dyn Progress) -> Result<Vec<(String, Reduced)>> {
    super::no_differences(file, "resized")?;
    let names: Vec<&str> = file.modules().collect();
    let mut task = progress.begin(Work { what: "resizing", unit: "module", start: 0, total: names.len() as u64 });
    let mut all = Vec::with_capacity(names.len());
    for group in names.chunks(2 * rayon::current_num_threads()) {
        let one = |name: &&str| -> Result<Option<(String, Reduced)>> {
            let Some(module) = file.module(name)? else { return Ok(None) };
            Ok(Some((name.to_string(), reduce(&module, cut)?)))
        };
        let done: Vec<Option<(String, Reduced)>> = group.par_iter().map(one).collect::<Result<_>>()?;
        all.extend(done.into_iter().flatten());
        task.advance(group.len() as u64, group.last().unwrap_or(&""));
    }
    Ok(all)
}
