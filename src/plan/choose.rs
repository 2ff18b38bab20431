//! From a budget to an arrangement: the fastest one that fits, by a coarse model of what recomputing and streaming cost.
//! Where nothing fits: by how much, and what would.

use std::fmt;

use wan_models::adapter::Kind;
use wan_models::linear::Products;
use wan_models::wan::{BlockPlan, Home, SavePolicy};

use super::cards::Rates;
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
    /// Predicted seconds of a step on a card of the given rates.
    pub step_seconds: f64,
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

/// The fastest arrangement within the budget, on a card of these rates.
pub fn choose(job: &Job, budget: Budget, wishes: Wishes, rates: &Rates) -> Result<Plan, Box<Shortfall>> {
    let mut best: Option<(f64, Plan)> = None;
    let prices = Prices::new(job);
    let extra = Extra::new(job, rates);
    for (blocks_to_swap, saving) in candidates(job, wishes) {
        let ring_size = wishes.ring_size.unwrap_or(2);
        let arrangement = Arrangement { blocks_to_swap, ring_size, saving };
        let Some(arrangement) = with_homes(job, &prices, budget, wishes, arrangement) else { continue };
        let cost = extra.seconds(&arrangement);
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            let memory = prices.of(&arrangement);
            let step_seconds = extra.step() + cost;
            best = Some((cost, Plan { arrangement, memory, budget, step_seconds }));
        }
    }
    match best {
        Some((_, plan)) => Ok(plan),
        None => Err(Box::new(shortfall(job, budget, wishes))),
    }
}

/// Predicted seconds of a step of `job` under an arrangement that may have been chosen for another one: a run has one
/// plan, that of its largest batch, for all its buckets.
pub fn predict(job: &Job, rates: &Rates, arrangement: &Arrangement) -> f64 {
    let extra = Extra::new(job, rates);
    extra.step() + extra.seconds(arrangement)
}

/// What 8-bit products and 8-bit attention would make of a run that does without, on a card of these rates: a line each.
pub fn offers(job: &Job, plan: &Plan, wishes: Wishes, rates: &Rates) -> Vec<String> {
    if job.target == Target::Cpu {
        return Vec::new();
    }
    let linears = |products, weights| Job { products, weights, ..job.clone() };
    let mut ways = Vec::new();
    if job.products == Products::Full {
        ways.push(("--fp8_fast", linears(Products::Fp8, WeightForm::Fp8Rows { scale_bytes: 2 })));
        ways.push(("--int8_fast", linears(Products::Int8, WeightForm::Int8 { otherwise: 2 })));
    }
    if !job.fast_attention {
        ways.push(("--fast_attention", Job { fast_attention: true, ..job.clone() }));
    }
    let line = |(name, other): (&str, Job)| {
        rates.products(other.products)?;
        let other = choose(&other, plan.budget, wishes, rates).ok()?;
        let (now, then) = (plan.step_seconds, other.step_seconds);
        let less = 100.0 * (1.0 - then / now);
        (less >= 1.0).then(|| format!("{name}: about {less:.0} % less time a step ({now:.2} s now, {then:.2} s then)"))
    };
    ways.into_iter().filter_map(line).collect()
}

/// What was asked for and is not used: a line.
pub fn unused(job: &Job, rates: &Rates) -> Option<String> {
    let (tokens, from) = (job.tokens() / job.batch, rates.fast_attention_from);
    (job.fast_attention && tokens < from as u64).then(|| {
        format!("--fast_attention changes nothing: it pays from {from} tokens on, the largest bucket has {tokens}")
    })
}

fn fits(job: &Job, memory: &Memory, budget: Budget) -> bool {
    let host = job.target == Target::Cpu || memory.host() <= budget.host;
    memory.held() <= budget.device && host
}

/// The arrangement with as few blocks as possible saving to host memory, the first ones: those wait longest.
fn with_homes(job: &Job, prices: &Prices, budget: Budget, wishes: Wishes, a: Arrangement) -> Option<Arrangement> {
    let layers = a.saving.len();
    let away = |count: usize| {
        let mut a = a.clone();
        a.saving[..count].iter_mut().for_each(|plan| plan.home = Home::Host);
        a
    };
    let fit = |count: usize| fits(job, &prices.of(&away(count)), budget);
    let on_device = |count: usize| prices.of(&away(count)).held() <= budget.device;
    if job.target == Target::Cpu || !wishes.offload && fit(0) {
        return fit(0).then(|| away(0));
    }
    if wishes.offload || !on_device(layers) {
        return fit(layers).then(|| away(layers));
    }
    // The device's share falls with every block that saves elsewhere.
    let (mut too_few, mut enough) = (0, layers);
    while enough - too_few > 1 {
        let middle = (too_few + enough) / 2;
        match on_device(middle) {
            true => enough = middle,
            false => too_few = middle,
        }
    }
    fit(enough).then(|| away(enough))
}

