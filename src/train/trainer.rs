//! The loop: batches -> forward -> loss -> backward -> (every N-th batch) one optimizer step -> checkpoints.
//!
//! A run is a function of its settings, data and weights: order, noise, timesteps and dropout are keyed by (seed, epoch,
//! sample or step), the rate is a function of the step, and everything else that a step depends on is in
//! [`Trainer::snapshot`]. So a run that is killed and resumed from a state ends bit-equal to one that was not.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::time::Instant;

use anyhow::{anyhow, Context, Result};
use candle_core::DType;
use wan_kernels::adamw::clip_scale;
use wan_kernels::Exec;
use wan_models::wan::SavePlan;

use super::batch::{Assembler, Batch, Items};
use super::history::History;
use super::loss;
use super::models::{Frozen, Models};
use super::observe::{MicroStep, Observer, Outcome, RunFacts, Saver, Update, When};
use super::order;
use super::preview::At;
use super::scale::LossScale;
use super::settings::TrainSettings;
use crate::adapter::{norm, select, AdapterParams, Grads, StepAdapters};
use crate::checkpoint::{Identity, Position};
use crate::error::UserError;
use crate::optim::Optimizer;
use crate::schedule::{Schedule, ScheduleSpec};

/// What a run works with; lent by whoever loaded it.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    pub exec: &'a Exec,
    pub models: Models<'a>,
    /// What each block keeps between the passes.
    pub save_plan: &'a SavePlan,
    pub items: &'a dyn Items,
}

/// A run in progress.
pub struct Trainer<'a> {
    pub(super) parts: Parts<'a>,
    pub(super) settings: TrainSettings,
    pub(super) params: AdapterParams,
    pub(super) grads: Grads,
    pub(super) optimizer: Optimizer,
    schedule: Schedule,
    pub(super) position: Position,
    pub(super) history: History,
    pub(super) scale: LossScale,
    /// Steps skipped for a loss or gradient that was not finite: in a row, and in all.
    pub(super) bad_steps: (u32, u64),
    pub(super) identity: Identity,
    pub(super) config: serde_json::Value,
    facts: RunFacts,
}

/// What has gathered since the last optimizer step.
#[derive(Default)]
struct Group {
    items: Vec<usize>,
    /// A loss of this group was not finite.
    bad: bool,
}

impl<'a> Trainer<'a> {
    /// A run at its start. `identity` says what a state of this run belongs to (rank, alpha, optimizer and dataset are
    /// filled in here); `config` is stored with every state.
    pub fn new(
        parts: Parts<'a>,
        settings: TrainSettings,
        identity: Identity,
        config: serde_json::Value,
    ) -> Result<Self> {
        parts.models.check(settings.shared_boundary)?;
        let batches = order::epoch(parts.items.buckets(), settings.seed, 0, 0).len() as u64;
        if batches == 0 {
            return Err(UserError::new("there is nothing to train on: the dataset has no cached item").into());
        }
        let sites = select(parts.models.arch(), &settings.network.patterns)?;
        let params = AdapterParams::new(settings.network.clone(), sites, settings.seed, parts.exec.device())?;
        let grads = Grads::new(params.layout().clone(), parts.exec.device())?;
        let optimizer = Optimizer::on(settings.optimizer, params.layout(), parts.exec.device())?;
        let facts = RunFacts {
            total_steps: settings.total_steps(batches),
            total_epochs: settings.total_epochs(batches),
            batches_per_epoch: batches,
            samples_per_epoch: parts.items.buckets().iter().map(|b| b.entries.len() as u64).sum(),
            sites: params.layout().sites.len(),
            trainable: params.len() as u64,
        };
        let schedule = Schedule::new(&ScheduleSpec { total_steps: facts.total_steps, ..settings.schedule.clone() })?;
        let identity = Identity {
            network: settings.network.kind_name().into(),
            rank: settings.network.adapter.rank as u64,
            alpha: settings.network.alpha(),
            optimizer: settings.optimizer.kind.name().into(),
            dataset: super::state::dataset_hash(parts.items),
            ..identity
        };
        let scale = LossScale::new(parts.exec.compute() == DType::F16);
        Ok(Self {
            parts,
            settings,
            params,
            grads,
            optimizer,
            schedule,
            position: Position::default(),
            history: History::default(),
            scale,
            bad_steps: (0, 0),
            identity,
            config,
            facts,
        })
    }

