//! Which frames of a video become which clips. Pure functions and small state machines; no decoding here.
//!
//! First the source is resampled to 16 frames a second ([`Cadence`], only when `source_fps` is given), then clips are
//! cut from the resampled frames ([`Cut`]). Indices in clip starts count resampled frames.

use super::{Entry, FrameExtraction};

/// Frames a second that the models were trained at.
pub const TARGET_FPS: f64 = 16.0;

/// Sorted and unique, each lowered to the next 4n+1, which is what the VAE takes. Zeros are left out.
pub fn round_targets(targets: &[usize]) -> Vec<usize> {
    let mut rounded: Vec<usize> = targets.iter().filter(|t| **t > 0).map(|t| floor_4n1(*t)).collect();
    rounded.sort_unstable();
    rounded.dedup();
    rounded
}

/// The largest 4n+1 that is not above `frames` (at least 1).
pub fn floor_4n1(frames: usize) -> usize {
    frames.max(1).saturating_sub(1) / 4 * 4 + 1
}

/// Latent frames of a clip of `frames` = 4n+1 frames.
pub fn latent_frames(frames: usize) -> usize {
    frames.div_ceil(4)
}

/// For each frame after resampling, the source frame it shows, for a source of constant rate.
///
/// `None`: all of them. 16 and above: some are left out, by the old tool's accumulated sum. Below 16: frames are
/// repeated (the nearest earlier one), so that the clip keeps its duration; under `compat` all are kept once.
pub fn resample(n: usize, source_fps: Option<f64>, compat: bool) -> Vec<usize> {
    let mut cadence = Cadence::new(source_fps, false, compat);
    (0..n).flat_map(|i| std::iter::repeat_n(i, cadence.copies(Span::UNKNOWN))).collect()
}

/// The time a source frame is shown, in seconds since the first frame.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    pub from: f64,
    pub to: f64,
}

impl Span {
    /// For sources without timestamps.
    pub const UNKNOWN: Span = Span { from: f64::NAN, to: f64::NAN };
}

/// How often each source frame is shown after resampling.
#[derive(Debug, Clone)]
pub enum Cadence {
    /// Once.
    All,
    /// `sum` grows by `step` a frame; a frame is shown when it brings a new whole number. The sum is kept in double
    /// precision and never recomputed, because its rounding decides about 23.976 and 29.97.
    Thin { step: f64, sum: f64, last: Option<usize> },
    /// Source frame i is shown from i·step to (i+1)·step, rounded up.
    Repeat { step: f64, index: usize },
    /// As `Repeat`, by the timestamps; `next` is the first slot not filled yet.
    Timed { next: usize },
}

impl Cadence {
    /// `variable`: the source's timestamps are uneven and to be trusted over `source_fps`.
    pub fn new(source_fps: Option<f64>, variable: bool, compat: bool) -> Self {
        match source_fps {
            None => Cadence::All,
            Some(_) if variable && !compat => Cadence::Timed { next: 0 },
            Some(fps) if fps < TARGET_FPS && !compat => Cadence::Repeat { step: TARGET_FPS / fps, index: 0 },
            Some(fps) => Cadence::Thin { step: TARGET_FPS / fps, sum: 0.0, last: None },
        }
    }

    /// How many frames at 16 a second show the next source frame.
    pub fn copies(&mut self, span: Span) -> usize {
        match self {
            Cadence::All => 1,
            Cadence::Thin { step, sum, last } => {
                let k = *sum as usize;
                *sum += *step;
                usize::from(last.replace(k) != Some(k))
            }
            Cadence::Repeat { step, index } => {
                let slot = |i: usize| (i as f64 * *step - 1e-9).ceil() as usize;
                let copies = slot(*index + 1) - slot(*index);
                *index += 1;
                copies
            }
            // A frame without a time among others with one: shown once.
            Cadence::Timed { next } if span.to.is_nan() => {
                *next += 1;
                1
            }
            Cadence::Timed { next } => {
                // A fiftieth of a slot: timestamps in milliseconds are off by up to half of one.
                let end = (span.to * TARGET_FPS - 0.02).ceil().max(0.0) as usize;
                let copies = end.saturating_sub(*next);
                *next += copies;
                copies
            }
        }
    }

