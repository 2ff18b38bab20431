//! The memory plan: closed forms, monotonicity, and the sizes that must fit.

use wan_models::adapter::{AdapterSpec, Kind};
use wan_models::arch::{ModelConfig, WanArch};
use wan_models::linear::Products;
use wan_models::wan::{BlockPlan, Home, SavePolicy};
use wan_train::config::registry;
use wan_train::plan::{
    choose, offers, price, unused, Arrangement, Budget, Job, Moments, Rates, Target, WeightForm, Wishes, OF_A_STEP,
};

const GIB: u64 = 1 << 30;

fn arch(task: &str) -> WanArch {
    ModelConfig::from_toml(registry::text(&format!("models/{task}.toml")).unwrap()).unwrap().arch
}

/// The job of the measured 24 GB case: 14B, 1280x720, 21 frames, rank 42, fp8 weights, 16-bit compute.
fn v21(target: Target) -> Job {
    let arch = arch("t2v-A14B");
    Job {
        sites: arch.sites(),
        models: 1,
        target,
        weights: WeightForm::Fp8Scaled { scale_bytes: 2 },
        products: Products::Full,
        fast_attention: false,
        rest_bytes: 2,
        compute_bytes: 2,
        stream_bytes: 4,
        latent: [6, 90, 160],
        batch: 1,
        adapter: AdapterSpec { kind: Kind::Lora, rank: 42, alpha: 42.0 },
        moments: Moments::Blocks8bit,
        arch,
    }
}

/// Two blocks of width 8, feed-forward 24, two heads; 2 x 2 x 3 tokens.
fn tiny() -> Job {
    let arch = WanArch {
        dim: 8,
        ffn_dim: 24,
        num_heads: 2,
        num_layers: 2,
        in_dim: 4,
        out_dim: 4,
        text_dim: 6,
        text_len: 5,
        freq_dim: 4,
        eps: 1e-6,
        patch: [1, 2, 2],
        clip: None,
        per_token_time: false,
    };
    Job {
        sites: arch.sites(),
        models: 1,
        target: Target::Cpu,
        weights: WeightForm::Dense(4),
        products: Products::Full,
        fast_attention: false,
        rest_bytes: 4,
        compute_bytes: 4,
        stream_bytes: 4,
        latent: [2, 4, 6],
        batch: 1,
        adapter: AdapterSpec { kind: Kind::Lora, rank: 3, alpha: 3.0 },
        moments: Moments::F32,
        arch,
    }
}

fn keep(job: &Job, keep: SavePolicy) -> Arrangement {
    Arrangement::uniform(job, keep, Home::Device)
}

#[test]
fn a_preview_takes_less_than_one_block_of_a_step() {
    for target in [Target::Cpu, Target::Cuda] {
        let job = v21(target);
        let memory = price(&job, &keep(&job, SavePolicy::Recompute));
        let row = |what: &str| memory.row(what).unwrap().device;
        // All blocks' inputs are saved in a step.
        let others = 39 * job.saved_bytes(SavePolicy::Recompute);
        let of_step = OF_A_STEP.iter().map(|what| row(what)).sum::<u64>() - others;
        let preview = job.preview_bytes() - row("batches");
        assert!(preview < of_step && preview > of_step / 3, "{preview} {of_step}");
        let long = Job { latent: [21, 90, 160], ..job.clone() };
        assert!(long.preview_bytes() > 3 * job.preview_bytes() && long.preview_bytes() < 4 * job.preview_bytes());
    }
    // A clip of 81 frames of 832 x 480 fits beside the fp8 weights on a card of 24 GB.
    let job = Job { latent: [21, 60, 104], ..v21(Target::Cuda) };
    assert!(job.preview_bytes() < 5 * GIB, "{}", job.preview_bytes());
}

