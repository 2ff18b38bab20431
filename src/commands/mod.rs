//! One file per verb. This is the only place that wires the stages together.

mod bench;
#[cfg(feature = "cuda")]
mod bench_cache;
#[cfg(feature = "cuda")]
mod bench_fast;
mod bench_start;
mod buckets;
mod cache;
mod check;
mod claims;
mod demo;
mod disk;
mod init_dataset;
mod interrupt;
mod job;
mod keep;
mod lora;
mod machine;
mod musubi;
mod pair;
mod plan;
mod preview;
mod project;
mod random_files;
mod run;
mod save;
mod setup;
mod show;
#[cfg(feature = "cuda")]
mod synthetic;
mod templates;
mod text;
mod train;
mod verify;
mod watch;
mod weights;

use std::process::ExitCode;

use crate::cli::Invocation;
use crate::config::{self, Resolved, Typed};
use pair::Runs;

/// Runs a verb to its end.
pub fn run(invocation: Invocation) -> anyhow::Result<ExitCode> {
    dispatch(invocation).map_err(plan::explain_unplanned)
}

fn dispatch(invocation: Invocation) -> anyhow::Result<ExitCode> {
    match invocation {
        Invocation::Run(typed) => run::run(&mut Runs::of(&typed)?),
        Invocation::Cache { typed, what } => cache::run(Runs::of(&typed)?.first(), what),
        Invocation::Train(typed) => train::run(&mut Runs::of(&typed)?),
        Invocation::Plan(typed) => Runs::of(&typed)?.each(plan::run),
        Invocation::Show { name, typed, json } => show::show(name.as_deref(), typed, json),
        Invocation::Bench { typed, options } => bench::run(typed, &options),
        Invocation::Lora(job) => lora::run(job),
        Invocation::Check { typed, fix } => check::run(&Runs::of(&typed)?, fix),
        Invocation::Templates { base_dir, files } => templates::run(&base_dir, &files),
        Invocation::InitDataset { dir, output, force } => init_dataset::run(&dir, output.as_deref(), force),
        Invocation::Setup(options) => setup::run(&options),
        Invocation::Musubi(words) => musubi::run(&words),
        Invocation::Verify { golden, device } => verify::run(golden.as_deref(), &device),
    }
}

/// Resolves what was typed with the local time as the run's stamp.
fn resolve(typed: &Typed) -> anyhow::Result<Resolved> {
    config::resolve(typed, &stamp())
}

fn stamp() -> String {
    chrono::Local::now().format(claims::MINUTE).to_string()
}
