//! One adapter over two experts: who computes a batch, at which timesteps, and that nothing else changes a bit.

use std::sync::Arc;

use wan_models::wan::{random_weights, Numerics, ResidentWeights, SavePlan, SavePolicy, WanModel, WanWeights};
use wan_train::checkpoint::{Identity, TrainState};
use wan_train::config::RunConfig;
use wan_train::residency::{CpuCopy, Residency, ResidencySpec};
use wan_train::train::expert::{draw_batch, Chance, Expert};
use wan_train::train::noise::SampleDraws;
use wan_train::train::quantile::normal_quantile;
use wan_train::train::timesteps::{Draws, Sampling, TimestepSpec};
use wan_train::train::{loss, order, Assembler, Frozen, Models, Parts, TrainSettings, Trainer};

use super::support::{arch, bits, data, model, settings, Bench, Ended, Memory, Record, Recorder};

/// The high expert beside the bench's own model, which is the low one.
struct High {
    model: WanModel,
    blocks: Residency,
}

impl High {
    fn new(blocks_to_swap: usize) -> Self {
        let (rest, blocks) = weights(12);
        let spec = ResidencySpec { blocks_to_swap, ring_size: 1 };
        let model = WanModel::new(arch(), rest, Numerics::default()).unwrap();
        Self { model, blocks: Residency::new(blocks.0, spec, Arc::new(CpuCopy)) }
    }
}

fn weights(seed: u64) -> (WanWeights, ResidentWeights) {
    WanWeights::from_tensors(&arch(), &random_weights(&arch(), seed).unwrap()).unwrap()
}

/// Settings of a run over both experts.
fn shared(boundary: f64, change: impl FnOnce(&mut RunConfig)) -> TrainSettings {
    settings(|c| {
        c.noise_level = Some("shared".into());
        c.timestep_boundary = Some(boundary);
        change(c);
    })
}

fn run(bench: &Bench, high: &High, settings: TrainSettings, from: Option<&TrainState>, stop: Option<u64>) -> Ended {
    let models = Models::Two {
        high: Frozen { model: &high.model, blocks: &high.blocks },
        low: Frozen { model: &bench.model, blocks: &*bench.blocks },
    };
    let parts = Parts { exec: &bench.exec, models, save_plan: &bench.plan, items: &bench.items };
    let mut trainer = Trainer::new(parts, settings, Identity::default(), serde_json::json!({})).unwrap();
    if let Some(state) = from {
        trainer.restore(state, std::path::Path::new("memory")).unwrap();
    }
    let flag = Default::default();
    let mut recorder = Recorder { record: Record::default(), stop_after: stop, stop: &flag };
    let mut saver = Memory::default();
    let outcome = trainer.run(&mut recorder, &mut saver, &flag).unwrap();
    Ended { record: recorder.record, saver, outcome, state: trainer.snapshot().unwrap() }
}

/// The median of the distribution that these tests train on, so that both experts have work.
const MIDDLE: f64 = 0.75;

