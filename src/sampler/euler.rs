//! Euler: follow the velocity in a straight line to the next noise level.

use candle_core::{Result, Tensor};

pub(super) fn step(sigmas: &[f32], i: usize, v: &Tensor, x: &Tensor) -> Result<Tensor> {
    x + (v * (sigmas[i + 1] - sigmas[i]) as f64)?
}
