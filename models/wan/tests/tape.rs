//! The explicit backward against candle's tape, policies against each other, at ugly sizes.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use wan_kernels::philox::{stream, Philox};
use wan_kernels::Exec;

use super::train::{step, Grads};
use crate::adapter::{Adapter, AdapterSpec, Adapters, Dropout, Kind, WeightDelta};
use crate::arch::{ClipArch, WanArch};
use crate::golden::{max_abs, max_of, model};
use crate::keys;
use crate::wan::{
    random_weights, BlockPlan, GradSink, Home, Numerics, SavePlan, SavePolicy, Timesteps, WanInputs, WanModel,
};
use crate::Result;

/// Width 6 heads of 10, 3 blocks, rows that are no power of two.
fn arch(clip: Option<ClipArch>, in_dim: usize) -> WanArch {
    WanArch {
        dim: 60,
        ffn_dim: 50,
        num_heads: 6,
        num_layers: 3,
        in_dim,
        out_dim: 4,
        text_dim: 7,
        text_len: 9,
        freq_dim: 10,
        eps: 1e-6,
        patch: [1, 2, 2],
        clip,
        per_token_time: false,
    }
}

fn normal(item: u32, shape: &[usize]) -> Tensor {
    Philox::new(17, stream::NOISE, 0, item).normal(shape, &Device::Cpu).unwrap()
}

fn inputs(arch: &WanArch, t: Timesteps) -> WanInputs {
    let [f, h, w] = [3, 2, 6];
    let b = t.batch();
    let y = arch.in_dim - arch.out_dim;
    WanInputs {
        x: normal(1, &[b, arch.out_dim, f, h, w]),
        t,
        context: (0..b).map(|i| normal(10 + i as u32, &[1 + 4 * i, arch.text_dim])).collect(),
        y: (y > 0).then(|| normal(2, &[b, y, f, h, w])),
        clip_fea: arch.clip.map(|c| normal(3, &[b * c.images, c.tokens, c.dim])),
        f_indices: None,
    }
}

/// Adapters of one kind at the sites that `take` accepts; every parameter is random, none zero.
fn adapters(arch: &WanArch, spec: AdapterSpec, take: impl Fn(&str) -> bool) -> BTreeMap<String, Adapter> {
    let mut item = 100;
    let mut all = BTreeMap::new();
    for site in arch.sites().into_iter().filter(|s| take(&s.name)) {
        let layout = spec.layout(site.out_features, site.in_features);
        let mut params: BTreeMap<_, _> = BTreeMap::new();
        for p in &layout.params {
            item += 1;
            params.insert(p.name, (normal(item, &p.shape) * 0.3).unwrap());
        }
        let adapter = Adapter::from_params(&mut |name| params.get(name).cloned(), layout.scale).unwrap();
        all.insert(site.name, adapter);
    }
    all
}

/// The same adapters with every parameter a `Var`, and the vars by gradient key.
fn on_tape(adapters: &BTreeMap<String, Adapter>) -> (BTreeMap<String, Adapter>, BTreeMap<String, Var>) {
    let mut vars = BTreeMap::new();
    let mut taped = BTreeMap::new();
    for (site, adapter) in adapters {
        let scale = match adapter {
            Adapter::Lora(a) => a.scale,
            Adapter::Loha(a) => a.scale,
            Adapter::Lokr(a) => a.scale,
        };
        let params: BTreeMap<_, _> =
            adapter.params().into_iter().map(|(name, t)| (name, Var::from_tensor(t).unwrap())).collect();
        let mut get = |name: &'static str| params.get(name).map(|v| v.as_tensor().clone());
        taped.insert(site.clone(), Adapter::from_params(&mut get, scale).unwrap());
        for (name, var) in params {
            vars.insert(format!("{}.{name}", keys::kohya_name(site)), var);
        }
    }
    (taped, vars)
}

/// Adapters with dropout masks drawn from a generator keyed by the site.
struct WithDropout(BTreeMap<String, Adapter>);

impl Adapters for WithDropout {
    fn get(&self, site: &str) -> Option<&Adapter> {
        self.0.get(site)
    }

