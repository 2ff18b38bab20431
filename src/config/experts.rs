//! What the two experts of Wan 2.2 add to the resolving of options.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::layers::{lay_over, Layer, Resolved};
use super::options::RunConfig;
use super::registry;
use crate::error::UserError;

/// `--noise_level shared`: one LoRA over both experts.
pub const SHARED: &str = "shared";

impl RunConfig {
    /// Whether one LoRA is trained over both experts.
    pub fn is_shared(&self) -> bool {
        self.noise_level.as_deref() == Some(SHARED)
    }

    /// Where the high-noise expert takes over (0..1): as given, else the task's.
    pub fn boundary(&self) -> Option<f64> {
        self.timestep_boundary.or_else(|| registry::expert_boundary(&self.task))
    }

    /// How a LoRA's metadata call the expert that it belongs to.
    pub fn expert_tag(&self) -> Option<String> {
        match self.noise_level.as_deref()? {
            SHARED => Some("both".into()),
            level => Some(format!("{level}_noise")),
        }
    }
}

/// Which DiT is trained where two can be named: `--dit_high_noise` is the high expert's, `--dit` the other one's (of
/// a pair: only the low expert's). So too the LoRAs merged into them. One LoRA over both keeps all of them.
pub fn choose_dit(
    values: &mut Map<String, Value>,
    origin: &mut BTreeMap<&'static str, Layer>,
    level: Option<&str>,
    pair: bool,
    template_dit: Option<(Value, Layer)>,
) -> Result<(), UserError> {
    let has_high = values.contains_key("dit_high_noise");
    if level == Some(SHARED) || (level.is_none() && has_high) {
        values.insert("noise_level".into(), SHARED.into());
        origin.entry("noise_level").or_insert(Layer::Derived);
        return Ok(());
    }
    let mut take = |name: &str| values.remove(name).zip(origin.remove(name));
    let (high_dit, high_merges) = (take("dit_high_noise"), take("base_weights_high_noise"));
    let Some(level) = level else {
        return match high_merges {
            None => Ok(()),
            Some(_) => Err(UserError::usage("--base_weights_high_noise is given, but no second expert is trained")
                .hint("it goes with --dit_high_noise; a single model takes --base_weights")),
        };
    };
    values.insert("noise_level".into(), level.into());
    if level == "high" {
        let own = if pair { high_dit.or(template_dit) } else { high_dit };
        if pair && own.is_none() {
            return Err(needs_either("both"));
        }
        for (name, own) in [("dit", own), ("base_weights", high_merges)] {
            if let Some((value, layer)) = own {
                values.insert(name.into(), value);
                origin.insert(name, layer);
            }
        }
    }
    Ok(())
}

fn needs_either(level: &str) -> UserError {
    UserError::usage(format!("--noise_level {level} needs the DiT of either expert"))
        .hint("give the high one with --dit_high_noise, the low one with --dit, or use a Wan 2.2 template")
}

/// What a template with parts for its experts says of one LoRA over both: what it says of the low expert's, which is the
/// larger one, but over all timesteps; of the high expert the weights; and whatever stands under `[shared]`.
pub fn lay_shared(mut parts: BTreeMap<&'static str, Map<String, Value>>, into: &mut Map<String, Value>) {
    let mut part = |level| parts.remove(level).unwrap_or_default();
    let (mut low, mut high, shared) = (part("low"), part("high"), part(SHARED));
    low.remove("min_timestep");
    low.remove("max_timestep");
    if low.contains_key("base_weights") {
        // The low expert's own LoRAs are not the high one's.
        into.insert("base_weights_high_noise".into(), Value::Array(Vec::new()));
    }
    lay_over(into, low);
    for (own, name) in [("dit", "dit_high_noise"), ("base_weights", "base_weights_high_noise")] {
        into.extend(high.remove(own).map(|value| (name.to_owned(), value)));
    }
    lay_over(into, shared);
}

/// Holds one LoRA over both experts against the task and the files.
pub fn derive_shared(r: &mut Resolved) -> Result<(), UserError> {
    let c = &mut r.config;
    if !c.is_shared() {
        return Ok(());
    }
    if c.boundary().is_none() {
        return Err(UserError::usage(format!(
            "task {} has a single model: --dit_high_noise and --noise_level shared are for Wan 2.2",
            c.task
        ))
        .hint("leave them out, or choose the task of the two models"));
    }
    if c.dit_high_noise.is_none() {
        return Err(needs_either(SHARED));
    }
    // LoRAs of one's own take the place of the template's in both experts.
    let from_template = |name: &str| matches!(r.origin.get(name), Some(Layer::Template(_)));
    if from_template("base_weights_high_noise") && !from_template("base_weights") && !c.base_weights.is_empty() {
        c.base_weights_high_noise = None;
        r.origin.insert("base_weights_high_noise", Layer::Derived);
    }
    Ok(())
}

/// What templates say of an expert of a pair, worked out where there is none: its own name, and its own timesteps.
pub fn derive_pair(r: &mut Resolved) -> Result<(), UserError> {
    let c = &mut r.config;
    let level = c.noise_level.clone().unwrap_or_default();
    // Two merged models do not fit one file.
    c.save_merged = c.save_merged.as_deref().map(|path| merged_name(path, &level));
    if c.template.is_some() {
        return Ok(());
    }
    let Some(boundary) = c.boundary() else {
        return Err(UserError::usage(format!("task {} has a single model: --noise_level both is for Wan 2.2", c.task))
            .hint("leave --noise_level out"));
    };
    let boundary = (if boundary > 1.0 { boundary } else { boundary * 1000.0 }).round() as u64;
    let high = c.noise_level.as_deref() == Some("high");
    let (low_end, high_end) = if high { (boundary, 1000) } else { (0, boundary) };
    if c.min_timestep.is_none() && c.max_timestep.is_none() {
        (c.min_timestep, c.max_timestep) = (Some(low_end), Some(high_end));
        r.origin.extend([("min_timestep", Layer::Derived), ("max_timestep", Layer::Derived)]);
    }
    c.output_name = c.output_name.as_ref().map(|name| format!("{name}-{level}"));
    Ok(())
}

/// The file of one of two merged models.
pub fn merged_name(path: &Path, level: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}-{level}.safetensors"))
}
