//! Predictions and activations of every recorded DiT case.

use candle_core::{DType, Tensor};
use wan_kernels::Exec;

use crate::adapter::NoAdapters;
use crate::golden::{cases, inputs, json, max_abs, model, rel_l2, tensors, weights};
use crate::wan::{Numerics, WanModel};

const CASES: [&str; 2] = ["01_dit", "02_dit"];

/// Predictions in fp32 are within 3e-5 (the references among themselves: 3.3e-6), activations likewise.
#[test]
fn predictions_and_activations_match() {
    for name in cases(&CASES) {
        let (arch, tensors_by_key) = weights(&name);
        let (model, blocks) = model(&arch, &tensors_by_key, Numerics::default());
        let io = tensors(&format!("{name}.io.safetensors"));
        let meta = json(&format!("{name}.json"));
        for case in meta["cases"].as_array().unwrap() {
            let i = case["case"].as_u64().unwrap();
            let get = |key: &str| &io[&format!("case{i}.{key}")];
            let inputs = inputs(&io, &format!("case{i}."), get("x"), get("t"));
            let acts = match meta["acts_for_case"].as_u64() == Some(i) {
                true => tensors(&format!("{name}.acts.safetensors")),
                false => Default::default(),
            };
            let mut seen = 0;
            let mut compare = |key: &str, value: &Tensor| {
                let Some(want) = acts.get(key) else { return Ok(()) };
                // The reference keeps only the first rows of the text embedding.
                let value =
                    if value.dims() == want.dims() { value.clone() } else { value.narrow(1, 0, want.dim(1)?)? };
                let diff = max_abs(&value, want);
                assert!(diff <= 3e-5, "{name} case {i}: {key} is off by {diff:e}");
                seen += 1;
                Ok(())
            };
            let pred = model.predict(&Exec::cpu(), &inputs, &NoAdapters, &blocks, Some(&mut compare)).unwrap();
            assert_eq!(seen, acts.len(), "{name} case {i}: activations compared");
            let diff = max_abs(&pred, get("pred"));
            assert!(diff <= 3e-5, "{name} case {i}: the prediction is off by {diff:e}");
        }
    }
}

/// What the old tool predicts with bf16 attention in an fp32 model, and, for two images, with its split of the context.
#[test]
fn the_old_tools_rounding_and_split_are_reproduced() {
    for name in cases(&CASES) {
        let (arch, tensors_by_key) = weights(&name);
        let numerics = |attention| Numerics { attention, musubi_clip_split: true, ..Numerics::default() };
        let (model, blocks) = model(&arch, &tensors_by_key, numerics(Some(DType::BF16)));
        let io = tensors(&format!("{name}.io.safetensors"));
        for i in 0.. {
            let Some(x) = io.get(&format!("case{i}.x")) else { break };
            let inputs = inputs(&io, &format!("case{i}."), x, &io[&format!("case{i}.t")]);
            let predict = |m: &WanModel| m.predict(&Exec::cpu(), &inputs, &NoAdapters, &blocks, None).unwrap();
            let off = rel_l2(&predict(&model), &io[&format!("case{i}.pred_musubi_bf16attn")]);
            assert!(off <= 1e-2, "{name} case {i}: with bf16 attention off by {off:e}");
            if let Some(want) = io.get(&format!("case{i}.pred_musubi_disagrees")) {
                let exact = WanModel::new(arch.clone(), model.weights().clone(), numerics(None)).unwrap();
                let diff = max_abs(&predict(&exact), want);
                assert!(diff <= 3e-5, "{name} case {i}: with the old split off by {diff:e}");
                let honest = WanModel::new(arch.clone(), model.weights().clone(), Numerics::default()).unwrap();
                assert!(rel_l2(&predict(&honest), want) > 0.1, "{name} case {i}: the split makes no difference");
            }
        }
    }
}

/// 16-bit computation, with the fp32 stream of the official code and with the 16-bit stream of the old tool.
#[test]
fn bf16_and_fp16_stay_near() {
    for name in cases(&CASES) {
        let (arch, tensors_by_key) = weights(&name);
        let io = tensors(&format!("{name}.io.safetensors"));
        let inputs = inputs(&io, "case0.", &io["case0.x"], &io["case0.t"]);
        for (compute, numerics, limit) in [
            (DType::BF16, Numerics::default(), 1e-2),
            (DType::BF16, Numerics { musubi_clip_split: false, ..Numerics::musubi() }, 1.5e-2),
            (DType::F16, Numerics::default(), 2e-3),
        ] {
            let (model, blocks) = model(&arch, &tensors_by_key, numerics);
            let exec = Exec::cpu().with_compute(compute);
            let pred = model.predict(&exec, &inputs, &NoAdapters, &blocks, None).unwrap();
            let off = rel_l2(&pred, &io["case0.pred"]);
            assert!(off > 0.0 && off <= limit, "{name}: {compute:?} {numerics:?} is off by {off:e}");
        }
    }
}
