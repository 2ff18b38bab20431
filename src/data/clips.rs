//! An item -> its clips: decoded, resampled, resized and cropped as a stream.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use image::RgbImage;

use super::bucket::{self, Selector};
use super::frames::{self, Cadence, Cut, Span, Windows};
use super::{folder, picture, resize, video, Clip, Entry, FrameExtraction, Item, Kind, Probe};
use crate::error::UserError;

/// A clip as it will come out, by the [`Probe`] alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    pub start: usize,
    pub frames: usize,
    /// Width, height.
    pub size: (u32, u32),
}

impl Planned {
    /// Tokens of the video model: one for 2x2 latent pixels of 8x8 pixels, for each latent frame.
    pub fn tokens(&self) -> usize {
        let side = |pixels: u32| (pixels / bucket::STEP) as usize;
        frames::latent_frames(self.frames) * side(self.size.0) * side(self.size.1)
    }
}

impl Entry {
    /// The choice of buckets of this dataset. The old tool ignores the flags of video datasets.
    pub fn selector(&self) -> Selector {
        match self.musubi_compat && self.kind == Kind::Video {
            true => Selector::new(self.resolution, true, false),
            false => Selector::new(self.resolution, self.enable_bucket, self.bucket_no_upscale),
        }
    }

    /// The clips to expect of a medium. Exact where the container tells the number of frames rightly.
    pub fn plan(&self, probe: &Probe) -> Vec<Planned> {
        self.clips_of(self.resampled(probe), probe.size)
    }

    /// The clips of a medium of `n` frames after resampling and `source` (width, height) as shown.
    pub fn clips_of(&self, n: usize, source: (u32, u32)) -> Vec<Planned> {
        let size = self.selector().choose(source);
        if self.kind == Kind::Image {
            return vec![Planned { start: 0, frames: 1, size }];
        }
        let mut clips = Cut::of(self).positions(n);
        clips.sort_unstable();
        clips.dedup();
        clips.into_iter().map(|(start, frames)| Planned { start, frames, size }).collect()
    }

    /// Frames after resampling, by what the container tells.
    pub fn resampled(&self, probe: &Probe) -> usize {
        match (self.kind, probe.variable) {
            (Kind::Image, _) => 1,
            (Kind::Video, Some(seconds)) => (seconds * frames::TARGET_FPS).round() as usize,
            (Kind::Video, None) => self.resampled_count(probe.frames),
        }
    }

    fn resampled_count(&self, n: usize) -> usize {
        match self.old_limit() {
            None => frames::resample(n, self.source_fps, self.musubi_compat).len(),
            Some(limit) => {
                let mut cadence = self.cadence(false);
                let shown = (0..n).map(|_| (cadence.copies(Span::UNKNOWN), cadence.position()));
                shown.take_while(|(_, k)| k.is_none_or(|k| k < limit)).map(|(copies, _)| copies).sum()
            }
        }
    }

    fn cadence(&self, variable: bool) -> Cadence {
        Cadence::new(self.source_fps, variable, self.musubi_compat)
    }

    /// The old tool stops a `head` at its own count of frames, which runs ahead below 16 a second.
    fn old_limit(&self) -> Option<usize> {
        let cut = Cut::of(self);
        (self.musubi_compat && cut.effective() == FrameExtraction::Head).then(|| cut.longest())
    }

    fn upright(&self) -> bool {
        !self.musubi_compat
    }
}

/// Decodes, orients, resizes and crops one picture: a clip of one frame.
///
/// With `fp_1f_clean_indices`, the control holds as many pictures; otherwise one, where the item has a control.
pub fn decode_image(item: &Item, entry: &Entry) -> Result<Clip> {
    let read = |path: &Path| picture::read(path, entry.upright()).map_err(|e| named(path, &e));
    let picture = read(&item.path)?;
    let original = picture.dimensions();
    let size = usable(entry.selector().choose(original), original).map_err(|e| named(&item.path, &e))?;
    let mut control = Vec::new();
    for path in &item.controls {
        let source = read(path)?;
        let bucket = control_size(entry, source.dimensions(), size);
        control.push(Arc::new(resize::to_bucket(source, bucket)));
    }
    Ok(Clip {
        start: 0,
        frames: vec![Arc::new(resize::to_bucket(picture, size))],
        size,
        original,
        control: (!control.is_empty()).then_some(control),
    })
}

