//! Bare `wan-train --template …`: check, cache what is missing, train.

use std::process::ExitCode;

use super::cache::Prepared;
use super::job::Job;
use super::{train, weights};
use crate::cli::CacheWhat;

pub fn run(job: &Job) -> anyhow::Result<ExitCode> {
    job.catch_interrupts();
    // The DiT is needed last and checked first: hours of caching for a file that is missing would be lost.
    weights::open_dit(job)?;
    let mut prepared = Prepared::new(job, true)?;
    prepared.make(job, CacheWhat::Both)?;
    prepared.table(job);
    prepared.scan.check()?;
    if job.stopped() {
        job.progress.say("stopped while caching; run the same command again to go on");
        return Ok(ExitCode::from(130));
    }
    train::train(job, &mut prepared)
}
