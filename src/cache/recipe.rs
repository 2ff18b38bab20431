//! The recipe record: everything that decides what is in a cache file, written into its metadata as JSON under
//! `wan_train.recipe`, and compared field by field with what a run would do now.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::fingerprint::{hex, nanoseconds, SourceId};
use super::format::{FormatError, Header, RECIPE_KEY};

/// Raised when a change of the program changes what is cached; older files are then stale.
pub const RECIPE_VERSION: u32 = 1;

/// The state of a cache file, for this run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Freshness {
    /// Ours, and what would be made now.
    Fresh,
    /// Whole, but not what would be made now.
    Stale(String),
    /// Made by another program, and of the right shapes: used as it is.
    Foreign,
    /// Cut off, overwritten or not readable.
    Torn(String),
    Missing,
}

impl Freshness {
    pub fn is_usable(&self) -> bool {
        matches!(self, Freshness::Fresh | Freshness::Foreign)
    }

    /// There, but of no use.
    pub fn is_spoilt(&self) -> bool {
        matches!(self, Freshness::Stale(_) | Freshness::Torn(_))
    }

    /// Why the file cannot be used; empty where it can.
    pub fn why(&self) -> String {
        match self {
            Freshness::Fresh | Freshness::Foreign => String::new(),
            Freshness::Stale(why) => format!("stale: {why}"),
            Freshness::Torn(why) => format!("torn: {why}"),
            Freshness::Missing => "not cached yet".to_string(),
        }
    }
}

/// What every recipe says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub version: u32,
    /// Name and version of the program that wrote the file.
    pub program: String,
    /// When, in nanoseconds since 1970.
    pub made_ns: u64,
    /// SHA-256 over the tensors it describes, names and contents in order of name.
    pub payload: String,
}

impl Stamp {
    /// For these tensors, now.
    pub fn new(tensors: &BTreeMap<String, Tensor>) -> anyhow::Result<Self> {
        Ok(Self {
            version: RECIPE_VERSION,
            program: concat!("wan-train ", env!("CARGO_PKG_VERSION")).to_string(),
            made_ns: nanoseconds(SystemTime::now()),
            payload: payload_hash(tensors)?,
        })
    }

    fn check_version(&self) -> Option<String> {
        (self.version != RECIPE_VERSION)
            .then(|| format!("written by {} under recipe version {}, now {RECIPE_VERSION}", self.program, self.version))
    }
}

/// Recipe of a latent file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LatentRecipe {
    #[serde(flatten)]
    pub stamp: Stamp,
    pub source: SourceId,
    pub controls: Vec<SourceId>,
    #[serde(flatten)]
    pub settings: LatentSettings,
    pub vae: String,
    /// Of the CLIP weights, where CLIP features are stored.
    pub clip: Option<String>,
    /// For the last clip made of a video: all clips that the video yields under `cut`.
    pub clips: Option<ClipList>,
}

/// The settings that decide a latent file's content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LatentSettings {
    /// Width and height the frames were resized and cropped to.
    pub bucket: (u32, u32),
    pub start: usize,
    pub frames: usize,
    pub source_fps: Option<f64>,
    /// Dtype of the latents, as in the tensor names.
    pub dtype: String,
    /// Whether the first-frame condition is stored.
    pub i2v: bool,
    /// Whether that condition shows the last frame as well.
    pub last_frame: bool,
    /// Pictures only: the condition is that of an empty frame.
    pub images_as_t2v: bool,
    /// One-frame training: positions of the controls, then of the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_frame: Option<Vec<i64>>,
    /// The old trainer's rules for pixels and constants.
    pub musubi_compat: bool,
}

/// Clips of a video, and the rule they were cut by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClipList {
    pub cut: String,
    /// (start, frames)
    pub all: Vec<(usize, usize)>,
}

/// What a run would make a latent file from, and how.
#[derive(Debug, Clone, Copy)]
pub struct LatentWish<'a> {
    pub source: &'a Path,
    pub controls: &'a [std::path::PathBuf],
    pub settings: &'a LatentSettings,
    /// Fingerprints; `None` where the weights are not at hand and cannot be compared.
    pub vae: Option<&'a str>,
    pub clip: Option<&'a str>,
}

