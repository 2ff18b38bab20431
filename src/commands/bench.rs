//! `wan-train bench`: real training steps of the 14B model on random weights made on the card, without any file; and
//! `bench ops`: every kernel by itself, timed (or, with `--check`, held against its definition).

use std::process::ExitCode;

use super::{bench_start, project};
use crate::cli::{BenchOptions, BenchWhat};
use crate::config::Typed;
use crate::error::UserError;

/// A latent video by name: what the case names of reports mean.
pub fn pixels(case: &str) -> Result<[usize; 3], UserError> {
    match case {
        "img720" => return Ok([1280, 720, 1]),
        "v21" => return Ok([1280, 720, 21]),
        "v45" => return Ok([960, 544, 45]),
        _ => {}
    }
    let sizes: Vec<usize> = case.split('x').filter_map(|n| n.parse().ok()).collect();
    match sizes[..] {
        [w, h, f] if w >= 16 && h >= 16 && w % 16 == 0 && h % 16 == 0 && f % 4 == 1 => Ok([w, h, f]),
        _ => Err(UserError::usage(format!("--case {case} is neither img720, v21, v45 nor WIDTHxHEIGHTxFRAMES"))
            .hint("width and height are multiples of 16, frames one more than a multiple of 4: 832x480x81")),
    }
}

/// Channels, frames, rows, columns of the Wan 2.1 latent of a video.
pub fn latent([w, h, f]: [usize; 3]) -> [usize; 4] {
    [16, (f - 1) / 4 + 1, h / 8, w / 8]
}

/// What every bench takes where nothing else is typed: the usual way to train a 14B model.
fn defaults(typed: &mut Typed) {
    let mut default = |name: &'static str, words: &[&str]| {
        typed.flags.entry(name).or_insert_with(|| words.iter().map(|w| w.to_string()).collect());
    };
    default("task", &["t2v-14B"]);
    default("mixed_precision", &["bf16"]);
    default("fp8_base", &[]);
    default("fp8_scaled", &[]);
    default("network_dim", &["42"]);
    default("network_alpha", &["42"]);
    default("optimizer_type", &["adamw"]);
    default("seed", &["1"]);
}

pub fn run(mut typed: Typed, options: &BenchOptions) -> anyhow::Result<ExitCode> {
    defaults(&mut typed);
    match (&options.project, options.what) {
        (Some(card), _) => project::run(&typed, card, options.json),
        (None, BenchWhat::Start) => bench_start::run(typed, options),
        (None, _) => measure(typed, options),
    }
}

#[cfg(not(feature = "cuda"))]
fn measure(_typed: Typed, _options: &BenchOptions) -> anyhow::Result<ExitCode> {
    Err(UserError::new("this build computes on the CPU only").hint("build with `make cuda`").into())
}

#[cfg(feature = "cuda")]
fn measure(typed: Typed, options: &BenchOptions) -> anyhow::Result<ExitCode> {
    on_card::run(typed, options)
}

#[cfg(feature = "cuda")]
pub mod on_card {
    use std::collections::BTreeMap;
    use std::ops::Range;
    use std::process::ExitCode;
    use std::time::Instant;

    use candle_core::{DType, Device};
    use serde_json::json;
    use wan_kernels::gpu::{Gpu, KernelsOf, Memory};
    use wan_kernels::philox::Philox;
    use wan_kernels::{bench, check, Exec};
    use wan_models::arch::WanArch;
    use wan_models::linear::Products;
    use wan_models::wan::{BlockWeights, SavePlan, WanModel, WanWeights};

    use crate::adapter::select;
    use crate::cache::index::{Bucket, BucketKey, ItemTensors};
    use crate::checkpoint::Identity;
    use crate::cli::{BenchOptions, BenchWhat};
    use crate::commands::job::Job;
    use crate::commands::plan::{explain, wishes, Room};
    use crate::commands::{synthetic, weights};
    use crate::config::Typed;
    use crate::error::UserError;
    use crate::plan::{self, RunShape, Target};
    use crate::report::{Task, Work};
    use crate::residency::{Residency, ResidencySpec};
    use crate::train::{Items, MicroStep, Models, Observer, Parts, TrainSettings, Trainer};

