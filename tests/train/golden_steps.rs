//! The recorded ten-step trajectories through our optimizer, clipping, loss and the model's backward.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use wan_kernels::adamw::{clip_scale, global_norm};
use wan_kernels::Exec;
use wan_models::adapter::{AdapterSpec, Kind};
use wan_models::arch::{NotInShapes, Shapes, WanArch};
use wan_models::keys;
use wan_models::wan::{Numerics, SavePlan, SavePolicy, Timesteps, WanInputs, WanModel, WanWeights};
use wan_train::adapter::start::{self, Stored};
use wan_train::adapter::{select, AdapterParams, Grads, NetworkSpec, Patterns};
use wan_train::optim::{Optimizer, OptimizerSpec};
use wan_train::train::timesteps::Timestep;
use wan_train::train::{loss, Batch};

use crate::golden_support::golden_dir;

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden_dir().join(name)).unwrap()).unwrap()
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden_dir().join(name), &Device::Cpu).unwrap()
}

fn base(case: &Value) -> (WanArch, BTreeMap<String, Tensor>) {
    let config = json(case["base_config"].as_str().unwrap())["config"].clone();
    let weights: BTreeMap<String, Tensor> = tensors(case["base_weights"].as_str().unwrap())
        .into_iter()
        .map(|(k, t)| (k, t.to_dtype(DType::F32).unwrap()))
        .collect();
    let shapes: Shapes = weights.iter().map(|(k, t)| (k.clone(), t.dims().to_vec())).collect();
    let number = |key: &str| config[key].as_u64().map(|n| n as usize);
    let rest =
        NotInShapes { num_heads: number("num_heads"), text_len: number("text_len"), eps: config["eps"].as_f64() };
    (WanArch::from_shapes(&shapes, rest).unwrap(), weights)
}

/// The network of a file in kohya's spelling, by site.
fn stored(file: &HashMap<String, Tensor>) -> BTreeMap<String, Stored> {
    let mut out: BTreeMap<String, Stored> = BTreeMap::new();
    const NAMES: [&str; 10] = [
        "lora_down.weight",
        "lora_up.weight",
        "hada_w1_a",
        "hada_w1_b",
        "hada_w2_a",
        "hada_w2_b",
        "lokr_w1",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
    ];
    for (key, tensor) in file {
        let (module, param) = key.split_once('.').unwrap();
        let site = keys::site_from_kohya(module).unwrap();
        let entry = out.entry(site).or_insert_with(|| Stored { factors: BTreeMap::new(), alpha: None });
        match NAMES.iter().find(|n| **n == param) {
            Some(name) => drop(entry.factors.insert(name, tensor.clone())),
            None => entry.alpha = Some(tensor.to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap()),
        }
    }
    out
}

struct Case {
    json: Value,
    io: HashMap<String, Tensor>,
    model: WanModel,
    blocks: wan_models::wan::ResidentWeights,
    params: AdapterParams,
}

fn open(name: &str) -> Case {
    let json = json(&format!("{name}.json"));
    let (arch, weights) = base(&json);
    let (rest, blocks) = WanWeights::from_tensors(&arch, &weights).unwrap();
    let sites = select(&arch, &Patterns::default()).unwrap();
    let (rank, alpha) = (json["network_dim"].as_u64().unwrap() as usize, json["network_alpha"].as_f64().unwrap());
    let kind = match json["kind"].as_str().unwrap() {
        "lora" => Kind::Lora,
        "loha" => Kind::Loha,
        "lokr" => Kind::Lokr { factor: -1 },
        other => panic!("{name}: a {other} network"),
    };
    let spec = NetworkSpec { adapter: AdapterSpec { kind, rank, alpha }, ..NetworkSpec::lora(rank, alpha) };
    let params = AdapterParams::new(spec, sites, 0, &Device::Cpu).unwrap();
    let note = start::load(&params, name, &stored(&tensors(&format!("{name}.network.safetensors")))).unwrap();
    assert_eq!(note, None);
    let model = WanModel::new(arch, rest, Numerics::default()).unwrap();
    Case { io: tensors(&format!("{name}.io.safetensors")), json, model, blocks, params }
}

impl Case {
    /// One micro-batch from explicit noise, noise share and timestep.
    fn batch(&self, noise: &Tensor, sigma_b: &[f32], t_b: &[f32]) -> Batch {
        let latents = self.io["latents"].clone();
        let sigma = Tensor::new(sigma_b, &Device::Cpu).unwrap().reshape((sigma_b.len(), 1, 1, 1, 1)).unwrap();
        let clean = latents.broadcast_mul(&sigma.affine(-1.0, 1.0).unwrap()).unwrap();
        let x = (clean + noise.broadcast_mul(&sigma).unwrap()).unwrap();
        let inputs = WanInputs {
            x,
            t: Timesteps::PerSample(t_b.to_vec()),
            context: (0..sigma_b.len()).map(|b| self.io[&format!("context.{b}")].clone()).collect(),
            y: self.io.get("y").cloned(),
            clip_fea: None,
            f_indices: None,
        };
        Batch {
            items: vec![0; sigma_b.len()],
            latents,
            noise: noise.clone(),
            expert: None,
            timesteps: sigma_b.iter().zip(t_b).map(|(s, t)| Timestep { t: *t, sigma: *s }).collect(),
            weight_b: None,
            clean_first_frame: false,
            inputs,
        }
    }