#[test]
fn each_batch_is_computed_by_the_expert_of_its_timesteps() {
    for batch_size in [1, 2] {
        let (bench, high) = (Bench::new(data(7, 4, batch_size)), High::new(0));
        // The adapter begins as nothing; at a rate of 0 it stays so, and each loss is the frozen model's own.
        let options = || shared(MIDDLE, |c| c.learning_rate = 0.0);
        let losses = run(&bench, &high, options(), None, None).record.losses();
        let settings = options();
        let assembler =
            Assembler { settings: &settings, arch: bench.model.arch(), items: &bench.items, exec: &bench.exec };
        let trainer = bench.trainer(super::support::settings(|_| {}));
        let (mut at, mut seen) = (0, [0, 0]);
        for epoch in 0..3 {
            for plan in order::epoch(&bench.items.buckets, 5, epoch, 0) {
                let batch = assembler.assemble(&plan, epoch).unwrap();
                let is_high = batch.timesteps[0].t >= 750.0;
                assert!(batch.timesteps.iter().all(|t| (t.t >= 750.0) == is_high), "{:?}", batch.timesteps);
                assert_eq!(batch.expert, Some(if is_high { Expert::High } else { Expert::Low }));
                let by = |high: &High, is_high: bool| {
                    let (params, plan) = (trainer.params(), &bench.plan);
                    let pred = match is_high {
                        true => high.model.forward(&bench.exec, &batch.inputs, params, &high.blocks, plan),
                        false => bench.model.forward(&bench.exec, &batch.inputs, params, &*bench.blocks, plan),
                    };
                    loss::flow(&bench.exec, &batch, &pred.unwrap().0, 1.0).unwrap().mean
                };
                assert_eq!(losses[at].to_bits(), by(&high, is_high).to_bits(), "batch {at}");
                assert_ne!(losses[at].to_bits(), by(&high, !is_high).to_bits(), "the models differ");
                seen[usize::from(is_high)] += 1;
                at += 1;
            }
        }
        assert_eq!(at, losses.len());
        assert!(seen[0] > 3 && seen[1] > 3, "{seen:?}");
    }
}

/// Settings whose state and randomness are the most there is to get wrong.
fn busy(c: &mut RunConfig) {
    c.gradient_accumulation_steps = 2;
    c.network_dropout = Some(0.1);
    c.network_args = vec!["rank_dropout=0.1".into()];
    c.num_timestep_buckets = Some(4);
}

#[test]
fn with_all_timesteps_on_one_side_it_is_a_run_of_that_expert_bit_for_bit() {
    let bench = || Bench::new(data(3, 2, 2));
    let high = High::new(0);
    let own = High::new(0);
    let of_high = Bench { model: own.model, blocks: Arc::new(own.blocks), ..bench() };
    for change in [(|_| {}) as fn(&mut RunConfig), busy] {
        for (boundary, alone) in [(1.0, &bench()), (0.0, &of_high)] {
            let both = run(&bench(), &high, shared(boundary, change), None, None);
            let alone = alone.run(settings(change), None, None).unwrap();
            assert_eq!(both.record, alone.record, "boundary {boundary}");
            assert_eq!(bits(&both.state), bits(&alone.state), "boundary {boundary}");
        }
    }
}

#[test]
fn streaming_and_resuming_change_no_bit() {
    for change in [(|_| {}) as fn(&mut RunConfig), busy] {
        let options = || shared(MIDDLE, change);
        let whole = run(&Bench::new(data(5, 4, 2)), &High::new(0), options(), None, None);
        let want = bits(&whole.state);
        for swap in [1, 3] {
            let spec = ResidencySpec { blocks_to_swap: swap, ring_size: 1 };
            let blocks = Arc::new(Residency::new(model(&arch()).1 .0, spec, Arc::new(CpuCopy)));
            let plan = SavePlan::uniform(SavePolicy::Recompute);
            let bench = Bench { blocks, plan, ..Bench::new(data(5, 4, 2)) };
            let streamed = run(&bench, &High::new(swap), options(), None, None);
            assert_eq!(streamed.record, whole.record, "{swap}");
            assert_eq!(bits(&streamed.state), want, "{swap}");
        }
        let bench = Bench::new(data(5, 4, 2));
        for stop in 1..whole.record.facts.total_steps {
            let first = run(&bench, &High::new(0), options(), None, Some(stop));
            let rest = run(&bench, &High::new(1), options(), first.saver.last.as_ref(), None);
            assert_eq!(bits(&rest.state), want, "stopped after {stop}");
        }
    }
}

