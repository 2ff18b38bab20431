//! A run to and from its saved state, and what a resumed run may change.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{json, Value};
use sha2::{Digest, Sha256};

use super::batch::Items;
use super::history::History;
use super::trainer::Trainer;
use crate::checkpoint::state::{config_hash, hex};
use crate::checkpoint::{Master, TrainState};
use crate::error::UserError;
use crate::optim::Buffers;

const HISTORY: &str = "loss_history";
const OPTIMIZER: &str = "optimizer.";

impl Trainer<'_> {
    /// Everything the rest of the run depends on, as it is now (at an optimizer step).
    pub fn snapshot(&self) -> Result<TrainState> {
        let mut adapters = std::collections::BTreeMap::new();
        let masters = self.params.master().to_vec()?;
        let layout = self.params.layout();
        for p in &layout.params {
            let data = masters[p.range.clone()].to_vec();
            adapters.insert(layout.full_name(p), Master { shape: p.shape.to_vec(), data });
        }
        let moments = self.optimizer.export(layout)?;
        let prefixed = |name: String| format!("{OPTIMIZER}{name}");
        let mut buffers_f32: std::collections::BTreeMap<_, _> =
            moments.f32.into_iter().map(|(k, v)| (prefixed(k), v)).collect();
        buffers_f32.insert(HISTORY.into(), self.history.slots().to_vec());
        let (scale_bits, scale_good) = self.scale.export();
        Ok(TrainState {
            position: self.position.clone(),
            identity: self.identity.clone(),
            adapters,
            buffers_f32,
            buffers_u8: moments.u8.into_iter().map(|(k, v)| (prefixed(k), v)).collect(),
            meta: json!({
                "seed": self.settings.seed,
                "applied_steps": self.optimizer.applied(),
                "loss_scale_bits": scale_bits,
                "loss_scale_good": scale_good,
                "bad_steps_in_row": self.bad_steps.0,
                "bad_steps": self.bad_steps.1,
            }),
            config: self.config.clone(),
            config_hash: config_hash(&self.config),
        })
    }

    /// Continues from a state. `dir` is named in errors. Returns what the user should know about settings that differ.
    pub fn restore(&mut self, state: &TrainState, dir: &Path) -> Result<Vec<String>> {
        state.check_identity(dir, &self.identity)?;
        let notes = compare_configs(dir, &state.config, &self.config)?;
        let meta = |key: &str| {
            state.meta.get(key).and_then(Value::as_u64).with_context(|| format!("{}: {key} is missing", dir.display()))
        };
        if meta("seed")? != self.settings.seed {
            return Err(UserError::new(format!(
                "{} cannot be resumed with seed {}: it was started with {}",
                dir.display(),
                self.settings.seed,
                meta("seed")?
            ))
            .hint("leave --seed out, or give the old one")
            .into());
        }
        let (saved, own) = (state.adapters.len(), self.params.layout().params.len());
        if saved != own {
            let what = format!("{} holds another network: {saved} tensors, this run trains {own}", dir.display());
            return Err(UserError::new(what).hint("give the saved --network_args, or start with --resume_from").into());
        }
        self.params
            .restore(|name| state.adapters.get(name).map(|m| (m.shape.as_slice(), m.data.as_slice())))
            .with_context(|| format!("{} holds another network", dir.display()))?;
        let own = |name: &String| name.strip_prefix(OPTIMIZER).map(str::to_owned);
        let buffers = Buffers {
            f32: state.buffers_f32.iter().filter_map(|(k, v)| Some((own(k)?, v.clone()))).collect(),
            u8: state.buffers_u8.iter().filter_map(|(k, v)| Some((own(k)?, v.clone()))).collect(),
        };
        self.optimizer
            .import(self.params.layout(), &buffers, meta("applied_steps")?)
            .with_context(|| format!("{} holds another optimizer", dir.display()))?;
        self.scale.import(meta("loss_scale_bits")?, meta("loss_scale_good")? as u32);
        self.bad_steps = (meta("bad_steps_in_row")? as u32, meta("bad_steps")?);
        self.history = History::from_slots(state.buffers_f32.get(HISTORY).cloned().unwrap_or_default());
        self.position = state.position.clone();
        Ok(notes)
    }
}

