//! The values that pass between the stages of the data path.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::error::UserError;

/// What the command line says about data, beside the dataset file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataOptions {
    /// Old rules: buckets of videos, orientation, `source_fps` below 16, colour matrices.
    pub musubi_compat: bool,
    /// An item without a caption is used with an empty one instead of being an error.
    pub allow_missing_captions: bool,
    /// An unreadable file is left out instead of being an error.
    pub allow_bad_media: bool,
}

/// Pictures or clips; a dataset holds one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Image,
    Video,
}

/// Where the items of a dataset come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Every media file of a directory, not of its subdirectories, sorted by name.
    Directory(PathBuf),
    /// One JSON object a line.
    Jsonl(PathBuf),
}

impl Source {
    pub fn path(&self) -> &Path {
        match self {
            Source::Directory(p) | Source::Jsonl(p) => p,
        }
    }
}

/// How clips are cut from a video of `n` frames, for each target length `T`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FrameExtraction {
    /// The first `T` frames.
    Head,
    /// Starts 0, T, 2T, ...; the tail is left.
    Chunk,
    /// Starts 0, stride, 2·stride, ...
    Slide,
    /// `frame_sample` starts, evenly spread.
    Uniform,
    /// One clip, as long as `max_frames` and 4n+1 allow; targets are ignored.
    Full,
}

/// One `[[datasets]]` table with every option resolved: dataset, else `[general]`, else default.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Entry {
    /// Position in the file, from 0.
    pub index: usize,
    pub kind: Kind,
    pub source: Source,
    pub control_directory: Option<PathBuf>,
    /// Where cache files go; by default beside the media. No two entries share one.
    pub cache_directory: PathBuf,
    /// Width, height.
    pub resolution: (u32, u32),
    /// With its dot; appended to the stem of the media file.
    pub caption_extension: String,
    pub batch_size: usize,
    pub num_repeats: usize,
    pub enable_bucket: bool,
    pub bucket_no_upscale: bool,
    pub no_resize_control: bool,
    pub control_resolution: Option<(u32, u32)>,
    pub fp_latent_window_size: u32,
    pub fp_1f_clean_indices: Option<Vec<i64>>,
    pub fp_1f_target_index: Option<i64>,
    pub fp_1f_no_post: bool,
    /// Sorted, unique, each 4n+1.
    pub target_frames: Vec<usize>,
    pub frame_extraction: FrameExtraction,
    pub frame_stride: usize,
    pub frame_sample: usize,
    pub max_frames: usize,
    /// Frame rate of the sources; frames are resampled to 16 a second when given.
    pub source_fps: Option<f64>,
    /// Old rules (see [`DataOptions::musubi_compat`]).
    pub musubi_compat: bool,
}

/// A dataset file, read, checked and resolved.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DatasetConfig {
    pub path: PathBuf,
    pub entries: Vec<Entry>,
    /// Things worth telling the user once: deprecated names, rounded frame counts, assumed defaults.
    pub notes: Vec<String>,
}

/// What is known of a medium without decoding it whole.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Probe {
    /// Width and height as shown, after orientation.
    pub size: (u32, u32),
    /// Frames in the file (1 for a picture); for a video the container's word, or a count of its packets.
    pub frames: usize,
    /// Average frame rate, of a video file.
    pub fps: Option<f64>,
    /// Length in seconds, of a video file of variable frame rate whose timestamps are used (`source_fps` given).
    pub variable: Option<f64>,
}

/// One picture or video with its caption and controls.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Item {
    /// Index into [`DatasetConfig::entries`].
    pub dataset: usize,
    pub kind: Kind,
    /// A media file, or a directory of frames.
    pub path: PathBuf,
    /// File name without its last extension: the base of the cache file names, unique in a dataset.
    pub stem: String,
    /// `None` where there is none (allowed only by [`DataOptions::allow_missing_captions`]).
    pub caption: Option<String>,
    /// Control pictures in their order, or one control video (file or directory of frames).
    pub controls: Vec<PathBuf>,
    pub probe: Probe,
}

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Used,
    Dropped,
    Error,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Used => "used",
            Verdict::Dropped => "dropped",
            Verdict::Error => "error",
        })
    }
}

/// One row of the table that ends every scan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub dataset: usize,
    pub path: PathBuf,
    pub verdict: Verdict,
    pub why: String,
}

impl Finding {
    pub fn new(dataset: usize, path: impl Into<PathBuf>, verdict: Verdict, why: impl Into<String>) -> Self {
        Self { dataset, path: path.into(), verdict, why: why.into() }
    }
}

/// All items that can be used, and one finding for every file seen.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ScanReport {
    pub items: Vec<Item>,
    pub findings: Vec<Finding>,
    /// What can be done about the errors, each remedy once.
    pub remedies: Vec<String>,
}

impl ScanReport {
    /// One error that lists every [`Verdict::Error`] finding, if there is any.
    pub fn check(&self) -> Result<()> {
        let bad: Vec<_> = self.findings.iter().filter(|f| f.verdict == Verdict::Error).collect();
        if bad.is_empty() {
            return Ok(());
        }
        let mut what = match bad.len() {
            1 => "a file of the dataset cannot be used:".to_string(),
            n => format!("{n} files of the dataset cannot be used:"),
        };
        for f in &bad {
            what.push_str(&format!("\n  {}: {}", f.path.display(), f.why));
        }
        let mut error = UserError::new(what);
        if !self.remedies.is_empty() {
            error = error.hint(self.remedies.join("; "));
        }
        Err(error.into())
    }
}

/// Consecutive frames of one item, resized and cropped to their bucket.
///
/// Frames are shared between overlapping clips, so holding one costs a pointer.
#[derive(Debug, Clone)]
pub struct Clip {
    /// Index of the first frame, after resampling to 16 a second.
    pub start: usize,
    /// 4n+1 frames of one size.
    pub frames: Vec<Arc<RgbImage>>,
    /// Width and height of the frames: the bucket.
    pub size: (u32, u32),
    /// Width and height of the source as shown, before resizing.
    pub original: (u32, u32),
    /// As many control frames, where the item has a control. Pictures: one frame, whose size may differ
    /// (`no_resize_control`, `control_resolution`).
    pub control: Option<Vec<Arc<RgbImage>>>,
}

impl Clip {
    /// The size that stands in the name of the latent cache file: the true original size of a picture, the bucket of a
    /// video (whose frames are resized while they are decoded).
    pub fn name_size(&self, kind: Kind) -> (u32, u32) {
        match kind {
            Kind::Image => self.original,
            Kind::Video => self.size,
        }
    }
}
