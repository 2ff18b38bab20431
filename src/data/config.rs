//! What a dataset file says: the schema, its defaults, and the checks that need no media.

use std::path::{Component, Path, PathBuf};

use anyhow::Result;

use super::document::{self, Table, Value};
use super::section::Section;
use super::{bucket, frames, DataOptions, DatasetConfig, Entry, FrameExtraction, Kind, Source};
use crate::error::{nearest, UserError};

/// Allowed in `[general]` and in every dataset.
const SHARED: [&str; 6] =
    ["resolution", "caption_extension", "batch_size", "num_repeats", "enable_bucket", "bucket_no_upscale"];
/// Allowed in a dataset of either kind.
const EITHER: [&str; 3] = ["cache_directory", "control_directory", "fp_latent_window_size"];
const IMAGE_ONLY: [&str; 8] = [
    "image_directory",
    "image_jsonl_file",
    "multiple_target",
    "no_resize_control",
    "control_resolution",
    "fp_1f_clean_indices",
    "fp_1f_target_index",
    "fp_1f_no_post",
];
const VIDEO_ONLY: [&str; 8] = [
    "video_directory",
    "video_jsonl_file",
    "target_frames",
    "frame_extraction",
    "frame_stride",
    "frame_sample",
    "max_frames",
    "source_fps",
];
/// Old names that are still read.
const RENAMED: [(&str, &str); 3] = [
    ("flux_kontext_no_resize_control", "no_resize_control"),
    ("qwen_image_edit_no_resize_control", "no_resize_control"),
    ("qwen_image_edit_control_resolution", "control_resolution"),
];
const DEFAULT_RESOLUTION: (u32, u32) = (960, 544);
const DEFAULT_CAPTIONS: &str = ".txt";

impl DatasetConfig {
    /// Reads a dataset file (TOML, or JSON when its name ends in `.json`), checks every key and value, resolves the
    /// paths and makes sure that the sources exist.
    ///
    /// A relative path is looked up in the current directory first, then beside the file; a cache directory that does
    /// not exist yet will be made where its dataset was found.
    pub fn load(path: &Path, options: &DataOptions) -> Result<Self> {
        let text = document::read_text(path, "the dataset file")?;
        Self::from_text(&text, path, options)
    }

    /// As [`DatasetConfig::load`], for a text already read from `path`.
    pub fn from_text(text: &str, path: &Path, options: &DataOptions) -> Result<Self> {
        let mut root = document::parse(text, path)?;
        let mut notes = Vec::new();
        check_top_level(&root, path)?;
        rename_old_keys(&mut root, path, &mut notes);

        let none = Table::default();
        let general = match root.get("general").map(|f| (&f.node.value, f.line)) {
            None => &none,
            Some((Value::Table(t), _)) => t,
            Some((_, line)) => return Err(at(path, line, "`general` must be a table: [general]").into()),
        };
        check_general(general, path)?;

        let lists = match root.get("datasets").map(|f| (&f.node.value, f.line)) {
            Some((Value::List(list), _)) => list,
            Some((_, line)) => {
                return Err(at(path, line, "`datasets` must be a list of tables: [[datasets]]").into());
            }
            None => &Vec::new(),
        };
        if lists.is_empty() {
            return Err(UserError::usage(format!("{} describes no dataset", path.display()))
                .hint("add a [[datasets]] table with image_directory or video_directory")
                .into());
        }
        let (mut entries, mut faults) = (Vec::new(), Vec::new());
        for (index, node) in lists.iter().enumerate() {
            let Value::Table(own) = &node.value else {
                return Err(at(path, node.line, "`datasets` must be a list of tables: [[datasets]]").into());
            };
            let section = Section { file: path, name: dataset_name(index), own, general, shared: &SHARED };
            match entry(&section, index, node.line, options, &mut notes) {
                Ok(entry) => entries.push(entry),
                Err(e) => faults.push(e),
            }
        }
        if let Some(error) = all_at_once(faults) {
            return Err(error);
        }
        check_cache_directories(&entries, path)?;
        Ok(Self { path: path.to_path_buf(), entries, notes })
    }
}