    const GIB: f64 = (1u64 << 30) as f64;
    /// Rows of a prompt of usual length.
    pub const TEXT_ROWS: usize = 120;

    pub fn run(mut typed: Typed, options: &BenchOptions) -> anyhow::Result<ExitCode> {
        typed.flags.entry("device").or_insert_with(|| vec!["cuda".into()]);
        typed.flags.insert("max_train_steps", vec![(options.steps + 2).to_string()]);
        let job = Job::new(&typed)?;
        let exec = job.exec()?;
        weights::check_fast(&job.config, &exec)?;
        let Exec::Cuda { gpu, .. } = &exec else {
            return Err(UserError::new("bench measures a card; this run computes on the CPU").into());
        };
        match options.what {
            BenchWhat::Ops if options.check => checked(gpu, options.group.as_deref()),
            BenchWhat::Ops => ops(gpu, &job, exec.compute(), options),
            BenchWhat::Steps => {
                gpu.use_kernels_of(if options.portable { KernelsOf::Sm86 } else { KernelsOf::ThisCard });
                train(gpu, &job, &exec, options)
            }
            BenchWhat::Start => unreachable!("has a file of its own"),
            BenchWhat::Fast => super::super::bench_fast::run(gpu, &job, &exec, options),
            BenchWhat::Cache => super::super::bench_cache::run(gpu, &exec, options),
        }
    }