    fn draws_by_row(&self) -> bool {
        true
    }

    fn dropout(&self, site: &str, batch: usize, rows: usize) -> Result<Dropout> {
        let item = site.bytes().fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b)));
        let mask = |salt: u32, shape: &[usize]| -> Result<Tensor> {
            let keep = Philox::new(3, stream::DROPOUT, salt, item).normal(shape, &Device::Cpu)?.ge(-0.5f32)?;
            Ok((keep.to_dtype(DType::F32)? * 1.4)?)
        };
        if site.ends_with("ffn.0") {
            return Ok(Dropout { skip: true, ..Dropout::default() });
        }
        Ok(match &self.0[site] {
            Adapter::Lora(a) => {
                let r = a.down.dim(0)?;
                let (neuron, rank) = (Some(mask(0, &[batch, rows, r])?), Some(mask(1, &[batch, 1, r])?));
                Dropout { skip: false, neuron, rank }
            }
            Adapter::Loha(a) => Dropout { rank: Some(mask(1, &[a.w1_a.dim(0)?])?), ..Dropout::default() },
            Adapter::Lokr(a) => {
                let o = a.delta()?.dim(0)?;
                Dropout { rank: Some(mask(1, &[o])?), ..Dropout::default() }
            }
        })
    }
}

/// Explicit gradients equal the tape's within 2e-5 of the tensor's largest value, parameter by parameter.
fn check_against_tape(
    what: &str,
    arch: &WanArch,
    t: Timesteps,
    plain: &dyn Adapters,
    taped: &dyn Adapters,
    vars: &BTreeMap<String, Var>,
) {
    let (model, blocks) = model(arch, &random_weights(arch, 5).unwrap(), Numerics::default());
    let inputs = inputs(arch, t);
    let target = normal(4, inputs.x.dims());
    let exec = Exec::cpu();
    let plan = SavePlan::uniform(SavePolicy::Recompute);
    let (pred, _, grads) = step(&exec, &model, &blocks, plain, &inputs, &target, &plan);
    let on_tape = model.predict(&exec, &inputs, taped, &blocks, None).unwrap();
    assert_eq!(max_abs(&pred, &on_tape), 0.0, "{what}: forward and predict differ");
    let loss = (on_tape - &target).unwrap().sqr().unwrap().mean_all().unwrap();
    let store = loss.backward().unwrap();
    let mut compared = 0;
    for (key, var) in vars {
        let want = store.get(var.as_tensor());
        match (want, grads.0.get(key)) {
            (None, None) => {}
            (Some(want), Some(got)) => {
                let (diff, max) = (max_abs(got, want), max_of(want));
                assert!(diff <= 2e-5 * max, "{what}: gradient of {key} is off by {diff:e} of {max:e}");
                compared += 1;
            }
            (want, got) => panic!("{what}: {key} has a gradient on one side: {} {}", want.is_some(), got.is_some()),
        }
    }
    assert!(compared > 0 && compared == grads.0.len(), "{what}: {compared} of {}", grads.0.len());
}

const KINDS: [Kind; 4] = [Kind::Lora, Kind::Loha, Kind::Lokr { factor: -1 }, Kind::Lokr { factor: 2 }];

#[test]
fn gradients_equal_the_tapes() {
    let image = |images| Some(ClipArch { dim: 5, tokens: 11, images });
    for (what, arch, t) in [
        ("t2v", arch(None, 4), Timesteps::PerSample(vec![812.5, 33.0])),
        ("i2v 2.1", arch(image(1), 9), Timesteps::PerSample(vec![5.0, 640.0])),
        ("flf2v", arch(image(2), 9), Timesteps::PerSample(vec![5.0])),
        (
            "ti2v",
            arch(None, 4),
            Timesteps::PerToken(vec![vec![0.0, 0.0, 0.0, 700.0, 700.0, 700.0, 700.0, 700.0, 690.0]]),
        ),
    ] {
        for kind in KINDS {
            // LoKr of rank 3: some sites low-rank, some whole.
            let adapters = adapters(&arch, AdapterSpec { kind, rank: 3, alpha: 2.0 }, |_| true);
            let (taped, vars) = on_tape(&adapters);
            check_against_tape(&format!("{what} {kind:?}"), &arch, t.clone(), &adapters, &taped, &vars);
        }
    }
}

