//! Everything the training loop goes by, checked: made once from the [`RunConfig`], and nothing below looks at an option
//! again.

use wan_models::adapter::Kind;
use wan_models::arch::{Conditioning, ModelConfig};

use super::expert::{idle_note, range_note};
use super::preview;
use super::timesteps::TimestepSpec;
use crate::adapter::network::NetworkOptions;
use crate::adapter::NetworkSpec;
use crate::config::RunConfig;
use crate::error::UserError;
use crate::optim::OptimizerSpec;
use crate::schedule::{Schedule, ScheduleSpec};

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// Optimizer steps.
    Steps(u64),
    Epochs(u64),
}

/// When checkpoints are written, beside the one at the end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SaveEvery {
    pub epochs: Option<u64>,
    pub steps: Option<u64>,
    /// With the full state.
    pub state: bool,
    /// The full state at the end.
    pub state_at_end: bool,
}

/// Where this run reproduces the old tool's numbers instead of the right ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compat {
    /// The model is told 1000 sigma + 1; `sigma` mode ignores shift and mirrors its limits; loss weights come from the
    /// table of a thousand noise levels.
    pub timesteps: bool,
    /// Noise is rounded to the dtype of the cached latents.
    pub noise: bool,
    /// `sigma` mode rounds the noise level to the compute dtype before mixing.
    pub sigma_rounding: bool,
    /// Fun Control without CLIP features: text rows take the place of the image's, where zeros would stand.
    pub missing_clip: bool,
    /// One-frame training: frames count from 0 whatever their positions.
    pub frame_positions: bool,
    /// Polynomial decay ends at 1e-7 whatever the ratio; `rex` starts odd.
    pub schedule: bool,
}

impl Compat {
    /// All of it (`--musubi_compat`).
    pub fn musubi() -> Self {
        Self {
            timesteps: true,
            noise: true,
            sigma_rounding: true,
            missing_clip: true,
            frame_positions: true,
            schedule: true,
        }
    }
}

/// The settings of a run.
#[derive(Debug, Clone)]
pub struct TrainSettings {
    pub seed: u64,
    pub length: Length,
    /// Micro-batches whose gradients make one optimizer step.
    pub accumulation: u64,
    /// Global L2 limit of the gradient; 0 is off.
    pub max_grad_norm: f64,
    pub timesteps: TimestepSpec,
    /// Where the high-noise expert takes over (0..1), if one adapter is trained over both.
    pub shared_boundary: Option<f64>,
    /// `total_steps` is filled in when the data are known.
    pub schedule: ScheduleSpec,
    pub optimizer: OptimizerSpec,
    pub network: NetworkSpec,
    pub scale_weight_norms: Option<f64>,
    pub conditioning: Conditioning,
    pub save: SaveEvery,
    pub previews: preview::Every,
    pub compat: Compat,
    /// Consecutive steps with a loss or gradient that is not finite, after which the run stops.
    pub max_bad_steps: u32,
    /// Sentences for the user to read once.
    pub notes: Vec<String>,
}