    fn checked(gpu: &Gpu, group: Option<&str>) -> anyhow::Result<ExitCode> {
        let rows = check::all(gpu, group)?;
        if rows.is_empty() {
            return Err(
                UserError::new(format!("this card has no kernels of the group {}", group.unwrap_or("all"))).into()
            );
        }
        let wrong: Vec<_> = rows.iter().filter(|r| !r.right).collect();
        for row in &wrong {
            println!("WRONG {:28} {:40} error {:.2e}, naive {:.2e}", row.op, row.case, row.error, row.naive);
        }
        let mut worst: BTreeMap<&str, f64> = BTreeMap::new();
        for row in rows.iter().filter(|r| r.naive > 0.0) {
            let ratio = row.error / row.naive;
            let entry = worst.entry(&row.op).or_default();
            *entry = entry.max(ratio);
        }
        for (op, ratio) in worst {
            println!("{op:28} largest error over the naive one's: {ratio:.2}");
        }
        println!("{} of {} results are right", rows.len() - wrong.len(), rows.len());
        Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn ops(gpu: &Gpu, job: &Job, compute: DType, options: &BenchOptions) -> anyhow::Result<ExitCode> {
        let [_, f, h, w] = super::latent(super::pixels(&options.case)?);
        let tokens = f * (h / 2) * (w / 2);
        for row in bench::ops(gpu, compute, tokens, job.config.network_dim as usize)? {
            let (tflops, gbytes) = (row.tflops(), row.gbytes());
            match options.json {
                true => {
                    println!(
                        "{}",
                        json!({"op": row.op, "case": row.case, "ms": row.ms, "tflops": tflops, "gb_s": gbytes})
                    )
                }
                false => {
                    println!("{:30} {:32} {:9.3} ms {tflops:7.0} TFLOP/s {gbytes:7.0} GB/s", row.op, row.case, row.ms)
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Random items, the same in every run: losses of runs that differ in policies only are then the same, bit for bit.
    struct Synthetic {
        buckets: Vec<Bucket>,
        shape: [usize; 4],
        text: usize,
    }

    impl Items for Synthetic {
        fn buckets(&self) -> &[Bucket] {
            &self.buckets
        }

        fn load(&self, item: usize) -> anyhow::Result<ItemTensors> {
            let normal = |stream, shape: &[usize]| Philox::new(1, stream, 0, item as u32).normal(shape, &Device::Cpu);
            Ok(ItemTensors {
                latents: normal(0, &self.shape)?,
                latents_image: None,
                control: None,
                clip: None,
                positions: None,
                context: (normal(1, &[TEXT_ROWS, self.text])? * 0.1)?.to_dtype(DType::BF16)?,
            })
        }

        fn name(&self, item: usize) -> String {
            format!("synthetic {item}")
        }
    }

    /// Times of the steps; a profile of the last one.
    pub struct Clock<'a> {
        gpu: &'a Gpu,
        pub seconds: Vec<f64>,
        pub losses: Vec<f32>,
        skipped: usize,
        profiled: u64,
        progress: Option<Box<dyn Task>>,
        /// Behind each step; peaks are those of the step.
        memory: Vec<Memory>,
    }

    impl Clock<'_> {
        /// The most of something over all steps.
        pub fn most_gib(&self, of: fn(&Memory) -> u64) -> f64 {
            self.memory.iter().map(of).max().unwrap_or(0) as f64 / GIB
        }

        /// How a long run changes on its way, by tenths of the counted steps: median seconds; the most in tensors between
        /// steps and within; the most held by the pools between steps and within, the large one's part of it by itself.
        /// `None` for fewer than 20.
        fn drift(&self) -> Option<serde_json::Value> {
            let counted = 1..self.seconds.len().saturating_sub(1);
            let n = counted.len();
            if n < 20 {
                return None;
            }
            let tenths = || (0..10).map(|i| counted.start + n * i / 10..counted.start + n * (i + 1) / 10);
            let median = |steps: Range<usize>| {
                let mut seconds = self.seconds[steps].to_vec();
                seconds.sort_by(f64::total_cmp);
                seconds[seconds.len() / 2]
            };
            let most = |of: fn(&Memory) -> u64| -> Vec<f64> {
                let gib = |steps: Range<usize>| self.memory[steps].iter().map(of).max().unwrap_or(0) as f64 / GIB;
                tenths().map(gib).collect()
            };
            Some(json!({
                "s": tenths().map(median).collect::<Vec<_>>(),
                "in_tensors_gib": most(|m| m.used), "in_tensors_peak_gib": most(|m| m.peak),
                "held_gib": most(|m| m.reserved), "held_peak_gib": most(|m| m.reserved_peak),
                "held_large_peak_gib": most(|m| m.large_peak),
            }))
        }
    }

    impl Observer for Clock<'_> {
        fn micro_step(&mut self, step: &MicroStep) {
            let Some(update) = step.update else { return };
            self.losses.push(step.loss);
            self.seconds.push(update.seconds);
            self.skipped += usize::from(update.skipped.is_some());
            // Zeros where the card does not say: it cannot compute either, and the next step tells why.
            let memory = self.gpu.memory().unwrap_or_default();
            let _ = self.gpu.reset_peak();
            self.memory.push(memory);
            if let Some(progress) = &mut self.progress {
                let held = memory.reserved_peak as f64 / GIB;
                progress.advance(1, &format!("loss {:.4}, {held:.1} GiB held", step.loss));
            }
            if step.step + 1 == self.profiled {
                self.gpu.start_profile();
            }
        }
    }

    fn train(gpu: &Gpu, job: &Job, exec: &Exec, options: &BenchOptions) -> anyhow::Result<ExitCode> {
        let clock = Instant::now();
        let (planned, tokens, settings) = plan_for(job, exec, options)?;
        if !options.json {
            println!("{planned}");
        }
        let arch = &job.model.arch;
        let spec = residency(&planned);
        let (c, products) = (&job.config, job.config.products());
        // int8 is rounded from 16 bit, as from a file.
        let fp8 = products != Products::Int8 && (c.fp8_base || c.fp8_scaled || c.fp8_fast);
        let weights = synthetic::on_card(exec, arch, &spec.streamed(arch.num_layers), (fp8, products));
        let weights = weights.map_err(|e| explain(exec, &planned.memory, e))?;
        let steps = options.steps + 2;
        let (watch, ready) = steps_of(gpu, job, exec, options, (&planned, settings), weights, steps)?;
        let prepared = (ready - clock).as_secs_f64();
        let classes = gpu.finish_profile()?;
        let code = report(gpu, job, options, &planned, &watch, &classes, prepared, tokens)?;
        Ok(if job.stopped() { ExitCode::from(130) } else { code })
    }

    pub fn residency(planned: &plan::Plan) -> ResidencySpec {
        let a = &planned.arrangement;
        ResidencySpec { blocks_to_swap: a.blocks_to_swap as usize, ring_size: a.ring_size as usize }
    }

    /// The plan for a case, its tokens, and what the configuration says about training.
    pub fn plan_for(
        job: &Job,
        exec: &Exec,
        options: &BenchOptions,
    ) -> anyhow::Result<(plan::Plan, u64, TrainSettings)> {
        let arch = &job.model.arch;
        let shape = super::latent(super::pixels(&options.case)?);
        let settings = TrainSettings::from_config(&job.config, &job.model, job.config.seed.unwrap_or(1))?;
        let work = plan::Job::from_config(
            &job.config,
            arch,
            &RunShape {
                target: Target::Cuda,
                checkpoint_bytes: 2,
                latent: [shape[1] as u64, shape[2] as u64, shape[3] as u64],
                batch: 1,
                adapter: settings.network.adapter,
                sites: select(arch, &settings.network.patterns)?,
            },
        );
        let room = Room::on(exec, job.config.vram_budget)?;
        let planned = plan::choose(&work, room.budget, wishes(job, &job.config), &room.rates)
            .map_err(|s| UserError::new(format!("this case does not fit:\n{}{s}", s.memory)))?;
        Ok((planned, work.tokens(), settings))
    }

    /// Trains `steps` steps on random items; also when everything was ready for the first.
    pub fn steps_of<'a>(
        gpu: &'a Gpu,
        job: &Job,
        exec: &Exec,
        options: &BenchOptions,
        (planned, settings): (&plan::Plan, TrainSettings),
        (rest, blocks): (WanWeights, Vec<BlockWeights>),
        steps: u64,
    ) -> anyhow::Result<(Clock<'a>, Instant)> {
        let arch = &job.model.arch;
        let [w, h, f] = super::pixels(&options.case)?;
        let explain = |e| explain(exec, &planned.memory, e);
        let model = WanModel::new(arch.clone(), rest, job.config.numerics()).map_err(|e| explain(e.into()))?;
        let (residency, note) = Residency::on(exec, blocks, residency(planned)).map_err(explain)?;
        note.iter().for_each(|note| eprintln!("note: {note}"));
        let save_plan = SavePlan::per_block(planned.arrangement.saving.clone());
        let items = Synthetic {
            buckets: vec![Bucket {
                dataset: 0,
                key: BucketKey { width: w, height: h, frames: f },
                batch_size: 1,
                entries: (0..steps as usize).collect(),
            }],
            shape: super::latent([w, h, f]),
            text: arch.text_dim,
        };
        let parts = Parts { exec, models: Models::one(&model, &residency), save_plan: &save_plan, items: &items };
        let trainer = Trainer::new(parts, settings, Identity::default(), serde_json::Value::Null);
        let mut trainer = trainer.map_err(explain)?;
        gpu.synchronize()?;
        let ready = Instant::now();
        gpu.reset_peak()?;
        exec.plan_held(planned.memory.held());
        let mut watch = Clock {
            gpu,
            seconds: Vec::new(),
            losses: Vec::new(),
            skipped: 0,
            // The last step is profiled and not counted: its events cost time.
            profiled: steps,
            progress: Some(job.progress.begin(Work { what: "training", unit: "step", start: 0, total: steps })),
            memory: Vec::new(),
        };
        // A long run that is stopped reports the steps it made.
        job.catch_interrupts();
        trainer.run(&mut watch, &mut (), &job.stop).map_err(explain)?;
        watch.progress = None;
        Ok((watch, ready))
    }

    #[allow(clippy::too_many_arguments)]
    fn report(
        gpu: &Gpu,
        job: &Job,
        options: &BenchOptions,
        planned: &plan::Plan,
        watch: &Clock,
        classes: &[(&str, usize, f64)],
        prepared: f64,
        tokens: u64,
    ) -> anyhow::Result<ExitCode> {
        // The first step loads kernels and fills the pool.
        let counted = &watch.seconds[1..watch.seconds.len().saturating_sub(1).max(1)];
        let mut sorted = if counted.is_empty() { watch.seconds.clone() } else { counted.to_vec() };
        sorted.sort_by(f64::total_cmp);
        let (least, median, most) = (sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]);
        let tflop = useful_tflop(&job.model.arch, tokens as f64);
        let (peak, reserved) = (watch.most_gib(|m| m.peak), watch.most_gib(|m| m.reserved_peak));
        let plan_gib = planned.memory.device() as f64 / GIB;
        let saving = |policy: wan_models::wan::SavePolicy| {
            planned.arrangement.saving.iter().filter(|b| b.keep == policy).count()
        };
        use wan_models::wan::SavePolicy::{KeepAll, KeepAttention, Recompute};
        let row = json!({
            "case": options.case, "card": gpu.card().name, "precision": job.config.mixed_precision, "fp8_fast": job.config.fp8_fast, "int8_fast": job.config.int8_fast,
            "fast_attention": job.config.fast_attention,
            "portable": options.portable, "rank": job.config.network_dim, "blocks_to_swap": planned.arrangement.blocks_to_swap,
            "vram_budget_gib": job.config.vram_budget,
            "kept": {"all": saving(KeepAll), "attention": saving(KeepAttention), "recompute": saving(Recompute)},
            "host_saved": planned.arrangement.saving.iter().filter(|b| b.home == wan_models::wan::Home::Host).count(),
            "steps": sorted.len(), "s_per_step": median, "s_min": least, "s_max": most, "first_step_s": watch.seconds[0],
            "tokens": tokens, "tokens_per_s": tokens as f64 / median, "tflops": tflop / median,
            "peak_gib": peak, "reserved_gib": reserved, "planned_gib": plan_gib, "planned_held_gib": planned.memory.held() as f64 / GIB, "planned_s": planned.step_seconds, "prepare_s": prepared,
            "pinned_gib": gpu.stash_bytes() as f64 / GIB, "commit": env!("WAN_COMMIT"),
            "losses": watch.losses, "skipped": watch.skipped, "drift": watch.drift(),
            "ms_by_op": classes.iter().map(|(op, calls, ms)| json!([op, calls, ms])).collect::<Vec<_>>(),
        });
        if options.json {
            println!("{row}");
            return Ok(ExitCode::SUCCESS);
        }
        println!(
            "{}: {median:.3} s/step ({least:.3} to {most:.3} over {}), {:.0} tokens/s, {:.0} TFLOP/s",
            options.case,
            sorted.len(),
            tokens as f64 / median,
            tflop / median
        );
        println!("peak memory in tensors: {peak:.2} GiB, planned {plan_gib:.2} GiB");
        gpu.stash_unpinned().iter().for_each(|why| println!("note: host memory is not pinned: {why}"));
        if let Some(drift) = watch.drift() {
            println!("by tenths of the run: {drift}");
        }
        println!("losses: {:?}", watch.losses);
        for (op, calls, ms) in classes {
            println!("{op:32} {calls:6} calls {ms:10.1} ms");
        }
        Ok(ExitCode::SUCCESS)
    }

