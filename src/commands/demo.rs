//! The demo's models and dataset, made where the demo template looks for them: seeded random weights of a small
//! Wan-shaped DiT, VAE and umT5, and the pictures and the clip that are embedded in the program.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use wan_models::umt5::{self, Umt5Config};
use wan_models::vae::{random_vae, VaeArch};
use wan_models::wan::{cast_all, random_weights};

use super::job::Job;
use crate::config::{registry, Layer};
use crate::fsio::{self, TensorOut};

/// The task that this module serves.
pub const TASK: &str = "demo";
const SEED: u64 = 7;

/// Writes what is missing of the files that the template names; what is there already stays as it is, and what the user
/// names is the user's.
pub fn prepare(job: &Job) -> anyhow::Result<()> {
    let c = &job.config;
    let missing = |option: &str, path: &'_ Option<PathBuf>| -> Option<PathBuf> {
        let ours = matches!(job.resolved.origin.get(option), Some(Layer::Template(_)));
        path.clone().filter(|p| ours && !p.exists())
    };
    // Two experts, where a recipe has two, are two models.
    let high = SEED + u64::from(c.noise_level.as_deref() == Some("high"));
    for (option, path, seed) in [("dit", &c.dit, high), ("dit_high_noise", &c.dit_high_noise, SEED + 1)] {
        if let Some(path) = missing(option, path) {
            job.progress.say("making the demo's models: small, of random weights");
            write(&path, cast_all(&random_weights(&job.model.arch, seed)?, DType::BF16)?)?;
        }
    }
    if let Some(path) = missing("vae", &c.vae) {
        let small = VaeArch { base_dim: 8, dec_dim: 8, ..VaeArch::wan21() };
        write(&path, random_vae(&small, SEED)?)?;
    }
    if let Some(path) = missing("t5", &c.t5) {
        let width = job.model.arch.text_dim;
        // The vocabulary is the real one, so that the real tokenizer's ids fit.
        let small =
            Umt5Config { dim: width, dim_attn: width, dim_ffn: 2 * width, heads: 3, layers: 2, ..Umt5Config::xxl() };
        let tensors: HashMap<String, Tensor> = umt5::random::weights(&small, SEED, DType::BF16)?;
        write(&path, tensors.into_iter().collect())?;
    }
    match missing("dataset_config", &c.dataset_config).as_deref().and_then(Path::parent) {
        Some(dir) => unpack(dir),
        None => Ok(()),
    }
}

fn write(path: &Path, tensors: BTreeMap<String, Tensor>) -> anyhow::Result<()> {
    let out = tensors.iter().map(|(name, t)| TensorOut::of(name, t)).collect::<anyhow::Result<Vec<_>>>()?;
    if let Some(dir) = path.parent() {
        fsio::create_dir(dir)?;
    }
    fsio::write_safetensors(path, out, &BTreeMap::new())
}

/// The pictures, the clip, their captions; the dataset file comes last, so that it stands for all of them.
fn unpack(dir: &Path) -> anyhow::Result<()> {
    // Absolute, so that the dataset file means the same from any directory.
    let here = std::path::absolute(dir)?.to_string_lossy().replace('\\', "/");
    let (config, media): (Vec<_>, Vec<_>) =
        registry::files_under("demo").into_iter().partition(|(path, _)| path.ends_with(".toml"));
    let place = |path: &str| dir.join(path.strip_prefix("demo/").unwrap_or(path));
    for (path, bytes) in media {
        let to = place(&path);
        if let Some(parent) = to.parent() {
            fsio::create_dir(parent)?;
        }
        fsio::write_bytes(&to, bytes)?;
    }
    for (path, bytes) in config {
        let text = String::from_utf8_lossy(bytes).replace("{dir}", &here);
        fsio::write_bytes(&place(&path), text.as_bytes())?;
    }
    Ok(())
}
