//! Which noise level a sample is trained at: every sampling mode as a pure function of its random draws.
//!
//! A mode maps draws to a share `s` of noise in 0..=1; the timestep limits then squeeze `s` into their range, or (with
//! `preserve_distribution_shape`) reject what falls outside. The noise mix uses sigma = s; the model is told 1000 sigma,
//! as at inference. In compat mode the old tool's quirks come back: 1000 sigma + 1, and a `sigma` mode that ignores the
//! flow shift and mirrors the limits.

use std::f64::consts::PI;
use std::fmt;
use std::str::FromStr;

use super::quantile::normal_quantile;
use crate::error::{nearest, UserError};

/// A source of random numbers: counter-based in a run, recorded in a test.
pub trait Draws {
    /// `n` numbers uniform in [0, 1).
    fn uniform(&mut self, n: usize) -> Vec<f32>;
    /// `n` standard normal numbers.
    fn normal(&mut self, n: usize) -> Vec<f32>;
}

/// `--timestep_sampling`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampling {
    Sigma,
    Uniform,
    Sigmoid,
    Shift,
    FluxShift,
    Flux2Shift,
    QwenShift,
    Krea2Shift,
    Ideogram4Shift,
    LogSnr,
    QinglongFlux,
    QinglongQwen,
}

impl Sampling {
    pub const ALL: [(&'static str, Sampling); 12] = [
        ("sigma", Self::Sigma),
        ("uniform", Self::Uniform),
        ("sigmoid", Self::Sigmoid),
        ("shift", Self::Shift),
        ("flux_shift", Self::FluxShift),
        ("flux2_shift", Self::Flux2Shift),
        ("qwen_shift", Self::QwenShift),
        ("krea2_shift", Self::Krea2Shift),
        ("ideogram4_shift", Self::Ideogram4Shift),
        ("logsnr", Self::LogSnr),
        ("qinglong_flux", Self::QinglongFlux),
        ("qinglong_qwen", Self::QinglongQwen),
    ];
}

/// `--weighting_scheme`: the density of `sigma` mode and the weight of the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weighting {
    None,
    LogitNormal,
    Mode,
    Cosmap,
    SigmaSqrt,
}

impl Weighting {
    pub const ALL: [(&'static str, Weighting); 5] = [
        ("none", Self::None),
        ("logit_normal", Self::LogitNormal),
        ("mode", Self::Mode),
        ("cosmap", Self::Cosmap),
        ("sigma_sqrt", Self::SigmaSqrt),
    ];
}

fn by_name<T: Copy>(option: &str, all: &[(&'static str, T)], text: &str) -> Result<T, UserError> {
    if let Some((_, value)) = all.iter().find(|(name, _)| *name == text) {
        return Ok(*value);
    }
    let error = UserError::usage(format!("--{option} {text} is unknown"));
    Err(match nearest(text, all.iter().map(|(n, _)| *n)) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint(format!("choose one of: {}", all.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", "))),
    })
}

fn name_of<T: PartialEq>(all: &[(&'static str, T)], value: &T) -> &'static str {
    all.iter().find(|(_, v)| v == value).map_or("?", |(name, _)| name)
}

impl FromStr for Sampling {
    type Err = UserError;
    fn from_str(text: &str) -> Result<Self, UserError> {
        by_name("timestep_sampling", &Self::ALL, text)
    }
}

impl fmt::Display for Sampling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(&Self::ALL, self))
    }
}

impl FromStr for Weighting {
    type Err = UserError;
    fn from_str(text: &str) -> Result<Self, UserError> {
        by_name("weighting_scheme", &Self::ALL, text)
    }
}

impl fmt::Display for Weighting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(&Self::ALL, self))
    }
}

/// Everything that decides the noise level of a sample.
#[derive(Debug, Clone, PartialEq)]
pub struct TimestepSpec {
    pub sampling: Sampling,
    pub flow_shift: f64,
    pub sigmoid_scale: f64,
    pub weighting: Weighting,
    pub logit_mean: f64,
    pub logit_std: f64,
    pub mode_scale: f64,
    /// Limits in model units, 0..=1000.
    pub min: f64,
    pub max: f64,
    /// Reject draws outside the limits instead of squeezing the whole distribution into them.
    pub preserve_shape: bool,
    /// Stratify each epoch's draws into this many strata; below 2 means off.
    pub buckets: usize,
    pub compat: bool,
}

impl Default for TimestepSpec {
    fn default() -> Self {
        Self {
            sampling: Sampling::Sigma,
            flow_shift: 1.0,
            sigmoid_scale: 1.0,
            weighting: Weighting::None,
            logit_mean: 0.0,
            logit_std: 1.0,
            mode_scale: 1.29,
            min: 0.0,
            max: 1000.0,
            preserve_shape: false,
            buckets: 0,
            compat: false,
        }
    }
}

