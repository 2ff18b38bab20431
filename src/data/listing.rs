//! Candidates: what a directory or a jsonl file offers, before anything is opened.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use super::config::{find, plain};
use super::{caption, document, folder, picture, video, DatasetConfig, Entry, Finding, Kind, Source, Verdict};
use crate::error::UserError;

/// A medium that may become an item.
pub struct Candidate {
    pub path: PathBuf,
    pub caption: Caption,
    /// `Err`: why the controls cannot be used.
    pub controls: Result<Vec<PathBuf>, String>,
}

pub enum Caption {
    Text(String),
    /// Where it was looked for.
    Missing(String),
    /// Why it cannot be used.
    Bad(String),
}

/// Everything a dataset offers, and findings for what is none of it.
pub fn candidates(config: &DatasetConfig, entry: &Entry) -> Result<(Vec<Candidate>, Vec<Finding>)> {
    match &entry.source {
        Source::Directory(directory) => from_directory(config, entry, directory),
        Source::Jsonl(file) => Ok((from_jsonl(entry, file)?, Vec::new())),
    }
}

fn extensions(kind: Kind, compat: bool) -> &'static [&'static str] {
    match (kind, compat) {
        (Kind::Image, false) => &picture::EXTENSIONS,
        (Kind::Image, true) => &picture::EXTENSIONS[..picture::OLD_EXTENSIONS],
        (Kind::Video, false) => &video::EXTENSIONS,
        (Kind::Video, true) => &video::EXTENSIONS[..video::OLD_EXTENSIONS],
    }
}

fn from_directory(config: &DatasetConfig, entry: &Entry, directory: &Path) -> Result<(Vec<Candidate>, Vec<Finding>)> {
    let files = folder::list(directory)
        .map_err(|e| UserError::new(format!("the directory {} cannot be read: {e}", directory.display())))?;
    let wanted = extensions(entry.kind, entry.musubi_compat);
    let is_media =
        |p: &Path| folder::has_extension(p, &picture::EXTENSIONS) || folder::has_extension(p, &video::EXTENSIONS);
    let media_stems: BTreeSet<String> =
        files.iter().filter(|p| is_media(p) && p.is_file()).map(|p| folder::stem(p)).collect();
    let controls = match &entry.control_directory {
        Some(dir) => Some(ControlFolder::list(dir)?),
        None => None,
    };
    let elsewhere = Elsewhere::of(config, entry, directory);

    let (mut found, mut findings) = (Vec::new(), Vec::new());
    for path in files {
        if !folder::is_hidden(&path) && !path.is_dir() && folder::has_extension(&path, wanted) {
            let caption = match caption::read(&caption_path(&path, entry)) {
                Ok(Some(text)) => Caption::Text(text),
                Ok(None) => Caption::Missing(format!("no caption file {}", folder::name(&caption_path(&path, entry)))),
                Err(why) => Caption::Bad(why),
            };
            let controls = match &controls {
                Some(controls) => controls.of(&path, entry),
                None => Ok(Vec::new()),
            };
            found.push(Candidate { path, caption, controls });
        } else if let Some(why) = elsewhere.why_not_used(&path, entry, &media_stems) {
            findings.push(Finding::new(entry.index, path, Verdict::Dropped, why));
        }
    }
    Ok((found, findings))
}

fn caption_path(media: &Path, entry: &Entry) -> PathBuf {
    media.with_file_name(format!("{}{}", folder::stem(media), entry.caption_extension))
}

/// What other parts of the configuration make of the files of a directory.
struct Elsewhere {
    /// Another dataset takes the other kind of media from the same directory.
    other_kind_used: bool,
    caption_extensions: Vec<String>,
    /// Caches, controls and sources, which may lie inside.
    directories: Vec<PathBuf>,
}