#[test]
fn models_and_boundary_must_go_together() {
    let (bench, high) = (Bench::new(data(2, 0, 1)), High::new(0));
    let low = Frozen { model: &bench.model, blocks: &*bench.blocks };
    let two = Models::Two { high: Frozen { model: &high.model, blocks: &high.blocks }, low };
    let refused = |models: Models, settings: TrainSettings| {
        let parts = Parts { exec: &bench.exec, models, save_plan: &bench.plan, items: &bench.items };
        Trainer::new(parts, settings, Identity::default(), serde_json::json!({})).err().unwrap().to_string()
    };
    assert!(refused(two, settings(|_| {})).contains("no boundary"));
    assert!(refused(Models::One(low), shared(0.5, |_| {})).contains("one model"));
    let wide = Bench::with_arch(wan_models::arch::WanArch { ffn_dim: 32, ..arch() }, data(2, 0, 1));
    let two = Models::Two { high: Frozen { model: &wide.model, blocks: &*wide.blocks }, low };
    assert!(refused(two, shared(0.5, |_| {})).contains("different architectures"));
}

const HW: (usize, usize) = (60, 104);

fn chances(epoch: u64, samples: std::ops::Range<u32>, strata: bool) -> Vec<Chance<SampleDraws>> {
    // Strata as an epoch has them: even, in an order that has nothing to do with the samples.
    let n = 20_000;
    let stratum = |id: u32| ((u64::from(id) * 7919 + epoch * 104_729) % n) as f32 / n as f32;
    let chance = |id| Chance { draws: SampleDraws::new(3, epoch, id), stratum: strata.then(|| stratum(id)) };
    samples.map(chance).collect()
}

#[test]
fn timesteps_are_distributed_as_without_a_boundary_whatever_the_batch_size() {
    for (name, sampling) in Sampling::ALL {
        for (min, max, preserve_shape, boundary, strata) in [
            (0.0, 1000.0, false, 0.875, false),
            (0.0, 1000.0, true, 0.4, true),
            (100.0, 950.0, true, 0.875, false),
            (100.0, 950.0, false, 0.6, true),
        ] {
            let spec = TimestepSpec { sampling, flow_shift: 3.0, min, max, preserve_shape, ..Default::default() };
            let draw = |batch: u32| -> Vec<f64> {
                let mut all = Vec::new();
                for first in (0..20_000).step_by(batch as usize) {
                    let (drawn, expert) =
                        draw_batch(&spec, boundary, HW, &mut chances(1, first..first + batch, strata));
                    assert!(drawn.iter().all(|t| Expert::at(t.t.into(), boundary) == expert), "{name}");
                    assert!(drawn.iter().all(|t| (min..=max).contains(&f64::from(t.t)) && t.t == 1000.0 * t.sigma));
                    all.extend(drawn.iter().map(|t| f64::from(t.t)));
                }
                all.sort_by(f64::total_cmp);
                all
            };
            let (alone, four) = (draw(1), draw(4));
            // 5000 batches decide together: two standard deviations of a share are 0.014.
            for q in [0.05, 0.25, 0.5, 0.75, 0.95] {
                let t = alone[(q * alone.len() as f64) as usize];
                let share = four.partition_point(|x| *x < t) as f64 / four.len() as f64;
                assert!((share - q).abs() < 0.03, "{name} {min}..{max} {preserve_shape}: {share} of {q} below {t}");
            }
        }
    }
}

#[test]
fn a_sample_keeps_its_own_draw_on_the_right_side_and_needs_no_luck_on_the_wrong_one() {
    let spec = TimestepSpec { sampling: Sampling::Shift, flow_shift: 3.0, ..Default::default() };
    let (mut kept, mut moved) = (0, 0);
    for first in (0..4000).step_by(4) {
        let (drawn, expert) = draw_batch(&spec, 0.875, HW, &mut chances(2, first..first + 4, false));
        for (i, at) in drawn.iter().enumerate() {
            let alone = spec.sample(&mut SampleDraws::new(3, 2, first + i as u32), HW, None, 1)[0];
            match Expert::at(alone.t.into(), 0.875) == expert {
                true => {
                    assert_eq!(*at, alone);
                    kept += 1;
                }
                false => moved += 1,
            }
        }
    }
    assert!(kept > 2000 && moved > 500, "{kept} {moved}");
    // A side that one draw in ten thousand reaches is reached all the same, at its own distribution.
    let edge = normal_quantile(0.9999);
    let rare = TimestepSpec { sampling: Sampling::Sigmoid, ..Default::default() };
    let boundary = 1.0 / (1.0 + (-edge).exp());
    let mut found = 0;
    for first in (0..60_000).step_by(2) {
        let (drawn, expert) = draw_batch(&rare, boundary, HW, &mut chances(4, first..first + 2, false));
        if expert == Expert::High {
            found += 1;
            let t = f64::from(drawn[1].t) / 1000.0;
            assert!(t >= boundary && t < 1.0 / (1.0 + (-(edge + 2.0)).exp()), "{t}");
        }
    }
    assert!(found > 0);
}

