//! Checkpoints of every form people hold, read one tensor at a time.

mod header;
pub mod merge;
mod pickle;
mod shards;
pub mod source;

pub use merge::{merge_into, merge_map, LoraMerge};
pub use source::Source;