impl Elsewhere {
    fn of(config: &DatasetConfig, entry: &Entry, directory: &Path) -> Self {
        let here = plain(directory);
        let same = |e: &&Entry| matches!(&e.source, Source::Directory(d) if plain(d) == here);
        let all = || config.entries.iter();
        Self {
            other_kind_used: all().filter(same).any(|e| e.kind != entry.kind),
            caption_extensions: all().filter(same).map(|e| e.caption_extension.clone()).collect(),
            directories: all()
                .flat_map(|e| {
                    [Some(&e.cache_directory), e.control_directory.as_ref(), Some(&e.source.path().to_path_buf())]
                        .map(|d| d.map(|d| plain(d)))
                })
                .flatten()
                .collect(),
        }
    }

    /// Why a file that is no candidate is left out; `None` where that goes without saying: captions, caches, other
    /// datasets' media.
    fn why_not_used(&self, path: &Path, entry: &Entry, media_stems: &BTreeSet<String>) -> Option<String> {
        let name = folder::name(path);
        if path.is_dir() {
            let here = plain(path);
            let known = self.directories.iter().any(|d| d.starts_with(&here));
            return (!known).then(|| match entry.kind {
                Kind::Image => "a directory: subdirectories are not searched".into(),
                Kind::Video => {
                    "a directory: subdirectories are not searched; frames in directories need a jsonl file".into()
                }
            });
        }
        if folder::is_hidden(path) {
            return Some("a hidden file".into());
        }
        if name.ends_with("_wan.safetensors") || name.ends_with("_wan_te.safetensors") {
            return None;
        }
        if let Some(stem) = self.caption_extensions.iter().find_map(|e| name.strip_suffix(e.as_str())) {
            return (!media_stems.contains(stem)).then(|| "a caption without its picture or video".into());
        }
        let other = match entry.kind {
            Kind::Image => Kind::Video,
            Kind::Video => Kind::Image,
        };
        if folder::has_extension(path, extensions(entry.kind, false)) {
            return Some("the tool to be compatible with does not list this file type".into());
        }
        if folder::has_extension(path, extensions(other, false)) {
            return (!self.other_kind_used).then(|| match entry.kind {
                Kind::Image => "a video: it needs a dataset with video_directory".into(),
                Kind::Video => "a picture: it needs a dataset with image_directory".into(),
            });
        }
        Some("neither picture nor video nor caption".into())
    }
}

/// The files of a control directory, by stem and by name.
struct ControlFolder {
    directory: PathBuf,
    files: Vec<PathBuf>,
}

impl ControlFolder {
    fn list(directory: &Path) -> Result<Self> {
        let files = folder::list(directory)
            .map_err(|e| UserError::new(format!("the directory {} cannot be read: {e}", directory.display())))?;
        let files = files.into_iter().filter(|p| !folder::is_hidden(p)).collect();
        Ok(Self { directory: directory.to_path_buf(), files })
    }

    fn of(&self, media: &Path, entry: &Entry) -> Result<Vec<PathBuf>, String> {
        let stem = folder::stem(media);
        match entry.kind {
            Kind::Image => {
                let wanted = entry.fp_1f_clean_indices.as_ref().map_or(1, Vec::len);
                let mut found: BTreeMap<Option<u64>, PathBuf> = BTreeMap::new();
                for file in self.files.iter().filter(|p| folder::has_extension(p, &picture::EXTENSIONS)) {
                    let own = folder::stem(file);
                    if own == stem {
                        found.entry(None).or_insert_with(|| file.clone());
                    } else if let Some(n) = numbered(&own, &stem) {
                        found.entry(Some(n)).or_insert_with(|| file.clone());
                    }
                }
                if found.len() < wanted {
                    let (have, dir) = (found.len(), self.directory.display());
                    return Err(format!("{have} of {wanted} control pictures in {dir} (named {stem}.* or {stem}_N.*)"));
                }
                Ok(found.into_values().take(wanted).collect())
            }
            Kind::Video => {
                let by_name = self.files.iter().find(|p| p.is_file() && p.file_name() == media.file_name());
                let folder = self.files.iter().find(|p| p.is_dir() && folder::name(p) == stem);
                let by_stem = self
                    .files
                    .iter()
                    .find(|p| p.is_file() && folder::stem(p) == stem && folder::has_extension(p, &video::EXTENSIONS));
                by_name
                    .or(folder)
                    .or(by_stem)
                    .map(|p| vec![p.clone()])
                    .ok_or_else(|| format!("no control video of this name in {}", self.directory.display()))
            }
        }
    }
}

