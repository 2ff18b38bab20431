//! The learning rate as a pure function of the optimizer step: nothing to advance, nothing to restore on resume.
//!
//! `lr(s)` is the rate used by optimizer step `s` (counted from 0). Names and formulas are those of the Hugging Face
//! schedules that existing recipes use, with T = total steps, W = warm-up, D = decay.

use std::f64::consts::PI;
use std::str::FromStr;

use crate::error::{nearest, UserError};
use crate::kwargs::KwArgs;

/// A number of steps, or a share of the whole run: `100`, `0.05`, `5%`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StepCount {
    Steps(u64),
    /// In 0..=1; multiplied by the total and rounded down.
    Ratio(f64),
}

impl StepCount {
    /// A whole number from 1 on counts steps, a fraction below 1 is a share of the run.
    pub fn from_number(v: f64) -> Result<Self, UserError> {
        match v {
            v if v >= 0.0 && v.fract() == 0.0 && v < 1e15 => Ok(Self::Steps(v as u64)),
            v if v > 0.0 && v < 1.0 => Ok(Self::Ratio(v)),
            _ => Err(UserError::usage(format!("{v} is neither a whole number of steps nor a share between 0 and 1"))),
        }
    }

    pub fn resolve(self, total: u64) -> u64 {
        match self {
            Self::Steps(n) => n,
            Self::Ratio(r) => (r * total as f64) as u64,
        }
    }
}

impl FromStr for StepCount {
    type Err = UserError;

    fn from_str(text: &str) -> Result<Self, UserError> {
        let bad = || UserError::usage(format!("`{text}` is not a number of steps, a share such as 0.05, or 5%"));
        let text = text.trim();
        if let Some(percent) = text.strip_suffix('%') {
            let v: f64 = percent.trim().parse().map_err(|_| bad())?;
            return if (0.0..=100.0).contains(&v) { Ok(Self::Ratio(v / 100.0)) } else { Err(bad()) };
        }
        Self::from_number(text.parse().map_err(|_| bad())?).map_err(|_| bad())
    }
}

/// What the user asked for; [`Schedule::new`] checks it.
#[derive(Debug, Clone)]
pub struct ScheduleSpec {
    /// `--lr_scheduler`.
    pub name: String,
    /// `--lr_scheduler_type`: a torch scheduler class that replaces `name`; empty for none.
    pub class: String,
    /// `--lr_scheduler_args`, as typed.
    pub args: Vec<String>,
    /// `--learning_rate`.
    pub lr: f64,
    pub total_steps: u64,
    pub warmup: StepCount,
    pub decay: StepCount,
    pub num_cycles: f64,
    pub power: f64,
    pub timescale: Option<f64>,
    pub min_lr_ratio: Option<f64>,
    /// Reproduce the old tool where it errs: polynomial ends at 1e-7 whatever the ratio, `rex` starts odd.
    pub compat: bool,
}

impl ScheduleSpec {
    /// `name` with everything else at the old tool's defaults.
    pub fn new(name: &str, lr: f64, total_steps: u64) -> Self {
        Self {
            name: name.into(),
            class: String::new(),
            args: Vec::new(),
            lr,
            total_steps,
            warmup: StepCount::Steps(0),
            decay: StepCount::Steps(0),
            num_cycles: 1.0,
            power: 1.0,
            timescale: None,
            min_lr_ratio: None,
            compat: false,
        }
    }
}

/// Every schedule name, for messages and completion.
pub const NAMES: [&str; 11] = [
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "piecewise_constant",
    "rex",
];

/// Torch schedulers accepted by `--lr_scheduler_type`.
pub const CLASSES: [&str; 3] = ["CosineAnnealingLR", "ExponentialLR", "StepLR"];

/// Shape of the warm-up and decay pieces of `warmup_stable_decay`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Curve {
    Linear,
    Cosine,
    OneMinusSqrt,
}

#[derive(Debug, Clone, PartialEq)]
enum Shape {
    Constant,
    Linear,
    Cosine { cycles: f64 },
    CosineMin { half_cycles: f64, min: f64 },
    Restarts { cycles: f64 },
    Polynomial { power: f64, end: f64 },
    InverseSqrt { timescale: f64 },
    WarmupStableDecay { decay: f64, half_cycles: f64, min: f64, up: Curve, down: Curve },
    Piecewise { rules: Vec<(u64, f64)>, last: f64 },
    Rex { min: f64, alpha: f64, beta: f64, compat: bool },
    CosineAnnealing { t_max: f64, eta_min: f64 },
    Exponential { gamma: f64 },
    Staircase { every: u64, gamma: f64 },
}

