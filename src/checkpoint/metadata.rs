//! What a LoRA file says about itself: the `ss_*` keys that managers of LoRAs read, `modelspec.*`, and the hashes by
//! which files are recognised. Equal runs give equal bytes: dates and the session number come from the caller.

use super::state::hex;
use crate::config::RunConfig;
use crate::fsio::{tensors, TensorOut};
use anyhow::Result;
use chrono::{DateTime, Local};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

/// Facts of a run that its configuration does not hold.
#[derive(Debug, Clone, Default)]
pub struct RunFacts {
    /// Family of the base model, `2.1` or `2.2`.
    pub model_version: String,
    /// Any number that tells sessions apart.
    pub session_id: u64,
    /// Seconds since 1970.
    pub started_at: f64,
    pub num_train_items: u64,
    pub num_batches_per_epoch: u64,
    pub num_epochs: u64,
    pub max_train_steps: u64,
    /// The seed in use, drawn or given.
    pub seed: u64,
    /// `adamw8bit(weight_decay=0.01)` and the like.
    pub optimizer: String,
    /// `high_noise` or `low_noise` where one expert of two was trained, `both` where one adapter was over both.
    pub expert: Option<String>,
    /// One JSON object a dataset: resolution, repeats, directories (base names), frame extraction.
    pub datasets: Vec<Value>,
}

/// Where the run stood when the file was written.
#[derive(Debug, Clone, Default)]
pub struct Moment {
    pub steps: u64,
    /// Epochs finished, or the one under way (from 0) in files named by step.
    pub epoch: u64,
    /// Seconds since 1970.
    pub at: f64,
}

/// The keys that `--no_metadata` leaves, besides `modelspec.*` and the hashes.
const ESSENTIAL: [&str; 5] =
    ["ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"];

/// Everything but the hashes, which [`add_hashes`] adds when the tensors are known.
pub fn build(cfg: &RunConfig, run: &RunFacts, now: &Moment) -> BTreeMap<String, String> {
    let mut m = BTreeMap::new();
    let mut put = |key: &str, value: String| drop(m.insert(format!("ss_{key}"), value));
    let compat = cfg.musubi_compat;
    put("session_id", run.session_id.to_string());
    put("training_started_at", float(run.started_at));
    put("training_finished_at", float(now.at));
    put("output_name", text(&cfg.output_name));
    put("learning_rate", float(cfg.learning_rate));
    put("num_train_items", run.num_train_items.to_string());
    put("num_batches_per_epoch", run.num_batches_per_epoch.to_string());
    put("num_epochs", run.num_epochs.to_string());
    put("gradient_checkpointing", boolean(cfg.gradient_checkpointing));
    put("gradient_checkpointing_cpu_offload", boolean(cfg.gradient_checkpointing_cpu_offload));
    put("gradient_accumulation_steps", cfg.gradient_accumulation_steps.to_string());
    put("max_train_steps", run.max_train_steps.to_string());
    put("lr_warmup_steps", cfg.lr_warmup_steps.clone());
    put("lr_scheduler", cfg.lr_scheduler.clone());
    put("base_model_version", if compat { "wan".into() } else { base_model(cfg, run) });
    put("network_module", cfg.network_module.clone());
    put("network_dim", cfg.network_dim.to_string());
    put("network_alpha", float(cfg.network_alpha));
    put("network_dropout", number(&cfg.network_dropout));
    put("mixed_precision", cfg.mixed_precision.clone());
    put("seed", run.seed.to_string());
    put("training_comment", text(&cfg.training_comment));
    put("optimizer", run.optimizer.clone());
    put("max_grad_norm", float(cfg.max_grad_norm));
    put("fp8_base", boolean(cfg.fp8_base));
    put("full_fp16", boolean(false));
    put("full_bf16", boolean(false));
    put("weighting_scheme", cfg.weighting_scheme.clone());
    put("logit_mean", float(cfg.logit_mean));
    put("logit_std", float(cfg.logit_std));
    put("mode_scale", float(cfg.mode_scale));
    put("guidance_scale", float(1.0));
    put("timestep_sampling", cfg.timestep_sampling.clone());
    put("sigmoid_scale", float(cfg.sigmoid_scale));
    put("discrete_flow_shift", float(cfg.discrete_flow_shift));
    put("datasets", Value::Array(run.datasets.clone()).to_string());
    if !cfg.network_args.is_empty() {
        put("network_args", network_args(&cfg.network_args));
    }
    put("sd_model_name", base_name(cfg.dit.as_deref()));
    if cfg.vae.is_some() {
        put("vae_name", base_name(cfg.vae.as_deref()));
    }
    put("steps", now.steps.to_string());
    put("epoch", now.epoch.to_string());
    if !compat {
        // What the old tool left unsaid, and people need to use the file.
        put("task", cfg.task.clone());
        put("fp8_scaled", boolean(cfg.fp8_scaled));
        put("num_train_images", run.num_train_items.to_string());
        if let Some(Value::Array(size)) = run.datasets.first().and_then(|d| d.get("resolution")) {
            let sides: Vec<String> = size.iter().map(Value::to_string).collect();
            put("resolution", format!("({})", sides.join(", ")));
        }
        put("min_timestep", integer(&cfg.min_timestep));
        put("max_timestep", integer(&cfg.max_timestep));
        if let Some(expert) = &run.expert {
            put("expert", expert.clone());
        }
        if cfg.is_shared() {
            put("sd_model_name_high_noise", base_name(cfg.dit_high_noise.as_deref()));
            put("timestep_boundary", number(&cfg.boundary()));
        }
        put("program", format!("wan-train {}", env!("CARGO_PKG_VERSION")));
    }
    if cfg.no_metadata {
        m.retain(|k, _| ESSENTIAL.contains(&k.as_str()));
    }
    m.extend(modelspec(cfg, run, now));
    m
}

