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
mod draft;
#[cfg(feature = "video")]
mod ffmpeg;
mod folder;
pub mod frames;
mod listing;
#[cfg(feature = "video")]
mod mp4;
pub mod picture;
pub mod repair;
pub mod resize;
mod scan;
mod section;
mod table;
mod types;
pub mod video;

pub use clips::{count_frames, decode_image, decode_video, Planned};
pub use config::{dataset_name, known_keys};
pub use draft::{draft, Draft};
pub use frames::Cut;
pub use scan::{check_media, scan};
pub use table::table;
pub use types::*;

/// The text of a dataset file.
pub fn read_text(path: &std::path::Path) -> anyhow::Result<String> {
    document::read_text(path, "the dataset file")
}
