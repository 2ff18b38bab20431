//! `wan-train check`: everything that can be known before anything is loaded. Settings, paths, media, captions; every
//! bucket with its counts; how long it will take and what it needs. All that is wrong is listed at once.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use wan_models::arch::Role;

use super::buckets::Bucket;
use super::cache::Prepared;
use super::job::Job;
use super::pair::Runs;
use super::{plan, preview, save, weights};
use crate::cache::{BucketKey, CacheReport};
use crate::config::SHARED;
use crate::data::{self, repair, Verdict};
use crate::error::{wrong, UserError};
use crate::fsio;
use crate::loader::Source;
use crate::report::{progress, Table};
use crate::train::{Expert, TrainSettings};

const GIB: f64 = (1u64 << 30) as f64;

pub fn run(runs: &Runs, fix: bool) -> anyhow::Result<ExitCode> {
    let job = runs.first();
    let mut faults = Faults::default();
    if fix {
        faults.catch(repair_dataset(job));
    }
    let mut sources = Vec::new();
    for job in runs.jobs() {
        sources.push(models(job, &mut faults));
        faults.catch(weights::check_save_merged(job).map_err(Into::into));
        faults.catch(output_place(job));
        faults.catch(preview::check(job));
    }
    if let Some(buckets) = faults.catch(Prepared::new(job, false)).and_then(|p| dataset(&p, &mut faults)) {
        for (job, source) in runs.jobs().iter().zip(&sources) {
            if let Some(settings) = faults.catch(settings(job)) {
                faults.catch(cost(job, &settings, &buckets, source));
            }
        }
    } else {
        runs.jobs().iter().for_each(|job| drop(faults.catch(settings(job))));
    }
    faults.conclude()
}

/// What is wrong, in the order in which it was found, each thing once.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn catch<T>(&mut self, result: anyhow::Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(e) => {
                let said = format!("{e:#}");
                if !self.0.contains(&said) {
                    self.0.push(said);
                }
                None
            }
        }
    }

    fn conclude(self) -> anyhow::Result<ExitCode> {
        match self.0.len() {
            0 => {
                println!("nothing is wrong");
                Ok(ExitCode::SUCCESS)
            }
            n => {
                let list = self.0.join("\n").replace('\n', "\n  ");
                Err(UserError::new(format!("{}:\n  {list}", wrong(n))).into())
            }
        }
    }
}

fn settings(job: &Job) -> anyhow::Result<TrainSettings> {
    let settings = TrainSettings::from_config(&job.config, &job.model, job.config.seed.unwrap_or_default())?;
    settings.notes.iter().for_each(|note| println!("note: {note}"));
    Ok(settings)
}

/// The model files: there, readable by their headers, and of the right task.
fn models(job: &Job, faults: &mut Faults) -> Vec<Source> {
    let c = &job.config;
    let mut table = Table::new(["model file", "path", "size"]);
    let mut opened = Vec::new();
    for dit in job.dits() {
        let Some(source) = faults.catch(weights::open_dit(job, &dit)) else { continue };
        let level = dit.expert.map(Expert::name).or(c.noise_level.as_deref());
        let level = level.map_or(String::new(), |level| format!(" ({level} noise)"));
        let path = source.path().display().to_string();
        table.row([format!("DiT{level}"), path, fsio::human(source.total_bytes())]);
        opened.push(source);
    }
    let (_, clip) = job.conditions();
    let others = [("vae", Role::Vae, &c.vae, true), ("t5", Role::T5, &c.t5, true), ("clip", Role::Clip, &c.clip, clip)];
    for (option, role, path, _) in others.into_iter().filter(|(.., needed)| *needed) {
        let opened = job
            .model_file(option, role, path.as_ref())
            .and_then(|path| Ok((Source::open_by(&path, c.reading())?, path)));
        if let Some((source, path)) = faults.catch(opened) {
            table.row([
                crate::hub::role_name(role).into(),
                path.display().to_string(),
                fsio::human(source.total_bytes()),
            ]);
        }
    }
    for dit in job.dits() {
        let what = dit.expert.map_or("merged LoRA".into(), |expert| format!("merged LoRA ({} noise)", expert.name()));
        for file in dit.merges.iter().filter(|file| Path::new(file).is_file()) {
            let size = fsio::human(std::fs::metadata(file).map_or(0, |m| m.len()));
            table.row([what.clone(), file.clone(), size]);
        }
        // A Lightning LoRA that is missing will be downloaded.
        if weights::lightning_to_fetch(job, &dit).is_none() {
            faults.catch(weights::check_merges(job, &dit));
        } else {
            table.row([what, "will be downloaded".into(), String::new()]);
        }
    }
    if !table.is_empty() {
        println!("{}", table.render());
    }
    opened
}