    /// What a step must compute without recomputing: forward, input gradients, attention with its backward. One row stands
    /// for the padding behind the prompt.
    fn useful_tflop(arch: &WanArch, tokens: f64) -> f64 {
        let text = arch.text_len.min(TEXT_ROWS + 1) as f64;
        let rows =
            |name: &str| if name.ends_with("cross_attn.k") || name.ends_with("cross_attn.v") { text } else { tokens };
        let linears: f64 = arch
            .block_sites(0)
            .iter()
            .map(|s| {
                let passes = if rows(&s.name) == text { 1.0 } else { 2.0 };
                2.0 * passes * rows(&s.name) * (s.in_features * s.out_features) as f64
            })
            .sum();
        let attention = 3.5 * 4.0 * tokens * (tokens + text) * arch.dim as f64;
        (linears + attention) * arch.num_layers as f64 / 1e12
    }
}

#[cfg(test)]
mod tests {
    use super::pixels;

    #[test]
    fn cases_are_named_or_measured() {
        assert_eq!(pixels("v45").unwrap(), [960, 544, 45]);
        assert_eq!(pixels("832x480x81").unwrap(), [832, 480, 81]);
        for wrong in ["", "v22", "832x480", "833x480x81", "832x480x80", "0x0x1"] {
            assert!(pixels(wrong).unwrap_err().to_string().contains("WIDTHxHEIGHTxFRAMES"), "{wrong}");
        }
    }
}
