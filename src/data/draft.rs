//! A dataset file for a folder, to begin with: pictures; clips from their head; long clips at a lower resolution.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{caption, folder, frames, picture, video};
use crate::error::UserError;

/// The text of a dataset file, and what to know about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    pub text: String,
    pub notes: Vec<String>,
}

/// Lengths of the part at full resolution, and of the one at the lower.
const SHORT: [usize; 3] = [1, 25, 45];
const LONG: [usize; 2] = [45, 81];
const FULL: (u32, u32) = (960, 544);
const LOWER: (u32, u32) = (640, 368);

/// What a folder holds.
#[derive(Default)]
struct Media {
    pictures: usize,
    /// Frames at 16 a second, of each readable clip.
    lengths: Vec<usize>,
    /// Clips by frame rate, in thousandths.
    rates: BTreeMap<u64, usize>,
}

impl Media {
    fn is_empty(&self) -> bool {
        self.pictures == 0 && self.lengths.is_empty()
    }
}

/// Looks at a folder and its subfolders. Errors: it does not exist, is no directory, or holds no picture and no clip.
pub fn draft(root: &Path) -> Result<Draft> {
    if !root.is_dir() {
        let what = if root.exists() { "is a file, not a directory" } else { "does not exist" };
        return Err(UserError::usage(format!("{} {what}", root.display()))
            .hint("give the folder that holds the pictures and clips")
            .into());
    }
    let root = std::path::absolute(root)?;
    let mut folders = vec![root.clone()];
    let inside = folder::list(&root).map_err(|e| UserError::new(format!("{} cannot be read: {e}", root.display())))?;
    folders.extend(inside.into_iter().filter(|p| p.is_dir() && !folder::is_hidden(p) && folder::name(p) != "cache"));
    let mut notes = Vec::new();
    let mut found = Vec::new();
    for dir in folders {
        let media = look(&dir, &mut notes)?;
        if !media.is_empty() {
            found.push((dir, media));
        }
    }
    if found.is_empty() {
        return Err(UserError::new(format!("there is no picture and no clip in {} or its subfolders", root.display()))
            .hint("put them there, each with a caption in a .txt file of the same name")
            .into());
    }
    let mut text = head();
    for (dir, media) in found.iter().filter(|(_, m)| m.pictures > 0) {
        pictures(&mut text, dir, media, &root);
    }
    for (dir, media) in found.iter().filter(|(_, m)| !m.lengths.is_empty()) {
        clips(&mut text, dir, media, &root, &mut notes);
    }
    Ok(Draft { text, notes })
}

fn look(dir: &Path, notes: &mut Vec<String>) -> Result<Media> {
    let files = folder::list(dir).map_err(|e| UserError::new(format!("{} cannot be read: {e}", dir.display())))?;
    let mut media = Media::default();
    let mut bare = 0;
    for path in files.iter().filter(|p| p.is_file() && !folder::is_hidden(p)) {
        // A gif counts as a clip here only if it moves in a folder of clips: the schema takes it for a picture too.
        let is_picture = folder::has_extension(path, &picture::EXTENSIONS);
        let is_clip = !is_picture && folder::has_extension(path, &video::EXTENSIONS);
        if is_picture {
            media.pictures += 1;
        } else if is_clip {
            match video::probe(path, true, false) {
                Ok(facts) => {
                    let rate = facts.fps.filter(|fps| *fps > 0.0);
                    let factor = rate.map_or(1.0, |fps| frames::TARGET_FPS / fps);
                    media.lengths.push((facts.frames as f64 * factor) as usize);
                    *media.rates.entry(rate.map_or(0, |fps| (fps * 1000.0).round() as u64)).or_default() += 1;
                }
                Err(e) => notes.push(format!("{} cannot be read: {e:#}", path.display())),
            }
        }
        let caption = || caption::read(&path.with_extension("txt"));
        if (is_picture || is_clip) && !matches!(caption(), Ok(Some(_))) {
            bare += 1;
        }
    }
    if bare > 0 {
        notes.push(format!("{bare} files in {} have no caption (a .txt of the same name) yet", dir.display()));
    }
    Ok(media)
}