#[test]
fn the_tiny_model_has_the_sizes_counted_by_hand() {
    let job = tiny();
    assert_eq!(job.tokens(), 12);
    // Eight 8x8 matrices and two of 8x24.
    assert_eq!(job.block_linear_bytes(), 4 * (8 * 64 + 2 * 192));
    // Rank 3: each square site 3·16 numbers, each of the others 3·32.
    assert_eq!(job.trainable(), 2 * (8 * 48 + 2 * 96));
    let table = price(&job, &keep(&job, SavePolicy::Recompute));
    let device = |what: &str| table.row(what).unwrap().device;
    assert_eq!(device("resident blocks"), 2 * job.block_linear_bytes());
    assert_eq!(device("adapters"), 4 * 1152);
    assert_eq!(device("gradients"), 4 * 1152);
    assert_eq!(device("optimizer"), 8 * 1152);
    assert_eq!(device("saved activations"), 2 * 12 * 8 * 4);
    // Embeddings: patch 8·16+8, text 8·6+8+64+8, time 8·4+8+64+8+6·64+48, head 8·16+16+16; a block's biases
    // 9·8+24, norms 6·8, modulation 6·8.
    let outer = 136 + 128 + 544 + 160;
    assert_eq!(device("embeddings, head, norms, biases"), 4 * (outer + 2 * (96 + 48 + 48)));
    // Attention: 12·8 outputs and 2·12 sums. All: that twice, keys and values of five text rows, six products and the
    // feed-forward one, and low-rank activations of 8 sites over 12 rows and two over 5.
    let attention = 4 * (96 + 24);
    let all = 2 * attention + 4 * (2 * 5 * 8 + 6 * 96 + 12 * 24 + 3 * (8 * 12 + 2 * 5));
    assert_eq!(job.saved_bytes(SavePolicy::KeepAttention), 4 * 96 + attention);
    assert_eq!(job.saved_bytes(SavePolicy::KeepAll), 4 * 96 + all);
}

#[test]
fn a_14b_block_is_as_large_as_measured() {
    let job = v21(Target::Cuda);
    let matrices = 8 * 5120u64.pow(2) + 2 * 5120 * 13824;
    assert_eq!(matrices, 351_272_960);
    assert_eq!(job.block_linear_bytes(), matrices + matrices / 64 * 2);
    assert_eq!(job.tokens(), 21_600);
    assert_eq!(job.saved_bytes(SavePolicy::Recompute), 21_600 * 5120 * 4);
}

#[test]
fn more_of_anything_never_takes_less() {
    let base = v21(Target::Cuda);
    let total = |job: &Job, a: &Arrangement| {
        let m = price(job, a);
        (m.device(), m.device() + m.host())
    };
    let a = keep(&base, SavePolicy::KeepAttention);
    let (device, all) = total(&base, &a);
    let mut wider = base.clone();
    wider.adapter.rank = 64;
    let mut dense = base.clone();
    dense.weights = WeightForm::Dense(2);
    let more = [
        Job { latent: [7, 90, 160], ..base.clone() },
        Job { batch: 2, ..base.clone() },
        Job { moments: Moments::F32, ..base.clone() },
        Job { compute_bytes: 4, ..base.clone() },
        wider,
        dense,
    ];
    for job in more {
        assert!(total(&job, &a).0 > device);
    }
    let policies = [SavePolicy::Recompute, SavePolicy::KeepAttention, SavePolicy::KeepAll];
    let sizes = policies.map(|p| total(&base, &keep(&base, p)).0);
    assert!(sizes[0] < sizes[1] && sizes[1] < sizes[2]);
    let mut last = (u64::MAX, 0);
    for swap in 3..=40 {
        let now = total(&base, &Arrangement { blocks_to_swap: swap, ..a.clone() });
        assert!(now.0 < last.0 && now.1 >= last.1, "each streamed block frees device memory, never the sum");
        last = now;
    }
    assert!(last.1 > all, "two ring slots come on top");
}