/// The noise level of one sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timestep {
    /// What the model is told, in 0..=1000 (1..=1001 in compat mode).
    pub t: f32,
    /// The share of noise in the input: `x_t = (1 - sigma) x + sigma noise`.
    pub sigma: f32,
}

/// How often a rejected draw is repeated before the range is taken as unreachable.
const MAX_ROUNDS: usize = 1000;

impl TimestepSpec {
    pub fn check(&self) -> Result<(), UserError> {
        if !(0.0..=1000.0).contains(&self.min) || !(0.0..=1000.0).contains(&self.max) || self.min >= self.max {
            return Err(UserError::usage(format!(
                "--min_timestep {} and --max_timestep {} do not bound a range within 0..1000",
                self.min, self.max
            )));
        }
        if !(self.flow_shift.is_finite() && self.flow_shift > 0.0) {
            return Err(UserError::usage(format!("--discrete_flow_shift {} must be positive", self.flow_shift)));
        }
        if !(self.logit_std.is_finite() && self.logit_std > 0.0) {
            return Err(UserError::usage(format!("--logit_std {} must be positive", self.logit_std)));
        }
        Ok(())
    }

    fn compat_sigma(&self) -> bool {
        self.compat && self.sampling == Sampling::Sigma
    }

    fn limits(&self) -> (f32, f32) {
        ((self.min / 1000.0) as f32, (self.max / 1000.0) as f32)
    }

    /// Noise levels of `batch` samples of one latent size. `stratified`, one value in [0, 1) a sample, takes the place
    /// of the draws (the old `sigma` mode ignores it).
    ///
    /// In a run this is called a sample at a time with that sample's own draws.
    pub fn sample(
        &self,
        draws: &mut dyn Draws,
        latent_hw: (usize, usize),
        stratified: Option<&[f32]>,
        batch: usize,
    ) -> Vec<Timestep> {
        if self.compat_sigma() {
            return self.density(draws, None, batch).into_iter().map(|u| self.table_entry(u)).collect();
        }
        let (lo, hi) = self.limits();
        let full_range = self.min <= 0.0 && self.max >= 1000.0;
        let shares = if self.preserve_shape && !full_range {
            match stratified {
                Some(values) if self.monotone() => self.truncated(latent_hw, values, lo, hi),
                _ => self.rejected(draws, latent_hw, stratified, batch, lo, hi),
            }
        } else {
            let mut shares = self.shares(draws, latent_hw, stratified, batch);
            shares.iter_mut().for_each(|s| *s = *s * (hi - lo) + lo);
            shares
        };
        let offset = if self.compat { 1.0 } else { 0.0 };
        shares.into_iter().map(|s| Timestep { t: s * 1000.0 + offset, sigma: s }).collect()
    }

    /// The noise level of one sample, from the part of the distribution whose shares of noise lie in `from..=to`. Modes
    /// that are a monotone function of one number are inverted, so that any part is reached at once; the others are drawn
    /// until they fall into it, and squeezed into it if they do not. Not for compat mode.
    pub fn sample_between(&self, draws: &mut dyn Draws, latent_hw: (usize, usize), (from, to): (f32, f32)) -> Timestep {
        let (lo, hi) = self.limits();
        let width = hi - lo;
        // The part before the limits squeeze it, or within them.
        let raw = |s: f32| ((s - lo) / width).clamp(0.0, 1.0);
        let (a, b) = match self.preserve_shape {
            true => (from.max(lo), to.min(hi)),
            false => (raw(from), raw(to)),
        };
        let b = b.max(a);
        let s = match self.monotone() {
            true => self.truncated(latent_hw, &draws.uniform(1), a, b)[0],
            false => self.rejected(draws, latent_hw, None, 1, a, b)[0],
        };
        let s = if self.preserve_shape { s } else { s * width + lo };
        let sigma = s.clamp(from, to);
        Timestep { t: sigma * 1000.0, sigma }
    }

    /// Draws whole batches and keeps, in order, what lies within the limits.
    fn rejected(
        &self,
        draws: &mut dyn Draws,
        hw: (usize, usize),
        stratified: Option<&[f32]>,
        batch: usize,
        lo: f32,
        hi: f32,
    ) -> Vec<f32> {
        let mut kept = Vec::with_capacity(batch);
        let mut last = Vec::new();
        for round in 0..MAX_ROUNDS {
            last = self.shares(draws, hw, stratified.filter(|_| round == 0), batch);
            kept.extend(last.iter().copied().filter(|s| (lo..=hi).contains(s)));
            if kept.len() >= batch {
                kept.truncate(batch);
                return kept;
            }
        }
        if self.compat {
            return last;
        }
        // The distribution hardly reaches the range: squeezing keeps what it can of the shape.
        kept.extend(last.iter().map(|s| s * (hi - lo) + lo));
        kept.truncate(batch);
        kept
    }

