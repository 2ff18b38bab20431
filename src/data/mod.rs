//! Datasets: a TOML file and the media it names -> items -> clips of RGB frames in their bucket.
//!
//! Reading order: `config` (what the file says) -> `scan` (which files there are, one finding a file) -> `clips`
//! (an item -> clips), which stands on the pure parts [`bucket`], [`frames`] and [`resize`].
//! Nothing here knows of models or caches.

pub mod bucket;
mod caption;
mod clips;
mod config;
mod document;
#[cfg(feature = "video")]
mod ffmpeg;
mod folder;
pub mod frames;
mod listing;
pub mod picture;
pub mod resize;
mod scan;
mod section;
mod table;
mod types;
pub mod video;

pub use clips::{count_frames, decode_image, decode_video, Planned};
pub use config::dataset_name;
pub use frames::Cut;
pub use scan::{check_media, scan};
pub use table::table;
pub use types::*;
