//! UniPC of order 2 (`bh2`) for flow matching, on data predictions: each step first corrects the sample it was given,
//! now that the model has been asked there, then predicts the next. alpha = 1 - sigma, lambda = ln(alpha / sigma).

use super::dpmpp::{data_prediction, lambda};
use candle_core::{Result, Tensor};

#[derive(Default)]
pub(super) struct UniPc {
    /// Data predictions of the two steps before, latest last.
    past: Vec<Tensor>,
    /// Sample from which the last prediction started, and the order it used.
    last: Option<(Tensor, usize)>,
}

/// phi_1 .. of the exponential integrator at `hh`, scaled: `b_k = phi_k k! / B` with `B = e^hh - 1`.
fn b_coefficients<const N: usize>(hh: f64) -> [f64; N] {
    let big_b = hh.exp_m1();
    let mut phi = big_b / hh - 1.0;
    let mut factorial = 1.0;
    std::array::from_fn(|k| {
        let b = phi * factorial / big_b;
        factorial *= (k + 2) as f64;
        phi = phi / hh - 1.0 / factorial;
        b
    })
}

impl UniPc {
    pub(super) fn step(&mut self, sigmas: &[f32], i: usize, v: &Tensor, x: &Tensor) -> Result<Tensor> {
        let m_new = data_prediction(sigmas[i], v, x)?;
        let x = match self.last.take() {
            Some((from, order)) => self.correct(sigmas, i, &m_new, &from, order)?,
            None => x.clone(),
        };
        self.past.push(m_new);
        if self.past.len() > 2 {
            self.past.remove(0);
        }
        let left = sigmas.len() - 1 - i;
        let order = 2.min(left).min(i + 1);
        let out = self.predict(sigmas, i, &x, order)?;
        self.last = Some((x, order));
        Ok(out)
    }

    /// From the corrected sample at `sigmas[i]` to `sigmas[i + 1]`.
    fn predict(&self, sigmas: &[f32], i: usize, x: &Tensor, order: usize) -> Result<Tensor> {
        let m0 = &self.past[self.past.len() - 1];
        let (s, t) = (sigmas[i], sigmas[i + 1]);
        let h = lambda(t) - lambda(s);
        let h_phi_1 = (-h).exp_m1();
        let alpha_t = 1.0 - t as f64;
        let first = ((x * (t as f64 / s as f64))? - (m0 * (alpha_t * h_phi_1))?)?;
        if order == 1 {
            return Ok(first);
        }
        // At order 2 the predictor's coefficient is 1/2 in closed form.
        let m1 = &self.past[self.past.len() - 2];
        let r = (lambda(sigmas[i - 1]) - lambda(s)) / h;
        let d1 = ((m1 - m0)? * (1.0 / r))?;
        first - (d1 * (alpha_t * h_phi_1 * 0.5))?
    }

    /// Redoes the last prediction, from the same start and at the same order, with the answer at its end point known.
    fn correct(&self, sigmas: &[f32], i: usize, m_new: &Tensor, from: &Tensor, order: usize) -> Result<Tensor> {
        let m0 = &self.past[self.past.len() - 1];
        let (s, t) = (sigmas[i - 1], sigmas[i]);
        let h = lambda(t) - lambda(s);
        let hh = -h;
        let h_phi_1 = hh.exp_m1();
        let alpha_t = 1.0 - t as f64;
        let first = ((from * (t as f64 / s as f64))? - (m0 * (alpha_t * h_phi_1))?)?;
        let d1_new = (m_new - m0)?;
        let sum = if order == 1 {
            (d1_new * 0.5)?
        } else {
            let m1 = &self.past[self.past.len() - 2];
            let r = (lambda(sigmas[i - 2]) - lambda(s)) / h;
            let d1 = ((m1 - m0)? * (1.0 / r))?;
            // Solve [1 1; r 1] rho = b.
            let [b1, b2] = b_coefficients::<2>(hh);
            let rho_0 = (b1 - b2) / (1.0 - r);
            let rho_1 = b1 - rho_0;
            ((d1 * rho_0)? + (d1_new * rho_1)?)?
        };
        first - (sum * (alpha_t * h_phi_1))?
    }
}