impl TrainSettings {
    /// Checks every option that training goes by. `seed` is the configured one, or the one drawn for this run.
    pub fn from_config(c: &RunConfig, model: &ModelConfig, seed: u64) -> Result<Self, UserError> {
        let compat = if c.musubi_compat { Compat::musubi() } else { Compat::default() };
        let mut notes = Vec::new();
        if c.sample_prompts.is_some() && previews(c)?.is_never() {
            notes.push(
                "--sample_prompts alone makes no previews: add --sample_every_n_steps N, --sample_every_n_epochs N or \
                 --sample_at_first"
                    .into(),
            );
        }
        let at_least_one = |name: &str, v: u64| match v {
            0 => Err(UserError::usage(format!("--{name} must be at least 1"))),
            v => Ok(v),
        };
        let every = |name: &str, v: Option<u64>| v.map(|v| at_least_one(name, v)).transpose();
        let timesteps = timesteps(c, model, compat, &mut notes)?;
        let network = NetworkSpec::parse(&NetworkOptions {
            module: &c.network_module,
            dim: c.network_dim,
            alpha: c.network_alpha,
            dropout: c.network_dropout,
            args: &c.network_args,
        })?;
        notes.extend(network.notes.iter().cloned());
        if let Some(limit) = c.scale_weight_norms {
            if network.adapter.kind != Kind::Lora {
                return Err(UserError::usage("--scale_weight_norms works with LoRA only"));
            }
            if !(limit.is_finite() && limit > 0.0) {
                return Err(UserError::usage(format!("--scale_weight_norms {limit} must be positive")));
            }
        }
        if !(c.max_grad_norm.is_finite() && c.max_grad_norm >= 0.0) {
            return Err(UserError::usage(format!("--max_grad_norm {} must be 0 (off) or positive", c.max_grad_norm)));
        }
        if let Some(epochs) = c.max_train_epochs.filter(|_| c.max_train_steps != RunConfig::default().max_train_steps) {
            notes.push(format!(
                "--max_train_epochs {epochs} says how long it trains, so --max_train_steps {} is not used",
                c.max_train_steps
            ));
        }
        let length = match c.max_train_epochs {
            Some(epochs) => Length::Epochs(at_least_one("max_train_epochs", epochs)?),
            None => Length::Steps(at_least_one("max_train_steps", c.max_train_steps)?),
        };
        let optimizer = OptimizerSpec::parse(&c.optimizer_type, &c.optimizer_args)?;
        if optimizer.own_rates() {
            if network.loraplus_lr_ratio.is_some() {
                return Err(UserError::usage("loraplus_lr_ratio has no effect on adafactor, which sets its own rates")
                    .hint("leave it out, or add relative_step=False to --optimizer_args"));
            }
            notes.push(format!(
                "adafactor sets its own rates: --learning_rate {:e} and --lr_scheduler {} are not used \
                 (--optimizer_args relative_step=False scale_parameter=False uses them)",
                c.learning_rate, c.lr_scheduler
            ));
        }
        let schedule = ScheduleSpec {
            class: c.lr_scheduler_type.clone().unwrap_or_default(),
            args: c.lr_scheduler_args.clone(),
            warmup: c.lr_warmup_steps.parse()?,
            decay: c.lr_decay_steps.parse()?,
            num_cycles: c.lr_scheduler_num_cycles as f64,
            power: c.lr_scheduler_power,
            timescale: c.lr_scheduler_timescale.map(|t| t as f64),
            min_lr_ratio: c.lr_scheduler_min_lr_ratio,
            compat: compat.schedule,
            ..ScheduleSpec::new(&c.lr_scheduler, c.learning_rate, 1)
        };
        // Built once with a stand-in length, so that a mistake is found before anything is loaded.
        let stand_in = Schedule::new(&ScheduleSpec { total_steps: c.max_train_steps.max(2), ..schedule.clone() })?;
        if !optimizer.own_rates() {
            notes.extend(stand_in.note().map(str::to_owned));
        }
        Ok(Self {
            seed,
            length,
            accumulation: at_least_one("gradient_accumulation_steps", c.gradient_accumulation_steps)?,
            max_grad_norm: c.max_grad_norm,
            timesteps,
            shared_boundary: boundary(c, model).filter(|_| c.is_shared()),
            schedule,
            optimizer,
            network,
            scale_weight_norms: c.scale_weight_norms,
            conditioning: model.conditioning,
            save: SaveEvery {
                epochs: every("save_every_n_epochs", c.save_every_n_epochs)?,
                steps: every("save_every_n_steps", c.save_every_n_steps)?,
                state: c.save_state,
                state_at_end: c.save_state || c.save_state_on_train_end,
            },
            previews: previews(c)?,
            compat,
            max_bad_steps: 5,
            notes,
        })
    }

    /// Optimizer steps of an epoch of `batches` batches; a group that the epoch's end cuts short counts.
    pub fn steps_per_epoch(&self, batches: u64) -> u64 {
        batches.div_ceil(self.accumulation)
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self, batches_per_epoch: u64) -> u64 {
        match self.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => epochs * self.steps_per_epoch(batches_per_epoch),
        }
    }

    /// Epochs that the run takes; the last one may be cut short by a number of steps.
    pub fn total_epochs(&self, batches_per_epoch: u64) -> u64 {
        match self.length {
            Length::Steps(steps) => steps.div_ceil(self.steps_per_epoch(batches_per_epoch).max(1)),
            Length::Epochs(epochs) => epochs,
        }
    }
}

/// When previews are made; never without prompts.
fn previews(c: &RunConfig) -> Result<preview::Every, UserError> {
    let (steps, epochs) = (c.sample_every_n_steps, c.sample_every_n_epochs);
    let every = preview::Every { steps, epochs, at_first: c.sample_at_first };
    match c.sample_prompts {
        Some(_) => Ok(every),
        None if every.is_never() => Ok(every),
        None => Err(UserError::usage("previews are asked for, but no prompts are given")
            .hint("add --sample_prompts FILE: a text file with a prompt a line")),
    }
}

fn timesteps(
    c: &RunConfig,
    model: &ModelConfig,
    compat: Compat,
    notes: &mut Vec<String>,
) -> Result<TimestepSpec, UserError> {
    let spec = TimestepSpec {
        sampling: c.timestep_sampling.parse()?,
        flow_shift: c.discrete_flow_shift,
        sigmoid_scale: c.sigmoid_scale,
        weighting: c.weighting_scheme.parse()?,
        logit_mean: c.logit_mean,
        logit_std: c.logit_std,
        mode_scale: c.mode_scale,
        min: c.min_timestep.unwrap_or(0) as f64,
        max: c.max_timestep.unwrap_or(1000) as f64,
        preserve_shape: c.preserve_distribution_shape,
        buckets: c.num_timestep_buckets.unwrap_or(0) as usize,
        compat: compat.timesteps,
    };
    spec.check()?;
    match (boundary(c, model), &c.noise_level) {
        (Some(boundary), _) if c.is_shared() => notes.extend(idle_note(boundary, &spec)),
        (Some(boundary), Some(level)) => notes.extend(range_note(level.parse()?, boundary, spec.min, spec.max)),
        _ => {}
    }
    Ok(spec)
}

fn boundary(c: &RunConfig, model: &ModelConfig) -> Option<f64> {
    c.timestep_boundary.or(model.experts.map(|e| e.boundary))
}
