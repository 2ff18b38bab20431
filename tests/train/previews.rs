//! Previews on a tiny model: when they come, that they change no bit of the run, dropout, and which expert makes them.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor};
use wan_kernels::philox::{stream, Philox};
use wan_models::wan::{
    random_weights, Lease, Numerics, Pass, ResidentWeights, SavePlan, SavePolicy, Timesteps, WanInputs, WanModel,
    WanWeights, WeightProvider,
};
use wan_train::checkpoint::{Identity, TrainState};
use wan_train::config::RunConfig;
use wan_train::train::preview::sample::{sample, Given, How};
use wan_train::train::preview::At;
use wan_train::train::{Expert, Frozen, MicroStep, Models, Observer, Outcome, Parts, Trainer};

use super::support::{arch, bits, data, model, normal, settings, Bench, Memory};

fn given() -> Given {
    let text = |n| normal(n, &[3, 12], DType::F32);
    Given { context_md: text(900), negative_md: Some(text(901)), y: None, clip: None, first: None }
}

fn how(steps: usize) -> How {
    How { fhw: [2, 4, 4], seed: 11, steps, shift: 3.0, guidance: [2.0, 2.0], alone: Expert::Low, musubi: false }
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Makes a preview at every occasion, and stops the run after some.
struct Previewer<'a> {
    at: Vec<At>,
    latents: Vec<Vec<f32>>,
    losses: Vec<u32>,
    steps: usize,
    stop_after: Option<usize>,
    stop: &'a AtomicBool,
}