#[test]
fn the_720p_clip_fits_a_24_gb_card() {
    let budget = Budget { device: 45 * GIB / 2, host: 32 * GIB };
    for stream_bytes in [2, 4] {
        let job = Job { stream_bytes, ..v21(Target::Cuda) };
        let plan = choose(&job, budget, Wishes::default(), &Rates::default()).unwrap();
        assert!(plan.memory.device() <= budget.device && plan.memory.host() <= budget.host);
        // Attention is the dearest thing to compute again.
        assert!(plan.arrangement.saving.iter().all(|p| p.keep != SavePolicy::Recompute), "{plan}");
    }
    // Not a single block has to be streamed, whatever the optimizer keeps.
    for moments in [Moments::Blocks8bit, Moments::F32] {
        let job = Job { moments, ..v21(Target::Cuda) };
        let wishes = Wishes { blocks_to_swap: Some(0), ..Default::default() };
        let plan = choose(&job, Budget { host: 64 * GIB, ..budget }, wishes, &Rates::default()).unwrap();
        assert_eq!(plan.memory.row("streamed blocks"), None);
        assert!(plan.arrangement.saving.iter().all(|p| p.keep != SavePolicy::Recompute), "{plan}");
        println!("{plan}");
    }
}

#[test]
fn the_720p_clip_fits_a_12_gb_card_with_streamed_blocks() {
    let job = v21(Target::Cuda);
    let plan =
        choose(&job, Budget { device: 23 * GIB / 2, host: 64 * GIB }, Wishes::default(), &Rates::default()).unwrap();
    assert!(plan.arrangement.blocks_to_swap > 10, "{plan}");
    println!("{plan}");
}

#[test]
fn two_experts_take_their_weights_twice_and_nothing_else() {
    let one = v21(Target::Cuda);
    let two = Job { models: 2, ..one.clone() };
    for blocks_to_swap in [0, 1, 30, 40] {
        let arrangement = Arrangement { blocks_to_swap, ..keep(&one, SavePolicy::KeepAttention) };
        let (a, b) = (price(&one, &arrangement), price(&two, &arrangement));
        let mut weights = (0, 0);
        for row in ["embeddings, head, norms, biases", "resident blocks", "streamed blocks"] {
            let short = row.replace(" head,", "");
            let Some(row) = a.row(row) else { continue };
            for expert in ["low", "high"] {
                let own = b.row(&format!("{expert}: {short}")).unwrap();
                assert_eq!((own.device, own.host), (row.device, row.host), "{short}");
            }
            weights = (weights.0 + row.device, weights.1 + row.host);
        }
        assert_eq!((b.device(), b.host()), (a.device() + weights.0, a.host() + weights.1), "{blocks_to_swap}");
        assert_eq!(blocks_to_swap == 0, a.row("streamed blocks").is_none());
    }
    // On a 24 GB card the second model means streaming; a step takes no longer where copies are hidden.
    let budget = Budget { device: 45 * GIB / 2, host: 64 * GIB };
    let plan = |job: &Job| choose(job, budget, Wishes::default(), &Rates::default()).unwrap();
    let (alone, both) = (plan(&one), plan(&two));
    assert!(both.memory.device() <= budget.device && both.memory.host() <= budget.host);
    assert!(both.arrangement.blocks_to_swap > alone.arrangement.blocks_to_swap, "{both}");
    assert!(both.step_seconds < 1.1 * alone.step_seconds, "{} {}", both.step_seconds, alone.step_seconds);
    // Where both do not fit, it says that one at a time would.
    let small = Budget { device: 12 * GIB, host: 8 * GIB };
    let shortfall = choose(&two, small, Wishes::default(), &Rates::default()).unwrap_err().to_string();
    assert!(shortfall.contains("--noise_level both"), "{shortfall}");
}