    /// The old tool's number of the frame shown last: below 16 a second it runs ahead of the frames.
    pub fn position(&self) -> Option<usize> {
        match self {
            Cadence::Thin { last, .. } => *last,
            _ => None,
        }
    }
}

/// How clips are cut, with the targets already rounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    pub extraction: FrameExtraction,
    /// From [`round_targets`].
    pub targets: Vec<usize>,
    pub stride: usize,
    pub sample: usize,
    pub max_frames: usize,
}

impl Cut {
    pub fn of(entry: &Entry) -> Self {
        Self {
            extraction: entry.frame_extraction,
            targets: entry.target_frames.clone(),
            stride: entry.frame_stride,
            sample: entry.frame_sample,
            max_frames: entry.max_frames,
        }
    }

    /// `uniform` with one sample is `head`.
    pub fn effective(&self) -> FrameExtraction {
        match self.extraction {
            FrameExtraction::Uniform if self.sample <= 1 => FrameExtraction::Head,
            other => other,
        }
    }

    /// The longest clip: as many frames are held at most.
    pub fn longest(&self) -> usize {
        match self.effective() {
            FrameExtraction::Full => floor_4n1(self.max_frames),
            _ => self.targets.last().copied().unwrap_or(1),
        }
    }

    /// The shortest video that yields a clip.
    pub fn shortest(&self) -> usize {
        match self.effective() {
            FrameExtraction::Full => 1,
            _ => self.targets.first().copied().unwrap_or(1),
        }
    }

    /// (start, frames) of every clip of a video of `n` frames, target by target, as the old tool lists them:
    /// `uniform` may name a start more than once, of which only one clip is made.
    pub fn positions(&self, n: usize) -> Vec<(usize, usize)> {
        let extraction = self.effective();
        if extraction == FrameExtraction::Full {
            return if n == 0 { vec![] } else { vec![(0, floor_4n1(n.min(self.max_frames)))] };
        }
        let mut all = Vec::new();
        for &t in self.targets.iter().filter(|t| **t <= n) {
            match extraction {
                FrameExtraction::Head => all.push((0, t)),
                FrameExtraction::Chunk => all.extend((0..=n - t).step_by(t).map(|s| (s, t))),
                FrameExtraction::Slide => all.extend((0..=n - t).step_by(self.stride.max(1)).map(|s| (s, t))),
                FrameExtraction::Uniform => all.extend(linspace(n - t, self.sample).into_iter().map(|s| (s, t))),
                FrameExtraction::Full => unreachable!("handled above"),
            }
        }
        all
    }
}

/// `int(linspace(0, end, count))`: numpy's steps, i times the step, with the exact end.
fn linspace(end: usize, count: usize) -> Vec<usize> {
    let step = end as f64 / (count.max(2) - 1) as f64;
    (0..count).map(|i| if i + 1 == count && count > 1 { end } else { (i as f64 * step) as usize }).collect()
}

/// Follows a stream of frames and says which clips each of them completes.
#[derive(Debug, Clone)]
pub struct Windows {
    cut: Cut,
    extraction: FrameExtraction,
    /// `uniform` only: all clips, sorted by their last frame, without repeats.
    fixed: Vec<(usize, usize)>,
}

impl Windows {
    /// `uniform` places its clips by the number of frames, which must be given then (see [`Windows::needs_count`]).
    pub fn new(cut: &Cut, n: Option<usize>) -> Self {
        let extraction = cut.effective();
        let mut fixed = Vec::new();
        if extraction == FrameExtraction::Uniform {
            fixed = cut.positions(n.unwrap_or(0));
            fixed.sort_by_key(|(s, t)| (s + t, *s));
            fixed.dedup();
        }
        Self { cut: cut.clone(), extraction, fixed }
    }