    /// Whether a sample's share is a monotone function of one uniform number.
    fn monotone(&self) -> bool {
        !matches!(self.sampling, Sampling::QinglongFlux | Sampling::QinglongQwen)
    }

    /// The distribution restricted to the limits, by its quantiles: keeps both the shape and the strata.
    fn truncated(&self, hw: (usize, usize), values: &[f32], lo: f32, hi: f32) -> Vec<f32> {
        let share = |u: f64| self.shares(&mut NoDraws, hw, Some(&[u as f32]), 1)[0];
        let rising = share(0.75) >= share(0.25);
        // The u at which the share reaches `edge`.
        let crossing = |edge: f32| {
            let (mut a, mut b) = (0.0f64, 1.0f64);
            for _ in 0..60 {
                let mid = 0.5 * (a + b);
                if (share(mid) < edge) == rising {
                    a = mid;
                } else {
                    b = mid;
                }
            }
            0.5 * (a + b)
        };
        let (u_lo, u_hi) = (crossing(lo), crossing(hi));
        values.iter().map(|u| share(u_lo + *u as f64 * (u_hi - u_lo)).clamp(lo, hi)).collect()
    }

    /// The mode itself: shares of noise over the full range.
    fn shares(&self, draws: &mut dyn Draws, hw: (usize, usize), strata: Option<&[f32]>, n: usize) -> Vec<f32> {
        let (h, w) = (hw.0 as f64, hw.1 as f64);
        let patches = (hw.0 / 2) as f64 * (hw.1 / 2) as f64;
        let flux = line(patches, (256.0, 0.5), (4096.0, 1.15)).exp();
        let qwen = line(patches, (256.0, 0.5), (8192.0, 0.9)).exp();
        match self.sampling {
            Sampling::Sigma => {
                // The table of noise levels descends, so a large density variable means little noise.
                let density = self.density(draws, strata, n);
                density.into_iter().map(|u| shift((1.0 - u).clamp(0.0, 1.0), self.flow_shift)).collect()
            }
            Sampling::Uniform => uniforms(draws, strata, n),
            Sampling::Sigmoid => self.shifted(draws, strata, n, 1.0),
            Sampling::Shift => self.shifted(draws, strata, n, self.flow_shift),
            Sampling::FluxShift => self.shifted(draws, strata, n, flux),
            Sampling::Flux2Shift => self.shifted(draws, strata, n, line(h * w, (256.0, 0.5), (4096.0, 1.15)).exp()),
            Sampling::QwenShift => self.shifted(draws, strata, n, qwen),
            Sampling::Krea2Shift => self.shifted(draws, strata, n, line(patches, (256.0, 0.5), (6400.0, 1.15)).exp()),
            Sampling::Ideogram4Shift => {
                uniforms(draws, strata, n).into_iter().map(|u| ideogram4(u as f64, h, w)).collect()
            }
            Sampling::LogSnr => logsnr(draws, strata, n, self.logit_mean, self.logit_std),
            Sampling::QinglongFlux => self.mixture(draws, strata, n, flux, 0.79, 0.9),
            Sampling::QinglongQwen => self.mixture(draws, strata, n, qwen, 0.95, 0.95),
        }
    }

    fn shifted(&self, draws: &mut dyn Draws, strata: Option<&[f32]>, n: usize, by: f64) -> Vec<f32> {
        let scale = self.sigmoid_scale as f32;
        normals(draws, strata, n).into_iter().map(|z| shift(sigmoid(z * scale), by)).collect()
    }

    /// A draw below `first` takes the resolution shift, one below `second` the user's log-SNR, the rest a clean one.
    fn mixture(
        &self,
        draws: &mut dyn Draws,
        strata: Option<&[f32]>,
        n: usize,
        by: f64,
        first: f32,
        second: f32,
    ) -> Vec<f32> {
        let part: Vec<usize> =
            draws.uniform(n).iter().map(|d| usize::from(*d >= first) + usize::from(*d >= second)).collect();
        let mut out = vec![0.0; n];
        for which in 0..3 {
            let at: Vec<usize> = (0..n).filter(|i| part[*i] == which).collect();
            if at.is_empty() {
                continue;
            }
            let own: Option<Vec<f32>> = strata.map(|s| at.iter().map(|i| s[*i]).collect());
            let values = match which {
                0 => self.shifted(draws, own.as_deref(), at.len(), by),
                1 => logsnr(draws, own.as_deref(), at.len(), self.logit_mean, self.logit_std),
                _ => logsnr(draws, own.as_deref(), at.len(), 5.36, 1.0),
            };
            at.into_iter().zip(values).for_each(|(i, v)| out[i] = v);
        }
        out
    }

