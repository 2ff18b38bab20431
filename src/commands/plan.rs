//! `wan-train plan`: what will be where in memory, for the largest bucket of the dataset, and whether it fits.

use std::process::ExitCode;

use safetensors::Dtype;
use wan_kernels::Exec;
use wan_models::wan::SavePlan;

use super::cache::Prepared;
use super::job::Job;
use super::{preview, weights};
use crate::adapter::select;
use crate::cache::{BucketKey, CacheIndex, LatentGeometry};
use crate::config::{Layer, RunConfig};
use crate::error::UserError;
use crate::loader::{checkpoint_dtype, Source};
use crate::plan::{self, available_ram, Budget, Card, Plan, Rates, RunShape, Target, Wishes};
use crate::residency::ResidencySpec;
use crate::train::TrainSettings;

/// Pixels of the bucket that is planned for where there is no dataset: 720p, 21 frames.
const USUAL: BucketKey = BucketKey { width: 1280, height: 720, frames: 21 };
const GIB: f64 = (1u64 << 30) as f64;

pub fn run(job: &Job) -> anyhow::Result<ExitCode> {
    let settings = TrainSettings::from_config(&job.config, &job.model, job.config.seed.unwrap_or_default())?;
    let (bucket, batch) = match job.dataset_path().is_ok() {
        true => {
            let prepared = Prepared::new(job, false)?;
            largest(prepared.buckets().iter().map(|b| (b.key, b.largest_batch())))?
        }
        false => {
            println!("no dataset: planned for {} x {} pixels, {} frames", USUAL.width, USUAL.height, USUAL.frames);
            (USUAL, 1)
        }
    };
    // Without the file the published 16-bit checkpoints are assumed.
    let sources: Vec<Source> = job.dits().iter().filter_map(|dit| weights::open_dit(job, dit).ok()).collect();
    let mut plan = planned(
        job,
        &job.config,
        &settings,
        &Room::asked(&job.config, &job.config.device, || job.exec())?,
        (bucket, batch),
        &sources,
    )?;
    let notes = preview::count(job, &settings, &mut plan, &preview::prompts(job)?)?;
    println!("{}", plan.table());
    notes.iter().for_each(|note| println!("note: {note}"));
    Ok(ExitCode::SUCCESS)
}

/// The plan of a training run over an index.
#[tracing::instrument(level = "debug", skip_all, name = "plan")]
pub fn for_training(
    job: &Job,
    config: &RunConfig,
    settings: &TrainSettings,
    exec: &Exec,
    index: &CacheIndex,
    sources: &[Source],
) -> anyhow::Result<Planned> {
    let buckets = index.buckets.iter().map(|b| (b.key, b.batch_size.min(b.entries.len())));
    planned(job, config, settings, &Room::on(exec, config.vram_budget)?, largest(buckets)?, sources)
}

/// What the largest batch of a surveyed dataset will take, in a line; an error where it will not fit. `None` without media.
pub fn foreseen(job: &Job, prepared: &Prepared) -> anyhow::Result<Option<String>> {
    let settings = TrainSettings::from_config(&job.config, &job.model, job.config.seed.unwrap_or_default())?;
    let buckets = prepared.buckets();
    let Ok(largest) = largest(buckets.iter().map(|b| (b.key, b.largest_batch()))) else { return Ok(None) };
    let sources: Vec<Source> = weights::open_dits(job)?.into_iter().map(|(_, source)| source).collect();
    let exec = job.exec()?;
    let room = Room::on(&exec, job.config.vram_budget)?;
    let planned = planned(job, &job.config, &settings, &room, largest, &sources)?;
    let BucketKey { width, height, frames } = planned.bucket;
    Ok(Some(format!(
        "training will take {} of {} GiB for its largest batch: {} of {width} x {height} pixels, {frames} frames",
        plan::gib(planned.held()),
        plan::gib(room.budget.device),
        planned.batch,
    )))
}

/// A plan that fits, and for what.
pub struct Planned {
    plan: Plan,
    target: Target,
    /// Bytes of the largest preview.
    previews: u64,
    bucket: BucketKey,
    batch: usize,
    /// What 8-bit products would gain, a line each.
    offers: Vec<String>,
    /// What was asked for and is not used.
    unused: Option<String>,
}

