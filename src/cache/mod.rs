//! What is computed once per item and kept beside it: latents and caption embeddings, each with the recipe it was
//! made by. `names`, `format`: the files. `recipe`, `fingerprint`: what they were made from. `survey`: which of them
//! can be used. `latents` (`decode` before it, `writer` behind it), `text`: making the others. `table`: what became of
//! every file. `index`: what training reads.
//!
//! A run goes: `data::scan` -> `Survey::take` -> `cache_latents` -> `cache_text` -> `CacheReport::of`, printed -> the
//! scan's and the survey's `check` -> `CacheIndex::build`.

mod decode;
pub mod fingerprint;
pub mod format;
pub mod index;
pub mod latents;
mod listing;
pub mod names;
pub mod one_frame;
pub mod options;
pub mod recipe;
pub mod survey;
pub mod table;
pub mod text;
mod writer;

pub use index::{Bucket, BucketKey, CacheIndex, CachedItem, ItemTensors};
pub use latents::{cache_latents, LatentModels, Lazy};
pub use options::{CacheOptions, LatentGeometry};
pub use survey::{Outcome, Survey};
pub use table::CacheReport;
pub use text::{cache_text, CaptionTokens, TextEncoder, TextModels};