fn head() -> String {
    let (w, h) = FULL;
    format!(
        "# What to train on. Every picture and clip has its caption in a .txt file of the same name.\n\
         # `wan-train check` shows what becomes of it; `wan-train show datasets/wan22-dataset-config-local.toml` explains every key.\n\n\
         [general]\n\
         # An area: every item gets the size of about so many pixels that is nearest to its own shape.\n\
         resolution = [{w}, {h}]\n\
         enable_bucket = true\n\
         bucket_no_upscale = true\n\
         caption_extension = \".txt\"\n\
         batch_size = 1\n\
         num_repeats = 1\n"
    )
}

/// A path as a TOML string.
fn quoted(path: &Path) -> String {
    toml::Value::from(path.to_string_lossy().replace('\\', "/")).to_string()
}

/// Where the caches of a part go: under the root, out of the way of the media.
fn cache(root: &Path, dir: &Path, part: &str) -> PathBuf {
    let inside = dir.strip_prefix(root).ok().filter(|p| !p.as_os_str().is_empty());
    let name = inside.map_or(part.to_owned(), |p| format!("{}-{part}", p.to_string_lossy()));
    root.join("cache").join(name)
}

fn pictures(text: &mut String, dir: &Path, media: &Media, root: &Path) {
    let _ = write!(
        text,
        "\n# ---- pictures: how it looks ({} of them)\n[[datasets]]\nimage_directory = {}\ncache_directory = {}\n",
        media.pictures,
        quoted(dir),
        quoted(&cache(root, dir, "pictures"))
    );
}

fn clips(text: &mut String, dir: &Path, media: &Media, root: &Path, notes: &mut Vec<String>) {
    let longest = media.lengths.iter().copied().max().unwrap_or(0);
    let reached = |targets: &[usize]| -> Vec<usize> { targets.iter().copied().filter(|t| *t <= longest).collect() };
    let mut short = reached(&SHORT);
    // Clips between two of the usual lengths give what they have.
    if short.len() < SHORT.len() && frames::floor_4n1(longest.max(1)) > *short.last().unwrap_or(&0) {
        short.push(frames::floor_4n1(longest.max(1)));
    }
    let rate = media.rates.iter().max_by_key(|(rate, n)| (**n, **rate)).map_or(0, |(rate, _)| *rate);
    let off = |other: u64| (other as f64 / rate.max(1) as f64 - 1.0).abs() > 0.02;
    if media.rates.keys().any(|other| off(*other)) {
        let all: Vec<String> = media.rates.iter().map(|(r, n)| format!("{n} at {}", *r as f64 / 1000.0)).collect();
        notes.push(format!(
            "the clips in {} have several frame rates ({}): put those of another rate in a folder of their own",
            dir.display(),
            all.join(", ")
        ));
    }
    let fps = rate as f64 / 1000.0;
    let fps = if rate > 0 { format!("source_fps = {fps:?}\n") } else { String::new() };
    let _ = write!(
        text,
        "\n# ---- clips: how it moves ({} of them; lengths in frames at 16 a second, from the beginning of each)\n\
         [[datasets]]\nvideo_directory = {}\ncache_directory = {}\ntarget_frames = {short:?}\n\
         frame_extraction = \"head\"\n{fps}",
        media.lengths.len(),
        quoted(dir),
        quoted(&cache(root, dir, "clips")),
    );
    let long = reached(&LONG);
    if !long.is_empty() {
        let (w, h) = LOWER;
        let _ = write!(
            text,
            "\n# ---- the same clips, longer and at a lower resolution: how it goes on\n\
             [[datasets]]\nvideo_directory = {}\ncache_directory = {}\nresolution = [{w}, {h}]\n\
             target_frames = {long:?}\nframe_extraction = \"uniform\"\nframe_sample = 2\n{fps}",
            quoted(dir),
            quoted(&cache(root, dir, "clips-long")),
        );
    }
}
