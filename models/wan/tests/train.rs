//! One training step of every recorded adapter: prediction, loss, and the gradient of every parameter.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Tensor};
use serde_json::Value;
use wan_kernels::Exec;

use crate::adapter::{Adapters, NoAdapters};
use crate::golden::{adapters, cases, inputs, json, max_abs, max_of, model, tensors, weights};
use crate::keys;
use crate::wan::{GradSink, Numerics, ResidentWeights, SavePlan, SavePolicy, WanInputs, WanModel};
use crate::Result;

/// Sums gradients by `{kohya module}.{parameter}`.
#[derive(Default)]
pub struct Grads(pub BTreeMap<String, Tensor>);

impl GradSink for Grads {
    fn add(&mut self, site: &str, param: &'static str, grad: &Tensor) -> Result<()> {
        assert_eq!(grad.dtype(), DType::F32);
        let key = format!("{}.{param}", keys::kohya_name(site));
        let sum = match self.0.remove(&key) {
            Some(sum) => (sum + grad)?,
            None => grad.clone(),
        };
        self.0.insert(key, sum);
        Ok(())
    }
}

/// Prediction, mean squared error against `target`, and all gradients.
pub fn step(
    exec: &Exec,
    model: &WanModel,
    blocks: &ResidentWeights,
    adapters: &dyn Adapters,
    inputs: &WanInputs,
    target: &Tensor,
    plan: &SavePlan,
) -> (Tensor, f32, Grads) {
    let (pred, saved) = model.forward(exec, inputs, adapters, blocks, plan).unwrap();
    let error = (&pred - target).unwrap();
    let loss = error.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    let dpred = (error * (2.0 / pred.elem_count() as f64)).unwrap();
    let mut grads = Grads::default();
    model.backward(exec, adapters, blocks, saved, &dpred, &mut grads).unwrap();
    (pred, loss, grads)
}

/// Every gradient recorded under `grad.` is there, and none besides, each within 1e-4 of its tensor's largest value.
pub fn compare_grads(what: &str, grads: &Grads, io: &HashMap<String, Tensor>) {
    let want: BTreeMap<_, _> = io.iter().filter_map(|(k, t)| Some((k.strip_prefix("grad.")?, t))).collect();
    assert!(!want.is_empty());
    assert!(grads.0.keys().map(String::as_str).eq(want.keys().copied()), "{what}: other parameters have gradients");
    for (key, want) in want {
        let (diff, max) = (max_abs(&grads.0[key], want), max_of(want));
        assert!(max > 0.0 && diff <= 1e-4 * max, "{what}: gradient of {key} is off by {diff:e} of {max:e}");
    }
}

/// `scale_per_module` is one number or one for each module.
fn scale_of(meta: &Value, module: &str) -> f64 {
    let scale = &meta["scale_per_module"];
    scale.as_f64().or_else(|| scale[module].as_f64()).unwrap()
}

#[test]
fn recorded_steps_are_reproduced() {
    for name in cases(&["03_"]) {
        let meta = json(&format!("{name}.json"));
        let base = meta["base_weights"].as_str().unwrap().strip_suffix(".weights.safetensors").unwrap().to_string();
        let (arch, tensors_by_key) = weights(&base);
        let (model, blocks) = model(&arch, &tensors_by_key, Numerics::default());
        let io = tensors(&format!("{name}.io.safetensors"));
        let network = tensors(&format!("{name}.network.safetensors"));
        let adapters = adapters(&network, "", |module| scale_of(&meta, module));
        let names: Vec<Value> = arch.sites().iter().map(|s| keys::kohya_name(&s.name).into()).collect();
        assert_eq!(meta["module_names"], Value::from(names), "{name}: sites in creation order");

        let inputs = inputs(&io, "", &io["noisy"], &io["timesteps"]);
        let target = (&io["noise"] - &io["latents"]).unwrap();
        let exec = Exec::cpu();
        let (pred, loss, grads) =
            step(&exec, &model, &blocks, &adapters, &inputs, &target, &SavePlan::uniform(SavePolicy::Recompute));
        let diff = max_abs(&pred, &io["pred"]);
        assert!(diff <= 3e-5, "{name}: the prediction is off by {diff:e}");
        let want = io["loss"].to_vec1::<f32>().unwrap()[0];
        assert!((loss - want).abs() <= 1e-5 * want.max(1.0), "{name}: loss {loss}, recorded {want}");
        compare_grads(&name, &grads, &io);

        let bare = model.predict(&exec, &inputs, &NoAdapters, &blocks, None).unwrap();
        let diff = max_abs(&bare, &io["pred_without_network"]);
        assert!(diff <= 3e-5, "{name}: the base's prediction is off by {diff:e}");
    }
}
