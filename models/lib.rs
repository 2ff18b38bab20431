//! The Wan models: DiT (forward and backward), VAE, umT5, CLIP, and their checkpoint keys.
//! Nothing here reads a path, a flag or a dataset: weights come in as tensors, sizes as `WanArch`.

pub mod adapter;
pub mod arch;
pub mod clip;
pub mod error;
#[cfg(test)]
mod golden;
pub mod keys;
pub mod linear;
pub mod siblings;
pub mod umt5;
pub mod vae;
pub mod wan;

pub use error::{Error, Result};