/// Recorded draws of one sample.
struct Recorded(std::collections::VecDeque<f32>);

impl Draws for Recorded {
    fn uniform(&mut self, n: usize) -> Vec<f32> {
        self.0.drain(..n).collect()
    }
    fn normal(&mut self, n: usize) -> Vec<f32> {
        self.uniform(n)
    }
}

#[test]
fn compatibility_mode_draws_as_the_old_tool_did() {
    let spec = TimestepSpec { sampling: Sampling::Uniform, compat: true, ..Default::default() };
    let samples = |draws: &[&[f32]]| -> Vec<Chance<Recorded>> {
        let chance = |d: &&[f32]| Chance { draws: Recorded(d.iter().copied().collect()), stratum: None };
        draws.iter().map(chance).collect()
    };
    let t = |drawn: &[wan_train::train::timesteps::Timestep]| drawn.iter().map(|t| t.t).collect::<Vec<_>>();
    // The first draw decides, with the timestep's one more, and is drawn again.
    let mut two = samples(&[&[0.8995, 0.2, 0.91, 7.0], &[0.1, 0.3, 0.875, 0.99, 7.0]]);
    let (drawn, expert) = draw_batch(&spec, 0.9, HW, &mut two);
    assert_eq!((t(&drawn), expert), (vec![911.0, 991.0], Expert::High));
    assert!(two.iter().all(|s| s.draws.0.len() == 1), "no draw too many");
    let (drawn, expert) = draw_batch(&spec, 0.9, HW, &mut samples(&[&[0.898, 0.95, 0.5], &[0.25]]));
    assert_eq!((t(&drawn), expert), (vec![501.0, 251.0], Expert::Low));
    // A hundred draws in vain: everybody draws again, on either side; the expert stays.
    let mut vain = vec![0.25f32; 100];
    vain.push(0.5);
    let (drawn, expert) = draw_batch(&spec, 0.9, HW, &mut samples(&[&[0.95, 0.96, 0.125], &vain]));
    assert_eq!((t(&drawn), expert), (vec![126.0, 501.0], Expert::High));
    // The first draw of a sample is its stratum, and no other is.
    let strata = |of: &[(&[f32], f32)]| -> Vec<Chance<Recorded>> {
        of.iter().map(|(d, s)| Chance { draws: Recorded(d.iter().copied().collect()), stratum: Some(*s) }).collect()
    };
    let (drawn, expert) = draw_batch(&spec, 0.5, HW, &mut strata(&[(&[0.75], 0.625), (&[], 0.875)]));
    assert_eq!((t(&drawn), expert), (vec![751.0, 876.0], Expert::High));
}

#[test]
fn limits_that_leave_an_expert_idle_are_noted() {
    let notes = |change: fn(&mut RunConfig)| shared(0.875, change).notes;
    assert!(notes(|_| {}).is_empty());
    assert!(notes(|c| c.min_timestep = Some(500)).is_empty());
    let high = notes(|c| c.min_timestep = Some(900));
    assert!(high.len() == 1 && high[0].contains("only the high-noise expert"), "{high:?}");
    assert_eq!(notes(|c| c.max_timestep = Some(800)).len(), 1);
}
