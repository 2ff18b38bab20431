//! Checkpoints: the LoRA as ComfyUI loads it, and the full state for an exact resume; names and retention.

use std::path::Path;

use serde_json::{json, Value};
use wan_models::adapter::Adapters;

use super::job::Job;
use crate::cache::CacheIndex;
use crate::checkpoint::metadata::{self, Moment, RunFacts};
use crate::checkpoint::{save_dtype, write_lora, Form, ModuleOut, Names, Retention};
use crate::config::RunConfig;
use crate::data::{DatasetConfig, Entry, Kind};
use crate::error::UserError;
use crate::fsio;
use crate::train::{Saved, Saver, Trainer, When};

pub fn nowhere() -> anyhow::Error {
    UserError::usage("where to save is not given")
        .hint("add --output_dir DIR and --output_name NAME, or use a template")
        .into()
}

/// Refuses directories that cannot be made or written to, without making any.
pub fn check_places(c: &RunConfig) -> anyhow::Result<()> {
    for (option, dir) in [("--output_dir", &c.output_dir), ("--logging_dir", &c.logging_dir)] {
        let Some(dir) = dir else { continue };
        let there = std::path::absolute(dir)?;
        let there = there.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
        let (what, hint) = match there.metadata() {
            Ok(m) if !m.is_dir() => ("is a file", "choose another directory"),
            Ok(m) if m.permissions().readonly() => {
                ("cannot be written to", "choose another directory, or change its mode")
            }
            _ => continue,
        };
        let what = format!("{option} {}: {} {what}", dir.display(), there.display());
        return Err(UserError::new(what).hint(hint).into());
    }
    Ok(())
}

/// Writes the checkpoints of a run.
pub struct Checkpoints {
    config: RunConfig,
    names: Names,
    retention: Retention,
    facts: RunFacts,
    form: Form,
}

impl Checkpoints {
    /// Makes the output directory and finds out now, not after hours, whether it can be written.
    pub fn new(job: &Job, c: &RunConfig, dataset: &DatasetConfig, index: &CacheIndex) -> anyhow::Result<Self> {
        let (Some(dir), Some(name)) = (&c.output_dir, &c.output_name) else {
            return Err(nowhere());
        };
        save_dtype(c.save_precision.as_deref())?;
        fsio::ensure_writable_dir(dir)?;
        fsio::clean_leftovers(dir);
        let retention = Retention {
            save_every_n_epochs: c.save_every_n_epochs,
            save_last_n_epochs: c.save_last_n_epochs,
            save_last_n_epochs_state: c.save_last_n_epochs_state,
            save_every_n_steps: c.save_every_n_steps,
            save_last_n_steps: c.save_last_n_steps,
            save_last_n_steps_state: c.save_last_n_steps_state,
        };
        let facts = RunFacts {
            model_version: job.model.version.clone(),
            session_id: rand::random::<u32>().into(),
            started_at: now(),
            num_train_items: index.entries_per_epoch() as u64,
            num_batches_per_epoch: index.batches_per_epoch() as u64,
            seed: c.seed.unwrap_or_default(),
            optimizer: format!("{}({})", c.optimizer_type, c.optimizer_args.join(",")),
            expert: c.expert_tag(),
            datasets: dataset.entries.iter().map(describe).collect(),
            ..RunFacts::default()
        };
        let form = if c.lora_format == "kohya" { Form::Kohya } else { Form::Comfy };
        Ok(Self { config: c.clone(), names: Names::new(dir, name), retention, facts, form })
    }

