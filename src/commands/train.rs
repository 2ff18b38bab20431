//! `wan-train train`: the index of what is cached, the plan, the weights, the loop, the checkpoints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use wan_models::wan::WanModel;

use super::cache::Prepared;
use super::disk::Writes;
use super::job::Job;
use super::pair::Runs;
use super::plan;
use super::preview;
use super::save::{self, Checkpoints};
use super::watch::{Background, Watch};
use super::weights::{self, Loaded};
use crate::adapter::start;
use crate::cache::CacheIndex;
use crate::checkpoint::state::{peek, saved_config};
use crate::checkpoint::store::newest_checkpoint;
use crate::checkpoint::{Identity, LoraFile, Names, TrainState};
use crate::config::{Layer, RunConfig};
use crate::error::UserError;
use crate::fsio;
use crate::loader::Source;
use crate::residency::Residency;
use crate::train::{state, Frozen, Models, Outcome, Parts, TrainSettings, Trainer};

pub fn run(runs: &mut Runs) -> anyhow::Result<ExitCode> {
    runs.first().catch_interrupts();
    runs.get_ready()?;
    let job = runs.first();
    let mut prepared = Prepared::new(job, false)?;
    prepared.table(job);
    prepared.scan.check()?;
    runs.check_disk(&prepared)?;
    runs.train(&mut prepared)
}

/// How a run ended.
pub enum Ended {
    /// With this LoRA.
    Finished(Option<PathBuf>),
    Stopped,
}

impl Ended {
    pub fn code(&self) -> ExitCode {
        match self {
            Ended::Finished(_) => ExitCode::SUCCESS,
            Ended::Stopped => ExitCode::from(130),
        }
    }
}

/// Trains on a surveyed dataset whose caches are complete; goes on from `state` if there is one.
#[tracing::instrument(level = "debug", skip_all, name = "train")]
pub fn train(job: &Job, prepared: &mut Prepared, state: Option<PathBuf>) -> anyhow::Result<Ended> {
    let say = |line: &str| job.progress.say(line);
    let (mut config, resumed) = continued(job, state)?;
    with_states(job, &mut config);
    let seed = match (config.seed, &resumed) {
        (Some(seed), _) => seed,
        (None, Some((_, state))) => state::saved_seed(state).unwrap_or_default(),
        (None, None) => rand::random::<u32>().into(),
    };
    let config = RunConfig { seed: Some(seed), ..config };
    let settings = settings(job, &config, seed)?;
    settings.notes.iter().for_each(|note| say(&format!("note: {note}")));

    let index = CacheIndex::build(&mut prepared.survey)?;
    let checkpoints = Checkpoints::new(job, &config, prepared.dataset(), &index)?;
    let start_weights = match &config.network_weights {
        Some(path) => Some((path.clone(), weights::start_from(path, &config)?)),
        None => None,
    };

    let (dits, sources): (Vec<_>, Vec<_>) = weights::open_dits(job)?.into_iter().unzip();
    let exec = job.exec()?;
    weights::check_fast(&config, &exec)?;
    let mut plan = plan::for_training(job, &config, &settings, &exec, &index, &sources)?;
    let prompts = preview::prompts(job)?;
    let notes = preview::count(job, &settings, &mut plan, &prompts)?;
    say(&plan.table());
    notes.iter().for_each(|note| say(&format!("note: {note}")));
    let explain = |e| plan.explain(&exec, e);
    let previews = preview::prepare(job, &config, &settings, &exec, prompts).map_err(explain)?;
    let streamed = plan.residency().streamed(job.model.arch.num_layers);
    let numerics = config.numerics();
    let (mut loaded, mut keeping) = (Vec::with_capacity(dits.len()), Vec::new());
    for of in dits.iter().zip(&sources) {
        let weights = weights::load(job, &config, of, exec.device(), &streamed).map_err(explain)?;
        let Loaded { rest, blocks, keeping: this } = weights;
        keeping.extend(this);
        let model = WanModel::new(job.model.arch.clone(), rest, numerics).map_err(|e| explain(e.into()))?;
        let (residency, note) = Residency::on(&exec, blocks, plan.residency()).map_err(explain)?;
        note.iter().for_each(|note| say(&format!("note: {note}")));
        loaded.push((model, residency));
        if job.stopped() {
            say("stopped before the first step: nothing was trained, nothing was written");
            return Ok(Ended::Stopped);
        }
    }
    let frozen: Vec<Frozen> = loaded.iter().map(|(model, blocks)| Frozen { model, blocks }).collect();
    let models = match frozen[..] {
        [low, high] => Models::Two { high, low },
        [ref one, ..] => Models::One(*one),
        [] => anyhow::bail!("a run without a model"),
    };
    let save_plan = plan.save_plan();
    exec.plan_held(plan.held());
    let parts = Parts { exec: &exec, models, save_plan: &save_plan, items: &index };
    let base = base_name(&sources, settings.shared_boundary);
    let identity = Identity { task: config.task.clone(), base, ..Identity::default() };
    let trainer = Trainer::new(parts, settings, identity, serde_json::to_value(&config)?);
    let mut trainer = trainer.map_err(explain)?;
    if let Some((path, file)) = start_weights {
        let stored = stored(&file)?;
        let note = start::load(trainer.params(), &path.display().to_string(), &stored)?;
        say(&format!("starting from the weights of {}, with a fresh optimizer and schedule", path.display()));
        note.iter().for_each(|note| say(&format!("note: {note}")));
    }
    if let Some((dir, state)) = &resumed {
        let notes = trainer.restore(state, dir)?;
        notes.iter().for_each(|note| say(&format!("note: {note}")));
        say(&format!("resuming {} after step {}", dir.display(), trainer.position().step));
    }
    announce(job, &config, &trainer);

    let resumed_after = resumed.as_ref().map(|_| trainer.position().step);
    let dataset = prepared.report();
    let background = Background { exec: &exec, plan: &plan, dataset, previews };
    let mut watch = Watch::new(job, &config, resumed_after, background)?;
    let outcome = trainer.run(&mut watch, &mut { checkpoints }, &job.stop);
    watch.close();
    let outcome = outcome.map_err(explain)?;
    if let Outcome::Finished { .. } = outcome {
        keeping.into_iter().for_each(|keeping| keeping.finish(job));
    }
    plan.measured(&exec).iter().for_each(|line| say(line));
    Ok(conclude(job, &watch, outcome))
}