    /// Loss and gradients of a batch, added to `grads`.
    fn gradients(&self, batch: &Batch, keep: SavePolicy, grads: &mut Grads) -> f32 {
        let exec = Exec::cpu();
        let plan = SavePlan::uniform(keep);
        let (pred, saved) = self.model.forward(&exec, &batch.inputs, &self.params, &self.blocks, &plan).unwrap();
        let loss = loss::flow(&exec, batch, &pred, 1.0).unwrap();
        self.model.backward(&exec, &self.params, &self.blocks, saved, &loss.dpred, grads).unwrap();
        loss.mean
    }
}

fn floats(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn losses_and_gradients_match_the_recorded_ones() {
    for name in ["03_lora_d4a2", "03_lora_d8a8_b2", "03_lora_i2v22_d4", "03_loha_d3", "03_lokr_d4"] {
        let case = open(name);
        let batch = case.batch(&case.io["noise"], &floats(&case.io["sigma"]), &floats(&case.io["timesteps"]));
        let mut grads = Grads::new(case.params.layout().clone(), &Device::Cpu).unwrap();
        let loss = case.gradients(&batch, SavePolicy::KeepAttention, &mut grads);
        let want = floats(&case.io["loss"])[0];
        assert!((loss - want).abs() < 1e-5, "{name}: loss {loss} against {want}");
        let mut worst = 0f64;
        for (key, want) in case.io.iter().filter_map(|(k, t)| Some((k.strip_prefix("grad.")?, t))) {
            let (module, param) = key.split_once('.').unwrap();
            let full = format!("{}.{param}", keys::site_from_kohya(module).unwrap());
            let got = grads.get(&full).unwrap().unwrap();
            let scale = floats(want).iter().fold(0f32, |m, v| m.max(v.abs()));
            let error = floats(&got).iter().zip(floats(want)).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / scale;
            assert!(error < 1e-4, "{name} {full}: {error:e}");
            worst = worst.max(f64::from(error));
        }
        println!("{name}: loss off by {:e}, gradients by {worst:.1e} of their largest", (loss - want).abs());
    }
}

#[test]
fn ten_steps_follow_the_recorded_trajectories() {
    for (clip, final_file) in [("traj_noclip", "traj_noclip"), ("traj_clip", "traj_clip")] {
        let case = open("03_lora_d4a2");
        let facts = &case.json[clip];
        let spec = OptimizerSpec::parse(
            facts["optimizer"].as_str().unwrap(),
            &[format!("weight_decay={}", facts["weight_decay"]), format!("eps={}", facts["eps"])],
        )
        .unwrap();
        let layout = case.params.layout().clone();
        let mut optimizer = Optimizer::on(spec, &layout, &Device::Cpu).unwrap();
        let mut grads = Grads::new(layout.clone(), &Device::Cpu).unwrap();
        let max_norm = facts["max_grad_norm"].as_f64().unwrap_or(0.0);
        let lr = facts["lr"].as_f64().unwrap();
        let (mut worst_loss, mut worst_norm) = (0f64, 0f64);
        for step in 0..10 {
            let at = |name: &str| case.io[name].get(step).unwrap();
            let batch = case.batch(&at("traj.noise"), &floats(&at("traj.sigma")), &floats(&at("traj.timesteps")));
            grads.clear().unwrap();
            let loss = case.gradients(&batch, SavePolicy::Recompute, &mut grads);
            let norm = grads.flat().read(global_norm).unwrap();
            let want = facts["losses"][step].as_f64().unwrap();
            let want_norm = facts["grad_norm_before_clip"][step].as_f64().unwrap();
            worst_loss = worst_loss.max((f64::from(loss) - want).abs());
            worst_norm = worst_norm.max((norm / want_norm - 1.0).abs());
            let scale = clip_scale(norm, max_norm);
            optimizer.step(&layout, case.params.master(), grads.flat(), lr, lr, scale).unwrap();
        }
        let finals = tensors(&format!("03_lora_d4a2.{final_file}.final.safetensors"));
        let mut worst = 0f32;
        for (site, stored) in stored(&finals) {
            for param in layout.of_site(&site).unwrap() {
                let got = floats(&case.params.tensor(param).unwrap());
                let want = floats(&stored.factors[param.name]);
                worst = got.iter().zip(want).fold(worst, |m, (a, b)| m.max((a - b).abs()));
            }
        }
        println!("{clip}: losses off by {worst_loss:.1e}, norms by {worst_norm:.1e}, final weights by {worst:.1e}");
        assert!(worst_loss < 1e-5, "{clip}: losses off by {worst_loss:e}");
        assert!(worst_norm < 1e-4, "{clip}: norms off by {worst_norm:e}");
        assert!(worst < 1e-4, "{clip}: weights off by {worst:e}");
    }
}
