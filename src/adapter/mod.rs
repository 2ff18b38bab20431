//! The trainable side of a run: which linears get an adapter (`target`), what kind (`network`), their fp32 masters in one
//! flat buffer with a view per parameter (`params`), their gradients in another of the same layout (`grads`), how they
//! start (`init`, `start`), dropout, and max-norm regularisation.

pub mod dropout;
mod flat;
pub mod grads;
pub mod init;
pub mod network;
pub mod norm;
pub mod params;
pub mod start;
pub mod target;

pub use dropout::StepAdapters;
pub use flat::{add_assign, Flat};
pub use grads::Grads;
pub use network::NetworkSpec;
pub use params::{AdapterParams, Param};
pub use target::{select, Patterns};
