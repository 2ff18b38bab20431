//! Previews: pictures and clips made with the adapter as it is, now and then during training.
//!
//! `prompts` (what is asked for) -> `fit` (what the task can make of it) -> `sample` (noise to latent) -> `write` (latent to
//! file). What is computed once, text and picture features, comes ready in [`Scene`]; nothing of the run is changed, and a
//! preview that fails costs the run nothing but the preview.

pub mod fit;
pub mod prompts;
pub mod sample;
pub mod write;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use candle_core::Tensor;
use image::RgbImage;
use wan_models::vae::Vae;

use super::trainer::Trainer;
use crate::report::{Progress, Task, Work};
use prompts::Prompt;
use sample::{sample, Given, How};

/// The official pipeline's negative prompt, which guidance leads away from where a prompt names none.
pub const NEGATIVE: &str = "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，\
丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，\
背景人很多，倒着走";

/// When previews are made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Every {
    pub steps: Option<u64>,
    pub epochs: Option<u64>,
    /// Before the first step.
    pub at_first: bool,
}

impl Every {
    /// Before a run that has trained on so many items: only one that starts.
    pub fn first(&self, items_done: u64) -> Option<At> {
        (self.at_first && items_done == 0).then_some(At::Start)
    }

    pub fn after_step(&self, step: u64) -> Option<At> {
        self.steps.is_some_and(|n| step.is_multiple_of(n)).then_some(At::Step(step))
    }

    /// After an epoch whose last step was `step`: not where that step has had its own, in this process or, for a run that
    /// is resumed just there, in the one before.
    pub fn after_epoch(&self, epoch: u64, step: u64) -> Option<At> {
        let due = self.epochs.is_some_and(|n| epoch.is_multiple_of(n)) && self.after_step(step).is_none();
        due.then_some(At::Epoch(epoch))
    }

    pub fn is_never(&self) -> bool {
        *self == Self::default()
    }
}

/// The occasion of a preview.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Before the first step.
    Start,
    /// After this many steps.
    Step(u64),
    /// After this many epochs.
    Epoch(u64),
}

impl At {
    /// As file names have it.
    pub fn tag(self) -> String {
        match self {
            At::Start => "e000000".into(),
            At::Step(step) => format!("{step:06}"),
            At::Epoch(epoch) => format!("e{epoch:06}"),
        }
    }

    /// As messages have it.
    pub fn words(self) -> String {
        match self {
            At::Start => "before the first step".into(),
            At::Step(step) => format!("after step {step}"),
            At::Epoch(epoch) => format!("after epoch {epoch}"),
        }
    }
}

/// One preview, ready to be made again and again.
pub struct Scene {
    pub prompt: Prompt,
    pub given: Given,
    pub how: How,
}

/// Loads the VAE's decoder; `wide` asks for a dtype of wider range. `None`: there is none wider.
pub type LoadVae<'a> = dyn Fn(bool) -> Result<Option<Vae>> + 'a;

/// The previews of a run.
pub struct Previews<'a> {
    pub scenes: Vec<Scene>,
    /// Where files go, and how their names begin.
    pub dir: PathBuf,
    pub name: String,
    pub fps: u32,
    pub vae: Box<LoadVae<'a>>,
    pub stop: &'a AtomicBool,
}

/// A preview that was written.
pub struct Made {
    /// Which prompt of the file, from 0.
    pub number: usize,
    pub path: PathBuf,
    pub first_frame: RgbImage,
}

