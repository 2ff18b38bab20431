//! Errors of ops: facts only (op, tensor, shapes, dtypes); whoever talks to the user adds the words.

use candle_core::{DType, Shape};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{op}: {tensor} has shape {got:?}, expected {want}")]
    Shape { op: &'static str, tensor: &'static str, got: Shape, want: String },
    #[error("{op}: {tensor} is {got:?}, expected {want}")]
    Dtype { op: &'static str, tensor: &'static str, got: DType, want: &'static str },
    #[error("{op}: {what}")]
    Argument { op: &'static str, what: String },
    /// The driver, a library of it, or the card itself refused.
    #[error("{op}: {what}")]
    Gpu { op: &'static str, what: String },
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

pub type Result<T> = std::result::Result<T, Error>;