/// Everything worth pricing, simplest first: equal costs keep the earlier one.
fn candidates(job: &Job, wishes: Wishes) -> impl Iterator<Item = (u64, Vec<BlockPlan>)> + '_ {
    let layers = job.arch.num_layers as u64;
    let swaps = match (wishes.blocks_to_swap, job.target) {
        (Some(n), _) => n.min(layers)..=n.min(layers),
        // On the CPU streaming only adds copies.
        (None, Target::Cpu) => 0..=0,
        (None, Target::Cuda) => 0..=layers,
    };
    let savings: Vec<Vec<BlockPlan>> = saving_plans(layers, wishes.recompute);
    swaps.flat_map(move |blocks_to_swap| {
        let savings = savings.clone();
        savings.into_iter().map(move |saving| (blocks_to_swap, saving))
    })
}

/// Mixtures of two policies over the blocks, the thriftier part first.
fn saving_plans(layers: u64, recompute: bool) -> Vec<Vec<BlockPlan>> {
    let steps: &[(SavePolicy, SavePolicy)] = match recompute {
        true => &[(SavePolicy::Recompute, SavePolicy::Recompute)],
        false => &[
            (SavePolicy::KeepAttention, SavePolicy::KeepAll),
            (SavePolicy::Recompute, SavePolicy::KeepAttention),
            (SavePolicy::Recompute, SavePolicy::KeepAll),
        ],
    };
    let mut plans = Vec::new();
    for (thrifty, lavish) in steps {
        let counts = if thrifty == lavish { 0..=0 } else { 0..=layers };
        for lavish_blocks in counts.rev() {
            let of = |i: u64| if i < layers - lavish_blocks { *thrifty } else { *lavish };
            plans.push((0..layers).map(|i| BlockPlan { keep: of(i), home: Home::Device }).collect());
        }
    }
    plans
}

/// Bytes that single passes of a block move for each number of the stream, both directions: 258 for norms, rotations,
/// gates and GELU (16-bit values, fp32 stream) and 155 for a LoRA on every linear, counted; measured, a quarter more.
const PASSES: f64 = 520.0;

/// What an arrangement costs in time: computing again, and copies that the computing does not hide.
struct Extra {
    layers: f64,
    /// Of one block, in seconds.
    forward: f64,
    backward: f64,
    /// Norms, rotations, gates, GELU, and an adapter's thin products.
    passes: f64,
    /// Seconds of computing a block again, by policy.
    again: [f64; 3],
    /// Seconds of copying in one direction what a block saves, by policy.
    saved: [f64; 3],
    /// Seconds of copying one block's weights.
    weights: f64,
}

impl Extra {
    fn new(job: &Job, rates: &Rates) -> Self {
        let l = job.tokens() as f64;
        let per_sample = l / job.batch as f64;
        let rate = rates.products(job.products).unwrap_or(rates.linears);
        let size = |s: &wan_models::arch::Site| 2.0 * l * (s.in_features * s.out_features) as f64 / rate;
        let sites = job.arch.block_sites(0);
        let linears: f64 = sites.iter().map(size).sum();
        // Backward does not read the last product's output.
        let needed: f64 = sites.iter().filter(|s| !s.name.ends_with("ffn.2")).map(size).sum();
        let products = 4.0 * l * per_sample * job.arch.dim as f64;
        let fast = job.fast_attention && per_sample >= rates.fast_attention_from as f64;
        let attention = products / if fast { rates.fast_attention } else { rates.attention };
        let policies = [SavePolicy::Recompute, SavePolicy::KeepAttention, SavePolicy::KeepAll];
        Self {
            layers: job.arch.num_layers as f64,
            forward: linears + attention,
            backward: linears + 2.5 * products / rates.attention_backward,
            passes: PASSES * l * job.arch.dim as f64 / rates.memory,
            again: [needed + attention, needed, 0.0],
            saved: policies.map(|keep| job.saved_bytes(keep) as f64 / rates.bus),
            weights: job.block_linear_bytes() as f64 / rates.bus,
        }
    }

    /// A step in which nothing is computed twice and every copy is hidden.
    fn step(&self) -> f64 {
        self.layers * (self.forward + self.backward + self.passes)
    }