/// A pair has states at every checkpoint, which bound what a kill costs; of those that nobody asked for the last is kept.
fn with_states(job: &Job, config: &mut RunConfig) {
    if job.of_pair && !config.save_state {
        config.save_last_n_epochs_state.get_or_insert(1);
        config.save_last_n_steps_state.get_or_insert(0);
    }
}

fn settings(job: &Job, config: &RunConfig, seed: u64) -> Result<TrainSettings, UserError> {
    let mut settings = TrainSettings::from_config(config, &job.model, seed)?;
    settings.save.state |= job.of_pair;
    Ok(settings)
}

/// What `job` will write with `batches` batches an epoch, from `state` on if there is one.
pub fn writes(job: &Job, batches: u64, state: Option<&Path>) -> anyhow::Result<Writes> {
    let mut config = job.config.clone();
    with_states(job, &mut config);
    let settings = settings(job, &config, config.seed.unwrap_or_default())?;
    let done = state.or(config.resume.as_deref()).and_then(peek).unwrap_or_default();
    Writes::of(job, &config, &settings, batches, done)
}

/// What a state calls the models that it was trained on.
fn base_name(sources: &[Source], boundary: Option<f64>) -> String {
    let name = |s: &Source| s.path().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    match (sources, boundary) {
        ([low, high], Some(boundary)) => format!("{} and from {boundary} on {}", name(low), name(high)),
        _ => sources.first().map(name).unwrap_or_default(),
    }
}

/// The configuration to go by, and the state to go on from. A resumed run keeps its names, so that it writes where it
/// wrote before.
fn continued(job: &Job, state: Option<PathBuf>) -> anyhow::Result<(RunConfig, Option<(PathBuf, TrainState)>)> {
    let mut config = job.config.clone();
    let Some(dir) = state.or_else(|| config.resume.clone()) else {
        if config.template.is_some() && config.network_weights.is_none() {
            config.network_weights = from_resume_checkpoints(job)?;
        }
        return Ok((config, None));
    };
    let state = TrainState::load(&dir)?;
    let typed = |name: &str| matches!(job.resolved.origin.get(name), Some(Layer::Flag | Layer::File(_)));
    keep_names(&mut config, &state.config, typed);
    Ok((config, Some((dir, state))))
}

/// What `job` will write under; `None` where there is no place to save.
pub fn names(job: &Job) -> anyhow::Result<Option<Names>> {
    let mut config = job.config.clone();
    if let Some(dir) = config.resume.clone() {
        let typed = |name: &str| matches!(job.resolved.origin.get(name), Some(Layer::Flag | Layer::File(_)));
        keep_names(&mut config, &saved_config(&dir)?, typed);
    }
    Ok(config.output_dir.zip(config.output_name).map(|(dir, name)| Names::new(dir, name)))
}

/// Takes over the names that a state was saved under, unless they were `typed`. They are read one by one: the state may be
/// of a version with other options.
fn keep_names(config: &mut RunConfig, saved: &serde_json::Value, typed: impl Fn(&str) -> bool) {
    fn take<T: serde::de::DeserializeOwned>(saved: &serde_json::Value, name: &str, to: &mut T) {
        if let Some(value) = saved.get(name).and_then(|value| T::deserialize(value).ok()) {
            *to = value;
        }
    }
    if !typed("output_name") {
        take(saved, "output_name", &mut config.output_name);
    }
    if !typed("output_dir") && !typed("run_dir") {
        take(saved, "output_dir", &mut config.output_dir);
    }
    if !typed("logging_dir") && !typed("run_dir") {
        take(saved, "logging_dir", &mut config.logging_dir);
    }
}

