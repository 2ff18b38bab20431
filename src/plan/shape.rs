//! What the arithmetic needs to know of a run, from its configuration and its data.

use wan_models::adapter::AdapterSpec;
use wan_models::arch::{Site, WanArch};
use wan_models::linear::Products;

use super::memory::{Job, Moments, Target, WeightForm};
use crate::config::RunConfig;

impl Job {
    /// The job of a run: `checkpoint_bytes` an element of the DiT's file, `sites` the linears that get an adapter, and
    /// the largest bucket.
    pub fn from_config(c: &RunConfig, arch: &WanArch, run: &RunShape) -> Self {
        let (scaled, products) = (c.fp8_scaled || c.fp8_fast, c.products());
        let cast = products != Products::Int8 && c.fp8_base && c.musubi_compat && !scaled;
        let weights = match (products, c.fp8_base || scaled) {
            (Products::Int8, _) => WeightForm::Int8 { otherwise: run.checkpoint_bytes },
            (Products::Fp8, true) => WeightForm::Fp8Rows { scale_bytes: run.checkpoint_bytes },
            _ if cast => WeightForm::Fp8Cast,
            (_, true) => WeightForm::Fp8Scaled { scale_bytes: run.checkpoint_bytes },
            (_, false) => WeightForm::Dense(run.checkpoint_bytes),
        };
        let compute_bytes = if c.mixed_precision == "no" { 4 } else { 2 };
        Self {
            arch: arch.clone(),
            models: if c.is_shared() { 2 } else { 1 },
            target: run.target,
            weights,
            products,
            fast_attention: c.fast_attention,
            rest_bytes: if cast { 1 } else { run.checkpoint_bytes },
            compute_bytes,
            stream_bytes: if c.musubi_compat { compute_bytes } else { 4 },
            latent: run.latent,
            batch: run.batch,
            adapter: run.adapter,
            sites: run.sites.clone(),
            moments: moments(c),
        }
    }
}

/// What of a run is not in its configuration.
#[derive(Debug, Clone)]
pub struct RunShape {
    pub target: Target,
    pub checkpoint_bytes: u64,
    /// Latent frames, rows, columns of the largest bucket, and its batch size.
    pub latent: [u64; 3],
    pub batch: u64,
    pub adapter: AdapterSpec,
    pub sites: Vec<Site>,
}

/// By the name as it is written; what does not parse was refused before a plan is made.
fn moments(c: &RunConfig) -> Moments {
    let name = c.optimizer_type.rsplit('.').next().unwrap_or_default().to_lowercase();
    let first = || c.optimizer_args.iter().any(|a| a.trim_start().starts_with("beta1=") && !a.ends_with("None"));
    match name.as_str() {
        "adamw8bit" => Moments::Blocks8bit,
        "adafactor" => Moments::Factored { first: first() },
        _ => Moments::F32,
    }
}
