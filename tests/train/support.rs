//! A tiny Wan model and data made in memory, for tests of the loop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use wan_kernels::philox::Philox;
use wan_kernels::Exec;
use wan_models::arch::{Conditioning, Experts, Inference, ModelConfig, VaeConfig, VaeKind, WanArch};
use wan_models::wan::{random_weights, Numerics, ResidentWeights, SavePlan, SavePolicy, WanModel, WanWeights};
use wan_train::cache::index::{Bucket, BucketKey, ItemTensors};
use wan_train::checkpoint::{Identity, TrainState};
use wan_train::config::RunConfig;
use wan_train::train::{
    Items, MicroStep, Models, Observer, Outcome, Parts, RunFacts, Saved, Saver, TrainSettings, Trainer, When,
};

/// Sixteen latent channels, three blocks of width 16.
pub fn arch() -> WanArch {
    WanArch {
        dim: 16,
        ffn_dim: 24,
        num_heads: 2,
        num_layers: 3,
        in_dim: 16,
        out_dim: 16,
        text_dim: 12,
        text_len: 6,
        freq_dim: 8,
        eps: 1e-6,
        patch: [1, 2, 2],
        clip: None,
        per_token_time: false,
    }
}

/// A model configuration around an architecture.
pub fn model_config(arch: WanArch, conditioning: Conditioning) -> ModelConfig {
    ModelConfig {
        task: "t2v-14B".into(),
        summary: "a test".into(),
        version: "2.1".into(),
        conditioning,
        arch,
        experts: None::<Experts>,
        inference: Inference { shift: 5.0, steps: 4, guidance: vec![5.0], frames: 5, fps: 16 },
        vae: VaeConfig { kind: VaeKind::Wan21 },
        files: vec![],
    }
}

/// The model with seeded random weights.
pub fn model(arch: &WanArch) -> (WanModel, ResidentWeights) {
    let tensors = random_weights(arch, 11).unwrap();
    let (rest, blocks) = WanWeights::from_tensors(arch, &tensors).unwrap();
    (WanModel::new(arch.clone(), rest, Numerics::default()).unwrap(), blocks)
}

/// Items in memory.
pub struct Synthetic {
    pub buckets: Vec<Bucket>,
    pub items: Vec<ItemTensors>,
}

impl Items for Synthetic {
    fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }
    fn load(&self, item: usize) -> Result<ItemTensors> {
        Ok(self.items[item].clone())
    }
    fn name(&self, item: usize) -> String {
        format!("item{item}")
    }
}

/// Seeded normals.
pub fn normal(item: u32, shape: &[usize], dtype: DType) -> Tensor {
    Philox::new(99, 77, 0, item).normal(shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// One item of latents `[16, f, h, w]` with a caption of three rows.
pub fn item(number: u32, fhw: [usize; 3]) -> ItemTensors {
    let [f, h, w] = fhw;
    ItemTensors {
        latents: normal(2 * number, &[16, f, h, w], DType::BF16),
        latents_image: None,
        control: None,
        clip: None,
        positions: None,
        context: normal(2 * number + 1, &[3, 12], DType::BF16),
    }
}

/// `small` clips of one size and `large` of another, in two buckets.
pub fn data(small: usize, large: usize, batch_size: usize) -> Synthetic {
    let items: Vec<ItemTensors> =
        (0..small + large).map(|i| item(i as u32, if i < small { [1, 4, 4] } else { [2, 4, 6] })).collect();
    let key = |width, frames| BucketKey { width, height: 32, frames };
    let bucket =
        |key, entries: std::ops::Range<usize>| Bucket { dataset: 0, key, batch_size, entries: entries.collect() };
    let mut buckets = vec![bucket(key(32, 1), 0..small), bucket(key(48, 5), small..small + large)];
    buckets.retain(|b| !b.entries.is_empty());
    Synthetic { buckets, items }
}

/// Settings of a short run, changed as the test needs.
pub fn settings(change: impl FnOnce(&mut RunConfig)) -> TrainSettings {
    settings_for(&model_config(arch(), Conditioning::None), change)
}

pub fn config(change: impl FnOnce(&mut RunConfig)) -> RunConfig {
    let mut c = RunConfig {
        seed: Some(5),
        max_train_epochs: Some(3),
        learning_rate: 1e-2,
        network_dim: 3,
        network_alpha: 3.0,
        timestep_sampling: "shift".into(),
        discrete_flow_shift: 3.0,
        lr_scheduler: "cosine".into(),
        ..RunConfig::default()
    };
    change(&mut c);
    c
}

pub fn settings_for(model: &ModelConfig, change: impl FnOnce(&mut RunConfig)) -> TrainSettings {
    TrainSettings::from_config(&config(change), model, 5).unwrap()
}

/// What a run did, bit for bit.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Record {
    /// Step, epoch, bits of the loss and of the average, of every micro-batch.
    pub micro: Vec<(u64, u64, u32, u64)>,
    pub skipped: u64,
    pub epochs: Vec<u64>,
    pub saved: Vec<String>,
    pub facts: RunFacts,
}

impl Record {
    pub fn losses(&self) -> Vec<f32> {
        self.micro.iter().map(|m| f32::from_bits(m.2)).collect()
    }
}

/// Records, and raises the stop flag after a number of steps.
pub struct Recorder<'a> {
    pub record: Record,
    pub stop_after: Option<u64>,
    pub stop: &'a AtomicBool,
}