    pub fn parts(&self) -> Parts<'a> {
        self.parts
    }

    pub fn params(&self) -> &AdapterParams {
        &self.params
    }

    pub fn settings(&self) -> &TrainSettings {
        &self.settings
    }

    pub fn position(&self) -> &Position {
        &self.position
    }

    pub fn facts(&self) -> &RunFacts {
        &self.facts
    }

    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Moving average of the loss over the last epoch's worth of micro-batches.
    pub fn average_loss(&self) -> f64 {
        self.history.average()
    }

    /// Steps skipped so far because a loss or gradient was not finite.
    pub fn skipped_steps(&self) -> u64 {
        self.bad_steps.1
    }

    /// Trains to the end, or to the next optimizer step after `stop` is raised. `Stopped` says where the state lies.
    pub fn run(&mut self, observer: &mut dyn Observer, saver: &mut dyn Saver, stop: &AtomicBool) -> Result<Outcome> {
        observer.started(&self.facts, &self.position);
        if self.position.step >= self.facts.total_steps {
            return self.finish(None, observer, saver, stop);
        }
        let (parts, settings) = (self.parts, self.settings.clone());
        let (from, epochs) = (self.position.clone(), self.facts.total_epochs);
        std::thread::scope(|scope| {
            let (to, batches) = sync_channel(1);
            let exec = parts.exec;
            let (items, arch) = (parts.items, parts.models.arch());
            let feeder = scope.spawn(move || {
                let assembler = Assembler { settings: &settings, arch, items, exec };
                prefetch(&assembler, &from, epochs, &to);
            });
            let outcome = self.consume(&batches, observer, saver, stop);
            // A feeder that waits to hand over its batch ends when nobody will take it.
            drop(batches);
            match feeder.join() {
                Ok(()) => outcome,
                Err(_) => outcome.and(Err(anyhow!("the thread that loads batches has died"))),
            }
        })
    }

    fn consume(
        &mut self,
        batches: &Receiver<Result<Batch>>,
        observer: &mut dyn Observer,
        saver: &mut dyn Saver,
        stop: &AtomicBool,
    ) -> Result<Outcome> {
        let mut group = Group::default();
        if let Some(at) = self.settings.previews.first(self.position.items) {
            observer.preview(at, self);
            if stop.load(Ordering::Relaxed) {
                return Ok(Outcome::Stopped { step: self.position.step, state: None });
            }
        }
        let mut since = Instant::now();
        while self.position.epoch < self.facts.total_epochs {
            while self.position.micro_batch < self.facts.batches_per_epoch {
                let batch = batches.recv().map_err(|_| anyhow!("the thread that loads batches has died"))??;
                let (loss, per_sample) = self.micro_step(&batch, &mut group)?;
                self.position.micro_batch += 1;
                self.position.items += batch.items.len() as u64;
                let at_end = self.position.micro_batch == self.facts.batches_per_epoch;
                let due = at_end || self.position.micro_batch.is_multiple_of(self.settings.accumulation);
                let rates = self.rates();
                let update = match due {
                    true => Some(self.update(&mut group, &mut since)?),
                    false => None,
                };
                if due {
                    self.parts.exec.end_of_step()?;
                }
                let average = self.history.average();
                observer.micro_step(&MicroStep {
                    step: self.position.step + u64::from(!due),
                    epoch: self.position.epoch + 1,
                    micro_batch: self.position.micro_batch,
                    tokens: self.tokens(&batch)?,
                    loss,
                    average,
                    per_sample: &per_sample,
                    timesteps: &batch.timesteps,
                    expert: batch.expert,
                    items: &batch.items,
                    lr: rates.0,
                    lr_plus: self.settings.network.loraplus_lr_ratio.map(|_| rates.1),
                    update: update.as_ref(),
                });
                if update.is_none() {
                    continue;
                }
                let done = self.position.step >= self.facts.total_steps;
                if self.settings.save.steps.is_some_and(|n| self.position.step.is_multiple_of(n)) {
                    let saved = saver.save(When::Step(self.position.step), self.settings.save.state, self)?;
                    observer.saved(&saved);
                }
                let due = self.settings.previews.after_step(self.position.step);
                if done {
                    return self.finish(due, observer, saver, stop);
                }
                self.preview(due, observer, stop, &mut since);
                if stop.load(Ordering::Relaxed) {
                    let saved = saver.save(When::Stop(self.position.step), true, self)?;
                    observer.saved(&saved);
                    return Ok(Outcome::Stopped { step: self.position.step, state: saved.state });
                }
            }
            self.end_epoch(observer, saver)?;
            let due = self.settings.previews.after_epoch(self.position.epoch, self.position.step);
            self.preview(due, observer, stop, &mut since);
            if due.is_some() && stop.load(Ordering::Relaxed) && self.position.epoch < self.facts.total_epochs {
                let saved = saver.save(When::Stop(self.position.step), true, self)?;
                observer.saved(&saved);
                return Ok(Outcome::Stopped { step: self.position.step, state: saved.state });
            }
        }
        self.finish(None, observer, saver, stop)
    }

    /// Previews, where they are due and nobody wants to stop; their time is not the next step's.
    fn preview(&mut self, due: Option<At>, observer: &mut dyn Observer, stop: &AtomicBool, since: &mut Instant) {
        if let Some(at) = due.filter(|_| !stop.load(Ordering::Relaxed)) {
            observer.preview(at, self);
            *since = Instant::now();
        }
    }

    /// Forward, loss and backward of one micro-batch; gradients are added to those of the group.
    fn micro_step(&mut self, batch: &Batch, group: &mut Group) -> Result<(f32, Vec<f32>)> {
        let Parts { exec, models, save_plan, .. } = self.parts;
        let Frozen { model, blocks } = models.of(batch.expert);
        let number = self.position.epoch * self.facts.batches_per_epoch + self.position.micro_batch;
        let adapters = StepAdapters::new(&self.params, self.settings.seed, number, exec.device());
        let (pred, saved) = model.forward(exec, &batch.inputs, &adapters, blocks, save_plan)?;
        let dloss = self.scale.factor() / self.settings.accumulation as f64;
        let loss = loss::flow(exec, batch, &pred, dloss)?;
        drop(pred);
        group.items.extend(&batch.items);
        self.history.record(self.position.epoch, self.position.micro_batch, loss.mean);
        match loss.mean.is_finite() {
            true => model.backward(exec, &adapters, blocks, saved, &loss.dpred, &mut self.grads)?,
            false => group.bad = true,
        }
        Ok((loss.mean, loss.per_sample))
    }

    /// Tokens that the model sees of a batch's latents.
    fn tokens(&self, batch: &Batch) -> Result<u64> {
        let (samples, _, f, h, w) = batch.latents.dims5()?;
        let [f, h, w] = self.parts.models.arch().grid([f, h, w])?;
        Ok((samples * f * h * w) as u64)
    }

    /// The rates of the main group and of the LoRA+ group at the current step.
    fn rates(&self) -> (f64, f64) {
        let base = self.settings.schedule.lr;
        let ratio = self.settings.network.loraplus_lr_ratio.unwrap_or(1.0);
        let step = self.position.step;
        (self.schedule.lr(step, base), self.schedule.lr(step, base * ratio))
    }

    /// One optimizer step from the gathered gradients, or a skipped one where they are not finite. Either counts.
    fn update(&mut self, group: &mut Group, since: &mut Instant) -> Result<Update> {
        let norm = self.grads.flat().norm()? / self.scale.factor();
        let mut update = Update { grad_norm: norm, skipped: None, norms: None, seconds: 0.0 };
        let finite = norm.is_finite() && !group.bad;
        if finite {
            let (lr, lr_plus) = self.rates();
            let grad_scale = clip_scale(norm, self.settings.max_grad_norm) / self.scale.factor();
            let layout = self.params.layout().clone();
            self.optimizer.step(&layout, self.params.master(), self.grads.flat(), lr, lr_plus, grad_scale)?;
            if let Some(limit) = self.settings.scale_weight_norms {
                update.norms = Some(norm::apply(&self.params, limit)?);
            }
            self.bad_steps.0 = 0;
        }
        // A loss scale that is too high is the scale's fault, not the data's: the step is lost, but not held against it.
        let excused = self.scale.update(finite) && !group.bad;
        self.grads.clear()?;
        self.position.step += 1;
        update.seconds = since.elapsed().as_secs_f64();
        *since = Instant::now();
        let group = std::mem::take(group);
        if !finite {
            self.bad_steps.1 += 1;
            let what = if group.bad { "loss" } else { "gradient" };
            update.skipped = Some(format!("the {what} is not finite"));
            if !excused {
                self.bad_steps.0 += 1;
            }
            if self.bad_steps.0 >= self.settings.max_bad_steps {
                return Err(self.diverged(what, &group.items));
            }
        }
        Ok(update)
    }

    fn diverged(&self, what: &str, items: &[usize]) -> anyhow::Error {
        let mut names: Vec<String> = items.iter().map(|i| self.parts.items.name(*i)).collect();
        names.sort();
        names.dedup();
        UserError::new(format!(
            "the {what} was not finite in {} steps in a row; the last one, step {}, trained on {}",
            self.bad_steps.0,
            self.position.step,
            names.join(", ")
        ))
        .hint("checkpoints written before are good; look at these items' caches, lower --learning_rate, or use bf16")
        .into()
    }

    fn end_epoch(&mut self, observer: &mut dyn Observer, saver: &mut dyn Saver) -> Result<()> {
        self.position.epoch += 1;
        self.position.micro_batch = 0;
        let epoch = self.position.epoch;
        observer.epoch(epoch, self.position.step, self.history.average());
        let due = self.settings.save.epochs.is_some_and(|n| epoch.is_multiple_of(n));
        if due && epoch < self.facts.total_epochs {
            let saved = saver.save(When::Epoch(epoch), self.settings.save.state, self)?;
            observer.saved(&saved);
        }
        Ok(())
    }

    /// The last checkpoint, and then the previews of the last step or epoch: nothing they do can cost the run.
    fn finish(
        &mut self,
        mut due: Option<At>,
        observer: &mut dyn Observer,
        saver: &mut dyn Saver,
        stop: &AtomicBool,
    ) -> Result<Outcome> {
        if self.position.micro_batch == self.facts.batches_per_epoch {
            self.position.epoch += 1;
            self.position.micro_batch = 0;
            observer.epoch(self.position.epoch, self.position.step, self.history.average());
            due = due.or_else(|| self.settings.previews.after_epoch(self.position.epoch, self.position.step));
        }
        let saved = saver.save(When::End, self.settings.save.state_at_end, self)?;
        observer.saved(&saved);
        self.preview(due, observer, stop, &mut Instant::now());
        Ok(Outcome::Finished { step: self.position.step, lora: saved.lora })
    }
}

/// Assembles batches ahead of the loop, from a position to the last epoch's end, until nobody listens any more.
fn prefetch(assembler: &Assembler, from: &Position, epochs: u64, to: &SyncSender<Result<Batch>>) {
    let settings = assembler.settings;
    let mut skip = from.micro_batch as usize;
    for epoch in from.epoch..epochs {
        let plans = order::epoch(assembler.items.buckets(), settings.seed, epoch, settings.timesteps.buckets);
        for plan in &plans[skip.min(plans.len())..] {
            let batch = assembler.assemble(plan, epoch).with_context(|| {
                let names: Vec<String> = plan.samples.iter().map(|s| assembler.items.name(s.item)).collect();
                format!("while preparing the batch of {}", names.join(", "))
            });
            let failed = batch.is_err();
            if to.send(batch).is_err() || failed {
                return;
            }
        }
        skip = 0;
    }
}

/// A checkpoint that was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Saved {
    pub lora: Option<PathBuf>,
    pub state: Option<PathBuf>,
    /// Older ones that retention removed.
    pub removed: Vec<PathBuf>,
}