    fn seconds(&self, a: &Arrangement) -> f64 {
        let weights = a.blocks_to_swap as f64 / a.saving.len() as f64 * self.weights;
        let mut seconds = 0.0;
        for plan in &a.saving {
            let again = self.again[plan.keep as usize];
            let saved = if plan.home == Home::Host { self.saved[plan.keep as usize] } else { 0.0 };
            // Forward sends activations out while weights come in; in backward both come in.
            seconds += again + (saved.max(weights) - self.forward).max(0.0);
            seconds += (saved + weights - self.backward - again).max(0.0);
            // Hidden copies are not free: they take the bus and pinned memory from everything else.
            seconds += 0.1 * 2.0 * (saved + weights);
        }
        seconds
    }
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

/// The same for a budget: what the card has room for needs no host memory.
fn thriftiest(job: &Job, budget: Budget, wishes: Wishes) -> Arrangement {
    let least = least(job, wishes);
    if job.target == Target::Cpu || price(job, &least).held() > budget.device {
        return least;
    }
    let layers = job.arch.num_layers;
    let swaps = wishes.blocks_to_swap.map_or(0..=layers as u64, |n| n..=n);
    let candidates = [Home::Device, Home::Host].into_iter().flat_map(|home| {
        let saving = vec![BlockPlan { keep: SavePolicy::Recompute, home }; layers];
        let ring_size = least.ring_size;
        swaps.clone().map(move |blocks_to_swap| Arrangement { blocks_to_swap, ring_size, saving: saving.clone() })
    });
    let priced = candidates.map(|a| (price(job, &a), a)).filter(|(memory, _)| memory.held() <= budget.device);
    priced.min_by_key(|(memory, _)| memory.host()).map_or(least, |(_, a)| a)
}

fn shortfall(job: &Job, budget: Budget, wishes: Wishes) -> Shortfall {
    let memory = price(job, &thriftiest(job, budget, wishes));
    let free = Wishes::default();
    let mut remedies = Vec::new();
    let mut offer = |what: String, changed: &Job, wishes: Wishes| {
        let after = price(changed, &thriftiest(changed, budget, wishes));
        // Counted in what is short.
        let saved = match memory.held() > budget.device {
            true => memory.held().saturating_sub(after.held()),
            false => memory.host().saturating_sub(after.host()),
        };
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
    if job.models > 1 {
        let what = "a LoRA for each expert (--noise_level both), which needs one model at a time";
        offer(what.into(), &Job { models: 1, ..job.clone() }, wishes);
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
        fits(&fewer, &price(&fewer, &thriftiest(&fewer, budget, free)), budget)
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
        if self.gaps > 0 {
            line("between tensors", &gib(self.gaps), &gib(0))?;
        }
        line("total", &gib(self.held()), &gib(self.host()))
    }
}

impl Plan {
    /// What blocks keep and where their weights are, in one line.
    pub fn in_words(&self) -> String {
        let a = &self.arrangement;
        let mut groups: Vec<(BlockPlan, usize)> = Vec::new();
        for plan in &a.saving {
            match groups.last_mut() {
                Some((last, n)) if last == plan => *n += 1,
                _ => groups.push((*plan, 1)),
            }
        }
        let words: Vec<String> = groups.iter().map(|(plan, n)| format!("{n} {}", describe(*plan))).collect();
        let blocks = words.join(", ");
        match a.blocks_to_swap {
            0 => format!("blocks: {blocks}; weights: all blocks in place"),
            n => {
                let (all, slots) = (a.saving.len(), a.ring_size);
                format!("blocks: {blocks}; weights: {n} of {all} blocks streamed through {slots} slots")
            }
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.memory)?;
        writeln!(f, "{:<34}{:>12}", "budget", gib(self.budget.device))?;
        self.in_words().split("; ").try_for_each(|line| writeln!(f, "{line}"))
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
        match m.held() > b.device {
            true => write!(
                f,
                "even the thriftiest plan takes {} GiB, {} GiB more than the {} GiB there are",
                gib(m.held()),
                over(m.held(), b.device),
                gib(b.device)
            )?,
            false => write!(
                f,
                "beside a full card even the thriftiest plan takes {} GiB of host memory, {} GiB more than the {} GiB there are",
                gib(m.host()),
                over(m.host(), b.host),
                gib(b.host)
            )?,
        }
        self.remedies.iter().try_for_each(|r| write!(f, "\n  {r}"))
    }
}