impl Observer for Previewer<'_> {
    fn micro_step(&mut self, s: &MicroStep) {
        self.losses.push(s.loss.to_bits());
    }

    fn preview(&mut self, at: At, trainer: &Trainer) {
        self.at.push(at);
        if self.steps > 0 {
            let latent = sample(trainer, &given(), &how(self.steps), &mut |_| true).unwrap().unwrap();
            assert_eq!(latent.dims(), [1, 16, 2, 4, 4]);
            self.latents.push(values(&latent));
        }
        if Some(self.at.len()) == self.stop_after {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

struct Seen {
    at: Vec<At>,
    latents: Vec<Vec<f32>>,
    losses: Vec<u32>,
    state: TrainState,
    saved: Memory,
    outcome: Outcome,
}

/// Five small items: five steps an epoch, three epochs.
fn run(
    change: impl FnOnce(&mut RunConfig),
    steps: usize,
    from: Option<&TrainState>,
    stop_after: Option<usize>,
) -> Seen {
    let bench = Bench::new(data(5, 0, 1));
    let mut trainer = bench.trainer(settings(change));
    if let Some(state) = from {
        trainer.restore(state, std::path::Path::new("memory")).unwrap();
    }
    let stop = AtomicBool::new(false);
    let mut seen =
        Previewer { at: Vec::new(), latents: Vec::new(), losses: Vec::new(), steps, stop_after, stop: &stop };
    let mut saved = Memory::default();
    let outcome = trainer.run(&mut seen, &mut saved, &stop).unwrap();
    let Previewer { at, latents, losses, .. } = seen;
    Seen { at, latents, losses, state: trainer.snapshot().unwrap(), saved, outcome }
}

fn previews(steps: Option<u64>, epochs: Option<u64>, first: bool) -> impl FnOnce(&mut RunConfig) {
    move |c| {
        c.sample_prompts = Some("p.txt".into());
        c.sample_every_n_steps = steps;
        c.sample_every_n_epochs = epochs;
        c.sample_at_first = first;
    }
}

#[test]
fn they_come_when_they_are_due_and_never_twice_for_one_step() {
    use At::{Epoch, Start, Step};
    let at = |steps, epochs, first| run(previews(steps, epochs, first), 0, None, None).at;
    assert_eq!(at(None, None, true), [Start]);
    assert_eq!(at(Some(4), None, false), [Step(4), Step(8), Step(12)]);
    assert_eq!(at(None, Some(1), false), [Epoch(1), Epoch(2), Epoch(3)]);
    assert_eq!(at(None, Some(2), false), [Epoch(2)]);
    // Steps 5, 10 and 15 end an epoch: one preview each.
    assert_eq!(at(Some(5), Some(1), true), [Start, Step(5), Step(10), Step(15)]);
    assert_eq!(at(Some(10), Some(1), false), [Epoch(1), Step(10), Epoch(3)]);
    assert_eq!(at(None, None, false), []);
    assert!(run(|_| {}, 0, None, None).at.is_empty());
}

#[test]
fn a_run_stopped_in_any_preview_and_resumed_makes_the_others_once() {
    let whole = run(previews(Some(3), Some(1), true), 0, None, None);
    use At::{Epoch, Start, Step};
    assert_eq!(whole.at, [Start, Step(3), Epoch(1), Step(6), Step(9), Epoch(2), Step(12), Step(15)]);
    for stop_after in 1..whole.at.len() {
        let first = run(previews(Some(3), Some(1), true), 0, None, Some(stop_after));
        assert_eq!(first.at, whole.at[..stop_after]);
        if stop_after == 1 {
            assert_eq!(first.outcome, Outcome::Stopped { step: 0, state: None });
            assert!(first.saved.last.is_none(), "nothing was trained");
            continue;
        }
        let rest = run(previews(Some(3), Some(1), true), 0, first.saved.last.as_ref(), None);
        assert_eq!(rest.at, whole.at[stop_after..], "stopped in {:?}", whole.at[stop_after - 1]);
        assert_eq!(bits(&rest.state), bits(&whole.state));
    }
}

#[test]
fn they_change_no_bit_of_the_run() {
    let busy = |c: &mut RunConfig| {
        c.gradient_accumulation_steps = 2;
        c.network_dropout = Some(0.2);
        c.network_args = vec!["rank_dropout=0.2".into(), "module_dropout=0.2".into()];
    };
    let plain = run(busy, 0, None, None);
    let watched = run(
        |c| {
            busy(c);
            previews(Some(2), Some(1), true)(c);
        },
        3,
        None,
        None,
    );
    assert_eq!(watched.latents.len(), 7, "{:?}", watched.at);
    assert_eq!(watched.losses, plain.losses);
    assert_eq!(bits(&watched.state), bits(&plain.state));
    // They show the adapter as it is then; the same twice where it has not changed.
    let different: std::collections::BTreeSet<Vec<u32>> =
        watched.latents.iter().map(|l| l.iter().map(|v| v.to_bits()).collect()).collect();
    assert_eq!(different.len(), watched.latents.len());
    let again = run(
        |c| {
            busy(c);
            previews(Some(2), Some(1), true)(c);
        },
        3,
        None,
        None,
    );
    assert_eq!(again.latents, watched.latents);
}

#[test]
fn dropout_is_off_except_in_compatibility_mode() {
    let trained = run(|_| {}, 0, None, None).state;
    let bench = Bench::new(data(5, 0, 1));
    let latent = |change: fn(&mut RunConfig), musubi: bool| {
        let mut trainer = bench.trainer(settings(change));
        trainer.restore(&trained, std::path::Path::new("memory")).unwrap();
        values(&sample(&trainer, &given(), &How { musubi, ..how(4) }, &mut |_| true).unwrap().unwrap())
    };
    let dropout: fn(&mut RunConfig) = |c| c.network_dropout = Some(0.5);
    let plain = latent(|_| {}, false);
    assert_eq!(latent(dropout, false), plain);
    assert_eq!(latent(|_| {}, true), plain, "without dropout the switch changes nothing");
    assert_ne!(latent(dropout, true), plain);
    assert_eq!(latent(dropout, true), latent(dropout, true), "and its masks are drawn from counters");
}

#[test]
fn guidance_of_one_asks_once_and_other_guidance_leads_away_from_the_negative() {
    let bench = Bench::new(data(5, 0, 1));
    let counted = Counted { blocks: model(&arch()).1, passes: Cell::new(0), log: &RefCell::default(), name: 'x' };
    let models = Models::One(Frozen { model: &bench.model, blocks: &counted });
    let parts = Parts { exec: &bench.exec, models, save_plan: &bench.plan, items: &bench.items };
    let trainer = Trainer::new(parts, settings(|_| {}), Identity::default(), serde_json::json!({})).unwrap();
    let latent = |guidance: f64| {
        counted.passes.set(0);
        let how = How { guidance: [guidance, 9.0], ..how(3) };
        let latent = sample(&trainer, &given(), &how, &mut |_| true).unwrap().unwrap();
        (values(&latent), counted.passes.get())
    };
    let (one, passes) = latent(1.0);
    assert_eq!(passes, 3);
    let (two, passes) = latent(2.0);
    assert_eq!(passes, 6);
    assert_ne!(one, two);
    // Stopped before the second step.
    assert!(sample(&trainer, &given(), &how(3), &mut |step| step < 1).unwrap().is_none());
}

/// Counts passes, and writes down who made them.
struct Counted<'a> {
    blocks: ResidentWeights,
    passes: Cell<usize>,
    log: &'a RefCell<String>,
    name: char,
}

impl WeightProvider for Counted<'_> {
    fn acquire(&self, block: usize, pass: Pass) -> wan_models::Result<Lease<'_>> {
        if block == 0 {
            self.passes.set(self.passes.get() + 1);
            self.log.borrow_mut().push(self.name);
        }
        self.blocks.acquire(block, pass)
    }
}