    /// Whether the number of frames must be known before the first one is decoded.
    pub fn needs_count(cut: &Cut) -> bool {
        cut.effective() == FrameExtraction::Uniform
    }

    /// Whether any clip can contain frame `k`; others need not be converted.
    pub fn wants(&self, k: usize) -> bool {
        let longest = self.cut.longest();
        match self.extraction {
            FrameExtraction::Head | FrameExtraction::Full => k < longest,
            FrameExtraction::Chunk => true,
            FrameExtraction::Slide => k % self.cut.stride.max(1) < longest,
            FrameExtraction::Uniform => self.fixed.iter().any(|(s, t)| (*s..s + t).contains(&k)),
        }
    }

    /// The clips (start, frames) whose last frame is `k`.
    pub fn completed_by(&self, k: usize) -> Vec<(usize, usize)> {
        let ends = self.cut.targets.iter().filter(|t| **t <= k + 1).map(|t| (k + 1 - t, *t));
        match self.extraction {
            FrameExtraction::Head => ends.filter(|(s, _)| *s == 0).collect(),
            FrameExtraction::Chunk => ends.filter(|(s, t)| s % t == 0).collect(),
            FrameExtraction::Slide => ends.filter(|(s, _)| s % self.cut.stride.max(1) == 0).collect(),
            FrameExtraction::Uniform => self.fixed.iter().copied().filter(|(s, t)| s + t == k + 1).collect(),
            FrameExtraction::Full => vec![],
        }
    }

    /// Whether no frame after `k` matters.
    pub fn done_at(&self, k: usize) -> bool {
        match self.extraction {
            FrameExtraction::Head | FrameExtraction::Full => k + 1 >= self.cut.longest(),
            FrameExtraction::Uniform => self.fixed.last().is_none_or(|(s, t)| s + t <= k + 1),
            FrameExtraction::Chunk | FrameExtraction::Slide => false,
        }
    }

