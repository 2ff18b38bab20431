//! `--noise_level both`: the high expert's LoRA, then the low one's, in one go that can be interrupted anywhere.
//!
//! Both write under names with one time stamp. A record beside them remembers the stamp and which expert is finished, so
//! that the same command, typed again, goes on with the right one from its last state.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::cache::Prepared;
use super::job::Job;
use super::train::{self, Ended};
use super::{claims, disk, plan, preview, save, stamp, weights};
use crate::checkpoint::{state, Names};
use crate::config::{resolve_runs, Resolved, RunConfig, Typed};
use crate::error::UserError;
use crate::fsio;
use crate::train::TrainSettings;

/// The runs of one command line: one, or a pair.
pub struct Runs {
    jobs: Vec<Job>,
    pair: Option<Pair>,
    /// Of the names that the jobs write under.
    claims: Vec<fsio::Claim>,
}

impl Runs {
    /// Resolves what was typed. Of an interrupted pair the names are taken over.
    pub fn of(typed: &Typed) -> anyhow::Result<Self> {
        let mut runs = resolve_runs(typed, &stamp())?;
        let pair = match &runs[..] {
            [high, low] => Pair::find(high, low)?,
            _ => None,
        };
        if let Some(pair) = &pair {
            runs = resolve_runs(typed, &pair.record.stamp)?;
        }
        Ok(Self { jobs: Job::several(runs)?, pair, claims: Vec::new() })
    }

    pub fn first(&self) -> &Job {
        &self.jobs[0]
    }