#[test]
fn gradients_under_dropout_equal_the_tapes() {
    let arch = arch(None, 4);
    for kind in KINDS {
        let adapters = adapters(&arch, AdapterSpec { kind, rank: 4, alpha: 4.0 }, |_| true);
        let (taped, vars) = on_tape(&adapters);
        let t = Timesteps::PerSample(vec![812.5, 33.0]);
        check_against_tape(&format!("{kind:?}"), &arch, t, &WithDropout(adapters), &WithDropout(taped), &vars);
    }
}

/// Equal rows of a prompt's padding taken one by one, as under dropout.
struct RowByRow<'a>(&'a BTreeMap<String, Adapter>);

impl Adapters for RowByRow<'_> {
    fn get(&self, site: &str) -> Option<&Adapter> {
        self.0.get(site)
    }

    fn draws_by_row(&self) -> bool {
        true
    }
}

#[test]
fn one_row_stands_for_the_padding() {
    for (clip, in_dim) in [(None, 4), (Some(ClipArch { dim: 5, tokens: 11, images: 1 }), 9)] {
        let arch = WanArch { text_len: 40, ..arch(clip, in_dim) };
        let (model, blocks) = model(&arch, &random_weights(&arch, 5).unwrap(), Numerics::default());
        let exec = Exec::cpu();
        let plan = SavePlan::uniform(SavePolicy::KeepAll);
        // Prompts of 1 and 5 rows, then one that leaves a single row of padding, and one that leaves none.
        for rows in [[1, 5], [1, 39], [40, 2]] {
            let context = (0..2).map(|i| normal(30 + i, &[rows[i as usize], arch.text_dim])).collect();
            let inputs = WanInputs { context, ..inputs(&arch, Timesteps::PerSample(vec![812.5, 33.0])) };
            let target = normal(4, inputs.x.dims());
            for kind in KINDS {
                let adapters = adapters(&arch, AdapterSpec { kind, rank: 3, alpha: 2.0 }, |_| true);
                let (pred, _, grads) = step(&exec, &model, &blocks, &adapters, &inputs, &target, &plan);
                let (want, _, all) = step(&exec, &model, &blocks, &RowByRow(&adapters), &inputs, &target, &plan);
                assert!(max_abs(&pred, &want) <= 1e-5 * max_of(&want), "{kind:?}, {rows:?}");
                assert_eq!(grads.0.len(), all.0.len());
                for (key, want) in &all.0 {
                    let (diff, max) = (max_abs(&grads.0[key], want), max_of(want));
                    assert!(diff <= 2e-5 * max, "{kind:?}, {rows:?}: gradient of {key} is off by {diff:e} of {max:e}");
                }
                let folds = rows.iter().max() < Some(&39);
                assert_eq!(max_abs(&pred, &want) > 0.0, folds, "{kind:?}, {rows:?}: rounding tells the ways apart");
            }
        }
    }
}

/// With heads 128 wide and enough tokens, 8 bits in forward's attention are used, and change little; with few tokens nothing.
#[test]
fn fast_attention_stays_near_attention_in_full() {
    let arch = WanArch { dim: 128, num_heads: 1, ffn_dim: 64, num_layers: 2, ..arch(None, 4) };
    let adapters = adapters(&arch, AdapterSpec { kind: Kind::Lora, rank: 3, alpha: 2.0 }, |_| true);
    let fast = Numerics { fast_attention: true, ..Numerics::default() };
    let exec = Exec::cpu();
    let plan = SavePlan::uniform(SavePolicy::KeepAttention);
    for ([h, w], used) in [([64, 96], true), ([8, 8], false)] {
        let x = normal(1, &[1, 4, 1, h, w]);
        let inputs = WanInputs { x, ..inputs(&arch, Timesteps::PerSample(vec![500.0])) };
        let target = normal(4, inputs.x.dims());
        let of = |numerics| {
            let (model, blocks) = model(&arch, &random_weights(&arch, 5).unwrap(), numerics);
            step(&exec, &model, &blocks, &adapters, &inputs, &target, &plan)
        };
        let ((pred, _, grads), (want, _, full)) = (of(fast), of(Numerics::default()));
        assert_eq!(max_abs(&pred, &want) > 0.0, used, "[{h}, {w}]");
        assert!(max_abs(&pred, &want) < 0.02 * max_of(&want), "[{h}, {w}]");
        let (mut gg, mut gw, mut ww) = (0.0, 0.0, 0.0);
        for (key, want) in &full.0 {
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (g, w) in flat(&grads.0[key]).into_iter().zip(flat(want)) {
                let (g, w) = (f64::from(g), f64::from(w));
                (gg, gw, ww) = (gg + g * g, gw + g * w, ww + w * w);
            }
        }
        let cosine = gw / (gg * ww).sqrt();
        assert!(cosine > 0.999, "[{h}, {w}]: {cosine}");
    }
}