    /// The density variable of `sigma` mode, in 0..=1.
    fn density(&self, draws: &mut dyn Draws, strata: Option<&[f32]>, n: usize) -> Vec<f32> {
        let (mean, std, scale) = (self.logit_mean as f32, self.logit_std as f32, self.mode_scale as f32);
        match self.weighting {
            Weighting::LogitNormal => normals(draws, strata, n).iter().map(|z| sigmoid(mean + std * z)).collect(),
            Weighting::Mode => uniforms(draws, strata, n)
                .iter()
                .map(|u| 1.0 - u - scale * ((PI as f32 * u / 2.0).cos().powi(2) - 1.0 + u))
                .collect(),
            _ => uniforms(draws, strata, n),
        }
    }

    /// The old `sigma` mode: the limits index a table that descends from t = 1000.
    fn table_entry(&self, u: f32) -> Timestep {
        let index = u * (self.max - self.min) as f32 + self.min as f32;
        let sigma = table_sigma((index.max(0.0) as usize).min(999));
        Timestep { t: sigma * 1000.0, sigma }
    }

    /// The weight of each sample's loss, or `None` where every weight is one.
    pub fn loss_weights(&self, timesteps: &[Timestep]) -> Option<Vec<f32>> {
        let weight: fn(f32) -> f32 = match self.weighting {
            Weighting::SigmaSqrt => |sigma| sigma.powi(-2),
            Weighting::Cosmap => |sigma| 2.0 / (PI as f32 * (1.0 - 2.0 * sigma + 2.0 * sigma * sigma)),
            Weighting::None | Weighting::LogitNormal | Weighting::Mode => return None,
        };
        // The old tool looks the noise level up in the table of a thousand entries; its lowest one is our floor too,
        // where 1/sigma^2 would have no bound.
        let level = |s: &Timestep| if self.compat { nearest_table_sigma(s.t) } else { s.sigma.max(1e-3) };
        Some(timesteps.iter().map(|s| weight(level(s))).collect())
    }
}

/// A source that must not be asked: for modes fed by strata alone.
struct NoDraws;

impl Draws for NoDraws {
    fn uniform(&mut self, n: usize) -> Vec<f32> {
        vec![0.5; n]
    }
    fn normal(&mut self, n: usize) -> Vec<f32> {
        vec![0.0; n]
    }
}

fn uniforms(draws: &mut dyn Draws, strata: Option<&[f32]>, n: usize) -> Vec<f32> {
    strata.map_or_else(|| draws.uniform(n), <[f32]>::to_vec)
}

fn normals(draws: &mut dyn Draws, strata: Option<&[f32]>, n: usize) -> Vec<f32> {
    let quantile = |u: &f32| normal_quantile(u.clamp(1e-7, 1.0 - 1e-7) as f64) as f32;
    strata.map_or_else(|| draws.normal(n), |values| values.iter().map(quantile).collect())
}

fn logsnr(draws: &mut dyn Draws, strata: Option<&[f32]>, n: usize, mean: f64, std: f64) -> Vec<f32> {
    normals(draws, strata, n).into_iter().map(|z| sigmoid(-(mean as f32 + std as f32 * z) / 2.0)).collect()
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The flow shift: `by s / (1 + (by - 1) s)`.
pub fn shift(s: f32, by: f64) -> f32 {
    s * by as f32 / (1.0 + (by - 1.0) as f32 * s)
}

fn line(x: f64, a: (f64, f64), b: (f64, f64)) -> f64 {
    a.1 + (b.1 - a.1) / (b.0 - a.0) * (x - a.0)
}

fn ideogram4(u: f64, h: f64, w: f64) -> f32 {
    let z = normal_quantile(u.clamp(1e-7, 1.0 - 1e-7));
    let mean = 0.5 * (256.0 * h * w / (512.0 * 512.0)).ln();
    let s = 1.0 / (1.0 + (-(mean + 1.5 * z)).exp());
    s.clamp(1.0 - 1.0 / (1.0 + (-7.5f64).exp()), 1.0 - 1.0 / (1.0 + 9f64.exp())) as f32
}

/// Entry `index` of the noise table 1, 0.999, …, 0.001.
fn table_sigma(index: usize) -> f32 {
    (1000 - index) as f32 / 1000.0
}

/// The table's noise level whose timestep is nearest to `t`.
fn nearest_table_sigma(t: f32) -> f32 {
    // Half-way points go to the entry met first, which is the noisier one.
    table_sigma(1000 - ((t + 0.5).floor().clamp(1.0, 1000.0) as usize))
}
