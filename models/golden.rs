//! Reads the reference numbers for the tests of this crate. Everything about a case comes from its files.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::adapter::Adapter;
use crate::arch::{NotInShapes, Shapes, WanArch};
use crate::keys;
use crate::wan::{Numerics, ResidentWeights, Timesteps, WanInputs, WanModel, WanWeights};

pub fn dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden"))
}

/// The names (without `.json`) of every case that starts with one of the prefixes.
pub fn cases(prefixes: &[&str]) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir())
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_suffix(".json").map(str::to_string))
        .filter(|name| prefixes.iter().any(|p| name.starts_with(p)))
        .collect();
    names.sort();
    assert!(!names.is_empty(), "no case of {prefixes:?} in {}", dir().display());
    names
}

pub fn json(file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir().join(file)).unwrap()).unwrap()
}

pub fn tensors(file: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(dir().join(file), &Device::Cpu).unwrap()
}

/// Weights in fp32 (stored as bf16, exactly) and the architecture that their shapes and the JSON agree on.
pub fn weights(base: &str) -> (WanArch, BTreeMap<String, Tensor>) {
    let config = &json(&format!("{base}.json"))["config"];
    let number = |key: &str| config[key].as_u64().map(|n| n as usize);
    let tensors: BTreeMap<String, Tensor> = tensors(&format!("{base}.weights.safetensors"))
        .into_iter()
        .map(|(k, t)| {
            (keys::canonical(&k).unwrap_or_else(|| panic!("foreign key {k}")), t.to_dtype(DType::F32).unwrap())
        })
        .collect();
    let shapes: Shapes = tensors.iter().map(|(k, t)| (k.clone(), t.dims().to_vec())).collect();
    let rest =
        NotInShapes { num_heads: number("num_heads"), text_len: number("text_len"), eps: config["eps"].as_f64() };
    let arch = WanArch::from_shapes(&shapes, rest).unwrap();
    for (key, seen) in [
        ("dim", arch.dim),
        ("ffn_dim", arch.ffn_dim),
        ("num_layers", arch.num_layers),
        ("in_dim", arch.in_dim),
        ("out_dim", arch.out_dim),
        ("text_dim", arch.text_dim),
        ("freq_dim", arch.freq_dim),
    ] {
        assert_eq!(number(key), Some(seen), "{base}: {key}");
    }
    assert_eq!(number("clip_dim"), arch.clip.map(|c| c.dim), "{base}: clip_dim");
    arch.agrees_with(&shapes).unwrap();
    (arch, tensors)
}

pub fn model(arch: &WanArch, tensors: &BTreeMap<String, Tensor>, numerics: Numerics) -> (WanModel, ResidentWeights) {
    let (rest, blocks) = WanWeights::from_tensors(arch, tensors).unwrap();
    (WanModel::new(arch.clone(), rest, numerics).unwrap(), blocks)
}

/// The inputs of a case whose tensors carry `prefix` (`case0.`, or nothing).
pub fn inputs(io: &HashMap<String, Tensor>, prefix: &str, x: &Tensor, t: &Tensor) -> WanInputs {
    let context = (0..x.dim(0).unwrap()).map(|b| io[&format!("{prefix}context.{b}")].clone()).collect();
    let optional = |name: &str| io.get(&format!("{prefix}{name}")).cloned();
    WanInputs {
        x: x.clone(),
        t: Timesteps::from_tensor(t).unwrap(),
        context,
        y: optional("y"),
        clip_fea: optional("clip_fea"),
        f_indices: None,
    }
}

/// Adapters from a file in kohya's spelling (`{prefix}lora_unet_blocks_0_self_attn_q.lora_down.weight`), by site.
/// `scale` is looked up by kohya name.
pub fn adapters(
    file: &HashMap<String, Tensor>,
    prefix: &str,
    scale: impl Fn(&str) -> f64,
) -> BTreeMap<String, Adapter> {
    let mut by_module: BTreeMap<&str, HashMap<&str, &Tensor>> = BTreeMap::new();
    for (key, tensor) in file {
        let Some(key) = key.strip_prefix(prefix) else { continue };
        let Some((module, param)) = key.split_once('.') else { continue };
        by_module.entry(module).or_default().insert(param, tensor);
    }
    by_module
        .into_iter()
        .map(|(module, params)| {
            let mut get = |name: &'static str| params.get(name).map(|&t| t.clone());
            let site = keys::site_from_kohya(module).unwrap_or_else(|| panic!("no site {module}"));
            (site, Adapter::from_params(&mut get, scale(module)).unwrap())
        })
        .collect()
}

pub fn max_abs(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let diff = (a.to_dtype(DType::F32).unwrap() - b.to_dtype(DType::F32).unwrap()).unwrap();
    f64::from(diff.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap())
}

pub fn max_of(a: &Tensor) -> f64 {
    f64::from(a.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap())
}

/// ‖a − want‖ / ‖want‖.
pub fn rel_l2(a: &Tensor, want: &Tensor) -> f64 {
    let norm = |t: &Tensor| f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
    norm(&(a - want).unwrap()) / norm(want)
}
