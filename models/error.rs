//! Errors of models: facts only (model, key, shapes); whoever talks to the user adds the words.

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{model}: weight {key} is missing")]
    MissingWeight { model: &'static str, key: String },
    #[error("{model}: weight {key} has shape {got:?}, expected {want:?}")]
    WeightShape { model: &'static str, key: String, got: Vec<usize>, want: Vec<usize> },
    #[error("{model}: {what}")]
    Invalid { model: &'static str, what: String },
    #[error(transparent)]
    Kernel(#[from] wan_kernels::Error),
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

pub type Result<T> = std::result::Result<T, Error>;
