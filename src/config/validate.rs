//! What no single type can express: ranges, and options that exclude each other.

use super::options::RunConfig;
use crate::error::UserError;

/// Whether files can be called so.
fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['/', '\\', '\0']) && name != "." && name != ".."
}

/// Errors: usage errors that name the option and its value.
pub fn validate(c: &RunConfig) -> Result<(), UserError> {
    let bad = |what: String| Err(UserError::usage(what));
    if c.fp8_fast && c.int8_fast {
        return Err(UserError::usage("--fp8_fast and --int8_fast are two ways of the same")
            .hint("choose --fp8_fast where fp8 weights are to stay as they are, --int8_fast for the smaller error"));
    }
    if c.learning_rate < 0.0 {
        return bad(format!("learning_rate is {}: it cannot be negative", c.learning_rate));
    }
    for (name, value) in [
        ("network_dim", c.network_dim),
        ("gradient_accumulation_steps", c.gradient_accumulation_steps),
        ("block_swap_ring_size", c.block_swap_ring_size),
        ("max_train_steps", c.max_train_steps),
        ("max_train_epochs", c.max_train_epochs.unwrap_or(1)),
        ("save_every_n_epochs", c.save_every_n_epochs.unwrap_or(1)),
        ("save_every_n_steps", c.save_every_n_steps.unwrap_or(1)),
        ("sample_every_n_epochs", c.sample_every_n_epochs.unwrap_or(1)),
        ("sample_every_n_steps", c.sample_every_n_steps.unwrap_or(1)),
    ] {
        if value == 0 {
            return bad(format!("{name} is 0: it must be at least 1"));
        }
    }
    if let Some(name) = c.output_name.as_deref().filter(|name| !is_file_name(name)) {
        return Err(UserError::usage(format!("output_name is `{name}`: it names files and must not be a path"))
            .hint("--output_dir says in which directory they are"));
    }
    let (low, high) = (c.min_timestep.unwrap_or(0), c.max_timestep.unwrap_or(1000));
    if low >= high || high > 1000 {
        return bad(format!("timesteps {low} to {high}: min_timestep must be below max_timestep, both within 0..1000"));
    }
    for (name, p) in
        [("network_dropout", c.network_dropout), ("lr_scheduler_min_lr_ratio", c.lr_scheduler_min_lr_ratio)]
    {
        if p.is_some_and(|p| !(0.0..=1.0).contains(&p)) {
            return bad(format!("{name} is {}: it must lie between 0 and 1", p.unwrap_or_default()));
        }
    }
    if let Some(b) = c.timestep_boundary.filter(|b| !(0.0..=1.0).contains(b)) {
        return bad(format!("timestep_boundary is {b}: it must lie within 0..1, or within 0..1000 as a timestep"));
    }
    if c.resume.is_some() && c.network_weights.is_some() {
        return Err(UserError::usage("--resume and --resume_from exclude each other")
            .hint("--resume continues a run exactly; --resume_from starts a new run from its weights"));
    }
    let merged = c.base_weights.len().max(c.base_weights_high_noise.as_ref().map_or(0, Vec::len));
    if c.base_weights_multiplier.len() > merged {
        return bad(format!(
            "{} values of base_weights_multiplier for {merged} base_weights files",
            c.base_weights_multiplier.len(),
        ));
    }
    if let Some(w) = c.base_weights_multiplier.iter().find(|w| w.parse::<f64>().map_or(true, |x| !x.is_finite())) {
        return bad(format!("base_weights_multiplier `{w}` is not a number"));
    }
    Ok(())
}