fn modelspec(cfg: &RunConfig, run: &RunFacts, now: &Moment) -> BTreeMap<String, String> {
    let version = if cfg.musubi_compat { "2.1" } else { run.model_version.as_str() };
    let date = local(now.at);
    let mut m = BTreeMap::new();
    let mut put = |key: &str, value: String| drop(m.insert(format!("modelspec.{key}"), value));
    put("sai_model_spec", "1.0.0".into());
    put("architecture", format!("{}/lora", cfg.metadata_arch.clone().unwrap_or_else(|| format!("wan{version}"))));
    put("implementation", format!("https://github.com/Wan-Video/Wan{version}"));
    let title = cfg.metadata_title.clone().or_else(|| cfg.output_name.clone());
    put("title", title.unwrap_or_else(|| format!("LoRA@{}", float(now.at))));
    put("date", date.format("%Y-%m-%dT%H:%M:%S").to_string());
    put("resolution", resolution(cfg.metadata_reso.as_deref()));
    let optional = [
        ("author", &cfg.metadata_author),
        ("description", &cfg.metadata_description),
        ("license", &cfg.metadata_license),
        ("tags", &cfg.metadata_tags),
    ];
    for (key, value) in optional {
        if let Some(value) = value {
            put(key, value.clone());
        }
    }
    if cfg.min_timestep.is_some() || cfg.max_timestep.is_some() {
        put("timestep_range", format!("{},{}", cfg.min_timestep.unwrap_or(0), cfg.max_timestep.unwrap_or(1000)));
    }
    m
}