/// The seed that a state was started with: a resumed run without `--seed` takes it.
pub fn saved_seed(state: &TrainState) -> Option<u64> {
    state.meta.get("seed").and_then(Value::as_u64)
}

/// Tells whether two runs see the same items in the same buckets.
pub fn dataset_hash(items: &dyn Items) -> String {
    let mut hash = Sha256::new();
    for bucket in items.buckets() {
        let (key, size) = (bucket.key, bucket.batch_size);
        hash.update(format!("{} {}x{}x{} {size}\n", bucket.dataset, key.width, key.height, key.frames));
        for entry in &bucket.entries {
            hash.update(items.name(*entry));
            hash.update("\n");
        }
    }
    hex(&hash.finalize())[..16].to_owned()
}

/// Options that a resumed run may not change: what was trained so far, or the data position, would no longer fit.
const FIXED: &[&str] = &[
    "task",
    "musubi_compat",
    "seed",
    "gradient_accumulation_steps",
    "network_module",
    "network_dim",
    "network_alpha",
    "network_args",
    "optimizer_type",
    "noise_level",
    "one_frame",
];

/// Options that change the numbers from here on: allowed, and said.
const NOTED: &[&str] = &[
    "max_train_steps",
    "max_train_epochs",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_decay_steps",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "lr_scheduler_timescale",
    "lr_scheduler_min_lr_ratio",
    "lr_scheduler_type",
    "lr_scheduler_args",
    "optimizer_args",
    "max_grad_norm",
    "timestep_sampling",
    "discrete_flow_shift",
    "sigmoid_scale",
    "weighting_scheme",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "min_timestep",
    "max_timestep",
    "preserve_distribution_shape",
    "num_timestep_buckets",
    "timestep_boundary",
    "network_dropout",
    "scale_weight_norms",
    "mixed_precision",
    "fp8_base",
    "fp8_scaled",
    "fp8_fast",
    "int8_fast",
    "fast_attention",
    "base_weights",
    "base_weights_high_noise",
    "base_weights_multiplier",
    "skip_lightning",
    "device",
    "dit",
    "dit_high_noise",
];

/// Compares the configuration of a state with this run's. Options in neither list (paths, logging, saving, memory) do
/// not touch the numbers. Errors list every fixed option that differs; the notes, every one that changes what follows.
pub fn compare_configs(dir: &Path, saved: &Value, now: &Value) -> Result<Vec<String>, UserError> {
    let differs = |keys: &[&str]| -> Vec<String> {
        keys.iter()
            .filter_map(|key| match (saved.get(key), now.get(key)) {
                (Some(a), Some(b)) if !same(a, b) => Some(format!("{key} was {a}, is {b}")),
                _ => None,
            })
            .collect()
    };
    // A seed that was drawn is checked by its value, not by the absence of the option.
    let fixed: Vec<String> = differs(FIXED).into_iter().filter(|d| !d.starts_with("seed")).collect();
    if !fixed.is_empty() {
        return Err(UserError::new(format!(
            "{} cannot be resumed with these settings: {}",
            dir.display(),
            fixed.join("; ")
        ))
        .hint("give the saved settings, or start from the weights alone with --resume_from"));
    }
    let noted = differs(NOTED);
    Ok(noted.into_iter().map(|d| format!("resumed with another setting: {d}")).collect())
}

/// Equality of option values; floats within the rounding of JSON text.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-12 * a.abs().max(b.abs()),
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_may_change_some_settings_and_not_others() {
        let dir = Path::new("run-state");
        let saved = json!({"network_dim": 8, "learning_rate": 1e-4, "output_dir": "a", "seed": null});
        let with = |key: &str, value: Value| {
            let mut now = saved.clone();
            now[key] = value;
            compare_configs(dir, &saved, &now)
        };
        assert_eq!(with("output_dir", json!("b")).unwrap(), Vec::<String>::new());
        assert_eq!(with("seed", json!(42)).unwrap(), Vec::<String>::new());
        let notes = with("learning_rate", json!(5e-5)).unwrap();
        assert!(notes.len() == 1 && notes[0].contains("learning_rate"), "{notes:?}");
        let error = with("network_dim", json!(16)).unwrap_err().to_string();
        assert!(error.contains("network_dim was 8, is 16") && error.contains("run-state"), "{error}");
    }
}
