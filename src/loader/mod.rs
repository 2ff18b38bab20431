//! Checkpoints of every form people hold, read one tensor at a time.
//!
//! [`Source`] opens files, [`load_dit_by_block`] makes a DiT of one (LoRAs merged, quantised), [`Keyed`] gives the tensors of the
//! VAE, umT5 and CLIP under the names their models ask for.

#[cfg(feature = "cuda")]
mod ahead;
mod dit;
mod fp8;
mod header;
mod kept;
mod keyed;
#[cfg(target_os = "linux")]
mod mapped;
mod merge;
mod part;
mod pickle;
mod shards;
mod source;
mod torch;
mod values;

pub use dit::{check_precision, checkpoint_dtype, compact, load_dit_by_block, DitTable, Fp8, LoadOptions, Progress};
pub use kept::{kept_bytes, Found, KeptFp8};
pub use keyed::{clip_name, vae_name, Keyed};
pub use merge::{merge_into, merge_map, LoraMerge};
pub use part::Reading;
pub use source::{Fetch, Source};
pub use values::DitValues;