/// One error for the faults of several datasets.
fn all_at_once(mut faults: Vec<anyhow::Error>) -> Option<anyhow::Error> {
    match faults.len() {
        0 | 1 => faults.pop(),
        _ => {
            let list: Vec<String> = faults.iter().map(|e| format!("{e:#}")).collect();
            Some(UserError::usage(list.join("\n")).into())
        }
    }
}

/// How messages call a dataset.
pub fn dataset_name(index: usize) -> String {
    format!("dataset {}", index + 1)
}

fn at(path: &Path, line: usize, what: impl std::fmt::Display) -> UserError {
    match line {
        0 => UserError::usage(format!("{}: {what}", path.display())),
        n => UserError::usage(format!("{}, line {n}: {what}", path.display())),
    }
}

fn unknown_key<'a>(
    path: &Path,
    line: usize,
    key: &str,
    place: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> anyhow::Error {
    let error = at(path, line, format!("unknown key `{key}` in {place}"));
    let known: Vec<&str> = known.into_iter().collect();
    match nearest(key, known.iter().copied()) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint(format!("it takes {}", known.join(", "))),
    }
    .into()
}

fn check_top_level(root: &Table, path: &Path) -> Result<()> {
    for field in &root.0 {
        if !["general", "datasets"].contains(&field.key.as_str()) {
            if SHARED.contains(&field.key.as_str()) {
                let what = format!("`{}` stands outside of any table", field.key);
                return Err(at(path, field.line, what).hint("put it under [general] or [[datasets]]").into());
            }
            return Err(unknown_key(path, field.line, &field.key, "the file", ["general", "datasets"]));
        }
    }
    Ok(())
}

fn check_general(general: &Table, path: &Path) -> Result<()> {
    for field in &general.0 {
        let key = field.key.as_str();
        if SHARED.contains(&key) {
            continue;
        }
        if all_keys().any(|k| k == key) {
            let what = format!("`{key}` does not belong in [general]");
            return Err(at(path, field.line, what).hint("move it into each [[datasets]] that needs it").into());
        }
        return Err(unknown_key(path, field.line, key, "[general]", SHARED));
    }
    Ok(())
}

/// Every key that a dataset can have.
pub fn known_keys() -> impl Iterator<Item = &'static str> {
    all_keys()
}

fn all_keys() -> impl Iterator<Item = &'static str> {
    SHARED.into_iter().chain(EITHER).chain(IMAGE_ONLY).chain(VIDEO_ONLY)
}

fn rename_old_keys(root: &mut Table, path: &Path, notes: &mut Vec<String>) {
    let lists = root.0.iter_mut().filter(|f| f.key == "datasets");
    let tables = lists.flat_map(|f| match &mut f.node.value {
        Value::List(list) => list.as_mut_slice(),
        _ => &mut [],
    });
    for node in tables {
        let Value::Table(table) = &mut node.value else { continue };
        for field in &mut table.0 {
            if let Some((old, new)) = RENAMED.iter().find(|(old, _)| *old == field.key) {
                let note = at(path, field.line, format!("`{old}` is an old name of `{new}`"));
                notes.push(note.what);
                field.key = new.to_string();
            }
        }
    }
}