impl LatentRecipe {
    /// `None` if the wish would give this file again, else the first thing that differs.
    pub fn difference(&self, wish: &LatentWish<'_>) -> Option<String> {
        let (was, now) = (&self.settings, wish.settings);
        if let Some(why) = self.stamp.check_version() {
            return Some(why);
        }
        if was.bucket != now.bucket {
            let show = |(w, h): (u32, u32)| format!("{w}x{h}");
            return Some(format!("made at {}, now {}", show(was.bucket), show(now.bucket)));
        }
        if (was.start, was.frames) != (now.start, now.frames) {
            return Some(format!("holds {} frames from {}", was.frames, was.start));
        }
        if was.source_fps != now.source_fps {
            let show = |fps: Option<f64>| fps.map_or("none".to_string(), |f| f.to_string());
            return Some(format!("made for source_fps {}, now {}", show(was.source_fps), show(now.source_fps)));
        }
        if was.dtype != now.dtype {
            return Some(format!("stored as {}, now {}", was.dtype, now.dtype));
        }
        if now.i2v && !was.i2v {
            return Some("made without the first-frame condition that image-to-video needs".to_string());
        }
        if now.i2v && was.last_frame != now.last_frame {
            return Some(format!("made {} the last frame in its condition", with(was.last_frame)));
        }
        if now.i2v && was.images_as_t2v != now.images_as_t2v {
            return Some(format!("made {} i2v_images_as_t2v", with(was.images_as_t2v)));
        }
        if was.one_frame != now.one_frame {
            let show = |p: &Option<Vec<i64>>| p.as_ref().map_or("none".to_string(), |p| format!("{p:?}"));
            return Some(format!(
                "made for one-frame positions {}, now {}",
                show(&was.one_frame),
                show(&now.one_frame)
            ));
        }
        if was.musubi_compat != now.musubi_compat {
            return Some(made_under_compat(was.musubi_compat));
        }
        if wish.vae.is_some_and(|vae| vae != self.vae) {
            return Some("made with another VAE".to_string());
        }
        if let (Some(now), Some(was)) = (wish.clip, &self.clip) {
            if now != was {
                return Some("made with another CLIP".to_string());
            }
        }
        if let Some(why) = self.source.difference(wish.source, self.stamp.made_ns) {
            return Some(why);
        }
        if self.controls.len() != wish.controls.len() {
            return Some(format!("made with {} control files, now {}", self.controls.len(), wish.controls.len()));
        }
        let mut pairs = self.controls.iter().zip(wish.controls);
        pairs.find_map(|(was, now)| was.difference(now, self.stamp.made_ns)).map(|why| format!("control: {why}"))
    }
}

/// Recipe of a caption file; describes its `varlen_t5` tensor alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextRecipe {
    #[serde(flatten)]
    pub stamp: Stamp,
    /// SHA-256 of the caption as it was given to the tokenizer.
    pub caption: String,
    pub umt5: String,
    pub tokenizer: String,
    pub dtype: String,
    /// The old trainer's arithmetic.
    pub musubi_compat: bool,
    /// Tokens of the caption before it was cut to what the model takes.
    pub tokens: usize,
}

/// What a run would make a caption file from, and how; fingerprints are `None` where they cannot be compared.
#[derive(Debug, Clone, Copy)]
pub struct TextWish<'a> {
    pub caption: &'a str,
    pub umt5: Option<&'a str>,
    pub tokenizer: Option<&'a str>,
    pub dtype: &'a str,
    pub musubi_compat: bool,
}

impl TextRecipe {
    pub fn difference(&self, wish: &TextWish<'_>) -> Option<String> {
        if let Some(why) = self.stamp.check_version() {
            return Some(why);
        }
        if self.caption != super::fingerprint::sha256_hex(wish.caption.as_bytes()) {
            return Some("the caption has changed".to_string());
        }
        if self.dtype != wish.dtype {
            return Some(format!("stored as {}, now {}", self.dtype, wish.dtype));
        }
        if wish.umt5.is_some_and(|umt5| umt5 != self.umt5) {
            return Some("made with another text encoder".to_string());
        }
        if wish.tokenizer.is_some_and(|t| t != self.tokenizer) {
            return Some("made with another tokenizer".to_string());
        }
        (self.musubi_compat != wish.musubi_compat).then(|| made_under_compat(self.musubi_compat))
    }
}

fn with(option: bool) -> &'static str {
    if option {
        "with"
    } else {
        "without"
    }
}

fn made_under_compat(compat: bool) -> String {
    format!("made {} musubi_compat", with(compat))
}

/// The recipe of a file, `None` where it has none, or why it cannot be read.
pub fn read<T: serde::de::DeserializeOwned>(header: &Header) -> Result<Option<T>, String> {
    match header.metadata.get(RECIPE_KEY) {
        None => Ok(None),
        Some(json) => serde_json::from_str(json).map(Some).map_err(|e| format!("its recipe cannot be read ({e})")),
    }
}

/// SHA-256 over names and contents of tensors, in order of name.
pub fn payload_hash(tensors: &BTreeMap<String, Tensor>) -> anyhow::Result<String> {
    let mut hash = Sha256::new();
    for (name, tensor) in tensors {
        use safetensors::View;
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name.as_bytes());
        hash.update((tensor.data_len() as u64).to_le_bytes());
        hash.update(View::data(&tensor));
    }
    Ok(hex(&hash.finalize()))
}

/// A file whose time of change is this far from the one in its recipe was copied or written to by another program: its
/// content is then compared with the recipe.
const WRITE_TIME_NS: u64 = 30_000_000_000;

/// Whether the tensors selected by `ours` still are what the stamp describes. Reads the file only if its time of last
/// change gives reason to.
pub fn check_payload(path: &Path, stamp: &Stamp, ours: impl Fn(&str) -> bool) -> Result<(), FormatError> {
    let changed = nanoseconds(std::fs::metadata(path)?.modified()?);
    if changed.abs_diff(stamp.made_ns) <= WRITE_TIME_NS {
        return Ok(());
    }
    let (_, mut tensors) = super::format::read_tensors(path)?;
    tensors.retain(|name, _| ours(name));
    let found = payload_hash(&tensors).map_err(|e| FormatError::Torn(e.to_string()))?;
    match found == stamp.payload {
        true => Ok(()),
        false => Err(FormatError::Torn("its tensors are not those its recipe describes".to_string())),
    }
}
