//! From a budget to an arrangement: the fastest one that fits, by a coarse model of what recomputing and streaming cost.
//! Where nothing fits: by how much, and what would.

use std::fmt;

use wan_models::adapter::Kind;
use wan_models::wan::{BlockPlan, Home, SavePolicy};

use super::device::Budget;
use super::gib;
use super::memory::{price, Arrangement, Job, Memory, Moments, Prices, Target, WeightForm};

/// What the user has fixed; `None` leaves it to the plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wishes {
    pub blocks_to_swap: Option<u64>,
    pub ring_size: Option<u64>,
    /// `--gradient_checkpointing`: recompute every block whatever fits.
    pub recompute: bool,
    /// `--gradient_checkpointing_cpu_offload`: what is saved waits in host memory.
    pub offload: bool,
}

/// An arrangement that fits, with its table.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub arrangement: Arrangement,
    pub memory: Memory,
    pub budget: Budget,
}

/// Nothing fits.
#[derive(Debug, Clone, PartialEq)]
pub struct Shortfall {
    /// The least that this job takes.
    pub memory: Memory,
    pub budget: Budget,
    /// What would make it fit, or how much it brings, in words.
    pub remedies: Vec<String>,
}

/// Rates for comparing arrangements, of a 24 GB card on its usual bus. Only their ratio matters: a card twice as fast
/// everywhere gets the same plan.
const FLOPS: f64 = 120e12;
const ATTENTION_FLOPS: f64 = 80e12;
const BUS: f64 = 20e9;

/// The fastest arrangement within the budget.
pub fn choose(job: &Job, budget: Budget, wishes: Wishes) -> Result<Plan, Box<Shortfall>> {
    let mut best: Option<(f64, Plan)> = None;
    let prices = Prices::new(job);
    for arrangement in candidates(job, wishes) {
        let memory = prices.of(&arrangement);
        if !fits(job, &memory, budget) {
            continue;
        }
        let cost = extra_seconds(job, &arrangement);
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            best = Some((cost, Plan { arrangement, memory, budget }));
        }
    }
    match best {
        Some((_, plan)) => Ok(plan),
        None => Err(Box::new(shortfall(job, budget, wishes))),
    }
}

fn fits(job: &Job, memory: &Memory, budget: Budget) -> bool {
    let host = job.target == Target::Cpu || memory.host() <= budget.host;
    memory.device() <= budget.device && host
}

/// Every arrangement worth pricing, simplest first: equal costs keep the earlier one.
fn candidates(job: &Job, wishes: Wishes) -> impl Iterator<Item = Arrangement> + '_ {
    let layers = job.arch.num_layers as u64;
    let ring_size = wishes.ring_size.unwrap_or(2);
    let swaps = match (wishes.blocks_to_swap, job.target) {
        (Some(n), _) => n.min(layers)..=n.min(layers),
        // On the CPU streaming only adds copies.
        (None, Target::Cpu) => 0..=0,
        (None, Target::Cuda) => 0..=layers,
    };
    let homes: &[Home] = match (job.target, wishes.offload) {
        (Target::Cpu, _) => &[Home::Device],
        (Target::Cuda, true) => &[Home::Host],
        (Target::Cuda, false) => &[Home::Device, Home::Host],
    };
    let savings: Vec<Vec<BlockPlan>> = saving_plans(layers, homes, wishes.recompute);
    swaps.flat_map(move |blocks_to_swap| {
        let savings = savings.clone();
        savings.into_iter().map(move |saving| Arrangement { blocks_to_swap, ring_size, saving })
    })
}

/// Mixtures of two neighbouring policies over the blocks. The thriftier part comes first: those blocks wait longest.
fn saving_plans(layers: u64, homes: &[Home], recompute: bool) -> Vec<Vec<BlockPlan>> {
    let steps: &[(SavePolicy, SavePolicy)] = match recompute {
        true => &[(SavePolicy::Recompute, SavePolicy::Recompute)],
        false => &[
            (SavePolicy::KeepAttention, SavePolicy::KeepAll),
            (SavePolicy::Recompute, SavePolicy::KeepAttention),
            (SavePolicy::Recompute, SavePolicy::KeepAll),
        ],
    };
    let mut plans = Vec::new();
    for home in homes {
        for (thrifty, lavish) in steps {
            let counts = if thrifty == lavish { 0..=0 } else { 0..=layers };
            for lavish_blocks in counts.rev() {
                let of = |i: u64| if i < layers - lavish_blocks { *thrifty } else { *lavish };
                plans.push((0..layers).map(|i| BlockPlan { keep: of(i), home: *home }).collect());
            }
        }
    }
    plans
}

/// Time of recomputing, and of copies that the computing does not hide.
fn extra_seconds(job: &Job, a: &Arrangement) -> f64 {
    let l = job.tokens() as f64;
    let per_sample = l / job.batch as f64;
    let matrices: f64 = job.arch.block_sites(0).iter().map(|s| (s.in_features * s.out_features) as f64).sum();
    let linears = 2.0 * l * matrices / FLOPS;
    let attention = 4.0 * l * per_sample * job.arch.dim as f64 / ATTENTION_FLOPS;
    let (forward, backward) = (linears + attention, linears + 2.5 * attention);
    let streamed = a.blocks_to_swap as f64 / job.arch.num_layers as f64 * job.block_linear_bytes() as f64;
    let mut seconds = 0.0;
    for plan in &a.saving {
        let again = match plan.keep {
            SavePolicy::KeepAll => 0.0,
            SavePolicy::KeepAttention => linears,
            SavePolicy::Recompute => linears + attention,
        };
        let moved = match plan.home {
            Home::Device => 0.0,
            Home::Host => job.saved_bytes(plan.keep) as f64,
        };
        let copy = (moved + streamed) / BUS;
        seconds += again + (copy - forward).max(0.0) + (copy - backward - again).max(0.0);
        // Hidden copies are not free: they take the bus and pinned memory from everything else.
        seconds += 0.1 * 2.0 * copy;
    }
    seconds
}

