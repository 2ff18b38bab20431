//! `wan-train train`: the index of what is cached, the plan, the weights, the loop, the checkpoints.

use std::collections::BTreeMap;
use std::process::ExitCode;

use wan_models::wan::{Numerics, WanModel};

use super::cache::Prepared;
use super::job::Job;
use super::plan;
use super::save::{self, Checkpoints};
use super::watch::Watch;
use super::weights;
use crate::adapter::start;
use crate::cache::CacheIndex;
use crate::checkpoint::store::{newest_checkpoint, require_file};
use crate::checkpoint::{Identity, LoraFile, TrainState};
use crate::config::{Layer, RunConfig};
use crate::fsio;
use crate::residency::{Residency, ResidencySpec};
use crate::train::{state, Outcome, Parts, TrainSettings, Trainer};

pub fn run(job: &Job) -> anyhow::Result<ExitCode> {
    job.catch_interrupts();
    let mut prepared = Prepared::new(job, false)?;
    prepared.table(job);
    prepared.scan.check()?;
    train(job, &mut prepared)
}

/// Trains on a surveyed dataset whose caches are complete.
pub fn train(job: &Job, prepared: &mut Prepared) -> anyhow::Result<ExitCode> {
    let say = |line: &str| job.progress.say(line);
    let (config, resumed) = continued(job)?;
    let seed = match (config.seed, &resumed) {
        (Some(seed), _) => seed,
        (None, Some((_, state))) => state::saved_seed(state).unwrap_or_default(),
        (None, None) => rand::random::<u32>().into(),
    };
    let config = RunConfig { seed: Some(seed), ..config };
    let settings = TrainSettings::from_config(&config, &job.model, seed)?;
    settings.notes.iter().for_each(|note| say(&format!("note: {note}")));
    let spec = ResidencySpec {
        blocks_to_swap: config.blocks_to_swap as usize,
        ring_size: config.block_swap_ring_size as usize,
    };
    spec.check(job.model.arch.num_layers)?;

    let index = CacheIndex::build(&mut prepared.survey)?;
    let checkpoints = Checkpoints::new(job, &config, prepared.dataset(), &index)?;
    let start_weights = match &config.network_weights {
        Some(path) => {
            require_file("--resume_from", path)?;
            Some((path.clone(), LoraFile::open(path)?))
        }
        None => None,
    };

    let source = weights::open_dit(job)?;
    let plan = plan::for_training(job, &config, &settings, &index, &source)?;
    say(&plan.table());
    let (rest, blocks) = weights::load(job, &config, &source)?;
    if job.stopped() {
        say("stopped before the first step: nothing was trained, nothing was written");
        return Ok(ExitCode::from(130));
    }

    let exec = job.exec()?;
    let numerics = if config.musubi_compat { Numerics::musubi() } else { Numerics::default() };
    let rest = rest.map(&mut |t| Ok(t.to_device(exec.device())?))?;
    let model = WanModel::new(job.model.arch.clone(), rest, numerics)?;
    let (residency, note) = Residency::on(&exec, blocks, spec)?;
    note.iter().for_each(|note| say(&format!("note: {note}")));
    let save_plan = plan.save_plan();
    let parts = Parts { exec: &exec, model: &model, blocks: &residency, save_plan: &save_plan, items: &index };
    let identity = Identity {
        task: config.task.clone(),
        base: source.path().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        ..Identity::default()
    };
    let mut trainer = Trainer::new(parts, settings, identity, serde_json::to_value(&config)?)?;
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
    let mut watch = Watch::new(job, &config, resumed_after)?;
    let outcome = trainer.run(&mut watch, &mut { checkpoints }, &job.stop);
    watch.close();
    conclude(job, &config, &watch, outcome?)
}

/// The configuration to go by, and the state to go on from. A resumed run keeps its names, so that it writes where it
/// wrote before.
fn continued(job: &Job) -> anyhow::Result<(RunConfig, Option<(std::path::PathBuf, TrainState)>)> {
    let mut config = job.config.clone();
    let Some(dir) = config.resume.clone() else {
        if config.template.is_some() && config.network_weights.is_none() {
            let newest = newest_checkpoint(&config.base_dir.join("resume_checkpoints"))?;
            if let Some(path) = &newest {
                job.progress.say(&format!("note: taking {} from resume_checkpoints", path.display()));
            }
            config.network_weights = newest;
        }
        return Ok((config, None));
    };
    let state = TrainState::load(&dir)?;
    if let Ok(saved) = serde_json::from_value::<RunConfig>(state.config.clone()) {
        let typed = |name: &str| matches!(job.resolved.origin.get(name), Some(Layer::Flag | Layer::File(_)));
        if !typed("output_name") {
            config.output_name = saved.output_name;
        }
        if !typed("output_dir") && !typed("run_dir") {
            config.output_dir = saved.output_dir;
        }
        if !typed("logging_dir") && !typed("run_dir") {
            config.logging_dir = saved.logging_dir;
        }
    }
    Ok((config, Some((dir, state))))
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
    job.progress.say(&format!("learning rate: {}", lr.join(", ")));
}

fn conclude(job: &Job, config: &RunConfig, watch: &Watch, outcome: Outcome) -> anyhow::Result<ExitCode> {
    let say = |line: String| job.progress.say(&line);
    let code = match outcome {
        Outcome::Finished { step, lora } => {
            say(format!("finished after {step} steps"));
            if let Some(lora) = lora {
                let size = std::fs::metadata(&lora).map(|m| m.len()).unwrap_or_default();
                say(format!("LoRA:       {} ({})", lora.display(), fsio::human(size)));
                say("            copy it to ComfyUI/models/loras/".into());
            }
            ExitCode::SUCCESS
        }
        Outcome::Stopped { step, state } => {
            say(format!("stopped after step {step}"));
            if let Some(state) = state {
                say(format!("to go on:   {}", save::resume_command(&state)));
            }
            ExitCode::from(130)
        }
    };
    if let Some((events, lines, curve)) = watch.places() {
        say(format!("TensorBoard: {}", events.display()));
        say(format!("step log:   {}", lines.display()));
        say(format!("loss curve: {}", curve.display()));
    }
    let _ = config;
    Ok(code)
}
