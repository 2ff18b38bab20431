//! One file per verb. This is the only place that wires the stages together.

mod bench;
mod cache;
mod demo;
mod job;
mod plan;
mod run;
mod save;
mod show;
mod text;
mod train;
mod verify;
mod watch;
mod weights;

use std::process::ExitCode;

use crate::cli::Invocation;
use crate::config::{self, Resolved, Typed};
use job::Job;

/// Runs a verb to its end.
pub fn run(invocation: Invocation) -> anyhow::Result<ExitCode> {
    match invocation {
        Invocation::Run(typed) => run::run(&Job::new(&typed)?),
        Invocation::Cache { typed, what } => cache::run(&Job::new(&typed)?, what),
        Invocation::Train(typed) => train::run(&Job::new(&typed)?),
        Invocation::Plan(typed) => plan::run(&Job::new(&typed)?),
        Invocation::Show { name, typed, json } => show::show(name.as_deref(), typed, json),
        Invocation::Bench { typed, options } => bench::run(typed, &options),
        Invocation::Verify { golden, device } => verify::run(golden.as_deref(), &device),
    }
}

/// Resolves what was typed with the local time as the run's stamp.
fn resolve(typed: &Typed) -> anyhow::Result<Resolved> {
    config::resolve(typed, &chrono::Local::now().format("%Y%m%d_%H%M").to_string())
}