/// The size of a control picture whose target has the bucket `size`.
fn control_size(entry: &Entry, own: (u32, u32), size: (u32, u32)) -> (u32, u32) {
    let area = |(w, h): (u32, u32)| u64::from(w) * u64::from(h);
    let kept = (bucket::floor_step(own.0).max(bucket::STEP), bucket::floor_step(own.1).max(bucket::STEP));
    match (entry.no_resize_control, entry.control_resolution) {
        (true, Some(limit)) if area(own) > area(limit) => bucket::control_bucket(own, limit),
        (true, _) => kept,
        (false, Some(resolution)) => bucket::control_bucket(own, resolution),
        (false, None) => size,
    }
}

/// Decodes a video (file or directory of frames) as a stream and hands out its clips, each once complete.
///
/// At most the longest target's frames are held. No two clips of one item have the same `(start, frames.len())`.
/// Returns the number of clips: 0 where the video is too short for every target.
pub fn decode_video(item: &Item, entry: &Entry, sink: &mut dyn FnMut(Clip) -> Result<()>) -> Result<usize> {
    let cut = Cut::of(entry);
    let count = match Windows::needs_count(&cut) {
        true => Some(count_frames(&item.path, entry)?),
        false => None,
    };
    let windows = Windows::new(&cut, count);
    let mut main = Stream::open(&item.path, entry)?;
    let original = main.size;
    let size = usable(entry.selector().choose(original), original).map_err(|e| named(&item.path, &e))?;
    let mut control = match item.controls.first() {
        Some(path) => Some(Stream::open(path, entry)?),
        None => None,
    };
    // A control takes the bucket of its own aspect first, and that of its video after it.
    let own_size = match &control {
        Some(c) => usable(entry.selector().choose(c.size), c.size).map_err(|e| named(&c.path, &e))?,
        None => size,
    };
    let with_control = control.is_some();
    let fit_control = |p: RgbImage| resize::to_bucket(resize::to_bucket(p, own_size), size);

    let mut held = Held { frames: VecDeque::new(), control: VecDeque::new(), most: cut.longest(), first: 0 };
    let (mut n, mut clips) = (0, 0);
    let mut emit = |held: &Held, start: usize, frames: usize| -> Result<()> {
        let control = with_control.then(|| held.cut(&held.control, start, frames));
        clips += 1;
        sink(Clip { start, frames: held.cut(&held.frames, start, frames), size, original, control })
    };
    while let Some(frame) = main.next(windows.wants(n), &|p| resize::to_bucket(p, size))? {
        let control_frame = match &mut control {
            Some(control) => control.next_or_last(&fit_control)?,
            None => None,
        };
        held.push(frame, control_frame);
        for (start, frames) in windows.completed_by(n) {
            emit(&held, start, frames)?;
        }
        n += 1;
        if windows.done_at(n - 1) {
            break;
        }
    }
    if let Some((start, frames)) = windows.at_end(n) {
        emit(&held, start, frames)?;
    }
    Ok(clips)
}

/// The exact number of frames after resampling, by decoding all of them (without colour conversion).
pub fn count_frames(path: &Path, entry: &Entry) -> Result<usize> {
    let mut stream = Stream::open(path, entry)?;
    let mut n = 0;
    while stream.next(false, &|p| p)?.is_some() {
        n += 1;
    }
    Ok(n)
}

/// The latest frames, of which clips are cut.
struct Held {
    frames: VecDeque<Option<Arc<RgbImage>>>,
    control: VecDeque<Option<Arc<RgbImage>>>,
    most: usize,
    /// Index of the oldest one held.
    first: usize,
}

impl Held {
    fn push(&mut self, frame: Option<Arc<RgbImage>>, control: Option<Arc<RgbImage>>) {
        if self.frames.len() == self.most {
            self.frames.pop_front();
            self.control.pop_front();
            self.first += 1;
        }
        self.frames.push_back(frame);
        self.control.push_back(control);
    }

    fn cut(&self, from: &VecDeque<Option<Arc<RgbImage>>>, start: usize, frames: usize) -> Vec<Arc<RgbImage>> {
        from.iter().skip(start - self.first).take(frames).flatten().cloned().collect()
    }
}

