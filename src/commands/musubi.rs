//! `wan-train musubi …`: a command line of musubi-tuner, run here.

use std::process::ExitCode;

use crate::cli::musubi::translate;
use crate::report;

pub fn run(words: &[String]) -> anyhow::Result<ExitCode> {
    let translation = translate(words)?;
    let progress = report::for_stderr();
    translation.notes.iter().for_each(|note| progress.say(&format!("note: {note}")));
    super::run(translation.invocation)
}
