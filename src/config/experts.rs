//! What the two experts of Wan 2.2 add to the resolving of options.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::layers::{Layer, Resolved};
use super::registry;
use crate::error::UserError;

/// Which DiT is trained where two can be named: `--dit_high_noise` is the high expert's, `--dit` the other one's (of
/// a pair: only the low expert's).
pub fn choose_dit(
    values: &mut Map<String, Value>,
    origin: &mut BTreeMap<&'static str, Layer>,
    level: Option<&str>,
    pair: bool,
    template_dit: Option<(Value, Layer)>,
) -> Result<(), UserError> {
    let high_dit = values.remove("dit_high_noise").zip(origin.remove("dit_high_noise"));
    let Some(level) = level else {
        return match high_dit {
            None => Ok(()),
            Some(_) => Err(UserError::usage("one LoRA over both experts (--dit_high_noise alone) is not offered")
                .hint("add --noise_level both: it trains one LoRA for each expert, as ComfyUI loads them")),
        };
    };
    values.insert("noise_level".into(), level.into());
    if level == "high" {
        let own = if pair { high_dit.or(template_dit) } else { high_dit };
        match own {
            Some((dit, layer)) => {
                values.insert("dit".into(), dit);
                origin.insert("dit", layer);
            }
            None if pair => {
                return Err(UserError::usage("--noise_level both needs the DiT of either expert").hint(
                    "give the high one with --dit_high_noise, the low one with --dit, or use a Wan 2.2 template",
                ))
            }
            None => {}
        }
    }
    Ok(())
}

/// What templates say of an expert of a pair, worked out where there is none: its own name, and its own timesteps.
pub fn derive_pair(r: &mut Resolved) -> Result<(), UserError> {
    let c = &mut r.config;
    let level = c.noise_level.clone().unwrap_or_default();
    // Two merged models do not fit one file.
    c.save_merged = c.save_merged.as_ref().map(|path| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        path.with_file_name(format!("{stem}-{level}.safetensors"))
    });
    if c.template.is_some() {
        return Ok(());
    }
    let Some(boundary) = c.timestep_boundary.or_else(|| registry::expert_boundary(&c.task)) else {
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