#[test]
fn a_larger_budget_is_never_slower_and_wishes_are_kept() {
    let job = v21(Target::Cuda);
    let keeps = |plan: &BlockPlan| plan.keep == SavePolicy::KeepAll;
    let mut last = 0;
    for gib in [24, 40, 80, 139] {
        let plan =
            choose(&job, Budget { device: gib * GIB, host: 64 * GIB }, Wishes::default(), &Rates::default()).unwrap();
        let all = plan.arrangement.saving.iter().filter(|p| keeps(p)).count();
        assert!(all >= last, "{gib} GiB: {plan}");
        last = all;
    }
    assert_eq!(last, 40, "139 GiB hold everything");
    let wishes = Wishes { blocks_to_swap: Some(20), recompute: true, ..Default::default() };
    let plan = choose(&job, Budget { device: 80 * GIB, host: 64 * GIB }, wishes, &Rates::default()).unwrap();
    assert_eq!(plan.arrangement.blocks_to_swap, 20);
    assert!(plan.arrangement.saving.iter().all(|p| p.keep == SavePolicy::Recompute));
}

#[test]
fn what_does_not_fit_says_by_how_much_and_what_would() {
    let mut job = v21(Target::Cuda);
    job.weights = WeightForm::Dense(2);
    job.moments = Moments::F32;
    let budget = Budget { device: 25 * GIB, host: 64 * GIB };
    let wishes = Wishes { blocks_to_swap: Some(0), ..Default::default() };
    let short = choose(&job, budget, wishes, &Rates::default()).unwrap_err();
    let text = short.to_string();
    assert!(text.contains("more than the 25.00 GiB"), "{text}");
    assert!(text.contains("--fp8_scaled: fits"), "{text}");
    assert!(text.contains("leaving --blocks_to_swap to the plan: fits"), "{text}");
    assert!(text.contains("--optimizer_type adamw8bit: saves"), "{text}");
    let tiny_card = Budget { device: 6 * GIB, host: 64 * GIB };
    let text = choose(&v21(Target::Cuda), tiny_card, Wishes::default(), &Rates::default()).unwrap_err().to_string();
    assert!(text.contains("clips of"), "{text}");
    let no_ram = Budget { device: 12 * GIB, host: 2 * GIB };
    let text = choose(&v21(Target::Cuda), no_ram, Wishes::default(), &Rates::default()).unwrap_err().to_string();
    assert!(text.contains("host memory"), "{text}");
    // A remedy that is said to fit does, and what the card has room for is not asked of the host.
    let (two, little_ram) = (Job { models: 2, ..v21(Target::Cuda) }, Budget { device: 26 * GIB, host: 16 * GIB });
    let short = choose(&two, little_ram, Wishes::default(), &Rates::default()).unwrap_err();
    assert!(short.memory.held() > 24 * GIB && short.memory.held() <= 26 * GIB, "{}", short.memory);
    assert!(short.to_string().contains("one model at a time: fits"), "{short}");
    choose(&v21(Target::Cuda), little_ram, Wishes::default(), &Rates::default()).unwrap();
}

#[test]
fn on_the_cpu_everything_is_one_memory() {
    let job = tiny();
    let budget = Budget { device: GIB, host: 0 };
    let plan = choose(&job, budget, Wishes::default(), &Rates::default()).unwrap();
    assert_eq!(plan.memory.host(), 0);
    assert!(plan.arrangement.saving.iter().all(|p| *p == BlockPlan { keep: SavePolicy::KeepAll, home: Home::Device }));
    // Streaming on request costs the slots on top of the masters.
    let ring = Wishes { blocks_to_swap: Some(2), ring_size: Some(1), ..Default::default() };
    let ring = choose(&job, budget, ring, &Rates::default()).unwrap();
    assert_eq!(ring.memory.device(), plan.memory.device() + job.block_linear_bytes());
}