/// A checked schedule. `factor(s)` multiplies the base rate of each parameter group.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    shape: Shape,
    total: f64,
    warmup: f64,
    note: Option<String>,
}

impl Schedule {
    /// Checks and resolves a specification. Errors name the option and what to write instead.
    pub fn new(spec: &ScheduleSpec) -> Result<Self, UserError> {
        if !(spec.lr.is_finite() && spec.lr >= 0.0) {
            return Err(UserError::usage(format!("--learning_rate {} is not a rate", spec.lr)));
        }
        if let Some(r) = spec.min_lr_ratio.filter(|r| !(0.0..=1.0).contains(r)) {
            return Err(UserError::usage(format!("--lr_scheduler_min_lr_ratio {r} is not between 0 and 1")));
        }
        let mut args = KwArgs::parse("lr_scheduler_args", &spec.args)?;
        let (total, warmup) = (spec.total_steps as f64, spec.warmup.resolve(spec.total_steps) as f64);
        let (shape, note) = if spec.class.is_empty() {
            named_shape(spec, warmup, &mut args)?
        } else {
            (class_shape(&spec.class, spec.lr, &mut args)?, None)
        };
        args.finish()?;
        let warmup = if spec.class.is_empty() { warmup } else { 0.0 };
        Ok(Self { shape, total, warmup, note })
    }

    /// Something the user should read once before the run, if anything.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// The rate of a parameter group whose base rate is `base_lr`, for optimizer step `step` (from 0).
    pub fn lr(&self, step: u64, base_lr: f64) -> f64 {
        base_lr * self.factor(step)
    }

    /// What multiplies every group's base rate at `step`.
    pub fn factor(&self, step: u64) -> f64 {
        let (s, total, warmup) = (step as f64, self.total, self.warmup);
        let warming = s < warmup;
        let ramp = s / warmup.max(1.0);
        // 0 at the end of the warm-up, 1 at the end of the run.
        let progress = (s - warmup) / (total - warmup).max(1.0);
        match &self.shape {
            Shape::WarmupStableDecay { decay, half_cycles, min, up, down } => {
                let stable = total - warmup - decay;
                let f = if warming {
                    curve_up(*up, ramp)
                } else if s < warmup + stable {
                    return 1.0;
                } else if s < warmup + stable + decay {
                    curve_down(*down, (s - warmup - stable) / decay.max(1.0), *half_cycles)
                } else {
                    0.0
                };
                min + (1.0 - min) * f
            }
            Shape::Rex { min, alpha, beta, compat } => rex(s, total, warmup, *min, *alpha, *beta, *compat),
            Shape::Piecewise { rules, last } => {
                rules.iter().find(|(until, _)| step < *until).map_or(*last, |(_, factor)| *factor)
            }
            Shape::CosineAnnealing { t_max, eta_min } => {
                eta_min + (1.0 - eta_min) * 0.5 * (1.0 + (PI * s / t_max).cos())
            }
            Shape::Exponential { gamma } => gamma.powf(s),
            Shape::Staircase { every, gamma } => gamma.powi((step / every) as i32),
            _ if warming => ramp,
            Shape::Constant => 1.0,
            Shape::Linear => ((total - s) / (total - warmup).max(1.0)).max(0.0),
            Shape::Cosine { cycles } => (0.5 * (1.0 + (PI * cycles * 2.0 * progress).cos())).max(0.0),
            Shape::CosineMin { half_cycles, min } => {
                (min + (1.0 - min) * 0.5 * (1.0 + (PI * 2.0 * half_cycles * progress).cos())).max(0.0)
            }
            Shape::Restarts { .. } if progress >= 1.0 => 0.0,
            Shape::Restarts { cycles } => (0.5 * (1.0 + (PI * ((cycles * progress) % 1.0)).cos())).max(0.0),
            Shape::Polynomial { end, .. } if s > total => *end,
            Shape::Polynomial { power, end } => end + (1.0 - end) * (1.0 - progress).max(0.0).powf(*power),
            Shape::InverseSqrt { timescale } => 1.0 / ((s + timescale - warmup) / timescale).sqrt(),
        }
    }
}

