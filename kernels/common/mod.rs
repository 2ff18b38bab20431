//! What the CUDA paths share.

pub(crate) mod blas;
mod copy;
pub mod gpu;
mod pool;
pub(crate) mod stash;
pub(crate) mod tensor_map;