    fn write_adapter(&mut self, path: &Path, when: When, trainer: &Trainer) -> anyhow::Result<()> {
        let params = trainer.params();
        let layout = params.layout();
        let mut modules = Vec::with_capacity(layout.sites.len());
        for (site, scale) in layout.sites.iter().zip(&layout.scales) {
            if let Some(adapter) = params.get(&site.name) {
                modules.push(ModuleOut::of(&site.name, adapter, scale.alpha));
            }
        }
        self.facts.num_epochs = trainer.facts().total_epochs;
        self.facts.max_train_steps = trainer.facts().total_steps;
        let position = trainer.position();
        let epoch = match when {
            When::Epoch(epoch) => epoch,
            When::Step(_) | When::Stop(_) | When::End => position.epoch,
        };
        let moment = Moment { steps: position.step, epoch, at: now() };
        let metadata = metadata::build(&self.config, &self.facts, &moment);
        write_lora(path, &modules, self.form, save_dtype(self.config.save_precision.as_deref())?, metadata)
    }
}

impl Saver for Checkpoints {
    #[tracing::instrument(level = "debug", skip_all, name = "save")]
    fn save(&mut self, when: When, state: bool, trainer: &Trainer) -> anyhow::Result<Saved> {
        let (lora, state_dir) = match when {
            When::Epoch(epoch) => (self.names.epoch_file(epoch), self.names.epoch_state(epoch)),
            When::Step(step) | When::Stop(step) => (self.names.step_file(step), self.names.step_state(step)),
            When::End => (self.names.final_file(), self.names.final_state()),
        };
        self.write_adapter(&lora, when, trainer)?;
        let mut saved = Saved { lora: Some(lora), ..Saved::default() };
        if state {
            trainer.snapshot()?.save(&state_dir)?;
            saved.state = Some(state_dir);
        }
        let due = |step: u64| self.retention.save_every_n_steps.is_some_and(|n| n > 0 && step.is_multiple_of(n));
        match when {
            When::Stop(step) if state && !due(step) => self.names.mark_interrupt(step)?,
            When::Step(step) => self.names.unmark_interrupt(step),
            _ => {}
        }
        saved.removed = match when {
            When::Epoch(epoch) => self.retention.after_epoch(&self.names, epoch)?,
            When::Step(step) => self.retention.after_step(&self.names, step)?,
            When::Stop(_) => Vec::new(),
            When::End => self.names.remove_interrupts(),
        };
        Ok(saved)
    }
}

fn now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A dataset as the metadata records it: base names only, since paths say more about a user than a file should.
fn describe(entry: &Entry) -> Value {
    let base = entry.source.path().file_name().map(|n| n.to_string_lossy().into_owned());
    let mut value = json!({
        "resolution": [entry.resolution.0, entry.resolution.1],
        "caption_extension": entry.caption_extension,
        "batch_size_per_device": entry.batch_size,
        "num_repeats": entry.num_repeats,
        "enable_bucket": entry.enable_bucket,
        "bucket_no_upscale": entry.bucket_no_upscale,
        "source": base,
        "has_control": entry.control_directory.is_some(),
    });
    if entry.kind == Kind::Video {
        value["frame_extraction"] = json!(entry.frame_extraction);
        value["frame_stride"] = json!(entry.frame_stride);
        value["frame_sample"] = json!(entry.frame_sample);
        value["target_frames"] = json!(entry.target_frames);
        value["max_frames"] = json!(entry.max_frames);
        value["source_fps"] = json!(entry.source_fps);
    }
    value
}

/// What to type to go on: the same command, with `--resume` where a state is named.
pub fn resume_command(state: Option<&Path>) -> String {
    let mut words: Vec<String> = std::env::args().collect();
    if let Some(at) = words.iter().position(|w| w == "--resume") {
        words.drain(at..(at + 2).min(words.len()));
    }
    words.retain(|w| !w.starts_with("--resume="));
    words.extend(state.into_iter().flat_map(|state| ["--resume".into(), state.display().to_string()]));
    let quoted = |w: String| match w.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c)) {
        true => w,
        false => format!("'{}'", w.replace('\'', "'\\''")),
    };
    words.into_iter().map(quoted).collect::<Vec<_>>().join(" ")
}