fn named_shape(spec: &ScheduleSpec, warmup: f64, args: &mut KwArgs) -> Result<(Shape, Option<String>), UserError> {
    let mut note = None;
    let shape = match spec.name.as_str() {
        "constant" if warmup > 0.0 => {
            return Err(UserError::usage("--lr_scheduler constant has no warm-up, but --lr_warmup_steps is set")
                .hint("use --lr_scheduler constant_with_warmup"));
        }
        "constant" | "constant_with_warmup" => Shape::Constant,
        "linear" => Shape::Linear,
        // The cycles option does not reach plain cosine in existing recipes: half a wave, always.
        "cosine" => Shape::Cosine { cycles: args.take_f64("num_cycles")?.unwrap_or(0.5) },
        "cosine_with_restarts" => Shape::Restarts { cycles: spec.num_cycles },
        "cosine_with_min_lr" => {
            let min_lr = args.take_f64("min_lr")?;
            let min = match (spec.min_lr_ratio, min_lr) {
                (Some(ratio), None) => ratio,
                (None, Some(min_lr)) => min_lr / spec.lr,
                _ => {
                    return Err(UserError::usage("--lr_scheduler cosine_with_min_lr needs one lower limit")
                        .hint("give --lr_scheduler_min_lr_ratio 0.01, for instance"))
                }
            };
            Shape::CosineMin { half_cycles: spec.num_cycles / 2.0, min }
        }
        "polynomial" => {
            let power = args.take_f64("power")?.unwrap_or(spec.power);
            let lr_end = args.take_f64("lr_end")?;
            let (end, text) = polynomial_end(spec, lr_end)?;
            note = text;
            Shape::Polynomial { power, end }
        }
        "inverse_sqrt" => {
            let fallback = if warmup > 0.0 { warmup } else { 10_000.0 };
            let timescale = spec.timescale.unwrap_or(fallback);
            if timescale <= 0.0 {
                return Err(UserError::usage(format!("--lr_scheduler_timescale {timescale} must be positive")));
            }
            Shape::InverseSqrt { timescale }
        }
        "warmup_stable_decay" => Shape::WarmupStableDecay {
            decay: spec.decay.resolve(spec.total_steps) as f64,
            half_cycles: spec.num_cycles / 2.0,
            min: spec.min_lr_ratio.unwrap_or(0.0),
            up: curve(args, "warmup_type", Curve::Linear)?,
            down: curve(args, "decay_type", Curve::Cosine)?,
        },
        "piecewise_constant" => piecewise(args)?,
        "rex" => Shape::Rex {
            min: match args.take_f64("min_lr")? {
                Some(min_lr) => min_lr / spec.lr,
                None => spec.min_lr_ratio.unwrap_or(0.01),
            },
            alpha: args.take_f64("rex_alpha")?.unwrap_or(0.1),
            beta: args.take_f64("rex_beta")?.unwrap_or(0.9),
            compat: spec.compat,
        },
        "reduce_lr_on_plateau" => {
            return Err(UserError::usage("--lr_scheduler reduce_lr_on_plateau follows the loss, not the step")
                .hint(format!("choose one of: {}", NAMES.join(", "))))
        }
        "cosine_warmup_with_min_lr" => {
            return Err(UserError::usage("--lr_scheduler cosine_warmup_with_min_lr is not supported")
                .hint("cosine_with_min_lr with --lr_warmup_steps does the same"))
        }
        // Only a report of the rate that Adafactor was given.
        name if name.starts_with("adafactor:") => Shape::Constant,
        name => {
            let error = UserError::usage(format!("--lr_scheduler {name} is unknown"));
            return Err(match nearest(name, NAMES) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint(format!("choose one of: {}", NAMES.join(", "))),
            });
        }
    };
    Ok((shape, note))
}

/// Where polynomial decay ends, as a share of the base rate, and what to tell the user about it.
fn polynomial_end(spec: &ScheduleSpec, lr_end: Option<f64>) -> Result<(f64, Option<String>), UserError> {
    const OLD_END: f64 = 1e-7;
    let end_lr = match (lr_end, spec.min_lr_ratio) {
        (Some(end), _) => end,
        (None, Some(ratio)) if !spec.compat => ratio * spec.lr,
        (None, _) => OLD_END.min(if spec.compat { f64::MAX } else { spec.lr }),
    };
    if end_lr < 0.0 || end_lr > spec.lr || (spec.compat && end_lr >= spec.lr) {
        return Err(UserError::usage(format!(
            "polynomial decay would end at {end_lr:.2e}, above the rate {:.2e}",
            spec.lr
        )));
    }
    let note = match (lr_end, spec.min_lr_ratio) {
        (None, Some(ratio)) if spec.compat => {
            Some(format!("polynomial ignores the minimum ratio {ratio} as the old tool did: it ends at {OLD_END:e}"))
        }
        (None, Some(ratio)) => Some(format!(
            "polynomial decay ends at {end_lr:.2e} ({ratio} of the start); the old tool ignored the ratio and ended at \
             {OLD_END:e} (--musubi_compat restores that)"
        )),
        _ => None,
    };
    Ok((if spec.lr > 0.0 { end_lr / spec.lr } else { 0.0 }, note))
}

