//! What the loop tells, and whom it asks to save: declared here, implemented by whoever reports and writes files.

use std::path::PathBuf;

use anyhow::Result;

use super::expert::Expert;
use super::preview::At;
use super::timesteps::Timestep;
use super::trainer::{Saved, Trainer};
use crate::adapter::norm::NormReport;
use crate::checkpoint::Position;

/// The size of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RunFacts {
    /// Optimizer steps.
    pub total_steps: u64,
    pub total_epochs: u64,
    pub batches_per_epoch: u64,
    /// Repeats counted.
    pub samples_per_epoch: u64,
    /// Linears with an adapter.
    pub sites: usize,
    /// Trainable numbers.
    pub trainable: u64,
}

/// One micro-batch done.
#[derive(Debug)]
pub struct MicroStep<'a> {
    /// The optimizer step that this micro-batch belongs to, from 1: the x of the logs.
    pub step: u64,
    /// From 1.
    pub epoch: u64,
    /// Of the epoch, from 1.
    pub micro_batch: u64,
    /// Latent tokens of all samples.
    pub tokens: u64,
    pub loss: f32,
    /// Moving average over an epoch's worth of micro-batches.
    pub average: f64,
    pub per_sample: &'a [f32],
    pub timesteps: &'a [Timestep],
    /// The expert that computed it, where one adapter is trained over two.
    pub expert: Option<Expert>,
    /// Items of the batch by index.
    pub items: &'a [usize],
    pub lr: f64,
    /// Rate of the LoRA+ group, where there is one.
    pub lr_plus: Option<f64>,
    /// The optimizer step that this micro-batch completed.
    pub update: Option<&'a Update>,
}

/// One optimizer step.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    /// Global L2 norm before clipping.
    pub grad_norm: f64,
    /// Why the step was skipped, if it was.
    pub skipped: Option<String>,
    /// What max-norm regularisation did.
    pub norms: Option<NormReport>,
    /// Wall time since the step before.
    pub seconds: f64,
}

/// Listens to a run.
pub trait Observer {
    /// Before the first step; `from` is not at zero in a resumed run.
    fn started(&mut self, _facts: &RunFacts, _from: &Position) {}
    fn micro_step(&mut self, _step: &MicroStep) {}
    /// `epoch` epochs are done.
    fn epoch(&mut self, _epoch: u64, _step: u64, _average_loss: f64) {}
    fn saved(&mut self, _saved: &Saved) {}
    /// Previews are due; the weights stand still.
    fn preview(&mut self, _at: At, _trainer: &Trainer) {}
}

/// Nobody listens.
impl Observer for () {}

/// The occasion of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// After this many epochs.
    Epoch(u64),
    /// After this many steps.
    Step(u64),
    /// The run was asked to stop after this many steps.
    Stop(u64),
    End,
}

/// Writes checkpoints.
pub trait Saver {
    /// Writes the adapter, and with `state` the full state.
    fn save(&mut self, when: When, state: bool, trainer: &Trainer) -> Result<Saved>;
}

/// Nothing is written.
impl Saver for () {
    fn save(&mut self, _when: When, _state: bool, _trainer: &Trainer) -> Result<Saved> {
        Ok(Saved::default())
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Finished {
        step: u64,
        lora: Option<PathBuf>,
    },
    /// On request; the state continues it.
    Stopped {
        step: u64,
        state: Option<PathBuf>,
    },
}