/// The thriftiest arrangement that the wishes allow.
fn least(job: &Job, wishes: Wishes) -> Arrangement {
    let layers = job.arch.num_layers as u64;
    let (home, swap) = match job.target {
        Target::Cpu => (Home::Device, 0),
        Target::Cuda => (Home::Host, layers),
    };
    let saving = vec![BlockPlan { keep: SavePolicy::Recompute, home }; job.arch.num_layers];
    let blocks_to_swap = wishes.blocks_to_swap.unwrap_or(swap);
    Arrangement { blocks_to_swap, ring_size: wishes.ring_size.unwrap_or(2), saving }
}

fn shortfall(job: &Job, budget: Budget, wishes: Wishes) -> Shortfall {
    let memory = price(job, &least(job, wishes));
    let free = Wishes::default();
    let mut remedies = Vec::new();
    let mut offer = |what: String, changed: &Job, wishes: Wishes| {
        let after = price(changed, &least(changed, wishes));
        let saved = memory.device().saturating_sub(after.device()) + memory.host().saturating_sub(after.host());
        if fits(changed, &after, budget) {
            remedies.push(format!("{what}: fits"));
        } else if saved > 0 {
            remedies.push(format!("{what}: saves {} GiB, not enough alone", gib(saved)));
        }
    };
    if matches!(job.weights, WeightForm::Dense(_)) {
        let weights = WeightForm::Fp8Scaled { scale_bytes: 2 };
        offer("--fp8_scaled".into(), &Job { weights, ..job.clone() }, wishes);
    }
    if wishes.blocks_to_swap.is_some() && job.target == Target::Cuda {
        offer("leaving --blocks_to_swap to the plan".into(), job, Wishes { blocks_to_swap: None, ..wishes });
    }
    if job.moments == Moments::F32 {
        offer("--optimizer_type adamw8bit".into(), &Job { moments: Moments::Blocks8bit, ..job.clone() }, wishes);
    }
    if job.adapter.rank > 8 && job.adapter.kind == Kind::Lora {
        let mut small = job.clone();
        small.adapter.rank = 8;
        offer("--network_dim 8".into(), &small, wishes);
    }
    if job.batch > 1 {
        offer("batch_size 1".into(), &Job { batch: 1, ..job.clone() }, wishes);
    }
    let (frames, latent) = (job.latent[0], job.latent);
    if let Some(fitting) = (1..frames).rev().find(|f| {
        let fewer = Job { latent: [*f, latent[1], latent[2]], ..job.clone() };
        fits(&fewer, &price(&fewer, &least(&fewer, free)), budget)
    }) {
        remedies.push(format!("clips of {} frames instead of {}: fit", 4 * fitting - 3, 4 * frames - 3));
    }
    Shortfall { memory, budget, remedies }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.rows.iter().any(|r| r.host > 0);
        let mut line = |what: &str, device: &str, other: &str| match host {
            true => writeln!(f, "{what:<34}{device:>12}{other:>12}"),
            false => writeln!(f, "{what:<34}{device:>12}"),
        };
        line("", if host { "device GiB" } else { "GiB" }, "host GiB")?;
        for row in &self.rows {
            line(row.what, &gib(row.device), &gib(row.host))?;
        }
        line("total", &gib(self.device()), &gib(self.host()))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.memory)?;
        writeln!(f, "{:<34}{:>12}", "budget", gib(self.budget.device))?;
        let a = &self.arrangement;
        let mut groups: Vec<(BlockPlan, usize)> = Vec::new();
        for plan in &a.saving {
            match groups.last_mut() {
                Some((last, n)) if last == plan => *n += 1,
                _ => groups.push((*plan, 1)),
            }
        }
        let words: Vec<String> = groups.iter().map(|(plan, n)| format!("{n} {}", describe(*plan))).collect();
        writeln!(f, "blocks: {}", words.join(", "))?;
        match a.blocks_to_swap {
            0 => writeln!(f, "weights: all blocks in place"),
            n => writeln!(f, "weights: {n} of {} blocks streamed through {} slots", a.saving.len(), a.ring_size),
        }
    }
}

fn describe(plan: BlockPlan) -> String {
    let keep = match plan.keep {
        SavePolicy::Recompute => "recompute",
        SavePolicy::KeepAttention => "keep attention",
        SavePolicy::KeepAll => "keep all",
    };
    match plan.home {
        Home::Device => keep.into(),
        Home::Host => format!("{keep} (in host memory)"),
    }
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let over = |need: u64, have: u64| gib(need.saturating_sub(have));
        let (m, b) = (&self.memory, &self.budget);
        match m.device() > b.device {
            true => write!(
                f,
                "even the thriftiest plan takes {} GiB, {} GiB more than the {} GiB there are",
                gib(m.device()),
                over(m.device(), b.device),
                gib(b.device)
            )?,
            false => write!(
                f,
                "the thriftiest plan takes {} GiB of host memory, {} GiB more than the {} GiB there are",
                gib(m.host()),
                over(m.host(), b.host),
                gib(b.host)
            )?,
        }
        self.remedies.iter().try_for_each(|r| write!(f, "\n  {r}"))
    }
}