impl Observer for Recorder<'_> {
    fn started(&mut self, facts: &RunFacts, _from: &wan_train::checkpoint::Position) {
        self.record.facts = *facts;
    }
    fn micro_step(&mut self, s: &MicroStep) {
        self.record.micro.push((s.step, s.epoch, s.loss.to_bits(), s.average.to_bits()));
        if let Some(update) = s.update {
            self.record.skipped += u64::from(update.skipped.is_some());
            if Some(s.step) == self.stop_after {
                self.stop.store(true, Ordering::Relaxed);
            }
        }
    }
    fn epoch(&mut self, epoch: u64, _step: u64, _average: f64) {
        self.record.epochs.push(epoch);
    }
}

/// Keeps states in memory, and notes what was asked for.
#[derive(Default)]
pub struct Memory {
    pub asked: Vec<(When, bool)>,
    pub last: Option<TrainState>,
}

impl Saver for Memory {
    fn save(&mut self, when: When, state: bool, trainer: &Trainer) -> Result<Saved> {
        self.asked.push((when, state));
        if state {
            self.last = Some(trainer.snapshot()?);
        }
        Ok(Saved::default())
    }
}

/// The end of a run.
pub struct Ended {
    pub record: Record,
    pub saver: Memory,
    pub outcome: Outcome,
    /// The state at the end, whatever was saved.
    pub state: TrainState,
}

pub struct Bench {
    pub exec: Exec,
    pub model: WanModel,
    pub blocks: Arc<dyn wan_models::wan::WeightProvider>,
    pub plan: SavePlan,
    pub items: Synthetic,
}

impl Bench {
    pub fn new(items: Synthetic) -> Self {
        Self::with_arch(arch(), items)
    }

    pub fn with_arch(arch: WanArch, items: Synthetic) -> Self {
        let (model, blocks) = model(&arch);
        let plan = SavePlan::uniform(SavePolicy::KeepAll);
        Self { exec: Exec::cpu(), model, blocks: Arc::new(blocks), plan, items }
    }

    pub fn trainer(&self, settings: TrainSettings) -> Trainer<'_> {
        let parts = Parts {
            exec: &self.exec,
            models: Models::one(&self.model, &*self.blocks),
            save_plan: &self.plan,
            items: &self.items,
        };
        let identity = Identity { task: "t2v-14B".into(), base: "random".into(), ..Identity::default() };
        Trainer::new(parts, settings, identity, serde_json::json!({})).unwrap()
    }

    /// Runs, from a state if one is given, until the end or `stop_after` steps.
    pub fn run(&self, settings: TrainSettings, from: Option<&TrainState>, stop_after: Option<u64>) -> Result<Ended> {
        let mut trainer = self.trainer(settings);
        if let Some(state) = from {
            trainer.restore(state, std::path::Path::new("memory"))?;
        }
        let stop = AtomicBool::new(false);
        let mut recorder = Recorder { record: Record::default(), stop_after, stop: &stop };
        let mut saver = Memory::default();
        let outcome = trainer.run(&mut recorder, &mut saver, &stop)?;
        Ok(Ended { record: recorder.record, saver, outcome, state: trainer.snapshot()? })
    }
}

/// Every number of a state, as bits.
pub fn bits(state: &TrainState) -> Vec<(String, Vec<u32>)> {
    let of = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let masters = state.adapters.iter().map(|(k, m)| (k.clone(), of(&m.data)));
    let floats = state.buffers_f32.iter().map(|(k, v)| (k.clone(), of(v)));
    let bytes = state.buffers_u8.iter().map(|(k, v)| (k.clone(), v.iter().map(|b| u32::from(*b)).collect()));
    masters.chain(floats).chain(bytes).collect()
}