#[test]
fn the_price_of_saved_activations_is_what_the_model_keeps() {
    use super::support::{arch as small, data, settings_for, Bench};
    use wan_models::arch::{ClipArch, Conditioning};
    use wan_models::wan::{Numerics, SavePlan, WanModel, Width};
    use wan_train::train::{order, Assembler};

    let clip = ClipArch { dim: 10, tokens: 4, images: 1 };
    for (arch, batch) in [(small(), 1), (small(), 2), (WanArch { clip: Some(clip), ..small() }, 2)] {
        for compute in [candle_core::DType::F32, candle_core::DType::BF16] {
            for residual in [Width::Full, Width::Compute] {
                let exec = wan_kernels::Exec::Reference { device: candle_core::Device::Cpu, compute };
                let bench = Bench { exec, ..Bench::with_arch(arch.clone(), data(0, batch, batch)) };
                let numerics = Numerics { residual, ..Numerics::default() };
                let model = WanModel::new(arch.clone(), bench.model.weights().clone(), numerics).unwrap();
                let config = super::support::model_config(arch.clone(), Conditioning::None);
                let settings = settings_for(&config, |c| c.network_dim = 3);
                let bare = WanArch { clip: None, ..arch.clone() };
                let assembler = Assembler { settings: &settings, arch: &bare, items: &bench.items, exec: &bench.exec };
                let plan = &order::epoch(&bench.items.buckets, 5, 0, 0)[0];
                let mut inputs = assembler.assemble(plan, 0).unwrap().inputs;
                inputs.clip_fea = arch.clip.map(|_| super::support::normal(7, &[batch, 4, 10], compute));
                // Prompts as long as they may be: the plan does not know of shorter ones.
                let text = super::support::normal(8, &[arch.text_len, arch.text_dim], compute);
                inputs.context = vec![text; batch];
                let trainer = bench.trainer(settings.clone());
                let job = Job {
                    sites: arch.sites(),
                    compute_bytes: compute.size_in_bytes() as u64,
                    stream_bytes: residual.dtype(compute).size_in_bytes() as u64,
                    latent: [2, 4, 6],
                    batch: batch as u64,
                    arch: arch.clone(),
                    ..tiny()
                };
                for keep in [SavePolicy::Recompute, SavePolicy::KeepAttention, SavePolicy::KeepAll] {
                    let plan = SavePlan::uniform(keep);
                    let forward = model.forward(&bench.exec, &inputs, trainer.params(), &*bench.blocks, &plan);
                    let bytes = forward.unwrap().1.block_bytes();
                    let want = vec![job.saved_bytes(keep) as usize; 3];
                    assert_eq!(bytes, want, "{keep:?}, {compute:?}, stream {residual:?}, clip {:?}", arch.clip);
                }
            }
        }
    }
}