/// The name under which model sites and LoRA managers list the base.
fn base_model(cfg: &RunConfig, run: &RunFacts) -> String {
    let dit = base_name(cfg.dit.as_deref()).to_lowercase();
    let size = ["480p", "720p"].into_iter().find(|s| dit.contains(s)).map(|s| format!(" {s}")).unwrap_or_default();
    match cfg.task.as_str() {
        "t2v-A14B" => "Wan Video 2.2 T2V-A14B".into(),
        "i2v-A14B" => "Wan Video 2.2 I2V-A14B".into(),
        "ti2v-5B" => "Wan Video 2.2 TI2V-5B".into(),
        "t2v-1.3B" => "Wan Video 1.3B t2v".into(),
        "t2v-14B" | "t2i-14B" => "Wan Video 14B t2v".into(),
        "i2v-14B" => format!("Wan Video 14B i2v{size}"),
        other => format!("Wan Video {} {other}", run.model_version),
    }
}

/// sha256 over the tensors as they lie in the file, and the short hash that older tools show (64 KiB at 1 MiB of a file
/// that holds only the `ss_*` metadata). `tensors` come back sorted as they are written.
pub fn add_hashes(metadata: &mut BTreeMap<String, String>, outs: &mut [TensorOut<'_>]) -> Result<()> {
    let ss: BTreeMap<String, String> =
        metadata.iter().filter(|(k, _)| k.starts_with("ss_")).map(|(k, v)| (k.clone(), v.clone())).collect();
    let header = tensors::header(outs, &ss)?;
    let mut model = Sha256::new();
    let mut legacy = Sha256::new();
    let (from, to) = (0x10_0000, 0x11_0000);
    let mut at = 0;
    let mut window = |part: &[u8]| {
        let (a, b) = (from.max(at).min(at + part.len()) - at, to.max(at).min(at + part.len()) - at);
        legacy.update(&part[a..b]);
        at += part.len();
    };
    window(&header);
    for t in outs.iter() {
        model.update(&t.data);
        window(&t.data);
    }
    metadata.insert("sshs_model_hash".into(), hex(&model.finalize()));
    metadata.insert("sshs_legacy_hash".into(), hex(&legacy.finalize())[..8].to_owned());
    Ok(())
}

// Values are written as the old tool wrote them: readers of these files parse Python's spelling.

fn boolean(b: bool) -> String {
    if b { "True" } else { "False" }.into()
}

fn text(t: &Option<String>) -> String {
    t.clone().unwrap_or_else(|| "None".into())
}

fn integer(n: &Option<u64>) -> String {
    n.map_or_else(|| "None".into(), |n| n.to_string())
}

fn number(n: &Option<f64>) -> String {
    n.map_or_else(|| "None".into(), float)
}

/// Python's `repr` of a float: shortest digits that read back, an exponent of two digits below 1e-4 and from 1e16.
fn float(x: f64) -> String {
    let size = x.abs();
    if x != 0.0 && !(1e-4..1e16).contains(&size) {
        let s = format!("{x:e}");
        let (mantissa, exponent) = s.split_once('e').unwrap_or((&s, "0"));
        let (sign, digits) = exponent.strip_prefix('-').map_or(("+", exponent), |d| ("-", d));
        return format!("{mantissa}e{sign}{digits:0>2}");
    }
    let s = x.to_string();
    match s.contains('.') || !x.is_finite() {
        true => s,
        false => s + ".0",
    }
}

/// `k=v` pairs as one JSON object, values as text.
fn network_args(args: &[String]) -> String {
    let pairs = args.iter().filter_map(|a| a.split_once('='));
    let map: serde_json::Map<String, Value> =
        pairs.map(|(k, v)| (k.trim().to_owned(), Value::String(v.trim().to_owned()))).collect();
    Value::Object(map).to_string()
}

fn base_name(path: Option<&Path>) -> String {
    path.and_then(|p| p.file_name()).map_or_else(|| "None".into(), |n| n.to_string_lossy().into_owned())
}

/// `1280,720`, `1280x720` -> `1280x720`; one number is a square.
fn resolution(given: Option<&str>) -> String {
    let Some(given) = given else { return "1280x720".into() };
    let parts: Vec<&str> = given.split([',', 'x', 'X']).map(str::trim).collect();
    match parts.as_slice() {
        [one] => format!("{one}x{one}"),
        [w, h] => format!("{w}x{h}"),
        _ => given.to_owned(),
    }
}

fn local(seconds: f64) -> DateTime<Local> {
    DateTime::from_timestamp(seconds as i64, 0).unwrap_or_default().with_timezone(&Local)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spelled_as_python_spells_them() {
        for (x, want) in [
            (1e-4, "0.0001"),
            (8e-5, "8e-05"),
            (2e-6, "2e-06"),
            (1.25e-5, "1.25e-05"),
            (1.0, "1.0"),
            (0.0, "0.0"),
            (42.0, "42.0"),
            (0.875, "0.875"),
            (1e16, "1e+16"),
            (1754000000.25, "1754000000.25"),
        ] {
            assert_eq!(float(x), want);
        }
    }

    fn facts() -> RunFacts {
        RunFacts { model_version: "2.2".into(), expert: Some("high_noise".into()), seed: 42, ..Default::default() }
    }

    #[test]
    fn a_file_for_wan_2_2_says_so_and_compatibility_mode_does_not() {
        let mut cfg = RunConfig {
            task: "i2v-A14B".into(),
            output_name: Some("cat".into()),
            min_timestep: Some(900),
            network_args: vec!["loraplus_lr_ratio=4".into()],
            dit: Some("/models/wan2.2_i2v_high_noise_14B_fp16.safetensors".into()),
            ..Default::default()
        };
        let m = build(&cfg, &facts(), &Moment { steps: 12, epoch: 3, at: 0.0 });
        let is = |k: &str, v: &str| assert_eq!(m.get(k).map(String::as_str), Some(v), "{k}");
        is("modelspec.architecture", "wan2.2/lora");
        is("modelspec.implementation", "https://github.com/Wan-Video/Wan2.2");
        is("modelspec.title", "cat");
        is("modelspec.resolution", "1280x720");
        is("modelspec.timestep_range", "900,1000");
        is("ss_base_model_version", "Wan Video 2.2 I2V-A14B");
        is("ss_expert", "high_noise");
        is("ss_task", "i2v-A14B");
        is("ss_steps", "12");
        is("ss_epoch", "3");
        is("ss_network_args", r#"{"loraplus_lr_ratio":"4"}"#);
        is("ss_sd_model_name", "wan2.2_i2v_high_noise_14B_fp16.safetensors");
        is("ss_network_dropout", "None");

        cfg.no_metadata = true;
        let short = build(&cfg, &facts(), &Moment::default());
        let ss: Vec<&String> = short.keys().filter(|k| k.starts_with("ss_")).collect();
        assert_eq!(ss.len(), 5, "{ss:?}");

        cfg.musubi_compat = true;
        cfg.no_metadata = false;
        let old = build(&cfg, &facts(), &Moment::default());
        assert_eq!(old["modelspec.architecture"], "wan2.1/lora");
        assert_eq!(old["ss_base_model_version"], "wan");
        assert!(!old.contains_key("ss_task"));
    }

    #[test]
    fn the_short_hash_looks_at_one_window_of_the_file() {
        let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let split = 700_000;
        let out = |name: &str, d: &[u8]| TensorOut {
            name: name.into(),
            dtype: safetensors::Dtype::U8,
            shape: vec![d.len()],
            data: d.to_vec().into(),
        };
        let mut outs = [out("b", &data[split..]), out("a", &data[..split])];
        let mut m = BTreeMap::from([("ss_x".to_string(), "1".to_string()), ("modelspec.y".into(), "2".into())]);
        add_hashes(&mut m, &mut outs).unwrap();
        let ss = BTreeMap::from([("ss_x".to_string(), "1".to_string())]);
        let mut file = tensors::header(&mut outs, &ss).unwrap();
        file.extend(&data);
        assert_eq!(m["sshs_model_hash"], hex(&Sha256::digest(&data)));
        assert_eq!(m["sshs_legacy_hash"], hex(&Sha256::digest(&file[0x10_0000..0x11_0000]))[..8]);
    }
}