impl Planned {
    pub fn table(&self) -> String {
        let BucketKey { width, height, frames } = self.bucket;
        let mut table = format!(
            "memory plan for the largest batch: {} of {width} x {height} pixels, {frames} frames\n{}",
            self.batch, self.plan
        );
        if self.previews > 0 {
            let [previews, stays] = [self.previews, self.stays()].map(plan::gib);
            table += &format!("previews: up to {previews} GiB beside the {stays} GiB that stay between steps\n");
        }
        for offer in &self.offers {
            table += &format!("predicted with {offer}\n");
        }
        if let Some(unused) = &self.unused {
            table += &format!("note: {unused}\n");
        }
        table
    }

    /// So many bytes for previews belong to the plan.
    pub fn count_previews(&mut self, bytes: u64) {
        self.previews = bytes;
    }

    pub fn on_card(&self) -> bool {
        self.target == Target::Cuda
    }

    /// Device memory that steps are planned to hold.
    pub fn held(&self) -> u64 {
        self.plan.memory.held()
    }

    /// Lines that hold the measured peak against the plan; none on the CPU.
    pub fn measured(&self, exec: &Exec) -> Vec<String> {
        #[cfg_attr(not(feature = "cuda"), allow(unused_mut))]
        let mut lines = Vec::new();
        #[cfg(feature = "cuda")]
        if let Exec::Cuda { gpu, .. } = exec {
            let memory = gpu.memory().ok();
            let [peak, held] = [memory.map_or(0, |m| m.peak), memory.map_or(0, |m| m.reserved_peak)];
            let planned = [self.plan.memory.device(), self.plan.memory.held()];
            let with_previews = match self.stays() + self.previews {
                _ if self.previews == 0 => String::new(),
                sum => format!(", {} GiB in previews (decoding not counted)", plan::gib(sum)),
            };
            let ([peak, held], [planned, planned_held]) = ([peak, held].map(plan::gib), planned.map(plan::gib));
            lines.push(format!("peak device memory: {peak} GiB in tensors, planned {planned} GiB{with_previews}"));
            lines.push(format!("held on the card for them: {held} GiB, planned {planned_held} GiB"));
            lines.extend(gpu.stash_unpinned().map(|why| {
                format!("note: host memory for saved activations could not be pinned ({why}): copies are slower")
            }));
        }
        let _ = exec;
        lines
    }

    /// See [`explain`].
    pub fn explain(&self, exec: &Exec, e: anyhow::Error) -> anyhow::Error {
        explain(exec, &self.plan.memory, e)
    }

    /// Bytes that a preview of width, height, frames takes on the device, and those that there are for it: what a step
    /// needs is free between two steps.
    pub fn preview(
        &self,
        job: &Job,
        settings: &TrainSettings,
        (width, height, frames): (usize, usize, usize),
    ) -> anyhow::Result<(u64, u64)> {
        let room = Room { target: self.target, budget: self.plan.budget, rates: Rates::default() };
        let work = work(job, &job.config, settings, &room, BucketKey { width, height, frames }, 1, &[])?;
        let taken = self.stays() + self.plan.memory.gaps;
        Ok((work.preview_bytes(), self.plan.budget.device.saturating_sub(taken)))
    }

    /// Bytes on the device between two steps.
    fn stays(&self) -> u64 {
        let of_step: u64 = plan::OF_A_STEP.iter().filter_map(|what| Some(self.plan.memory.row(what)?.device)).sum();
        self.plan.memory.device() - of_step
    }

    /// How the blocks' weights are held.
    pub fn residency(&self) -> ResidencySpec {
        let a = &self.plan.arrangement;
        ResidencySpec { blocks_to_swap: a.blocks_to_swap as usize, ring_size: a.ring_size as usize }
    }

    /// What each block keeps between the passes.
    pub fn save_plan(&self) -> SavePlan {
        SavePlan::per_block(self.plan.arrangement.saving.clone())
    }
}

/// An error of a run; where the card was out of memory, with what was planned and what there was.
pub fn explain(exec: &Exec, memory: &plan::Memory, e: anyhow::Error) -> anyhow::Error {
    #[cfg(feature = "cuda")]
    if let (true, Exec::Cuda { gpu, .. }) = (out_of_memory(&e), exec) {
        let now = gpu.memory().map(|m| {
            let [used, peak, free] = [m.used, m.peak, m.free].map(plan::gib);
            format!("{used} GiB in tensors now, {peak} GiB at most, {free} GiB free for anybody")
        });
        let (planned, now) = (memory.held(), now.unwrap_or_else(|e| e.to_string()));
        let what = format!("the card is out of memory: {} GiB were planned; {now}\n{memory}", plan::gib(planned));
        return UserError::new(what)
            .hint(format!(
                "close what else uses the card, or plan for less: --vram_budget {:.1}; checkpoints written before are good",
                planned as f64 / GIB * 0.9
            ))
            .into();
    }
    let _ = (exec, memory);
    e
}