/// Where frames come from, before resampling.
enum Frames {
    File(Box<video::Reader>),
    /// A directory: its pictures in order, and the number of those handed out.
    Folder(Vec<PathBuf>, usize),
}

/// Frames after resampling, each converted and fitted at most once.
struct Stream {
    path: PathBuf,
    source: Frames,
    upright: bool,
    /// As shown, of the source.
    size: (u32, u32),
    cadence: Cadence,
    limit: Option<usize>,
    current: Option<Arc<RgbImage>>,
    /// How often the current source frame is still to be shown.
    pending: usize,
    last: Option<Arc<RgbImage>>,
}

impl Stream {
    fn open(path: &Path, entry: &Entry) -> Result<Self> {
        Self::open_quietly(path, entry).map_err(|e| named(path, &e))
    }

    fn open_quietly(path: &Path, entry: &Entry) -> Result<Self> {
        let upright = entry.upright();
        let (source, size, variable) = if path.is_dir() {
            let pictures = folder::frames(path, entry.musubi_compat)?.pictures;
            let first = pictures.first().context("the directory holds no pictures")?;
            let size = picture::probe(first, upright).map_err(|e| named(first, &e))?;
            (Frames::Folder(pictures, 0), size, false)
        } else {
            let timing = entry.source_fps.is_some() && !entry.musubi_compat;
            let variable = timing && video::probe(path, upright, true)?.variable.is_some();
            let reader = video::Reader::open(path, upright, !entry.musubi_compat)?;
            let size = reader.size()?;
            (Frames::File(Box::new(reader)), size, variable)
        };
        Ok(Self {
            path: path.to_path_buf(),
            source,
            upright,
            size,
            cadence: entry.cadence(variable),
            limit: entry.old_limit(),
            current: None,
            pending: 0,
            last: None,
        })
    }

    /// The next frame: `None` at the end, `Some(None)` where it is not wanted.
    fn next(&mut self, wanted: bool, fit: &dyn Fn(RgbImage) -> RgbImage) -> Result<Option<Option<Arc<RgbImage>>>> {
        while self.pending == 0 {
            let span = match &mut self.source {
                Frames::File(reader) => reader.advance().map_err(|e| named(&self.path, &e))?,
                Frames::Folder(pictures, done) => {
                    *done += 1;
                    (*done <= pictures.len()).then_some(Span::UNKNOWN)
                }
            };
            let Some(span) = span else { return Ok(None) };
            self.current = None;
            self.pending = self.cadence.copies(span);
            if let (Some(limit), Some(k)) = (self.limit, self.cadence.position()) {
                if k >= limit {
                    return Ok(None);
                }
            }
        }
        self.pending -= 1;
        if !wanted {
            return Ok(Some(None));
        }
        if self.current.is_none() {
            let picture = match &mut self.source {
                Frames::File(reader) => reader.picture().map_err(|e| named(&self.path, &e))?,
                Frames::Folder(pictures, done) => {
                    let path = &pictures[*done - 1];
                    picture::read(path, self.upright).map_err(|e| named(path, &e))?
                }
            };
            self.current = Some(Arc::new(fit(picture)));
        }
        Ok(Some(self.current.clone()))
    }

    /// The next frame, or the last one again: a control shorter than its video stands still.
    fn next_or_last(&mut self, fit: &dyn Fn(RgbImage) -> RgbImage) -> Result<Option<Arc<RgbImage>>> {
        if let Some(frame) = self.next(true, fit)? {
            self.last = frame;
        }
        Ok(self.last.clone())
    }
}

fn usable(bucket: (u32, u32), original: (u32, u32)) -> Result<(u32, u32)> {
    match bucket::is_usable(bucket) {
        true => Ok(bucket),
        false => Err(too_small(original)),
    }
}

/// Why a source of this size has no bucket.
pub fn too_small((w, h): (u32, u32)) -> anyhow::Error {
    anyhow::anyhow!("{w}x{h} is too small: under {} pixels, and bucket_no_upscale forbids enlarging", bucket::STEP)
}

fn named(path: &Path, why: &anyhow::Error) -> anyhow::Error {
    UserError::new(format!("{}: {why:#}", path.display())).into()
}