fn entry(s: &Section<'_>, index: usize, line: usize, options: &DataOptions, notes: &mut Vec<String>) -> Result<Entry> {
    let kind = kind_of(s, line)?;
    check_keys(s, kind)?;
    if s.flag("multiple_target", false)? {
        let line = s.field("multiple_target").map_or(line, |f| f.line);
        return Err(s.error(line, "`multiple_target` is not for Wan models").hint("remove the key").into());
    }

    let mut base = None;
    let source = source(s, kind, &mut base)?;
    let control_directory = match s.text("control_directory")? {
        Some(p) => Some(existing_directory(s, "control_directory", &p)?),
        None => None,
    };
    let cache_directory = match (s.text("cache_directory")?, &source) {
        (Some(p), _) => future_directory(s, &p, base.as_deref())?,
        (None, Source::Directory(media)) => media.clone(),
        (None, Source::Jsonl(file)) => {
            let what = format!("{} needs a `cache_directory`, because {} is a list", s.name, file.display());
            return Err(s.error(line, what).hint("add cache_directory = \"…\"").into());
        }
    };

    let resolution = s.size("resolution")?.unwrap_or(DEFAULT_RESOLUTION);
    let enable_bucket = s.flag("enable_bucket", false)?;
    // The old tool caches videos with buckets on, whatever the file says.
    let any_size = enable_bucket || options.musubi_compat && kind == Kind::Video;
    if !any_size && !bucket::is_usable(resolution) {
        let (w, h) = resolution;
        let near = (bucket::floor_step(w), bucket::floor_step(h));
        let line = s.field("resolution").map_or(line, |f| f.line);
        return Err(s
            .error(line, format!("`resolution` {w}x{h}: both sides must be multiples of 16 while buckets are off"))
            .hint(format!("use [{}, {}], or enable_bucket = true", near.0, near.1))
            .into());
    }

    let caption_extension = caption_extension(s, &source, notes)?;
    let source_fps = s.rate("source_fps")?;
    let frame_extraction = frame_extraction(s)?;
    let frame_sample = s.count("frame_sample", 1)?;
    let target_frames = match kind {
        Kind::Image => vec![1],
        Kind::Video => target_frames(s, frame_extraction, notes)?,
    };
    if kind == Kind::Video {
        note_idle_keys(s, frame_extraction, frame_sample, notes);
    }
    Ok(Entry {
        index,
        kind,
        source,
        control_directory,
        cache_directory,
        resolution,
        caption_extension,
        batch_size: s.count("batch_size", 1)?,
        num_repeats: s.count("num_repeats", 1)?,
        enable_bucket,
        bucket_no_upscale: s.flag("bucket_no_upscale", false)? && enable_bucket,
        no_resize_control: s.flag("no_resize_control", false)?,
        control_resolution: s.size("control_resolution")?,
        fp_latent_window_size: s.count("fp_latent_window_size", 9)? as u32,
        fp_1f_clean_indices: s.numbers("fp_1f_clean_indices", 0)?,
        fp_1f_target_index: s.integer("fp_1f_target_index")?,
        fp_1f_no_post: s.flag("fp_1f_no_post", false)?,
        target_frames,
        frame_extraction,
        frame_stride: s.count("frame_stride", 1)?,
        frame_sample,
        max_frames: s.count("max_frames", 129)?,
        source_fps,
        musubi_compat: options.musubi_compat,
    })
}

fn kind_of(s: &Section<'_>, line: usize) -> Result<Kind> {
    let sources = ["image_directory", "image_jsonl_file", "video_directory", "video_jsonl_file"];
    let given: Vec<&str> = sources.into_iter().filter(|k| s.has(k)).collect();
    match given.as_slice() {
        // The missing source may be the misspelled key.
        [] => match s.own.0.iter().find(|field| !all_keys().any(|key| key == field.key)) {
            Some(field) => Err(unknown_key(s.file, field.line, &field.key, &s.name, all_keys())),
            None => Err(s
                .error(line, format!("{} names no source", s.name))
                .hint("add image_directory, image_jsonl_file, video_directory or video_jsonl_file")
                .into()),
        },
        [one] if one.starts_with("image") => Ok(Kind::Image),
        [_] => Ok(Kind::Video),
        [first, .., last] => Err(s
            .error(s.field(last).map_or(line, |f| f.line), format!("{} has both `{first}` and `{last}`", s.name))
            .hint("give each source a [[datasets]] table of its own")
            .into()),
    }
}