/// The same for work that has no plan of its own, as caching; an error that is explained already stays as it is.
pub fn explain_unplanned(e: anyhow::Error) -> anyhow::Error {
    if !out_of_memory(&e) || e.downcast_ref::<UserError>().is_some() {
        return e;
    }
    // A backtrace may follow.
    let text = format!("{e:#}");
    UserError::new(format!("the card is out of memory: {}", text.lines().next().unwrap_or_default()))
        .hint("close what else uses the card (nvidia-smi lists it) and run the same command again; what is done stays done")
        .into()
}

/// Whether an error is the driver's or the allocator's lack of device memory.
#[cfg_attr(not(any(test, feature = "cuda")), allow(dead_code))]
fn out_of_memory(e: &anyhow::Error) -> bool {
    let text = format!("{e:#}");
    ["OUT_OF_MEMORY", "ALLOC_FAILED", "out of memory"].iter().any(|sign| text.contains(sign))
}

/// Where a run computes, what it may use there, and how fast that is.
pub struct Room {
    pub target: Target,
    pub budget: Budget,
    pub rates: Rates,
}

/// Device memory that is left to kernels that load late and to the desktop; at least a 64th of what is free. What lies
/// between tensors is in the plan.
#[cfg(feature = "cuda")]
const MARGIN: u64 = 1 << 29;

impl Room {
    /// What there is on the device that `exec` computes on; a `--vram_budget` in GiB lowers it.
    pub fn on(exec: &Exec, vram_budget: Option<f64>) -> anyhow::Result<Self> {
        let ram = available_ram().unwrap_or(u64::MAX);
        // Pinned memory cannot be swapped out: some is left to everybody else.
        let host = ram / 10 * 7;
        #[cfg(feature = "cuda")]
        if let Exec::Cuda { gpu, .. } = exec {
            let memory = gpu.memory()?;
            let free = memory.free.saturating_sub(MARGIN.max(memory.free / 64));
            let device = vram_budget.map_or(free, |gib| free.min((gib * GIB) as u64));
            let rates = Card::find(&gpu.card().name).map_or_else(Rates::default, |card| card.rates());
            return Ok(Self { target: Target::Cuda, budget: Budget { device, host }, rates });
        }
        let _ = (exec, vram_budget);
        Ok(Self { target: Target::Cpu, budget: Budget { device: ram, host }, rates: Rates::default() })
    }

    /// The same for planning only: a budget for a card is a question about a card, also on a machine that has none.
    fn asked(config: &RunConfig, device: &str, exec: impl Fn() -> anyhow::Result<Exec>) -> anyhow::Result<Self> {
        let exec = match device {
            "cuda" => exec().unwrap_or_else(|_| Exec::cpu()),
            _ => exec()?,
        };
        let room = Self::on(&exec, config.vram_budget)?;
        let gib = match (room.target, config.vram_budget) {
            (Target::Cuda, _) => return Ok(room),
            (Target::Cpu, Some(gib)) => gib,
            (Target::Cpu, None) if device == "cuda" => Card::find("").map_or(23.0, |card| card.free_gib()),
            (Target::Cpu, None) => return Ok(room),
        };
        let budget = Budget { device: (gib * GIB) as u64, host: room.budget.host };
        Ok(Self { target: Target::Cuda, budget, rates: Rates::default() })
    }
}

/// What of the arrangement the user has fixed.
pub fn wishes(job: &Job, config: &RunConfig) -> Wishes {
    let typed = |name: &str| job.resolved.origin.get(name).is_some_and(|layer| *layer != Layer::Default);
    let asked = |name: &str| matches!(job.resolved.origin.get(name), Some(Layer::Flag | Layer::File(_)));
    Wishes {
        blocks_to_swap: typed("blocks_to_swap").then_some(config.blocks_to_swap),
        ring_size: typed("block_swap_ring_size").then_some(config.block_swap_ring_size),
        // Templates always set checkpointing, since the old trainer had no other way to fit: theirs is a permission. A
        // user's is an order.
        recompute: config.gradient_checkpointing && asked("gradient_checkpointing"),
        offload: config.gradient_checkpointing_cpu_offload,
    }
}

/// What a run will cost: the plan of its largest batch, and under it the seconds of a batch of each bucket.
pub struct Forecast {
    pub device_bytes: u64,
    pub budget: u64,
    pub seconds: Vec<f64>,
    /// There is no card here: the figures are for a usual one.
    pub assumed: bool,
}

