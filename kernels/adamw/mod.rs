//! AdamW over flat fp32 buffers on the CPU, and the global gradient norm. Element-wise and in fixed-size pieces, so the
//! result does not depend on the number of threads.
//!
//! Order of a step (Loshchilov & Hutter's decoupled decay, as PyTorch's `AdamW` does it):
//! `p ← p·(1 − lr·wd)`, `m ← m + (1 − β1)(g − m)`, `v ← β2·v + (1 − β2)·g²`,
//! `p ← p − lr/(1 − β1^t) · m / (√v/√(1 − β2^t) + eps)`. Scalars are f64 rounded once to f32.

use std::ops::Range;

use rayon::prelude::*;

use crate::{Error, Result};

#[cfg(feature = "cuda")]
pub mod cuda;

const NAME: &str = "adamw";
/// Elements of a parallel piece: large against scheduling, small against two cores' share of a LoRA.
const PIECE: usize = 1 << 14;

/// What stays the same over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// What a step brings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Counts from 1: the bias correction's exponent.
    pub number: u64,
    pub lr: f64,
    /// Multiplies every gradient before use: clipping, and the inverse of a loss scale.
    pub grad_scale: f64,
}

/// One step over buffers of one length; `params`, `m` and `v` are updated in place.
///
/// Errors: `Argument` if the lengths differ or the step number is 0.
pub fn step(adamw: &AdamW, step: &Step, params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) -> Result<()> {
    check(NAME, step, params.len(), &[("grads", grads.len()), ("m", m.len()), ("v", v.len())])?;
    let c = Constants::new(adamw, step);
    let states = m.par_chunks_mut(PIECE).zip(v.par_chunks_mut(PIECE));
    params.par_chunks_mut(PIECE).zip(grads.par_chunks(PIECE)).zip(states).for_each(|((p, g), (m, v))| {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * c.grad_scale;
            *m += c.one_minus_beta1 * (g - *m);
            *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
            *p = *p * c.decay - c.step_size * *m / (v.sqrt() / c.correction2 + c.eps);
        }
    });
    Ok(())
}

/// [`step`] with a learning rate for each range of the buffers (LoRA+); elements outside every range stay as they are.
/// `step.lr` is not used.
pub fn step_ranges(
    adamw: &AdamW,
    at: &Step,
    ranges: &[(Range<usize>, f64)],
    params: &mut [f32],
    grads: &[f32],
    m: &mut [f32],
    v: &mut [f32],
) -> Result<()> {
    check(NAME, at, params.len(), &[("grads", grads.len()), ("m", m.len()), ("v", v.len())])?;
    for (range, lr) in ranges {
        let r = || range.clone();
        if params.get(r()).is_none() {
            let what = format!("range {range:?} lies outside {} parameters", params.len());
            return Err(Error::Argument { op: NAME, what });
        }
        step(adamw, &Step { lr: *lr, ..*at }, &mut params[r()], &grads[r()], &mut m[r()], &mut v[r()])?;
    }
    Ok(())
}

/// L2 norm of all gradients, summed in f64 in a fixed order. fp32 squares cannot overflow it, so it is finite exactly
/// if every gradient is.
pub fn global_norm(grads: &[f32]) -> f64 {
    let pieces: Vec<f64> =
        grads.par_chunks(PIECE).map(|g| g.iter().map(|&g| f64::from(g) * f64::from(g)).sum()).collect();
    pieces.iter().sum::<f64>().sqrt()
}

/// The factor that brings gradients of norm `norm` to at most `max_norm`, as `clip_grad_norm_` computes it; 1 if
/// `max_norm` is 0 (clipping off).
pub fn clip_scale(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 {
        (max_norm / (norm + 1e-6)).min(1.0)
    } else {
        1.0
    }
}

/// A step's scalars in fp32.
struct Constants {
    grad_scale: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    decay: f32,
    step_size: f32,
    correction2: f32,
    eps: f32,
}

impl Constants {
    fn new(adamw: &AdamW, step: &Step) -> Self {
        let (correction1, correction2) = corrections(adamw, step);
        Constants {
            grad_scale: step.grad_scale as f32,
            one_minus_beta1: (1.0 - adamw.beta1) as f32,
            beta2: adamw.beta2 as f32,
            one_minus_beta2: (1.0 - adamw.beta2) as f32,
            decay: (1.0 - step.lr * adamw.weight_decay) as f32,
            step_size: (step.lr / correction1) as f32,
            correction2: correction2 as f32,
            eps: adamw.eps as f32,
        }
    }
}

/// `1 − β1^t` and `√(1 − β2^t)`.
pub(crate) fn corrections(adamw: &AdamW, step: &Step) -> (f64, f64) {
    let t = step.number as f64;
    (1.0 - adamw.beta1.powf(t), (1.0 - adamw.beta2.powf(t)).sqrt())
}

pub(crate) fn check(op: &'static str, step: &Step, params: usize, others: &[(&str, usize)]) -> Result<()> {
    for (name, len) in others {
        if *len != params {
            return Err(Error::Argument { op, what: format!("{name} has {len} elements for {params} parameters") });
        }
    }
    if step.number == 0 {
        return Err(Error::Argument { op, what: "steps count from 1".to_string() });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