fn check_keys(s: &Section<'_>, kind: Kind) -> Result<()> {
    let (own, other) = match kind {
        Kind::Image => (IMAGE_ONLY.as_slice(), VIDEO_ONLY.as_slice()),
        Kind::Video => (VIDEO_ONLY.as_slice(), IMAGE_ONLY.as_slice()),
    };
    for field in &s.own.0 {
        let key = field.key.as_str();
        if SHARED.contains(&key) || EITHER.contains(&key) || own.contains(&key) {
            continue;
        }
        if other.contains(&key) {
            let (this, that) = match kind {
                Kind::Image => ("image", "video"),
                Kind::Video => ("video", "image"),
            };
            let what = format!("`{key}` belongs to {that} datasets; {} is one of {this}s", s.name);
            return Err(s.error(field.line, what).hint("remove the key, or move it to the other dataset").into());
        }
        let known = SHARED.into_iter().chain(EITHER).chain(own.iter().copied());
        return Err(unknown_key(s.file, field.line, key, &s.name, known));
    }
    Ok(())
}

fn source(s: &Section<'_>, kind: Kind, base: &mut Option<PathBuf>) -> Result<Source> {
    let (directory, jsonl) = match kind {
        Kind::Image => ("image_directory", "image_jsonl_file"),
        Kind::Video => ("video_directory", "video_jsonl_file"),
    };
    if let Some(written) = s.text(directory)? {
        let found = existing_directory(s, directory, &written)?;
        *base = base_of(s.file, &written, &found);
        return Ok(Source::Directory(found));
    }
    let written = s.text(jsonl)?.unwrap_or_default();
    let line = s.field(jsonl).map_or(0, |f| f.line);
    let Some(found) = find(s.file, &written).filter(|p| p.is_file()) else {
        return Err(s.error(line, format!("`{jsonl}` {written} is not a file")).hint("correct the path").into());
    };
    *base = base_of(s.file, &written, &found);
    Ok(Source::Jsonl(found))
}

fn existing_directory(s: &Section<'_>, key: &str, written: &str) -> Result<PathBuf> {
    let line = s.field(key).map_or(0, |f| f.line);
    match find(s.file, written) {
        Some(found) if found.is_dir() => Ok(found),
        Some(found) => Err(s
            .error(line, format!("`{key}` {} is a file, not a directory", found.display()))
            .hint("name the directory that holds the files, or use the key for a jsonl file")
            .into()),
        None => Err(s
            .error(line, format!("`{key}` {written} does not exist"))
            .hint("correct the path, or make the directory and put the files there")
            .into()),
    }
}

/// A relative path counts from the current directory; where nothing is there, from the dataset file's.
pub fn find(file: &Path, written: &str) -> Option<PathBuf> {
    let path = Path::new(written);
    if written.is_empty() {
        return None;
    }
    if path.exists() {
        return Some(path.to_path_buf());
    }
    let beside = file.parent()?.join(path);
    (path.is_relative() && beside.exists()).then_some(beside)
}

/// Where `find` had to look for `written`, if not in the current directory.
fn base_of(file: &Path, written: &str, found: &Path) -> Option<PathBuf> {
    (found != Path::new(written)).then(|| file.parent().map(Path::to_path_buf))?
}

fn future_directory(s: &Section<'_>, written: &str, base: Option<&Path>) -> Result<PathBuf> {
    let line = s.field("cache_directory").map_or(0, |f| f.line);
    if written.is_empty() {
        return Err(s.error(line, "`cache_directory` is empty").hint("name a directory, or remove the key").into());
    }
    let path = find(s.file, written).unwrap_or_else(|| base.map_or(PathBuf::from(written), |b| b.join(written)));
    if path.exists() && !path.is_dir() {
        let what = format!("`cache_directory` {} is a file, not a directory", path.display());
        return Err(s.error(line, what).hint("name another directory").into());
    }
    Ok(path)
}

