//! `wan-train plan`: what will be where in memory, for the largest bucket of the dataset, and whether it fits.

use std::process::ExitCode;

use safetensors::Dtype;
use wan_models::wan::SavePlan;

use super::cache::Prepared;
use super::job::Job;
use super::weights;
use crate::adapter::select;
use crate::cache::{BucketKey, CacheIndex, LatentGeometry};
use crate::config::{Layer, RunConfig};
use crate::error::UserError;
use crate::loader::{checkpoint_dtype, Source};
use crate::plan::{self, available_ram, Budget, Plan, RunShape, Target, Wishes};
use crate::train::TrainSettings;

/// Pixels of the bucket that is planned for where there is no dataset: 720p, 21 frames.
const USUAL: BucketKey = BucketKey { width: 1280, height: 720, frames: 21 };
const GIB: f64 = (1u64 << 30) as f64;

pub fn run(job: &Job) -> anyhow::Result<ExitCode> {
    let settings = TrainSettings::from_config(&job.config, &job.model, job.config.seed.unwrap_or_default())?;
    let (bucket, batch) = match job.dataset_path().is_ok() {
        true => largest_surveyed(&Prepared::new(job, false)?)?,
        false => {
            println!("no dataset: planned for {} x {} pixels, {} frames", USUAL.width, USUAL.height, USUAL.frames);
            (USUAL, 1)
        }
    };
    // Without the file the published 16-bit checkpoints are assumed.
    let source = weights::open_dit(job).ok();
    let plan = planned(job, &job.config, &settings, (bucket, batch), source.as_ref())?;
    println!("{}", plan.table());
    Ok(ExitCode::SUCCESS)
}

/// The plan of a training run over an index.
pub fn for_training(
    job: &Job,
    config: &RunConfig,
    settings: &TrainSettings,
    index: &CacheIndex,
    source: &Source,
) -> anyhow::Result<Planned> {
    let buckets = index.buckets.iter().map(|b| (b.key, b.batch_size.min(b.entries.len())));
    planned(job, config, settings, largest(buckets)?, Some(source))
}

/// A plan that fits, and for what.
pub struct Planned {
    plan: Plan,
    bucket: BucketKey,
    batch: usize,
}

impl Planned {
    pub fn table(&self) -> String {
        let BucketKey { width, height, frames } = self.bucket;
        format!(
            "memory plan for the largest batch: {} of {width} x {height} pixels, {frames} frames\n{}",
            self.batch, self.plan
        )
    }

    /// What each block keeps between the passes.
    pub fn save_plan(&self) -> SavePlan {
        SavePlan::per_block(self.plan.arrangement.saving.clone())
    }
}

fn planned(
    job: &Job,
    config: &RunConfig,
    settings: &TrainSettings,
    (bucket, batch): (BucketKey, usize),
    source: Option<&Source>,
) -> anyhow::Result<Planned> {
    let geometry = geometry(job);
    let [_, f, h, w] = geometry.shape((bucket.width as u32, bucket.height as u32), bucket.frames);
    // A budget for a card is a question about a card, also on a machine that has none.
    let target = match config.vram_budget.is_some() || config.device == "cuda" {
        true => Target::Cuda,
        false => Target::Cpu,
    };
    let shape = RunShape {
        target,
        checkpoint_bytes: match source.and_then(checkpoint_dtype) {
            Some(Dtype::F32) => 4,
            _ => 2,
        },
        latent: [f as u64, h as u64, w as u64],
        batch: batch as u64,
        adapter: settings.network.adapter,
        sites: select(&job.model.arch, &settings.network.patterns)?,
    };
    let work = plan::Job::from_config(config, &job.model.arch, &shape);
    let ram = available_ram().unwrap_or(u64::MAX);
    let device = match (target, config.vram_budget) {
        (Target::Cuda, Some(gib)) => (gib * GIB) as u64,
        _ => ram,
    };
    let typed = |name: &str| job.resolved.origin.get(name).is_some_and(|layer| *layer != Layer::Default);
    let wishes = Wishes {
        blocks_to_swap: typed("blocks_to_swap").then_some(config.blocks_to_swap),
        ring_size: typed("block_swap_ring_size").then_some(config.block_swap_ring_size),
        // Templates always ask for checkpointing, since the old trainer had no other way to fit; with a budget to plan
        // for, recomputing is the planner's choice.
        recompute: config.gradient_checkpointing && config.vram_budget.is_none(),
        offload: config.gradient_checkpointing_cpu_offload,
    };
    match plan::choose(&work, Budget { device, host: ram }, wishes) {
        Ok(plan) => Ok(Planned { plan, bucket, batch }),
        Err(shortfall) => Err(UserError::new(format!("this run does not fit:\n{}{shortfall}", shortfall.memory))
            .hint(
                "use smaller buckets or fewer frames in the dataset, a lower --network_dim, or a card with more memory",
            )
            .into()),
    }
}

fn geometry(job: &Job) -> LatentGeometry {
    (&super::cache::published_vae(job)).into()
}

fn largest_surveyed(prepared: &Prepared) -> anyhow::Result<(BucketKey, usize)> {
    let clips = prepared.survey.entries.iter().flat_map(|entry| {
        let batch = prepared.survey.dataset(&prepared.survey.items[entry.item]).batch_size;
        entry.clips.iter().map(move |clip| {
            let (width, height) = (clip.span.size.0 as usize, clip.span.size.1 as usize);
            let item = &prepared.survey.items[entry.item];
            (BucketKey { width, height, frames: prepared.survey.pixel_frames(item, clip.span) }, batch)
        })
    });
    largest(clips)
}

fn largest(buckets: impl Iterator<Item = (BucketKey, usize)>) -> anyhow::Result<(BucketKey, usize)> {
    let size = |(key, batch): &(BucketKey, usize)| key.width * key.height * (key.frames + 3) * batch;
    buckets.max_by_key(size).ok_or_else(|| UserError::new("the dataset has no usable item").into())
}