fn curve(args: &mut KwArgs, key: &'static str, default: Curve) -> Result<Curve, UserError> {
    match args.take_str(key)?.as_deref() {
        None => Ok(default),
        Some("linear") => Ok(Curve::Linear),
        Some("cosine") => Ok(Curve::Cosine),
        Some("1-sqrt") => Ok(Curve::OneMinusSqrt),
        Some(other) => Err(args.error(key, format!("is `{other}`, not one of linear, cosine, 1-sqrt"))),
    }
}

fn curve_up(curve: Curve, p: f64) -> f64 {
    match curve {
        Curve::Linear => p,
        Curve::Cosine => 0.5 * (1.0 - (PI * p).cos()),
        Curve::OneMinusSqrt => 1.0 - (1.0 - p).max(0.0).sqrt(),
    }
}

fn curve_down(curve: Curve, p: f64, half_cycles: f64) -> f64 {
    match curve {
        Curve::Linear => 1.0 - p,
        Curve::Cosine => (0.5 * (1.0 + (PI * half_cycles * 2.0 * p).cos())).max(0.0),
        Curve::OneMinusSqrt => 1.0 - p.sqrt(),
    }
}

/// `step_rules='1:50,0.1:120,0.01'`: factor 1 before step 50, 0.1 before step 120, 0.01 from there on.
fn piecewise(args: &mut KwArgs) -> Result<Shape, UserError> {
    const KEY: &str = "step_rules";
    let Some(text) = args.take_str(KEY)? else {
        return Err(UserError::usage("--lr_scheduler piecewise_constant needs its rules")
            .hint("give --lr_scheduler_args \"step_rules='1:50,0.1:120,0.01'\""));
    };
    let bad = |part: &str| args.error(KEY, format!("has `{part}`, expected factor:step, ..., factor"));
    let mut parts: Vec<&str> = text.split(',').map(str::trim).collect();
    let last = parts.pop().unwrap_or_default();
    let last = last.parse().map_err(|_| bad(last))?;
    let mut rules: Vec<(u64, f64)> = Vec::new();
    for part in parts {
        let (factor, until) = part.split_once(':').ok_or_else(|| bad(part))?;
        rules.push((until.trim().parse().map_err(|_| bad(part))?, factor.trim().parse().map_err(|_| bad(part))?));
    }
    rules.sort_by_key(|(until, _)| *until);
    Ok(Shape::Piecewise { rules, last })
}

/// The reverse-exponential curve: `z / (alpha + beta z)` over the part after the warm-up, between 1 and `min`.
fn rex(s: f64, total: f64, warmup: f64, min: f64, alpha: f64, beta: f64, compat: bool) -> f64 {
    if (warmup == 1.0 && s == 1.0) || (!compat && warmup > 0.0 && s == 0.0) {
        return min;
    }
    if warmup > 1.0 && s >= 1.0 && s <= warmup - 1.0 {
        return min + (1.0 - min) * (s - 1.0) / (warmup - 1.0);
    }
    let (after, rest) = (s - warmup, total - warmup);
    if after >= rest || after == -1.0 || rest <= 0.0 {
        return min;
    }
    // `after` is negative only for the compat start (step 0 of a warm-up), where the remainder wraps to the tail.
    let z = (rest - after.rem_euclid(rest)) / rest;
    min + (1.0 - min) * z / (alpha + beta * z)
}

fn class_shape(class: &str, lr: f64, args: &mut KwArgs) -> Result<Shape, UserError> {
    let need = |v: Option<f64>, key: &str| {
        v.filter(|v| *v > 0.0).ok_or_else(|| {
            UserError::usage(format!("--lr_scheduler_type {class} needs a positive `{key}` in --lr_scheduler_args"))
        })
    };
    match class.rsplit('.').next().unwrap_or(class) {
        "CosineAnnealingLR" => Ok(Shape::CosineAnnealing {
            t_max: need(args.take_f64("T_max")?, "T_max")?,
            eta_min: args.take_f64("eta_min")?.unwrap_or(0.0) / if lr > 0.0 { lr } else { 1.0 },
        }),
        "ExponentialLR" => Ok(Shape::Exponential { gamma: need(args.take_f64("gamma")?, "gamma")? }),
        "StepLR" => Ok(Shape::Staircase {
            every: need(args.take_f64("step_size")?, "step_size")?.max(1.0) as u64,
            gamma: args.take_f64("gamma")?.unwrap_or(0.1),
        }),
        _ => Err(UserError::usage(format!("--lr_scheduler_type {class} is not supported")).hint(format!(
            "choose one of {}, or a name for --lr_scheduler: {}",
            CLASSES.join(", "),
            NAMES.join(", ")
        ))),
    }
}