/// The newest LoRA of `resume_checkpoints/` that may belong to this run: never another expert's, and for one of a pair
/// only a file that says whose it is.
fn from_resume_checkpoints(job: &Job) -> anyhow::Result<Option<PathBuf>> {
    let dir = job.config.base_dir.join("resume_checkpoints");
    let own = job.config.expert_tag();
    let fits = |path: &Path| {
        // A file that cannot be read is not passed over here: opening it says what is wrong with it.
        let expert = LoraFile::open(path).ok().and_then(|file| file.metadata().get("ss_expert").cloned());
        match (&own, &expert) {
            (Some(own), Some(expert)) => own == expert,
            (Some(_), None) => !job.of_pair,
            (None, _) => true,
        }
    };
    let newest = newest_checkpoint(&dir, fits)?;
    if let Some(path) = &newest {
        job.progress.say(&format!("note: taking {} from resume_checkpoints", path.display()));
    }
    Ok(newest)
}

fn stored(file: &LoraFile) -> anyhow::Result<BTreeMap<String, start::Stored>> {
    let mut all = BTreeMap::new();
    for name in file.modules() {
        if let Some(module) = file.module(name)? {
            all.insert(name.to_owned(), start::Stored { factors: module.factors, alpha: module.alpha });
        }
    }
    Ok(all)
}

/// The size of the run and its learning rate at the quarters, before the hours are spent.
fn announce(job: &Job, config: &RunConfig, trainer: &Trainer) {
    let facts = trainer.facts();
    let schedule = trainer.schedule();
    let at = |percent: u64| {
        let step = (facts.total_steps * percent / 100).min(facts.total_steps.saturating_sub(1));
        format!("{percent} % {:.3e}", schedule.lr(step, config.learning_rate))
    };
    let lr: Vec<String> = [0, 25, 50, 75, 100].into_iter().map(at).collect();
    job.progress.say(&format!(
        "training {} adapters ({} numbers) on {} samples: {} epochs of {} batches, {} steps, seed {}",
        facts.sites,
        facts.trainable,
        facts.samples_per_epoch,
        facts.total_epochs,
        facts.batches_per_epoch,
        facts.total_steps,
        trainer.settings().seed,
    ));
    if !trainer.settings().optimizer.own_rates() {
        job.progress.say(&format!("learning rate: {}", lr.join(", ")));
    }
    if let Some(boundary) = trainer.settings().shared_boundary {
        let from = (1e6 * boundary).round() / 1e3;
        job.progress.say(&format!(
            "one LoRA over both experts: a batch whose first timestep is at least {from} goes to the high-noise DiT, any other to the low-noise one"
        ));
    }
}

fn conclude(job: &Job, watch: &Watch, outcome: Outcome) -> Ended {
    let say = |line: String| job.progress.say(&line);
    let ended = match outcome {
        Outcome::Finished { step, lora } => {
            say(format!("finished after {step} steps"));
            watch.experts().into_iter().for_each(|(name, what)| say(format!("{name}: {what}")));
            if let Some(lora) = &lora {
                let size = std::fs::metadata(lora).map(|m| m.len()).unwrap_or_default();
                say(format!("LoRA:       {} ({})", lora.display(), fsio::human(size)));
                let both =
                    if job.config.is_shared() { ", and load it on the high- and on the low-noise model" } else { "" };
                say(format!("            copy it to ComfyUI/models/loras/{both}"));
                let report = lora.with_extension("html");
                if report.is_file() {
                    say(format!("report:     {}", report.display()));
                }
            }
            Ended::Finished(lora)
        }
        Outcome::Stopped { step, state } => {
            say(format!("stopped after step {step}"));
            if let Some(state) = state {
                // A pair finds its state by itself.
                let state = (!job.of_pair).then_some(&*state);
                say(format!("to go on:   {}", save::resume_command(state)));
            }
            Ended::Stopped
        }
    };
    if let Some((events, lines, curve)) = watch.places() {
        say(format!("TensorBoard: {}", events.display()));
        say(format!("step log:   {}", lines.display()));
        say(format!("loss curve: {}", curve.display()));
    }
    ended
}

#[cfg(test)]
mod tests {
    use super::{keep_names, RunConfig};

    #[test]
    fn names_are_kept_from_states_of_other_versions() {
        let saved = RunConfig {
            output_name: Some("cats".into()),
            output_dir: Some("elsewhere".into()),
            ..RunConfig::default()
        };
        let mut saved = serde_json::to_value(saved).unwrap();
        let options = saved.as_object_mut().unwrap();
        options.remove("sample_at_first").expect("an option there is");
        options.insert("an_option_of_later".into(), 1.into());
        let mut config = RunConfig::default();
        keep_names(&mut config, &saved, |name| name == "output_dir");
        assert_eq!(config.output_name.as_deref(), Some("cats"));
        assert_eq!(config.output_dir, None);
    }
}
