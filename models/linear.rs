//! A frozen linear and its adapter: forward and backward on one page. The base gets no gradient.

use candle_core::{DType, Tensor};

use crate::{Error, Result};

/// A weight matrix as it is stored. Nothing trains it.
#[derive(Debug, Clone)]
pub enum Weight {
    /// `[o, i]` in any float dtype.
    Dense(Tensor),
    /// e4m3fn codes `[o, i]` (u8) with a scale per block `[o, i/block, 1]`, per row `[o, 1]` or for all `[]` / `[1]`.
    /// The value is code x scale, rounded to the scale's dtype.
    Scaled { q: Tensor, scale: Tensor },
    /// e4m3fn codes `[o, i]` (u8) without a scale: the lossy cast of plain `--fp8_base` in compat mode.
    Cast(Tensor),
}

impl Weight {
    /// The shape of the matrix (codes and values have the same).
    pub fn dims(&self) -> &[usize] {
        match self {
            Weight::Dense(w) | Weight::Cast(w) | Weight::Scaled { q: w, .. } => w.dims(),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        match self {
            Weight::Dense(w) | Weight::Cast(w) => size(w),
            Weight::Scaled { q, scale } => size(q) + size(scale),
        }
    }
}

/// `y = x Wᵀ + b` with a weight that never changes.
#[derive(Debug, Clone)]
pub struct Frozen {
    pub weight: Weight,
    /// `[o]`, any float dtype.
    pub bias: Option<Tensor>,
}

impl Frozen {
    /// Checks shapes and dtypes once, so that nothing below has to.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Result<Self> {
        let invalid = |what: String| Err(Error::Invalid { model: "linear", what });
        let [o, i] = *weight.dims() else {
            return invalid(format!("a weight of shape {:?} is no matrix", weight.dims()));
        };
        match &weight {
            Weight::Dense(w) if !w.dtype().is_float() => return invalid(format!("a dense weight of {:?}", w.dtype())),
            Weight::Cast(q) | Weight::Scaled { q, .. } if q.dtype() != DType::U8 => {
                return invalid(format!("fp8 codes of {:?}, expected u8", q.dtype()))
            }
            Weight::Scaled { scale, .. } => {
                let fits = match *scale.dims() {
                    [] | [1] => true,
                    [rows, 1] => rows == o,
                    [rows, blocks, 1] => rows == o && blocks > 0 && i % blocks == 0,
                    _ => false,
                };
                if !fits || !scale.dtype().is_float() {
                    return invalid(format!("a {:?} scale {:?} for a [{o}, {i}] weight", scale.dtype(), scale.dims()));
                }
            }
            _ => {}
        }
        if let Some(b) = &bias {
            if b.dims() != [o] || !b.dtype().is_float() {
                return invalid(format!("a {:?} bias {:?} for a [{o}, {i}] weight", b.dtype(), b.dims()));
            }
        }
        Ok(Self { weight, bias })
    }

    pub fn out_features(&self) -> usize {
        self.weight.dims()[0]
    }

    pub fn in_features(&self) -> usize {
        self.weight.dims()[1]
    }
}