/// The forecast of a run over these buckets (size, items a batch), on the card that is here or else on a usual one of
/// 24 GB; `None` where the run computes on the CPU.
pub fn forecast(
    job: &Job,
    settings: &TrainSettings,
    buckets: &[(BucketKey, usize)],
    sources: &[Source],
) -> anyhow::Result<Option<Forecast>> {
    if job.config.device == "cpu" || job.config.task == super::demo::TASK {
        return Ok(None);
    }
    let exec = job.exec().unwrap_or_else(|_| Exec::cpu());
    let assumed = exec.device().is_cpu();
    let room = Room::asked(&job.config, "cuda", || Ok(exec.clone()))?;
    let plan = planned(job, &job.config, settings, &room, largest(buckets.iter().copied())?, sources)?.plan;
    let seconds = |&(bucket, batch): &(BucketKey, usize)| {
        let work = work(job, &job.config, settings, &room, bucket, batch, sources)?;
        Ok(plan::predict(&work, &room.rates, &plan.arrangement))
    };
    let seconds = buckets.iter().map(seconds).collect::<anyhow::Result<_>>()?;
    Ok(Some(Forecast { device_bytes: plan.memory.held(), budget: plan.budget.device, seconds, assumed }))
}

fn work(
    job: &Job,
    config: &RunConfig,
    settings: &TrainSettings,
    room: &Room,
    bucket: BucketKey,
    batch: usize,
    sources: &[Source],
) -> anyhow::Result<plan::Job> {
    let geometry = geometry(job);
    let [_, f, h, w] = geometry.shape((bucket.width as u32, bucket.height as u32), bucket.frames);
    let shape = RunShape {
        target: room.target,
        checkpoint_bytes: match sources.iter().any(|s| checkpoint_dtype(s) == Some(Dtype::F32)) {
            true => 4,
            false => 2,
        },
        latent: [f as u64, h as u64, w as u64],
        batch: batch as u64,
        adapter: settings.network.adapter,
        sites: select(&job.model.arch, &settings.network.patterns)?,
    };
    Ok(plan::Job::from_config(config, &job.model.arch, &shape))
}

fn planned(
    job: &Job,
    config: &RunConfig,
    settings: &TrainSettings,
    room: &Room,
    (bucket, batch): (BucketKey, usize),
    sources: &[Source],
) -> anyhow::Result<Planned> {
    let work = work(job, config, settings, room, bucket, batch, sources)?;
    match plan::choose(&work, room.budget, wishes(job, config), &room.rates) {
        Ok(plan) => {
            let offers = plan::offers(&work, &plan, wishes(job, config), &room.rates);
            let unused = plan::unused(&work, &room.rates);
            Ok(Planned { plan, target: room.target, previews: 0, bucket, batch, offers, unused })
        }
        Err(shortfall) => {
            let more = match shortfall.memory.held() > shortfall.budget.device {
                true => "or a card with more memory",
                false => "more RAM, or a card with more memory",
            };
            Err(UserError::new(format!("this run does not fit:\n{}{shortfall}", shortfall.memory))
                .hint(format!("use smaller buckets or fewer frames in the dataset, a lower --network_dim, {more}"))
                .into())
        }
    }
}

pub fn geometry(job: &Job) -> LatentGeometry {
    (&super::cache::published_vae(job)).into()
}

fn largest(buckets: impl Iterator<Item = (BucketKey, usize)>) -> anyhow::Result<(BucketKey, usize)> {
    let size = |(key, batch): &(BucketKey, usize)| key.width * key.height * (key.frames + 3) * batch;
    buckets.max_by_key(size).ok_or_else(|| UserError::new("the dataset has no usable item").into())
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::{explain_unplanned, out_of_memory};
    use crate::error::UserError;

    #[test]
    fn lack_of_memory_is_told_from_other_errors() {
        assert!(out_of_memory(&anyhow!("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")").context("step 3")));
        assert!(!out_of_memory(&anyhow!("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS)")));
    }

    #[test]
    fn work_without_a_plan_says_what_to_do_once() {
        let raw = || anyhow!("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")\n  0: backtrace");
        let said = format!("{:#}", explain_unplanned(raw()));
        assert!(said.contains("the card is out of memory") && said.contains("hint: close"), "{said}");
        assert!(!said.contains("backtrace"), "{said}");
        let explained: anyhow::Error = UserError::new("the card is out of memory: 3 GiB were planned").into();
        assert_eq!(format!("{:#}", explain_unplanned(explained)), "the card is out of memory: 3 GiB were planned");
        assert_eq!(format!("{:#}", explain_unplanned(anyhow!("no such file"))), "no such file");
    }
}
