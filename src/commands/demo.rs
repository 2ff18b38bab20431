//! The demo's models and dataset, made where the demo template looks for them: seeded random weights of a small
//! Wan-shaped DiT, VAE and umT5, and the pictures and the clip that are embedded in the program.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Tensor};
use wan_models::umt5::{self, Umt5Config};
use wan_models::vae::{random_vae, VaeArch};
use wan_models::wan::{cast_all, random_weights};

use super::job::Job;
use crate::config::registry;
use crate::fsio::{self, TensorOut};

/// The task that this module serves.
pub const TASK: &str = "demo";
const SEED: u64 = 7;

/// Writes what is missing; what is there already stays as it is.
pub fn prepare(job: &Job) -> anyhow::Result<()> {
    let c = &job.config;
    if let Some(path) = c.dit.as_deref().filter(|p| !p.exists()) {
        job.progress.say("making the demo's models: small, of random weights");
        write(path, cast_all(&random_weights(&job.model.arch, SEED)?, DType::BF16)?)?;
    }
    if let Some(path) = c.vae.as_deref().filter(|p| !p.exists()) {
        let small = VaeArch { base_dim: 8, dec_dim: 8, ..VaeArch::wan21() };
        write(path, random_vae(&small, SEED)?)?;
    }
    if let Some(path) = c.t5.as_deref().filter(|p| !p.exists()) {
        let width = job.model.arch.text_dim;
        // The vocabulary is the real one, so that the real tokenizer's ids fit.
        let small =
            Umt5Config { dim: width, dim_attn: width, dim_ffn: 2 * width, heads: 3, layers: 2, ..Umt5Config::xxl() };
        let tensors: HashMap<String, Tensor> = umt5::random::weights(&small, SEED, DType::BF16)?;
        write(path, tensors.into_iter().collect())?;
    }
    match c.dataset_config.as_deref().filter(|p| !p.exists()).and_then(Path::parent) {
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