#[test]
fn both_experts_make_their_side_of_the_boundary_and_compatibility_leaves_it_to_the_low_one() {
    let bench = Bench::new(data(5, 0, 1));
    let weights = |seed| WanWeights::from_tensors(&arch(), &random_weights(&arch(), seed).unwrap()).unwrap();
    let (rest, high_blocks) = weights(12);
    let high_model = WanModel::new(arch(), rest, Numerics::default()).unwrap();
    let log = RefCell::default();
    let counted = |blocks, name| Counted { blocks, passes: Cell::new(0), log: &log, name };
    let (low, high) = (counted(model(&arch()).1, 'l'), counted(high_blocks, 'H'));
    let models = Models::Two {
        high: Frozen { model: &high_model, blocks: &high },
        low: Frozen { model: &bench.model, blocks: &low },
    };
    let plan = SavePlan::uniform(SavePolicy::KeepAll);
    let parts = Parts { exec: &bench.exec, models, save_plan: &plan, items: &bench.items };
    let shared = settings(|c| {
        c.noise_level = Some("shared".into());
        c.timestep_boundary = Some(0.75);
    });
    let trainer = Trainer::new(parts, shared, Identity::default(), serde_json::json!({})).unwrap();
    let latent = |musubi| {
        log.borrow_mut().clear();
        // At shift 1 the steps are told 999, 799, 599, 399 and 199. Only the low expert is guided: asked twice.
        let how = How { shift: 1.0, guidance: [3.0, 1.0], musubi, ..how(5) };
        values(&sample(&trainer, &given(), &how, &mut |_| true).unwrap().unwrap())
    };
    let both = latent(false);
    assert_eq!(log.borrow().as_str(), "HHllllll");
    assert_ne!(latent(true), both);
    assert_eq!(log.borrow().as_str(), "llllllllll");
}

#[test]
fn a_clean_first_frame_stays_clean() {
    let wide = wan_models::arch::WanArch { per_token_time: true, ..arch() };
    let bench = Bench::with_arch(wide, data(5, 0, 1));
    let trainer = bench.trainer(settings(|_| {}));
    let first = Tensor::arange(0f32, 256.0, &Device::Cpu).unwrap().reshape((1, 16, 1, 4, 4)).unwrap();
    let given = Given { first: Some((&first / 256.0).unwrap()), ..given() };
    let latent = sample(&trainer, &given, &how(3), &mut |_| true).unwrap().unwrap();
    let kept = latent.narrow(2, 0, 1).unwrap().contiguous().unwrap();
    assert_eq!(values(&kept), values(given.first.as_ref().unwrap()));
    let rest = latent.narrow(2, 1, 1).unwrap().contiguous().unwrap();
    assert_ne!(values(&rest), values(&kept));
}

/// One step of UniPC is `x - sigma v` at sigma = 0.999 shifted, with the timestep cut to a whole one.
#[test]
fn a_single_step_is_the_models_own_prediction() {
    let trained = run(|_| {}, 0, None, None).state;
    let bench = Bench::new(data(5, 0, 1));
    let mut trainer = bench.trainer(settings(|_| {}));
    trainer.restore(&trained, std::path::Path::new("memory")).unwrap();
    let how = How { seed: 77, guidance: [2.5, 9.0], ..how(1) };
    let got = values(&sample(&trainer, &given(), &how, &mut |_| true).unwrap().unwrap());

    let x = Philox::new(77, stream::PREVIEW, 0, 0).normal(&[1, 16, 2, 4, 4], &Device::Cpu).unwrap();
    let sigma = 3.0 * f64::from(0.999f32) / (1.0 + 2.0 * f64::from(0.999f32));
    let ask = |context: &Tensor| {
        let inputs = WanInputs {
            x: x.clone(),
            t: Timesteps::PerSample(vec![(1000.0 * sigma).trunc() as f32]),
            context: vec![context.clone()],
            y: None,
            clip_fea: None,
            f_indices: None,
        };
        bench.model.predict(&bench.exec, &inputs, trainer.params(), &*bench.blocks, None).unwrap()
    };
    let (with, without) = (ask(&given().context_md), ask(given().negative_md.as_ref().unwrap()));
    let v: Vec<f32> = values(&with).iter().zip(values(&without)).map(|(c, u)| u + 2.5 * (c - u)).collect();
    for ((got, x), v) in got.iter().zip(values(&x)).zip(v) {
        assert!((got - (x - sigma as f32 * v)).abs() < 1e-4, "{got}");
    }
}
