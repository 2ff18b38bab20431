//! The DiT on fp8 weights: every recorded way of storing and computing them.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Tensor};
use wan_kernels::fp8::{self, Granularity};
use wan_kernels::Exec;

use super::train::{compare_grads, step};
use crate::adapter::NoAdapters;
use crate::arch::WanArch;
use crate::golden::{adapters, cases, inputs, json, max_abs, rel_l2, tensors, weights};
use crate::keys;
use crate::linear::{Products, Weight};
use crate::wan::{BlockWeights, Numerics, ResidentWeights, SavePlan, SavePolicy, WanModel, WanWeights};
use crate::Result;

type Stored = BTreeMap<String, Weight>;

fn build(arch: &WanArch, stored: &Stored, numerics: Numerics) -> (WanModel, ResidentWeights) {
    let mut get = |key: &str| Ok(stored[key].clone());
    let rest = WanWeights::from_getter(arch, &mut get).unwrap();
    let blocks: Result<Vec<_>> = (0..arch.num_layers).map(|i| BlockWeights::from_getter(arch, i, &mut get)).collect();
    (WanModel::new(arch.clone(), rest, numerics).unwrap(), ResidentWeights::new(blocks.unwrap()))
}

/// Block-scaled linears, everything else as it was: a checkpoint of `dtype`.
fn scaled(tensors: &BTreeMap<String, Tensor>, dtype: DType) -> Stored {
    let store = |(key, t): (&String, &Tensor)| {
        let t = t.to_dtype(dtype).unwrap();
        let weight = match keys::is_quantisable(key) {
            true => Weight::Fp8(fp8::Weight::quantize(&t, Granularity::Block).unwrap()),
            false => Weight::Dense(t),
        };
        (key.clone(), weight)
    };
    tensors.iter().map(store).collect()
}

/// Every tensor cast to e4m3 without a scale; linears of blocks stay codes.
fn cast(tensors: &BTreeMap<String, Tensor>) -> Stored {
    let store = |(key, t): (&String, &Tensor)| {
        let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let codes: Vec<u8> = values.into_iter().map(fp8::codec::encode).collect();
        let weight = match keys::is_quantisable(key) {
            true => Weight::cast(Tensor::from_vec(codes, t.dims(), t.device()).unwrap()).unwrap(),
            false => {
                let values: Vec<f32> = codes.into_iter().map(fp8::codec::decode).collect();
                Weight::Dense(Tensor::from_vec(values, t.dims(), t.device()).unwrap())
            }
        };
        (key.clone(), weight)
    };
    tensors.iter().map(store).collect()
}

struct Case {
    name: String,
    arch: WanArch,
    tensors: BTreeMap<String, Tensor>,
    io: HashMap<String, Tensor>,
}

fn all() -> Vec<Case> {
    cases(&["04_fp8_dit"])
        .into_iter()
        .map(|name| {
            let (arch, base) = weights(json(&format!("{name}.json"))["base"].as_str().unwrap());
            let io = tensors(&format!("{name}.safetensors"));
            Case { name, arch, tensors: base, io }
        })
        .collect()
}

#[test]
fn predictions_on_fp8_weights_match() {
    for Case { name, arch, tensors, io } in all() {
        let inputs = inputs(&io, "", &io["x"], &io["t"]);
        let predict = |stored: &Stored, compute: DType, numerics: Numerics| {
            let (model, blocks) = build(&arch, stored, numerics);
            model.predict(&Exec::cpu().with_compute(compute), &inputs, &NoAdapters, &blocks, None).unwrap()
        };
        let dense: Stored = tensors.iter().map(|(k, t)| (k.clone(), Weight::Dense(t.clone()))).collect();
        let (official, musubi) = (Numerics::default(), Numerics::musubi());
        for (recorded, stored) in [
            ("pred_fp32_unquantized", &dense),
            ("pred_fp8scaled_fp32scale", &scaled(&tensors, DType::F32)),
            ("pred_fp8scaled_bf16scale_fp32compute", &scaled(&tensors, DType::BF16)),
            ("pred_fp8base_cast_fp32compute", &cast(&tensors)),
        ] {
            let diff = max_abs(&predict(stored, DType::F32, official), &io[recorded]);
            assert!(diff <= 3e-5, "{name}: {recorded} is off by {diff:e}");
        }
        for (recorded, stored) in [
            ("pred_fp8scaled_bf16_autocast", &scaled(&tensors, DType::BF16)),
            ("pred_fp8base_bf16_autocast", &cast(&tensors)),
        ] {
            let off = rel_l2(&predict(stored, DType::BF16, musubi), &io[recorded]);
            assert!(off <= 2e-2, "{name}: {recorded} is off by {off:e}");
        }
    }
}

#[test]
fn recorded_codes_and_scales_are_those_of_the_model() {
    for Case { name, tensors, io, .. } in all() {
        let stored = scaled(&tensors, DType::F32);
        let mut compared = 0;
        for (key, want) in io.iter().filter_map(|(k, t)| Some((k.strip_prefix("q_u8.")?, t))) {
            let Weight::Fp8(weight) = &stored[&format!("{key}.weight")] else { panic!("{name}: {key} is dense") };
            assert_eq!(weight.codes_oi().to_vec2::<u8>().unwrap(), want.to_vec2::<u8>().unwrap(), "{name}: {key}");
            assert_eq!(max_abs(weight.scale(), &io[&format!("scale.{key}")]), 0.0, "{name}: scale of {key}");
            compared += 1;
        }
        assert!(compared > 0);
    }
}

