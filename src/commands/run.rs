//! Bare `wan-train --template …`: check, cache what is missing, train.

use std::process::ExitCode;

use super::cache::Prepared;
use super::pair::Runs;
use crate::cli::CacheWhat;

pub fn run(runs: &mut Runs) -> anyhow::Result<ExitCode> {
    runs.first().catch_interrupts();
    // What training needs is needed last and checked first: hours of caching for a missing file would be lost.
    runs.get_ready()?;
    let job = runs.first();
    let mut prepared = Prepared::new(job, true)?;
    if prepared.scan.check().is_ok() && prepared.survey.latents_to_make() + prepared.survey.texts_to_make() > 0 {
        runs.foresee(&prepared)?;
    }
    if prepared.scan.check().is_ok() {
        runs.check_disk(&prepared)?;
    }
    prepared.make(job, CacheWhat::Both)?;
    prepared.table(job);
    prepared.scan.check()?;
    if job.stopped() {
        job.progress.say("stopped while caching; run the same command again to go on");
        return Ok(ExitCode::from(130));
    }
    runs.train(&mut prepared)
}
