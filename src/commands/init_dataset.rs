//! `wan-train init-dataset`: a dataset file for a folder of pictures and clips.

use std::path::Path;
use std::process::ExitCode;

use crate::data::{self, DataOptions, DatasetConfig};
use crate::error::UserError;
use crate::fsio;

pub fn run(dir: &Path, output: Option<&Path>, force: bool) -> anyhow::Result<ExitCode> {
    let beside = dir.join("dataset.toml");
    let output = output.unwrap_or(&beside);
    if output.exists() && !force {
        return Err(UserError::new(format!("{} is there already", output.display()))
            .hint("give another file with -o, or replace it with --force")
            .into());
    }
    let draft = data::draft(dir)?;
    // It is read as a run would read it before it is written.
    let read = DatasetConfig::from_text(&draft.text, output, &DataOptions::default())?;
    fsio::write_bytes(output, draft.text.as_bytes())?;
    draft.notes.iter().for_each(|note| println!("note: {note}"));
    println!("wrote {} with {} datasets", output.display(), read.entries.len());
    println!("next: wan-train check --template NAME --dataset_config {}", output.display());
    Ok(ExitCode::SUCCESS)
}