fn caption_extension(s: &Section<'_>, source: &Source, notes: &mut Vec<String>) -> Result<String> {
    match s.text("caption_extension")? {
        Some(e) if e.is_empty() || e.contains(['/', '\\']) => {
            let line = s.field("caption_extension").map_or(0, |f| f.line);
            Err(s.error(line, format!("`caption_extension` cannot be \"{e}\"")).hint("use \".txt\"").into())
        }
        Some(e) if !e.contains('.') => {
            notes.push(format!("{}: caption_extension \"{e}\" is read as \".{e}\"", s.name));
            Ok(format!(".{e}"))
        }
        Some(e) => Ok(e),
        None => {
            if matches!(source, Source::Directory(_)) {
                notes.push(format!("{}: no caption_extension given, captions are looked for in .txt files", s.name));
            }
            Ok(DEFAULT_CAPTIONS.into())
        }
    }
}

fn frame_extraction(s: &Section<'_>) -> Result<FrameExtraction> {
    Ok(match s.choice("frame_extraction", &["head", "chunk", "slide", "uniform", "full"])? {
        Some("chunk") => FrameExtraction::Chunk,
        Some("slide") => FrameExtraction::Slide,
        Some("uniform") => FrameExtraction::Uniform,
        Some("full") => FrameExtraction::Full,
        _ => FrameExtraction::Head,
    })
}

fn target_frames(s: &Section<'_>, extraction: FrameExtraction, notes: &mut Vec<String>) -> Result<Vec<usize>> {
    let Some(given) = s.numbers("target_frames", 1)? else {
        if extraction != FrameExtraction::Full {
            notes.push(format!("{}: no target_frames given, so single frames are trained on, not motion", s.name));
        }
        return Ok(vec![1]);
    };
    let given: Vec<usize> = given.into_iter().map(|t| t as usize).collect();
    let rounded = frames::round_targets(&given);
    if given.iter().any(|t| !rounded.contains(t)) {
        notes.push(format!("{}: target_frames {given:?} become {rounded:?}: the VAE takes 4n+1 frames", s.name));
    }
    Ok(rounded)
}

fn note_idle_keys(s: &Section<'_>, extraction: FrameExtraction, sample: usize, notes: &mut Vec<String>) {
    use FrameExtraction::*;
    let idle: [(&str, bool); 4] = [
        ("frame_stride", extraction != Slide),
        ("frame_sample", extraction != Uniform),
        ("max_frames", extraction != Full),
        ("target_frames", extraction == Full),
    ];
    let name = format!("{extraction:?}").to_lowercase();
    for (key, _) in idle.into_iter().filter(|(key, idle)| *idle && s.has(key)) {
        notes.push(format!("{}: `{key}` has no effect with frame_extraction = \"{name}\"", s.name));
    }
    if extraction == Uniform && sample == 1 {
        notes.push(format!("{}: frame_extraction \"uniform\" with frame_sample 1 takes the head of each clip", s.name));
    }
}

fn check_cache_directories(entries: &[Entry], path: &Path) -> Result<()> {
    for (i, a) in entries.iter().enumerate() {
        for b in &entries[i + 1..] {
            if plain(&a.cache_directory) == plain(&b.cache_directory) {
                return Err(UserError::usage(format!(
                    "{}: {} and {} share the cache directory {}",
                    path.display(),
                    dataset_name(a.index),
                    dataset_name(b.index),
                    a.cache_directory.display()
                ))
                .hint("give each [[datasets]] a cache_directory of its own")
                .into());
            }
        }
    }
    Ok(())
}

/// Absolute, without `.`, `..` and, where it exists, symbolic links: for comparing.
pub fn plain(path: &Path) -> PathBuf {
    if let Ok(real) = path.canonicalize() {
        return real;
    }
    let mut out = PathBuf::new();
    for part in std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()).components() {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
}