    /// A verb for each run in turn; the first code that is not success ends it.
    pub fn each(&self, verb: impl Fn(&Job) -> anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
        for job in &self.jobs {
            if let (true, Some(level)) = (job.of_pair, &job.config.noise_level) {
                println!("{level} noise:");
            }
            let code = verb(job)?;
            if code != ExitCode::SUCCESS {
                return Ok(code);
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Finds wrong what can be found before the first hour is spent, and gets what is missing and can be had, for every
    /// run that is still to be done. In the end the names of the runs are theirs alone.
    pub fn get_ready(&mut self) -> anyhow::Result<()> {
        // Cheap things first: nothing is downloaded for a job whose dataset is misspelled.
        self.first().dataset_path()?;
        if let Some(pair) = &self.pair {
            pair.check_job(self.first())?;
        }
        for job in self.jobs.iter().filter(|job| self.standing(job).is_none_or(|s| !s.finished())) {
            weights::check_save_merged(job)?;
            save::check_places(&job.config)?;
            job.config.resume.as_deref().map_or(Ok(()), state::require)?;
            if let Some(path) = &job.config.network_weights {
                weights::start_from(path, &job.config)?;
            }
            let seed = job.config.seed.unwrap_or_default();
            TrainSettings::from_config(&job.config, &job.model, seed)?;
            preview::prompts(job)?;
            weights::open_dits(job)?;
            weights::fetch_lightning(job)?;
            job.dits().iter().try_for_each(|dit| weights::check_merges(job, dit))?;
            weights::check_fast(&job.config, &job.exec()?)?;
        }
        for job in &mut self.jobs {
            self.claims.extend(claims::claim(job)?);
        }
        Ok(())
    }

    /// Refuses, before anything is encoded, a dataset whose largest batch will not fit; says what it will take where it
    /// does.
    pub fn foresee(&self, prepared: &Prepared) -> anyhow::Result<()> {
        for job in self.jobs.iter().filter(|job| self.standing(job).is_none_or(|s| !s.finished())) {
            if let Some(said) = plan::foreseen(job, prepared)? {
                job.progress.say(&said);
            }
        }
        Ok(())
    }

    /// Refuses a disk without room for the checkpoints of every run that is still to be done; says what they will take.
    pub fn check_disk(&self, prepared: &Prepared) -> anyhow::Result<()> {
        let batches = prepared.buckets().iter().map(|b| b.batches() as u64).sum();
        let Some(names) = train::names(self.first())?.filter(|_| batches > 0) else { return Ok(()) };
        let mut writes = Vec::new();
        for job in &self.jobs {
            let state = match self.standing(job) {
                Some(Standing::Finished) => continue,
                Some(Standing::From(state)) => Some(state),
                Some(Standing::New) | None => None,
            };
            writes.push(train::writes(job, batches, state.as_deref())?);
        }
        if !writes.is_empty() {
            self.first().progress.say(&disk::check(&names.output_dir, &writes)?);
        }
        Ok(())
    }

    pub fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// Trains what is to be trained on a surveyed dataset whose caches are complete.
    pub fn train(&self, prepared: &mut Prepared) -> anyhow::Result<ExitCode> {
        let Some(pair) = &self.pair else {
            // A pair without a place to save ends here too, where the trainer says so.
            weights::save_merged(self.first())?;
            return Ok(train::train(self.first(), prepared, None)?.code());
        };
        let say = |line: String| self.first().progress.say(&line);
        pair.begin()?;
        say(pair.announcement());
        let mut loras = Vec::new();
        for (number, job) in self.jobs.iter().enumerate() {
            let level = job.config.noise_level.clone().unwrap_or_default();
            let head = format!("expert {} of 2, {level} noise: ", number + 1);
            let names = names(job)?;
            weights::save_merged(job)?;
            let ended = match pair.standing(&level, &names) {
                Standing::Finished => {
                    say(format!("{head}finished before, not trained again"));
                    Ended::Finished(Some(names.final_file()))
                }
                Standing::From(state) => {
                    say(format!("{head}going on from {}", state.display()));
                    train::train(job, prepared, Some(state))?
                }
                Standing::New => {
                    say(format!("{head}from the start"));
                    train::train(job, prepared, None)?
                }
            };
            let Ended::Finished(lora) = ended else {
                return Ok(ended.code());
            };
            pair.finish(&level)?;
            if !job.config.save_state {
                // Those that were only written against a kill.
                let asked = job.config.save_state_on_train_end.then(|| names.final_state());
                names.remove_states(asked.as_deref())?;
            }
            loras.extend(lora.map(|lora| format!("{level} noise: {}", lora.display())));
            if job.stopped() && number == 0 {
                say("stopped between the experts; run the same command again to go on with the low one".into());
                return Ok(ExitCode::from(130));
            }
        }
        say(format!("both experts are trained:\n  {}", loras.join("\n  ")));
        Ok(ExitCode::SUCCESS)
    }

    fn standing(&self, job: &Job) -> Option<Standing> {
        let pair = self.pair.as_ref()?;
        Some(pair.standing(job.config.noise_level.as_deref()?, &names(job).ok()?))
    }
}

/// Where an expert of a pair stands.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    New,
    /// Its last state.
    From(PathBuf),
    Finished,
}

impl Standing {
    fn finished(&self) -> bool {
        *self == Standing::Finished
    }
}

/// A pair of runs and its record on disk.
struct Pair {
    path: PathBuf,
    record: Record,
    /// The record was there already, unfinished.
    interrupted: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    stamp: String,
    /// What the pair was begun for: another job of the same name must not take its LoRA for its own.
    template: Option<String>,
    dataset_config: Option<PathBuf>,
    /// Experts whose LoRA is finished.
    finished: Vec<String>,
}

/// Options that both experts must have in common: caches are made and checked once for both.
const SHARED: &[&str] = &[
    "task",
    "output_dir",
    "dataset_config",
    "vae",
    "t5",
    "clip",
    "vae_dtype",
    "fp8_t5",
    "musubi_compat",
    "i2v_images_as_t2v",
    "allow_missing_captions",
    "allow_bad_media",
    "device",
];

impl Pair {
    /// The interrupted pair of this name, or a new one; `None` where there is no place to save, which only planning and
    /// caching can do without.
    fn find(high: &Resolved, low: &Resolved) -> anyhow::Result<Option<Self>> {
        let values = |r: &Resolved| serde_json::to_value(&r.config);
        let (a, b) = (values(high)?, values(low)?);
        if let Some(key) = SHARED.iter().find(|key| a[**key] != b[**key]) {
            return Err(UserError::usage(format!(
                "the two experts differ in {key} ({} and {}), and a pair shares its dataset and caches",
                a[*key], b[*key]
            ))
            .hint("train them one after the other with --noise_level high and --noise_level low")
            .into());
        }
        let (Some(dir), Some(_)) = (&high.config.output_dir, &high.config.output_name) else {
            return Ok(None);
        };
        let path = dir.join(format!("{}-both.json", high.base_name));
        if let Some(record) = Record::read(&path)?.filter(|record| record.finished.len() < 2) {
            return Ok(Some(Self { path, record, interrupted: true }));
        }
        let RunConfig { template, dataset_config, .. } = &high.config;
        let (high, low) = (&high.config.output_name, &low.config.output_name);
        let taken = [high, low].into_iter().flatten().any(|name| Names::new(dir, name).final_file().exists());
        // A second pair within a minute must not take the first one's files for its own.
        let stamp = if taken { chrono::Local::now().format(claims::SECOND).to_string() } else { stamp() };
        let (template, dataset_config) = (template.clone(), dataset_config.clone());
        let record = Record { stamp, template, dataset_config, finished: Vec::new() };
        Ok(Some(Self { path, record, interrupted: false }))
    }

    /// Refuses to go on with a pair that was begun for something else.
    fn check_job(&self, job: &Job) -> Result<(), UserError> {
        let show = |what: Option<String>| what.unwrap_or_else(|| "none".into());
        let path = |path: &Option<PathBuf>| show(path.as_ref().map(|p| p.display().to_string()));
        let (then, now) = (&self.record, &job.config);
        for (what, then, now) in [
            ("template", show(then.template.clone()), show(now.template.clone())),
            ("dataset", path(&then.dataset_config), path(&now.dataset_config)),
        ] {
            if then != now {
                return Err(UserError::new(format!(
                    "the unfinished pair of {} was begun with the {what} {then}, this command has {now}",
                    self.record.stamp
                ))
                .hint(format!(
                    "give another --output_name, or delete {} to start over under this one",
                    self.path.display()
                )));
            }
        }
        Ok(())
    }

    fn standing(&self, level: &str, names: &Names) -> Standing {
        // The LoRA counts too: a kill can come between it and the record.
        if self.recorded(level) || (self.interrupted && names.final_file().is_file()) {
            return Standing::Finished;
        }
        match names.latest_state().filter(|_| self.interrupted) {
            Some(state) => Standing::From(state),
            None => Standing::New,
        }
    }

    fn recorded(&self, level: &str) -> bool {
        // Read again: the first expert may have been finished by this very process.
        let record = Record::read(&self.path).ok().flatten().unwrap_or_else(|| self.record.clone());
        record.stamp == self.record.stamp && record.finished.iter().any(|l| l == level)
    }

    fn begin(&self) -> anyhow::Result<()> {
        match self.interrupted {
            true => Ok(()),
            false => self.record.write(&self.path),
        }
    }

    fn finish(&self, level: &str) -> anyhow::Result<()> {
        let mut record = Record::read(&self.path)?.unwrap_or_else(|| self.record.clone());
        if !record.finished.iter().any(|l| l == level) {
            record.finished.push(level.to_owned());
        }
        record.write(&self.path)
    }

    fn announcement(&self) -> String {
        match self.interrupted {
            false => {
                "training both experts: high noise, then low noise; the same command goes on after an interruption"
                    .into()
            }
            true => format!(
                "going on with the pair of {} (to start over instead, delete {} or give another --output_name)",
                self.record.stamp,
                self.path.display()
            ),
        }
    }
}

impl Record {
    fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            // A place that cannot be is complained of by whoever writes there.
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
            Err(e) => return Err(fsio::explain(e, path)),
        };
        let record = serde_json::from_slice(&text).map_err(|e| {
            UserError::new(format!("{} is not the record of a pair of runs: {e}", path.display()))
                .hint("delete it to start over, or give another --output_name")
        })?;
        Ok(Some(record))
    }

    fn write(&self, path: &Path) -> anyhow::Result<()> {
        fsio::write_bytes(path, &serde_json::to_vec_pretty(self)?)
    }
}

fn names(job: &Job) -> anyhow::Result<Names> {
    let c = &job.config;
    let (dir, name) = c.output_dir.as_ref().zip(c.output_name.as_ref()).context("a pair has names")?;
    Ok(Names::new(dir, name))
}
