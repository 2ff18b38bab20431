//! DPM-Solver++ 2M (midpoint) for flow matching: alpha = 1 - sigma, lambda = ln(alpha / sigma), data prediction.

use candle_core::{Result, Tensor};

#[derive(Default)]
pub(super) struct DpmPp {
    /// Data prediction of the step before.
    previous: Option<Tensor>,
}

/// lambda of a noise level: +inf at 0, -inf at 1.
pub(super) fn lambda(sigma: f32) -> f64 {
    let s = sigma as f64;
    (1.0 - s).ln() - s.ln()
}

/// The clean sample that velocity `v` points to: `x - sigma v`.
pub(super) fn data_prediction(sigma: f32, v: &Tensor, x: &Tensor) -> Result<Tensor> {
    x - (v * sigma as f64)?
}

impl DpmPp {
    pub(super) fn step(&mut self, sigmas: &[f32], i: usize, v: &Tensor, x: &Tensor) -> Result<Tensor> {
        let m0 = data_prediction(sigmas[i], v, x)?;
        let last = i + 2 == sigmas.len();
        let (from, to) = (sigmas[i], sigmas[i + 1]);
        let h = lambda(to) - lambda(from);
        let alpha_t = 1.0 - to as f64;
        // exp(-h) - 1; h is infinite where a step starts at pure noise or ends clean, and the limits are exact.
        let decay = (-h).exp_m1();
        let ratio = to as f64 / from as f64;
        // (sigma_t / sigma_s) x - alpha_t (e^-h - 1) D
        let out = match self.previous.take() {
            // First order at both ends: no history yet, and stability at the jump to sigma 0.
            Some(m1) if !last && i > 0 => {
                let h_0 = lambda(from) - lambda(sigmas[i - 1]);
                let r = h_0 / h;
                let d1 = ((&m0 - &m1)? * (1.0 / r))?;
                ((x * ratio)? - (&m0 * (alpha_t * decay))?)? - (d1 * (0.5 * alpha_t * decay))?
            }
            _ => (x * ratio)? - (&m0 * (alpha_t * decay))?,
        };
        self.previous = Some(m0);
        out
    }
}
