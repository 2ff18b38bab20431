//! One file per verb. This is the only place that wires the stages together.

mod show;

use std::process::ExitCode;

use crate::cli::Invocation;
use crate::config::{self, Resolved, Typed};

/// Runs a verb to its end.
pub fn run(invocation: Invocation) -> anyhow::Result<ExitCode> {
    match invocation {
        Invocation::Show { name, typed, json } => show::show(name.as_deref(), typed, json),
        Invocation::Run(typed)
        | Invocation::Train(typed)
        | Invocation::Plan(typed)
        | Invocation::Cache { typed, .. } => {
            let resolved = resolve(&typed)?;
            anyhow::bail!("{} cannot train in this build", resolved.config.task)
        }
        Invocation::Verify { .. } => anyhow::bail!("this build has no reference numbers"),
    }
}

/// Resolves what was typed with the local time as the run's stamp.
fn resolve(typed: &Typed) -> anyhow::Result<Resolved> {
    config::resolve(typed, &chrono::Local::now().format("%Y%m%d_%H%M").to_string())
}