/// N of `stem_N`.
fn numbered(name: &str, stem: &str) -> Option<u64> {
    let number = name.strip_prefix(stem)?.strip_prefix('_')?;
    number.bytes().all(|b| b.is_ascii_digit()).then(|| number.parse().ok())?
}

fn from_jsonl(entry: &Entry, file: &Path) -> Result<Vec<Candidate>> {
    let text = document::read_text(file, "the list")?;
    let key = match entry.kind {
        Kind::Image => "image_path",
        Kind::Video => "video_path",
    };
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate().map(|(i, l)| (i + 1, l)).filter(|(_, l)| !l.trim().is_empty()) {
        let wrong = |what: String| UserError::usage(format!("{}, line {number}: {what}", file.display()));
        let value: Value = serde_json::from_str(line).map_err(|e| {
            let message = e.to_string();
            let message = message.split(" at line ").next().unwrap_or_default();
            wrong(format!("column {}: {message}", e.column())).hint("each line must be one JSON object")
        })?;
        let Value::Object(map) = value else {
            return Err(wrong("not a JSON object".into()).hint("each line must be one JSON object").into());
        };
        let text_at = |key: &str| match map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(s)) => Ok(Some(s.clone())),
            Some(_) => Err(wrong(format!("`{key}` must be a text"))),
        };
        let Some(written) = text_at(key)? else {
            let hint = match (map.contains_key("image_path_0"), map.keys().find(|k| k.ends_with("_path"))) {
                (true, _) => "several targets for one item are not for Wan models; use image_path".to_string(),
                (_, Some(other)) => format!("the line has `{other}`"),
                _ => format!("each line needs \"{key}\" and \"caption\""),
            };
            return Err(wrong(format!("no `{key}`")).hint(hint).into());
        };
        let caption = match text_at("caption")? {
            Some(text) => Caption::Text(text),
            None => Caption::Missing(format!("no `caption` in line {number} of {}", file.display())),
        };
        let resolve = |written: &str| find(file, written);
        let mut controls = Vec::new();
        for key in control_keys(&map) {
            if let Some(written) = text_at(&key)? {
                controls.push(resolve(&written).ok_or(format!("its control {written} does not exist")));
            }
        }
        let wanted = if entry.kind == Kind::Image { entry.fp_1f_clean_indices.as_ref().map_or(1, Vec::len) } else { 1 };
        let have = controls.len();
        if have < wanted && (wanted > 1 || !controls.is_empty()) {
            controls.push(Err(format!("{have} of {wanted} controls in line {number} of {}", file.display())));
        }
        controls.truncate(wanted);
        found.push(Candidate {
            path: resolve(&written).unwrap_or_else(|| PathBuf::from(&written)),
            caption,
            controls: controls.into_iter().collect(),
        });
    }
    Ok(found)
}

/// `control_path`, then `control_path_0`, `control_path_1`, ... by number.
fn control_keys(map: &serde_json::Map<String, Value>) -> Vec<String> {
    let mut keys: Vec<(Option<u64>, String)> = map
        .keys()
        .filter_map(|k| match k.as_str() {
            "control_path" => Some((None, k.clone())),
            other => numbered(other, "control_path").map(|n| (Some(n), k.clone())),
        })
        .collect();
    keys.sort();
    keys.into_iter().map(|(_, k)| k).collect()
}
