//! Averages over the checkpoints of one run, made after it: `s ← β·s + (1 − β)·v` over the files in order, factor by
//! factor, as the old tool does. β is constant, runs from one value to another, or follows the power function of
//! Karras et al. 2023 (arXiv 2312.02696) for a relative width sigma_rel.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{DType, Tensor};

use crate::checkpoint::{LoraFile, ModuleOut};
use crate::error::UserError;

/// How the weight of the past is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decay {
    /// From `first` to `last` over the files.
    Linear { first: f64, last: f64 },
    /// `(1 − 1/t)^(γ+1)`: the first file has no part in it.
    Power { gamma: f64 },
}

impl Decay {
    /// Of `--beta` and `--beta2`.
    pub fn linear(first: f64, last: Option<f64>) -> Result<Self, UserError> {
        let last = last.unwrap_or(first);
        for (name, beta) in [("beta", first), ("beta2", last)] {
            if !(0.0..=1.0).contains(&beta) {
                return Err(UserError::usage(format!("--{name} {beta} must lie between 0 and 1")));
            }
        }
        Ok(Decay::Linear { first, last })
    }

    /// Of `--sigma_rel`: γ is the largest real root of γ³ + 7γ² + (16 − σ⁻²)γ + (12 − σ⁻²) that is not negative.
    pub fn power(sigma_rel: f64) -> Result<Self, UserError> {
        let wrong = || {
            UserError::usage(format!("--sigma_rel {sigma_rel} is out of range"))
                .hint("use a value between 0 and 0.28, such as 0.2 (a wide average) or 0.05 (a narrow one)")
        };
        if !(sigma_rel.is_finite() && sigma_rel > 0.0) {
            return Err(wrong());
        }
        let inverse = sigma_rel.powi(-2);
        let f = |g: f64| ((g + 7.0) * g + (16.0 - inverse)) * g + (12.0 - inverse);
        // The polynomial rises for large γ, and its value at 0 is not positive exactly if there is such a root.
        if f(0.0) > 0.0 {
            return Err(wrong());
        }
        let (mut low, mut high) = (0.0, 1.0);
        while f(high) < 0.0 {
            (low, high) = (high, 2.0 * high);
        }
        for _ in 0..200 {
            let middle = 0.5 * (low + high);
            if f(middle) < 0.0 {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(Decay::Power { gamma: 0.5 * (low + high) })
    }

    /// The weight of the past when file `index` (from 1; file 0 is the start) of `count` files is taken in.
    pub fn beta(&self, index: usize, count: usize) -> f64 {
        match *self {
            Decay::Linear { first, last } if count > 2 => {
                first + (last - first) * (index - 1) as f64 / (count - 2) as f64
            }
            Decay::Linear { first, .. } => first,
            Decay::Power { gamma } => (1.0 - 1.0 / index as f64).powf(gamma + 1.0),
        }
    }
}

/// The average of at least two files with the same modules, factors and alphas.
pub fn average(files: &[LoraFile], decay: Decay) -> Result<Vec<ModuleOut>> {
    let Some((start, rest)) = files.split_first().filter(|(_, rest)| !rest.is_empty()) else {
        return Err(UserError::usage("an average takes two files or more").into());
    };
    for file in rest {
        same_modules(start, file)?;
    }
    let mut outs = Vec::new();
    for name in start.modules() {
        let Some(module) = start.module(name)? else { continue };
        let mut sums: BTreeMap<&'static str, Tensor> = BTreeMap::new();
        for (suffix, t) in &module.factors {
            sums.insert(*suffix, t.to_dtype(DType::F32)?);
        }
        for (i, file) in rest.iter().enumerate() {
            let Some(next) = file.module(name)? else { continue };
            let differ = |what: String| -> anyhow::Error {
                let (a, b) = (start.path().display(), file.path().display());
                UserError::new(format!("{a} and {b} cannot be averaged: {what}"))
                    .hint("average checkpoints of one run")
                    .into()
            };
            if module.alpha != next.alpha {
                return Err(differ(format!("the alpha of {name} is {:?} and {:?}", module.alpha, next.alpha)));
            }
            let beta = decay.beta(i + 1, files.len());
            for (suffix, sum) in &mut sums {
                let Some(value) = next.factors.get(suffix).filter(|v| v.dims() == sum.dims()) else {
                    return Err(differ(format!("{name} has other factors")));
                };
                *sum = (sum.affine(beta, 0.0)? + value.to_dtype(DType::F32)?.affine(1.0 - beta, 0.0)?)?;
            }
        }
        let alpha = module.alpha.or(module.rank().map(|r| r as f64)).unwrap_or(1.0);
        outs.push(ModuleOut { site: name.to_owned(), params: sums.into_iter().collect(), alpha });
    }
    Ok(outs)
}

fn same_modules(a: &LoraFile, b: &LoraFile) -> Result<(), UserError> {
    let lacking = |a: &LoraFile, b: &LoraFile| a.modules().find(|m| !b.adapts(m)).map(str::to_owned);
    for (has, lacks) in [(a, b), (b, a)] {
        if let Some(module) = lacking(has, lacks) {
            return Err(UserError::new(format!(
                "{} cannot be averaged with {}: it has no {module}",
                lacks.path().display(),
                has.path().display()
            ))
            .hint("average checkpoints of one run"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decays_are_those_of_the_old_tool() {
        let constant = Decay::linear(0.95, None).unwrap();
        assert!((1..5).all(|i| constant.beta(i, 5) == 0.95));
        let linear = Decay::linear(0.9, Some(0.98)).unwrap();
        let betas: Vec<f64> = (1..4).map(|i| linear.beta(i, 4)).collect();
        assert!((betas[0] - 0.9).abs() < 1e-12 && (betas[1] - 0.94).abs() < 1e-12 && (betas[2] - 0.98).abs() < 1e-12);
        assert_eq!(linear.beta(1, 2), 0.9);
        let Decay::Power { gamma } = Decay::power(0.2).unwrap() else { panic!() };
        let s = 0.2f64.powi(-2);
        assert!((gamma.powi(3) + 7.0 * gamma.powi(2) + (16.0 - s) * gamma + (12.0 - s)).abs() < 1e-9);
        // The relative width of t^γ, from its mean and variance.
        let width = ((gamma + 1.0) / ((gamma + 2.0).powi(2) * (gamma + 3.0))).sqrt();
        assert!((width - 0.2).abs() < 1e-9, "{width}");
        let power = Decay::Power { gamma };
        assert_eq!(power.beta(1, 3), 0.0, "the first file has no part");
        assert!((power.beta(2, 3) - 0.5f64.powf(gamma + 1.0)).abs() < 1e-15);
        assert!(Decay::power(0.5).is_err() && Decay::power(-1.0).is_err() && Decay::linear(1.5, None).is_err());
    }
}
