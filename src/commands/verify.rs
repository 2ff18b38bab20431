//! `wan-train verify`: every model and formula against reference numbers.

use std::path::Path;
use std::process::ExitCode;

use candle_core::DType;

use super::job::exec;
use crate::verify::{self, GoldenSource};

/// One line a check and the count; exit 1 when one failed.
pub fn run(golden: Option<&Path>, device: &str) -> anyhow::Result<ExitCode> {
    let source = golden.map_or(GoldenSource::Embedded, |dir| GoldenSource::Dir(dir.to_path_buf()));
    let summary = verify::run(&source, &exec(device, DType::F32)?, &mut std::io::stdout().lock())?;
    Ok(if summary.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