/// Backward ends at the lowest block with an adapter, wherever in the block it sits.
#[test]
fn few_adapters_get_the_same_gradients() {
    let arch = arch(None, 4);
    let spec = AdapterSpec { kind: Kind::Lora, rank: 2, alpha: 2.0 };
    for only in ["blocks.1.cross_attn.k", "blocks.2.ffn.2", "blocks.0.self_attn.v", "blocks.1."] {
        let adapters = adapters(&arch, spec, |site| site.starts_with(only));
        let (taped, vars) = on_tape(&adapters);
        check_against_tape(only, &arch, Timesteps::PerSample(vec![400.0]), &adapters, &taped, &vars);
    }
}

fn assert_equal_bits(what: &str, a: &(Tensor, f32, Grads), b: &(Tensor, f32, Grads)) {
    let bits = |t: &Tensor| -> Vec<u32> {
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(bits(&a.0), bits(&b.0), "{what}: predictions");
    assert_eq!(a.1.to_bits(), b.1.to_bits(), "{what}: losses");
    assert!(a.2 .0.keys().eq(b.2 .0.keys()) && !a.2 .0.is_empty());
    for (key, grad) in &a.2 .0 {
        assert_eq!(bits(grad), bits(&b.2 .0[key]), "{what}: gradient of {key}");
    }
}

#[test]
fn policies_change_no_bit() {
    let arch = arch(Some(ClipArch { dim: 5, tokens: 11, images: 1 }), 9);
    let weights = random_weights(&arch, 8).unwrap();
    let inputs = inputs(&arch, Timesteps::PerSample(vec![990.0, 3.5]));
    let target = normal(4, inputs.x.dims());
    let spec = AdapterSpec { kind: Kind::Lora, rank: 3, alpha: 2.0 };
    let adapters = WithDropout(adapters(&arch, spec, |_| true));
    let host = |keep| BlockPlan { keep, home: Home::Host };
    let device = |keep| BlockPlan { keep, home: Home::Device };
    use SavePolicy::{KeepAll, KeepAttention, Recompute};
    let plans = [
        SavePlan::uniform(KeepAttention),
        SavePlan::uniform(KeepAll),
        SavePlan::per_block(vec![host(KeepAll), device(Recompute), host(KeepAttention)]),
        SavePlan::per_block(vec![]),
    ];
    for (compute, numerics) in
        [(DType::F32, Numerics::default()), (DType::BF16, Numerics::default()), (DType::BF16, Numerics::musubi())]
    {
        let numerics = Numerics { musubi_clip_split: false, ..numerics };
        let exec = Exec::cpu().with_compute(compute);
        let (model, blocks) = model(&arch, &weights, numerics);
        let run = |plan: &SavePlan| step(&exec, &model, &blocks, &adapters, &inputs, &target, plan);
        let recompute = run(&SavePlan::uniform(Recompute));
        for plan in &plans {
            assert_equal_bits(&format!("{compute:?} {numerics:?} {plan:?}"), &recompute, &run(plan));
        }
    }
}

/// In 16 bit, the error of all gradients together is at most twice that of the tape run over the same 16-bit forward.
#[test]
fn gradients_in_16_bit_obey_the_twice_rule() {
    let arch = arch(None, 4);
    let (official, blocks) = model(&arch, &random_weights(&arch, 5).unwrap(), Numerics::default());
    let adapters = adapters(&arch, AdapterSpec { kind: Kind::Lora, rank: 3, alpha: 3.0 }, |_| true);
    let (taped, vars) = on_tape(&adapters);
    let inputs = inputs(&arch, Timesteps::PerSample(vec![500.0, 20.0]));
    let target = normal(4, inputs.x.dims());
    let plan = SavePlan::uniform(SavePolicy::Recompute);
    let run = |m: &WanModel, exec: &Exec| step(exec, m, &blocks, &adapters, &inputs, &target, &plan).2 .0;
    let exact = run(&official, &Exec::cpu());
    let old = WanModel::new(arch.clone(), official.weights().clone(), Numerics::musubi()).unwrap();
    for (model, compute) in [(&official, DType::BF16), (&old, DType::BF16), (&official, DType::F16)] {
        let exec = Exec::cpu().with_compute(compute);
        let pred = model.predict(&exec, &inputs, &taped, &blocks, None).unwrap();
        let tape = (pred - &target).unwrap().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        let off = |of: &dyn Fn(&str) -> Tensor| {
            let (mut error, mut size) = (0.0, 0.0);
            for (key, want) in &exact {
                let square = |t: &Tensor| f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
                error += square(&(of(key) - want).unwrap());
                size += square(want);
            }
            (error / size).sqrt()
        };
        let explicit = run(model, &exec);
        let (ours, naive) = (off(&|k| explicit[k].clone()), off(&|k| tape.get(vars[k].as_tensor()).unwrap().clone()));
        assert!(ours > 0.0 && ours <= 2.0 * naive, "{compute:?} {:?}: {ours:e}, tape {naive:e}", model.numerics());
    }
}

/// Two samples of one batch give what each gives alone: nothing leaks between samples.
#[test]
fn samples_of_a_batch_are_independent() {
    let arch = arch(None, 4);
    let (model, blocks) = model(&arch, &random_weights(&arch, 5).unwrap(), Numerics::default());
    let adapters = adapters(&arch, AdapterSpec { kind: Kind::Lora, rank: 3, alpha: 3.0 }, |_| true);
    let both = inputs(&arch, Timesteps::PerSample(vec![500.0, 20.0]));
    let pred = model.predict(&Exec::cpu(), &both, &adapters, &blocks, None).unwrap();
    for i in 0..2 {
        let one = WanInputs {
            x: both.x.narrow(0, i, 1).unwrap(),
            t: Timesteps::PerSample(vec![[500.0, 20.0][i]]),
            context: vec![both.context[i].clone()],
            ..both.clone()
        };
        let alone = model.predict(&Exec::cpu(), &one, &adapters, &blocks, None).unwrap();
        assert!(max_abs(&alone, &pred.narrow(0, i, 1).unwrap()) < 1e-5);
    }
}

/// A sink that refuses stops backward with its error.
#[test]
fn errors_of_the_sink_come_through() {
    struct Full;
    impl GradSink for Full {
        fn add(&mut self, site: &str, _: &'static str, _: &Tensor) -> Result<()> {
            Err(crate::Error::Invalid { model: "sink", what: site.to_string() })
        }
    }
    let arch = arch(None, 4);
    let (model, blocks) = model(&arch, &random_weights(&arch, 5).unwrap(), Numerics::default());
    let adapters = adapters(&arch, AdapterSpec { kind: Kind::Lora, rank: 1, alpha: 1.0 }, |_| true);
    let inputs = inputs(&arch, Timesteps::PerSample(vec![500.0]));
    let exec = Exec::cpu();
    let (pred, saved) = model.forward(&exec, &inputs, &adapters, &blocks, &SavePlan::per_block(vec![])).unwrap();
    let error = model.backward(&exec, &adapters, &blocks, saved, &pred, &mut Full).unwrap_err();
    assert!(error.to_string().contains("blocks.2.ffn.2"), "{error}");
}