#[test]
fn the_step_on_fp8_weights_is_reproduced() {
    for Case { name, arch, tensors: base, io } in all() {
        let step_name = name.replace("fp8_dit", "fp8_lora_step");
        let recorded = tensors(&format!("{step_name}.safetensors"));
        let network = adapters(&recorded, "network.", |module| {
            let alpha = recorded[&format!("network.{module}.alpha")].to_scalar::<f32>().unwrap();
            let rank = recorded[&format!("network.{module}.lora_down.weight")].dim(0).unwrap();
            f64::from(alpha) / rank as f64
        });
        let (model, blocks) = build(&arch, &scaled(&base, DType::F32), Numerics::default());
        // x holds the clean latent here; t/1000 is the noise fraction and the model is given t itself.
        let (x, noise, sigma) = (&io["x"], &recorded["noise"], &recorded["sigma"]);
        let sigma = sigma.reshape(((), 1, 1, 1, 1)).unwrap();
        let noisy =
            (x.broadcast_mul(&(1.0 - &sigma).unwrap()).unwrap() + noise.broadcast_mul(&sigma).unwrap()).unwrap();
        let inputs = inputs(&io, "", &noisy, &io["t"]);
        let target = (noise - x).unwrap();
        let plan = SavePlan::uniform(SavePolicy::KeepAll);
        let (pred, loss, grads) = step(&Exec::cpu(), &model, &blocks, &network, &inputs, &target, &plan);
        let diff = max_abs(&pred, &recorded["pred"]);
        assert!(diff <= 3e-5, "{step_name}: the prediction is off by {diff:e}");
        let want = recorded["loss"].to_vec1::<f32>().unwrap()[0];
        assert!((loss - want).abs() <= 1e-5 * want.max(1.0), "{step_name}: loss {loss}, recorded {want}");
        compare_grads(&step_name, &grads, &recorded);
    }
}

fn multiplied(stored: Stored, products: Products) -> Stored {
    let quantisable = |key: &str| keys::is_quantisable(key);
    let of = |(key, w): (String, Weight)| {
        let products = if quantisable(&key) { products } else { Products::Full };
        let w = w.for_products(products).unwrap();
        (key, w)
    };
    stored.into_iter().map(of).collect()
}

/// Cosine and relative error.
fn departs(got: &[f32], want: &[f32]) -> (f64, f64) {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let (gg, gw, ww) = (dot(got, got), dot(got, want), dot(want, want));
    (gw / (gg * ww).sqrt(), ((gg - 2.0 * gw + ww).max(0.0) / ww).sqrt())
}

/// The step's loss and the adapters' gradients with 8-bit products: fp8 against the same weights multiplied in full, int8
/// against the weights before they were rounded.
#[test]
fn eight_bit_products_keep_loss_and_gradients() {
    for Case { name, arch, tensors: base, io } in all() {
        let step_name = name.replace("fp8_dit", "fp8_lora_step");
        let recorded = tensors(&format!("{step_name}.safetensors"));
        let network = adapters(&recorded, "network.", |module| {
            let alpha = recorded[&format!("network.{module}.alpha")].to_scalar::<f32>().unwrap();
            f64::from(alpha) / recorded[&format!("network.{module}.lora_down.weight")].dim(0).unwrap() as f64
        });
        let inputs = inputs(&io, "", &io["x"], &io["t"]);
        let target = (&recorded["noise"] - &io["x"]).unwrap();
        let plan = SavePlan::uniform(SavePolicy::KeepAll);
        let run = |stored: &Stored| {
            let (model, blocks) = build(&arch, stored, Numerics::default());
            let (_, loss, grads) = step(&Exec::cpu(), &model, &blocks, &network, &inputs, &target, &plan);
            let flat = |g: &Tensor| g.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (loss, grads.0.iter().map(|(name, g)| (name.clone(), flat(g))).collect::<BTreeMap<_, _>>())
        };
        let dense: Stored = base.iter().map(|(k, t)| (k.clone(), Weight::Dense(t.clone()))).collect();
        let int8 = multiplied(dense.clone(), Products::Int8);
        let kept = |(key, w): (&String, &Weight)| keys::is_quantisable(key) == matches!(w, Weight::Int8(_));
        assert!(int8.iter().all(kept), "{name}");
        let stored = scaled(&base, DType::F32);
        for (what, got, want, lowest) in
            [("fp8", multiplied(stored.clone(), Products::Fp8), stored, 0.95), ("int8", int8, dense, 0.99)]
        {
            let ((loss, grads), (want_loss, want)) = (run(&got), run(&want));
            let all = |grads: &BTreeMap<_, Vec<f32>>| grads.values().flatten().copied().collect::<Vec<_>>();
            let (cosine, error) = departs(&all(&grads), &all(&want));
            assert!((0.99..1.0 - 1e-9).contains(&cosine), "{name}, {what}: the gradients' cosine is {cosine}");
            assert!(error < 0.14, "{name}, {what}: the gradients' error is {error}");
            let off = (loss - want_loss).abs() / want_loss;
            assert!(off < 0.01, "{name}, {what}: the loss is off by {off}");
            println!("{name}, {what}: loss off by {off:.2e}, gradients' cosine {cosine:.6}, error {error:.4}");
            for (key, grad) in &grads {
                let (cosine, error) = departs(grad, &want[key]);
                println!("  {key}: cosine {cosine:.6}, error {error:.4}");
                assert!(cosine > lowest, "{name}, {what}: {key} has cosine {cosine}");
            }
        }
    }
}
