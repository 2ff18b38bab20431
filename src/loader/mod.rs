//! Checkpoints of every form people hold, read one tensor at a time.

mod header;
mod pickle;
mod shards;
pub mod source;

pub use source::Source;
