//! What the CUDA paths share.

pub(crate) mod blas;
mod copy;
pub mod gpu;
pub(crate) mod stash;
pub(crate) mod tensor_map;
