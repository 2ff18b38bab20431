//! Flow-matching samplers: from noise to a latent by asking the model for velocities at falling noise levels.
//!
//! Every solver keeps fp32 state and is driven alike: `for (i, t) in sampler.timesteps()`, ask the model at `t`, `step`.

mod dpmpp;
mod euler;
mod unipc;

use anyhow::{bail, Result};
use candle_core::Tensor;

/// The solvers of the old trainer's `--sample_solver`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Solver {
    /// UniPC, order 2, `bh2`: predictor and corrector.
    UniPc,
    /// DPM-Solver++ 2M, midpoint.
    DpmPp,
    /// Plain Euler; the distilled (Lightning) models are made for it.
    Euler,
}

impl std::str::FromStr for Solver {
    type Err = anyhow::Error;

    /// `unipc`, `dpm++` (or `dpmpp`), `vanilla` (or `euler`).
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "unipc" => Ok(Self::UniPc),
            "dpm++" | "dpmpp" => Ok(Self::DpmPp),
            "vanilla" | "euler" => Ok(Self::Euler),
            other => bail!("no sampler is called {other:?}; there are unipc, dpm++ and vanilla"),
        }
    }
}

enum State {
    UniPc(unipc::UniPc),
    DpmPp(dpmpp::DpmPp),
    Euler,
}

/// One sampling run: its noise levels and the solver's memory of earlier steps.
pub struct Sampler {
    /// `steps + 1` values, falling, ending at 0.
    sigmas: Vec<f32>,
    /// What the model is told at each step, 0..=1000.
    timesteps: Vec<f32>,
    state: State,
    next: usize,
}

/// `shift * s / (1 + (shift - 1) * s)`: moves noise levels towards 1 for `shift` > 1.
fn shifted(s: f64, shift: f64) -> f64 {
    shift * s / (1.0 + (shift - 1.0) * s)
}

/// `n + 1` equally spaced values from `from` down to 0, built as NumPy builds them: a last bit decides which integer a
/// timestep is truncated to.
fn falling_grid(from: f64, n: usize) -> Vec<f64> {
    let step = (0.0 - from) / n as f64;
    (0..=n).map(|i| if i == n { 0.0 } else { i as f64 * step + from }).collect()
}

impl Sampler {
    /// `steps` >= 1 steps; `shift` is the flow shift, 1 = none.
    pub fn new(solver: Solver, steps: usize, shift: f64) -> Result<Self> {
        if steps == 0 {
            bail!("sampling needs at least one step");
        }
        if !(shift > 0.0 && shift.is_finite()) {
            bail!("flow shift {shift} is not a positive number");
        }
        // UniPC starts at the second entry of a 1000-step table, held in fp32; the others at pure noise.
        let start = if solver == Solver::UniPc { 0.999f32 as f64 } else { 1.0 };
        let mut grid: Vec<f64> = falling_grid(start, steps)[..steps].iter().map(|&s| shifted(s, shift)).collect();
        let timesteps = grid.iter().map(|s| s * 1000.0);
        let timesteps = match solver {
            // The multistep solvers tell the model whole timesteps, rounded towards zero.
            Solver::UniPc | Solver::DpmPp => timesteps.map(|t| t.trunc() as f32).collect(),
            Solver::Euler => timesteps.map(|t| t as f32).collect(),
        };
        grid.push(0.0);
        let sigmas = grid.into_iter().map(|s| s as f32).collect();
        let state = match solver {
            Solver::UniPc => State::UniPc(unipc::UniPc::default()),
            Solver::DpmPp => State::DpmPp(dpmpp::DpmPp::default()),
            Solver::Euler => State::Euler,
        };
        Ok(Self { sigmas, timesteps, state, next: 0 })
    }

    /// Noise levels: `steps + 1` values from the start down to 0.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The timestep to tell the model at each step, 0..=1000; whole numbers for UniPC and DPM-Solver++.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// Step `i` (0, 1, ... in order): the model's velocity at `sample` and `timesteps()[i]` to the next sample, fp32.
    pub fn step(&mut self, velocity: &Tensor, i: usize, sample: &Tensor) -> Result<Tensor> {
        if i != self.next || i >= self.steps() {
            bail!("sampler step {i} out of order: step {} of {} is next", self.next, self.steps());
        }
        if velocity.shape() != sample.shape() {
            bail!("the model returned {:?} for a sample of {:?}", velocity.shape(), sample.shape());
        }
        self.next += 1;
        let v = velocity.to_dtype(candle_core::DType::F32)?;
        let x = sample.to_dtype(candle_core::DType::F32)?;
        Ok(match &mut self.state {
            State::UniPc(s) => s.step(&self.sigmas, i, &v, &x)?,
            State::DpmPp(s) => s.step(&self.sigmas, i, &v, &x)?,
            State::Euler => euler::step(&self.sigmas, i, &v, &x)?,
        })
    }
}