/// Whether checkpoints can be written, without making anything.
fn output_place(job: &Job) -> anyhow::Result<()> {
    let c = &job.config;
    if c.output_dir.is_none() || c.output_name.is_none() {
        return Err(save::nowhere());
    }
    save::check_places(c)
}

/// What is wrong with the media, and the buckets; `None` where there is nothing to train on.
fn dataset(prepared: &Prepared, faults: &mut Faults) -> Option<Vec<Bucket>> {
    let (scan, survey) = (&prepared.scan, &prepared.survey);
    let told: Vec<_> = scan.findings.iter().filter(|f| f.verdict != Verdict::Used).cloned().collect();
    if !told.is_empty() {
        println!("{}", data::table(prepared.dataset(), &told));
    }
    faults.catch(scan.check());
    println!("{}", CacheReport::of(scan, survey).totals());
    println!("to be encoded: {} latents, {} captions\n", survey.latents_to_make(), survey.texts_to_make());

    let buckets = prepared.buckets();
    (!buckets.is_empty()).then_some(buckets)
}

fn tokens(job: &Job, key: BucketKey) -> usize {
    let [_, f, h, w] = plan::geometry(job).shape((key.width as u32, key.height as u32), key.frames);
    job.model.arch.tokens([f, h, w]).unwrap_or_default()
}

/// The buckets with what a step of each takes, and the whole run.
fn cost(job: &Job, settings: &TrainSettings, buckets: &[Bucket], sources: &[Source]) -> anyhow::Result<()> {
    let sizes: Vec<_> = buckets.iter().map(|b| (b.key, b.largest_batch())).collect();
    let forecast = plan::forecast(job, settings, &sizes, sources);
    let seconds = |i: usize| forecast.as_ref().ok().and_then(|f| Some(f.as_ref()?.seconds[i]));
    match job.config.noise_level.as_deref() {
        Some(SHARED) => println!("one LoRA over both experts:"),
        Some(level) => println!("{level} noise:"),
        None => {}
    }
    let mut table =
        Table::new(["dataset", "size", "frames", "items", "repeats", "batches", "tokens", "s/step (predicted)"]);
    for (i, b) in buckets.iter().enumerate() {
        table.row([
            (b.dataset + 1).to_string(),
            format!("{}x{}", b.key.width, b.key.height),
            b.key.frames.to_string(),
            b.items.to_string(),
            b.repeats.to_string(),
            b.batches().to_string(),
            tokens(job, b.key).to_string(),
            seconds(i).map_or("-".into(), |s| format!("{s:.2}")),
        ]);
    }
    print!("{}", table.render());
    let batches: u64 = buckets.iter().map(|b| b.batches() as u64).sum();
    let (steps, epochs) = (settings.total_steps(batches), settings.total_epochs(batches));
    let samples: usize = buckets.iter().map(Bucket::samples).sum();
    println!("an epoch: {samples} samples in {batches} batches; the run: {epochs} epochs, {steps} steps");
    let Some(forecast) = forecast? else {
        println!("on the CPU: no time is predicted\n");
        return Ok(());
    };
    let epoch: f64 = buckets.iter().zip(&forecast.seconds).map(|(b, s)| b.batches() as f64 * s).sum();
    let run = epoch * (steps * settings.accumulation) as f64 / batches.max(1) as f64;
    let card = if forecast.assumed { " (of an RTX 3090: there is no card here)" } else { "" };
    println!(
        "predicted: {} an epoch, {} the run; {:.1} of {:.1} GiB on the card{card}\n",
        progress::clock(Duration::from_secs_f64(epoch)),
        progress::clock(Duration::from_secs_f64(run)),
        forecast.device_bytes as f64 / GIB,
        forecast.budget as f64 / GIB
    );
    Ok(())
}

/// `--fix`: what can be put right in the dataset file without a question, with its comments kept.
fn repair_dataset(job: &Job) -> anyhow::Result<()> {
    let path = job.dataset_path()?;
    let text = data::read_text(&path)?;
    let (fixed, changes) = repair::repair(&text, &path)?;
    for change in &changes {
        println!("fixed {}: {change}", path.display());
    }
    match changes.is_empty() {
        true => println!("--fix: nothing in {} that can be put right by itself", path.display()),
        false => fsio::write_bytes(&path, fixed.as_bytes())?,
    }
    Ok(())
}