/// Every recorded training step: what was planned for its arrangement is within 5 % of what was measured.
#[test]
fn recorded_peaks_are_within_five_percent_of_the_plan() {
    let results = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    let days = ["2026-11-22-h200.jsonl", "2026-11-23-h200.jsonl"];
    let rows: String = days.map(|day| std::fs::read_to_string(results.join(day)).unwrap()).concat();
    let mut compared = 0;
    for line in rows.lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        if row["kind"] != "training step" || row["commit"].is_null() {
            continue;
        }
        let latent = match row["case"].as_str().unwrap() {
            "img720" => [1, 90, 160],
            "v21" => [6, 90, 160],
            "v45" => [12, 68, 120],
            "128x128x1" => [1, 16, 16],
            other => panic!("{other}: a case without a size"),
        };
        let (products, weights) = match (row["fp8_fast"].as_bool(), row["int8_fast"].as_bool()) {
            (Some(true), _) => (Products::Fp8, WeightForm::Fp8Rows { scale_bytes: 2 }),
            (_, Some(true)) => (Products::Int8, WeightForm::Int8 { otherwise: 2 }),
            _ => (Products::Full, WeightForm::Fp8Scaled { scale_bytes: 2 }),
        };
        let fast_attention = row["fast_attention"].as_bool().unwrap_or(false);
        let job = Job { latent, moments: Moments::F32, products, weights, fast_attention, ..v21(Target::Cuda) };
        let count = |of: &serde_json::Value| of.as_u64().unwrap();
        let (all, attention) = (count(&row["kept"]["all"]), count(&row["kept"]["attention"]));
        let (recompute, away) = (count(&row["kept"]["recompute"]), count(&row["host_saved"]));
        let of = |i: u64| match i {
            i if i < recompute => SavePolicy::Recompute,
            i if i < recompute + attention => SavePolicy::KeepAttention,
            _ => SavePolicy::KeepAll,
        };
        let home = |i: u64| if i < away { Home::Host } else { Home::Device };
        let saving = (0..recompute + attention + all).map(|i| BlockPlan { keep: of(i), home: home(i) }).collect();
        let arrangement = Arrangement { blocks_to_swap: count(&row["blocks_to_swap"]), ring_size: 2, saving };
        let planned = price(&job, &arrangement);
        // What the pools held, in rows since there are two of them; not in long runs of 1840671, where they grew
        // without bounds.
        let bounded = row["drift"].is_null() || row["commit"] != "1840671";
        if let (Some(held), true) = (row["planned_held_gib"].as_f64(), bounded) {
            let (reserved, limit) = (row["reserved_gib"].as_f64().unwrap(), planned.held() as f64 / GIB as f64);
            assert!(reserved <= 1.05 * limit, "{line}: {limit:.2} GiB planned, {held:.2} then, {reserved:.2} held");
        }
        let planned = planned.device() as f64 / GIB as f64;
        let peak = row["peak_gib"].as_f64().unwrap();
        assert!((planned / peak - 1.0).abs() < 0.05, "{line}: {planned:.2} GiB planned, {peak:.2} measured");
        compared += 1;
    }
    assert!(compared >= 24, "{compared}");
}

#[test]
fn eight_bit_products_are_offered_where_they_gain() {
    let job = v21(Target::Cuda);
    let budget = Budget { device: 22 * GIB, host: 48 * GIB };
    let plan = choose(&job, budget, Wishes::default(), &Rates::default()).unwrap();
    let lines = offers(&job, &plan, Wishes::default(), &Rates::default());
    // A usual card of 24 GB has no fp8 tensor cores.
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with("--int8_fast: about "), "{lines:?}");
    assert!(lines[1].starts_with("--fast_attention: about "), "{lines:?}");
    let fast = Job { fast_attention: true, ..job.clone() };
    let plan_of_fast = choose(&fast, budget, Wishes::default(), &Rates::default()).unwrap();
    assert!(plan_of_fast.step_seconds < plan.step_seconds);
    assert!(!offers(&fast, &plan_of_fast, Wishes::default(), &Rates::default())[0].contains("attention"));
    let int8 = Job { products: Products::Int8, weights: WeightForm::Int8 { otherwise: 2 }, ..job.clone() };
    let faster = choose(&int8, budget, Wishes::default(), &Rates::default()).unwrap();
    assert!(faster.step_seconds < 0.8 * plan.step_seconds, "{} and {}", faster.step_seconds, plan.step_seconds);
    assert!(int8.block_linear_bytes() < job.block_linear_bytes());
    let left = offers(&int8, &faster, Wishes::default(), &Rates::default());
    assert!(left.len() == 1 && left[0].starts_with("--fast_attention"), "{left:?}");
    let both = Job { fast_attention: true, ..int8 };
    assert!(offers(&both, &faster, Wishes::default(), &Rates::default()).is_empty());
    // A picture of 512 x 512.
    let small = Job { latent: [1, 64, 64], ..both.clone() };
    let said = unused(&small, &Rates::default()).unwrap();
    assert!(said.contains("from 1536 tokens on, the largest bucket has 1024"), "{said}");
    assert_eq!(unused(&both, &Rates::default()), None);
    assert!(offers(&tiny(), &plan, Wishes::default(), &Rates::default()).is_empty());
}
