//! One line of the report: the largest errors of a group of comparisons, and whether they are tolerable.

use std::fmt;

use anyhow::{bail, Result};
use candle_core::{DType, Tensor};

/// What a group of comparisons may be off by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tolerance {
    /// Largest absolute difference.
    Abs(f64),
    /// Largest difference relative to the largest number of the same tensor.
    Rel(f64),
    /// Length of the difference relative to the length of the tensor.
    L2(f64),
    /// Not at all: bytes, ids, names.
    Exact,
}

impl fmt::Display for Tolerance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tolerance::Abs(t) => write!(f, "{t:.0e} abs"),
            Tolerance::Rel(t) => write!(f, "{t:.0e} rel"),
            Tolerance::L2(t) => write!(f, "{t:.0e} L2"),
            Tolerance::Exact => f.write_str("exact"),
        }
    }
}

/// Collects comparisons.
pub struct Line {
    tolerance: Tolerance,
    abs: f64,
    rel: f64,
    compared: usize,
    /// What was compared where the error is largest.
    worst: String,
    failure: Option<String>,
}

impl Line {
    pub fn new(tolerance: Tolerance) -> Self {
        Line { tolerance, abs: 0.0, rel: 0.0, compared: 0, worst: String::new(), failure: None }
    }

    /// Notes a failure that is no matter of size; the first one is shown.
    pub fn fail(&mut self, why: String) {
        self.failure.get_or_insert(why);
    }

    /// Two things that must be the same.
    pub fn equal<T: PartialEq + fmt::Debug>(&mut self, what: &str, got: &T, want: &T) {
        self.compared += 1;
        if got != want {
            let short = |v: &T| format!("{v:?}").chars().take(160).collect::<String>();
            self.fail(format!("{what} is {}, expected {}", short(got), short(want)));
        }
    }

    /// Errors computed by the caller.
    pub fn error(&mut self, what: &str, abs: f64, rel: f64) {
        self.compared += 1;
        let (abs, rel) = (nan_is_infinite(abs), nan_is_infinite(rel));
        let larger = match self.tolerance {
            Tolerance::Rel(_) | Tolerance::L2(_) => rel > self.rel,
            _ => abs > self.abs,
        };
        if larger || self.worst.is_empty() {
            self.worst = what.to_string();
        }
        self.abs = self.abs.max(abs);
        self.rel = self.rel.max(rel);
    }

    /// Numbers against numbers.
    pub fn values(&mut self, what: &str, got: &[f64], want: &[f64]) {
        if got.len() != want.len() {
            return self.fail(format!("{what} has {} numbers, expected {}", got.len(), want.len()));
        }
        let (mut worst, mut largest, mut error2, mut length2) = (0f64, 0f64, 0f64, 0f64);
        for (got, want) in got.iter().zip(want) {
            // Equal covers infinities; numbers that are not any must not be any on both sides.
            let difference = match got == want || (got.is_nan() && want.is_nan()) {
                true => 0.0,
                false => nan_is_infinite((got - want).abs()),
            };
            worst = worst.max(difference);
            error2 += difference * difference;
            if want.is_finite() {
                largest = largest.max(want.abs());
                length2 += want * want;
            }
        }
        let relative = match self.tolerance {
            Tolerance::L2(_) => ratio(error2.sqrt(), length2.sqrt()),
            _ => ratio(worst, largest),
        };
        self.error(what, worst, relative);
    }

    /// Tensors of one shape, whatever their dtypes; where the tolerance is exact the dtypes must agree as well.
    pub fn tensor(&mut self, what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
        if got.dims() != want.dims() {
            bail!("{what} has shape {:?}, expected {:?}", got.dims(), want.dims());
        }
        if self.tolerance == Tolerance::Exact && got.dtype() != want.dtype() {
            bail!("{what} is {:?}, expected {:?}", got.dtype(), want.dtype());
        }
        self.values(what, &numbers(got)?, &numbers(want)?);
        Ok(())
    }

    pub fn passed(&self) -> bool {
        let small = match self.tolerance {
            Tolerance::Abs(t) => self.abs <= t,
            Tolerance::Rel(t) | Tolerance::L2(t) => self.rel <= t,
            Tolerance::Exact => self.abs == 0.0,
        };
        // A check that compared nothing has checked nothing.
        small && self.failure.is_none() && self.compared > 0
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "abs {:.1e}  rel {:.1e}  tol {}  ", self.abs, self.rel, self.tolerance)?;
        match (&self.failure, self.passed()) {
            (_, true) => f.write_str("ok"),
            (Some(why), _) => write!(f, "FAIL: {why}"),
            (None, _) if self.compared == 0 => f.write_str("FAIL: there was nothing to compare"),
            (None, _) => write!(f, "FAIL: {}", self.worst),
        }
    }
}

fn nan_is_infinite(x: f64) -> f64 {
    if x.is_nan() {
        f64::INFINITY
    } else {
        x
    }
}

fn ratio(error: f64, size: f64) -> f64 {
    match error == 0.0 {
        true => 0.0,
        false => error / size,
    }
}

/// Length of the difference relative to the length of `want`.
pub fn relative(got: &Tensor, want: &Tensor) -> Result<f64> {
    let (got, want) = (numbers(got)?, numbers(want)?);
    let error: f64 = got.iter().zip(&want).map(|(g, w)| (g - w) * (g - w)).sum();
    Ok(ratio(error.sqrt(), want.iter().map(|w| w * w).sum::<f64>().sqrt()))
}

/// Every element, flattened.
pub fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_device(&candle_core::Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(tolerance: Tolerance, got: &[f64], want: &[f64]) -> bool {
        let mut line = Line::new(tolerance);
        line.values("x", got, want);
        line.passed()
    }

    #[test]
    fn tolerances_mean_what_they_say() {
        assert!(passed(Tolerance::Abs(0.1), &[1.05, 2.0], &[1.0, 2.0]));
        assert!(!passed(Tolerance::Abs(0.01), &[1.05, 2.0], &[1.0, 2.0]));
        assert!(passed(Tolerance::Rel(0.03), &[1.05, 2.0], &[1.0, 2.0]));
        assert!(!passed(Tolerance::Rel(0.02), &[1.05, 2.0], &[1.0, 2.0]));
        assert!(passed(Tolerance::L2(0.03), &[1.05, 2.0], &[1.0, 2.0]));
        assert!(!passed(Tolerance::Exact, &[1.0 + 1e-15], &[1.0]));
    }

    #[test]
    fn what_is_no_number_never_passes_for_one() {
        for tolerance in [Tolerance::Abs(1.0), Tolerance::Rel(1.0), Tolerance::L2(1.0), Tolerance::Exact] {
            assert!(!passed(tolerance, &[f64::NAN], &[1.0]));
            assert!(!passed(tolerance, &[1.0], &[f64::NAN]));
            assert!(!passed(tolerance, &[f64::INFINITY], &[1.0]));
            assert!(!passed(tolerance, &[1.0, 2.0], &[1.0]));
            assert!(!passed(tolerance, &[1e-9], &[0.0]) || matches!(tolerance, Tolerance::Abs(_)));
            assert!(passed(tolerance, &[f64::NAN, 0.0], &[f64::NAN, 0.0]));
            assert!(!Line::new(tolerance).passed());
        }
    }
}