    /// The clip that only the end of the stream (or [`Windows::done_at`]) after `n` frames defines.
    pub fn at_end(&self, n: usize) -> Option<(usize, usize)> {
        (self.extraction == FrameExtraction::Full && n > 0).then(|| (0, floor_4n1(n.min(self.cut.max_frames))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FrameExtraction::*;

    fn cut(extraction: FrameExtraction, targets: &[usize], stride: usize, sample: usize, max_frames: usize) -> Cut {
        Cut { extraction, targets: round_targets(targets), stride, sample, max_frames }
    }

    #[test]
    fn thinning_follows_the_recorded_sequences() {
        let head = |fps: f64, want: &[usize]| assert_eq!(resample(60, Some(fps), true)[..want.len()], *want, "{fps}");
        head(30.0, &[0, 2, 4, 6, 8, 10, 12, 14, 16, 17, 19, 21, 23, 25, 27, 29, 31, 32, 34]);
        head(24.0, &[0, 2, 3, 5, 7, 8, 9, 11, 12, 14, 16, 17, 19, 20]);
        head(25.0, &[0, 2, 4, 5, 7, 8, 10, 11, 13, 15, 16]);
        head(60.0, &[0, 4, 8, 12, 16, 19, 23, 27, 31, 34]);
        head(23.976, &[0, 2, 3, 5, 6, 8, 9, 11]);
        assert_eq!(resample(60, Some(24.0), false), resample(60, Some(24.0), true));
    }

    #[test]
    fn below_16_frames_are_repeated_unless_compat() {
        assert_eq!(resample(4, Some(8.0), false), [0, 0, 1, 1, 2, 2, 3, 3]);
        assert_eq!(resample(6, Some(12.0), false), [0, 0, 1, 2, 3, 3, 4, 5]);
        assert_eq!(resample(4, Some(8.0), true), [0, 1, 2, 3]);
        // The duration is kept: 61 frames at 12 are 81 at 16.
        assert_eq!(resample(61, Some(12.0), false).len(), 82);
        for fps in [1.0, 5.0, 7.5, 10.0, 14.985, 15.0, 15.999] {
            let frames = resample(200, Some(fps), false);
            assert_eq!(frames.len(), (200.0 * 16.0 / fps - 1e-9f64).ceil() as usize, "{fps}");
            for (j, i) in frames.iter().enumerate() {
                assert_eq!(*i, (j as f64 * fps / 16.0 + 1e-9) as usize, "{fps}: frame {j}");
            }
        }
    }

    #[test]
    fn uneven_timestamps_decide() {
        // Shown for 1/8, 1/32, 1/32, 1/4 s: two slots, one for either short one at most, four.
        let ends = [0.125, 0.15625, 0.1875, 0.4375];
        let mut cadence = Cadence::new(Some(30.0), true, false);
        let mut from = 0.0;
        let copies: Vec<usize> =
            ends.iter().map(|to| cadence.copies(Span { from: std::mem::replace(&mut from, *to), to: *to })).collect();
        assert_eq!(copies, [2, 1, 0, 4]);
    }

    #[test]
    fn milliseconds_do_not_shift_a_slot() {
        // 16 frames a second with timestamps rounded to milliseconds: 0, 63, 125, 188, ...
        let stamp = |i: usize| (i as f64 * 62.5).round() / 1000.0;
        let mut cadence = Cadence::new(Some(16.0), true, false);
        assert!((0..100).all(|i| cadence.copies(Span { from: stamp(i), to: stamp(i + 1) }) == 1));
    }

    #[test]
    fn targets_are_rounded_down_and_unique() {
        assert_eq!(round_targets(&[16, 30, 24]), [13, 21, 29]);
        assert_eq!(round_targets(&[25, 26, 27, 28, 1, 4, 0]), [1, 25]);
        assert_eq!(latent_frames(1), 1);
        assert_eq!(latent_frames(81), 21);
    }

    #[test]
    fn uniform_of_one_sample_is_head() {
        assert_eq!(cut(Uniform, &[17], 1, 1, 129).effective(), Head);
        assert_eq!(cut(Uniform, &[17], 1, 1, 129).positions(60), [(0, 17)]);
    }

    /// The stream must find exactly the clips of the table, each once, and never ask for a frame too old.
    #[test]
    fn windows_find_what_positions_list() {
        let cuts = [
            cut(Head, &[1, 25, 45], 1, 1, 129),
            cut(Chunk, &[1, 13, 25], 1, 1, 129),
            cut(Slide, &[13, 25], 10, 1, 129),
            cut(Slide, &[5], 1, 1, 129),
            cut(Slide, &[5], 40, 1, 129),
            cut(Uniform, &[1, 25], 1, 4, 129),
            cut(Uniform, &[21], 1, 7, 129),
            cut(Uniform, &[17], 1, 1, 129),
            cut(Full, &[1], 1, 1, 45),
            cut(Full, &[1], 1, 1, 129),
        ];
        for cut in &cuts {
            for n in [0, 1, 4, 5, 6, 20, 24, 25, 26, 81, 100, 130] {
                let mut want = cut.positions(n);
                want.sort_unstable();
                want.dedup();
                let windows = Windows::new(cut, Some(n));
                let mut got = Vec::new();
                let mut seen = 0;
                for k in 0..n {
                    seen = k + 1;
                    let complete = windows.completed_by(k);
                    for (s, t) in &complete {
                        assert!(*t <= cut.longest());
                        assert!((*s..s + t).all(|j| windows.wants(j)), "{cut:?} {n}: {s}+{t}");
                    }
                    got.extend(complete);
                    if windows.done_at(k) {
                        break;
                    }
                }
                got.extend(windows.at_end(seen));
                got.sort_unstable();
                assert_eq!(got, want, "{cut:?} with {n} frames");
            }
        }
    }
}