impl Previews<'_> {
    /// Samples every prompt, decodes, writes. What fails is said and left out.
    pub fn make(&self, at: At, trainer: &Trainer, progress: &dyn Progress) -> Vec<Made> {
        let latents = self.sample_all(at, trainer, progress);
        let made = if self.stopped() { Vec::new() } else { self.write_all(at, latents, progress) };
        if self.stopped() && made.len() < self.scenes.len() {
            progress.say(&format!("stopped in the previews {}: the rest of them are left out", at.words()));
        }
        made
    }

    /// The latents of the prompts that could be sampled, by their numbers.
    fn sample_all(&self, at: At, trainer: &Trainer, progress: &dyn Progress) -> Vec<(usize, Tensor)> {
        let total = self.scenes.iter().map(|s| s.how.steps).sum();
        let mut count = Count::begin(progress, "previews", "step", total);
        let mut latents = Vec::new();
        for (number, scene) in self.scenes.iter().enumerate() {
            let mut go_on = |step: usize| {
                count.at(step, &scene.prompt.text);
                !self.stopped()
            };
            match sample(trainer, &scene.given, &scene.how, &mut go_on) {
                Ok(Some(latent)) => latents.push((number, latent)),
                Ok(None) => break,
                Err(e) => self.complain(at, number, &e, progress),
            }
            count.end(scene.how.steps, &scene.prompt.text);
        }
        latents
    }

    /// Latents to files, with the VAE loaded for as long as it takes.
    fn write_all(&self, at: At, latents: Vec<(usize, Tensor)>, progress: &dyn Progress) -> Vec<Made> {
        let stamp = chrono::Local::now().format("%Y%m%d%H%M%S").to_string();
        let frames = |number: &usize| self.scenes[*number].how.fhw[0];
        let total = latents.iter().map(|(number, _)| frames(number)).sum();
        let mut count = Count::begin(progress, "decoding previews", "latent frame", total);
        let mut vae = Decoding { load: &*self.vae, loaded: None, wide: false };
        let mut all = Vec::new();
        for (number, latent) in latents {
            let scene = &self.scenes[number];
            let seed = scene.prompt.seed.map_or(String::new(), |seed| format!("_{seed}"));
            let stem = format!("{}_{}_{number:02}_{stamp}{seed}", self.name, at.tag());
            let mut go_on = |frame: usize| {
                count.at(frame, &scene.prompt.text);
                !self.stopped()
            };
            let made = vae.decode(&latent, &mut go_on).and_then(|frames| {
                let Some(frames) = frames else { return Ok(None) };
                let path = write::write(&self.dir, &stem, &frames, self.fps)?;
                let first_frame = frames.into_iter().next();
                Ok(first_frame.map(|first_frame| Made { number, path, first_frame }))
            });
            match made {
                Ok(Some(made)) => {
                    progress.say(&format!("preview {}: {}", at.words(), made.path.display()));
                    all.push(made);
                }
                Ok(None) => break,
                Err(e) => self.complain(at, number, &e, progress),
            }
            count.end(frames(&number), &scene.prompt.text);
        }
        all
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn complain(&self, at: At, number: usize, e: &anyhow::Error, progress: &dyn Progress) {
        let text = format!("{e:#}");
        // Errors of the card carry a backtrace.
        let why = text.lines().next().unwrap_or_default();
        let place = &self.scenes[number].prompt.place;
        progress.say(&format!("warning: no preview {} of {place}: {why}; training goes on", at.words()));
    }
}

/// Counts what is done of one thing after another.
struct Count {
    task: Box<dyn Task>,
    /// Of the present thing.
    done: usize,
}

impl Count {
    fn begin(progress: &dyn Progress, what: &str, unit: &str, total: usize) -> Self {
        Self { task: progress.begin(Work { what, unit, start: 0, total: total as u64 }), done: 0 }
    }

    /// So much of the present thing is done.
    fn at(&mut self, done: usize, text: &str) {
        if done > self.done {
            let start: String = text.chars().take(40).collect();
            self.task.advance((done - self.done) as u64, &start);
            self.done = done;
        }
    }

    /// All of it is, or what was left will not be.
    fn end(&mut self, whole: usize, text: &str) {
        self.at(whole, text);
        self.done = 0;
    }
}

/// The VAE for the moment of decoding.
struct Decoding<'a> {
    load: &'a LoadVae<'a>,
    loaded: Option<Vae>,
    wide: bool,
}

impl Decoding<'_> {
    fn decode(&mut self, latent: &Tensor, go_on: &mut dyn FnMut(usize) -> bool) -> Result<Option<Vec<RgbImage>>> {
        if self.loaded.is_none() {
            self.loaded = (self.load)(self.wide)?;
        }
        let Some(vae) = &self.loaded else { anyhow::bail!("there is no VAE") };
        let frames = write::decode(vae, latent, go_on);
        if frames.is_ok() || self.wide {
            return frames;
        }
        // It goes first: both may not fit.
        self.loaded = None;
        match (self.load)(true)? {
            Some(wide) => {
                self.wide = true;
                write::decode(self.loaded.insert(wide), latent, go_on)
            }
            None => frames,
        }
    }
}
