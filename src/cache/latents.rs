//! Makes the latent files a survey found wanting: some threads decode, this one encodes, one writes. A decoder holds one
//! clip until this thread takes it, so that memory stays that of a few clips whatever the data set. Files are taken in
//! their order, whoever decodes faster, so results and reports do not depend on timing.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use anyhow::{bail, Context, Result};
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use wan_kernels::Exec;
use wan_models::clip::ClipVision;
use wan_models::vae::{Encoder, Vae};

use super::decode::{decode_all, Lanes, Message, Sources, WorkItem};
use super::format::{self, LatentTensors};
use super::one_frame::{self, Positions};
use super::options::CacheOptions;
use super::recipe::{ClipList, Freshness, LatentRecipe, Stamp};
use super::survey::{cut_rule, LatentEntry, Outcome, Survey};
use super::writer::Writer;
use crate::data::{self, Clip, Item, Kind, Planned};
use crate::error::UserError;
use crate::fsio;
use crate::report::{Progress, Work};

/// A model that is loaded when the first thing is to be computed with it, and dropped after the last.
pub struct Lazy<'a, T> {
    /// From `fingerprint::of_weights`; recorded in what is made.
    pub fingerprint: String,
    pub load: Box<dyn FnOnce() -> Result<T> + 'a>,
}

/// The models that latents are made with.
pub struct LatentModels<'a> {
    pub vae: Lazy<'a, Vae>,
    /// The same VAE in a dtype of wider range, for clips whose numbers overflow in the first one's.
    pub wide_vae: Option<Box<dyn FnOnce() -> Result<Vae> + 'a>>,
    /// Needed where the options ask for CLIP features.
    pub clip: Option<Lazy<'a, ClipVision>>,
    /// Files decoded at a time.
    pub decoders: usize,
}

/// Frames converted and encoded at a time, after the first: what the VAE takes as a chunk.
const CHUNK: usize = 4;

/// Makes every latent file that is missing, stale or torn, and writes the results into the survey. Media that cannot be
/// used become faults there (see `Survey::check`); errors that concern all of them (a disk that is full, a model that
/// cannot be loaded) end the work. `stop` is looked at between clips: once it is set, what is finished stays, the rest is
/// left as it is, and the call returns.
pub fn cache_latents(
    survey: &mut Survey,
    models: LatentModels<'_>,
    exec: &Exec,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<()> {
    let mut work = work_list(survey);
    if work.is_empty() {
        return Ok(());
    }
    find_damaged(survey, &work);
    work.retain(|w| survey.entries[w.entry].fault.is_none());
    if !survey.options.allow_bad_media && survey.entries.iter().any(|e| e.fault.is_some()) {
        return Ok(());
    }
    let directories: HashSet<PathBuf> = work.iter().map(|w| w.dataset.cache_directory.clone()).collect();
    for dir in &directories {
        fsio::ensure_writable_dir(dir)?;
    }
    if work.is_empty() {
        return Ok(());
    }
    let decoders = models.decoders.clamp(1, work.len());
    let mut kitchen = Kitchen::new(survey, models, exec)?;
    let total = work.len() as u64;
    let mut task = progress.begin(Work { what: "latents", unit: "file", start: 0, total });
    let mut done = 0;
    std::thread::scope(|scope| -> Result<()> {
        // A lane for each file keeps their order.
        let (lanes, receivers) = Lanes::new(work.len());
        let lanes = Arc::new(lanes);
        let work = &work;
        for _ in 0..decoders {
            let lanes = lanes.clone();
            scope.spawn(move || decode_all(work, &lanes, stop));
        }
        let mut writer = Writer::spawn(scope);
        // Leaving these loops drops the receivers, and that ends the decoders at their next clip.
        'files: for receive in receivers {
            for message in receive {
                if stop.load(Ordering::Relaxed) {
                    break 'files;
                }
                match message {
                    Message::Clip { entry, clip, sources } => {
                        task.detail(&clip_name(&survey.items[survey.entries[entry].item], &clip));
                        kitchen.take(survey, &mut writer, entry, clip, &sources)?;
                    }
                    Message::End { entry, result } => {
                        kitchen.finish(survey, &mut writer, entry, result)?;
                        done += 1;
                        task.advance(1, &file_name(&survey.items[survey.entries[entry].item].path));
                    }
                }
            }
        }
        kitchen.write_held(survey, &mut writer, None)?;
        writer.settle(survey)
    })?;
    drop(task);
    say_stopped(progress, stop, done, total, "files");
    Ok(())
}

/// Says where a run that was asked to stop has come to.
pub(super) fn say_stopped(progress: &dyn Progress, stop: &AtomicBool, done: u64, total: u64, what: &str) {
    if done < total && stop.load(Ordering::Relaxed) {
        progress.say(&format!("stopped after {done} of {total} {what}; what is finished is kept"));
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

fn clip_name(item: &Item, clip: &Clip) -> String {
    match item.kind {
        Kind::Image => file_name(&item.path),
        Kind::Video => {
            format!("{} frames {}..{}", file_name(&item.path), clip.start, clip.start + clip.frames.len())
        }
    }
}

fn work_list(survey: &Survey) -> Vec<WorkItem> {
    let needed =
        survey.entries.iter().enumerate().filter(|(_, e)| e.needs_latents() || (e.fault.is_none() && !e.settled));
    needed
        .map(|(i, e)| {
            let item = survey.items[e.item].clone();
            let dataset = survey.dataset(&item).clone();
            let ready = e.clips.iter().filter(|c| c.state.is_usable()).map(|c| c.path.clone()).collect();
            WorkItem { entry: i, item, dataset, ready }
        })
        .collect()
}

/// Finds the damaged media among those to be read, all at once and before a model is loaded.
fn find_damaged(survey: &mut Survey, work: &[WorkItem]) {
    let items: Vec<&Item> = work.iter().map(|w| &w.item).collect();
    for finding in data::check_media(&survey.config, &items) {
        let damaged = work.iter().filter(|w| w.item.dataset == finding.dataset && w.item.path == finding.path);
        for w in damaged {
            survey.entries[w.entry].fault = Some(finding.why.clone());
        }
    }
}

/// Encodes clips and writes them. A clip's file is written when the next message comes: the last clip of a video then
/// knows that it is the last, and its recipe lists them all.
struct Kitchen<'a> {
    vae: Vae,
    /// In a dtype of wider range, once a clip has needed it.
    wide_vae: Option<Vae>,
    load_wide: Option<Box<dyn FnOnce() -> Result<Vae> + 'a>>,
    vae_fingerprint: String,
    clip: Option<(ClipVision, String)>,
    device: Device,
    /// Encoded, not written yet.
    held: Option<Held>,
}

struct Held {
    entry: usize,
    file: LatentEntry,
    tensors: LatentTensors,
    sources: Arc<Sources>,
}

impl<'a> Kitchen<'a> {
    fn new(survey: &Survey, models: LatentModels<'a>, exec: &Exec) -> Result<Self> {
        let clip = match (survey.options.clip, models.clip) {
            (false, _) => None,
            (true, Some(clip)) => Some(((clip.load)()?, clip.fingerprint)),
            (true, None) => {
                return Err(UserError::new("this task needs CLIP features, and no CLIP weights are given")
                    .hint("pass --clip models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
                    .into())
            }
        };
        let vae_fingerprint = models.vae.fingerprint;
        let vae = (models.vae.load)()?;
        let (load_wide, device) = (models.wide_vae, exec.device().clone());
        Ok(Self { vae, wide_vae: None, load_wide, vae_fingerprint, clip, device, held: None })
    }

    fn take(
        &mut self,
        survey: &mut Survey,
        writer: &mut Writer,
        entry: usize,
        clip: Clip,
        sources: &Arc<Sources>,
    ) -> Result<()> {
        self.write_held(survey, writer, None)?;
        if survey.entries[entry].fault.is_some() {
            return Ok(());
        }
        let item = survey.items[survey.entries[entry].item].clone();
        // A clip that the estimate did not foresee may still be there from an earlier run, and another run may have made
        // one since the survey: two cards train on one dataset.
        let span = Planned { start: clip.start, frames: clip.frames.len(), size: clip.size };
        let file = survey.latent_entry(&item, span);
        if file.state.is_usable() {
            if let Some(known) = survey.entries[entry].clips.iter_mut().find(|c| c.path == file.path) {
                *known = file;
            }
            return Ok(());
        }
        let mut made = self.encode(survey, &item, &clip);
        if matches!(made, Err(Failure::Numbers(_))) && self.load_wide_vae()? {
            made = self.encode_wide(survey, &item, &clip);
        }
        match made {
            Ok(tensors) => {
                self.held = Some(Held { entry, file, tensors, sources: sources.clone() });
                Ok(())
            }
            Err(Failure::Medium(why) | Failure::Numbers(why)) => {
                survey.entries[entry].fault = Some(why);
                Ok(())
            }
            Err(Failure::Work(e)) => Err(e.context(format!("while encoding {}", item.path.display()))),
        }
    }

    /// Whether there is a VAE of wider range.
    fn load_wide_vae(&mut self) -> Result<bool> {
        if let Some(load) = self.load_wide.take() {
            self.wide_vae = Some(load()?);
        }
        Ok(self.wide_vae.is_some())
    }

    fn encode_wide(&mut self, survey: &Survey, item: &Item, clip: &Clip) -> Result<LatentTensors, Failure> {
        let Some(wide) = self.wide_vae.take() else { return self.encode(survey, item, clip) };
        let narrow = std::mem::replace(&mut self.vae, wide);
        let made = self.encode(survey, item, clip);
        self.wide_vae = Some(std::mem::replace(&mut self.vae, narrow));
        made
    }

    fn finish(
        &mut self,
        survey: &mut Survey,
        writer: &mut Writer,
        entry: usize,
        result: Result<Vec<Planned>>,
    ) -> Result<()> {
        match result {
            Ok(found) => {
                let item = &survey.items[survey.entries[entry].item];
                let all = found.iter().map(|c| (c.start, c.frames)).collect();
                let list = ClipList { cut: cut_rule(survey.dataset(item)), all };
                let list = (item.kind == Kind::Video).then_some(list);
                self.write_held(survey, writer, list)?;
                if survey.entries[entry].fault.is_none() {
                    survey.settle_clips(entry, &found);
                }
                Ok(())
            }
            Err(e) => {
                self.write_held(survey, writer, None)?;
                survey.entries[entry].fault = Some(format!("{e:#}"));
                Ok(())
            }
        }
    }

    fn write_held(&mut self, survey: &mut Survey, writer: &mut Writer, clips: Option<ClipList>) -> Result<()> {
        let Some(Held { entry, mut file, tensors, sources }) = self.held.take() else { return Ok(()) };
        let item = survey.items[survey.entries[entry].item].clone();
        let named = tensors.named()?;
        let recipe = LatentRecipe {
            stamp: Stamp::new(&named)?,
            source: sources.source.clone(),
            controls: sources.controls.clone(),
            settings: survey.settings(&item, file.span)?,
            vae: self.vae_fingerprint.clone(),
            clip: self.clip.as_ref().map(|(_, fingerprint)| fingerprint.clone()),
            clips,
        };
        let (size, frame_count) = match item.kind {
            Kind::Image => (item.probe.size, None),
            Kind::Video => (file.span.size, Some(file.span.frames)),
        };
        let mut metadata = format::latent_metadata(size.0 as usize, size.1 as usize, frame_count);
        metadata.insert(format::RECIPE_KEY.to_string(), serde_json::to_string(&recipe)?);
        writer.write(survey, entry, file.clone(), format::to_bytes(&named, &metadata)?)?;
        file.remade = file.state.is_spoilt().then(|| file.state.why());
        file.state = Freshness::Fresh;
        file.outcome = Outcome::Cached;
        let clips = &mut survey.entries[entry].clips;
        match clips.iter_mut().find(|c| c.path == file.path) {
            Some(known) => *known = file,
            None => clips.push(file),
        }
        Ok(())
    }

    fn encode(&self, survey: &Survey, item: &Item, clip: &Clip) -> Result<LatentTensors, Failure> {
        let options = &survey.options;
        let store = |t: &Tensor| -> Result<Tensor> {
            Ok(t.squeeze(0)?.to_device(&Device::Cpu)?.to_dtype(options.vae_dtype)?.contiguous()?)
        };
        if let Some(positions) = survey.positions(item) {
            return self.encode_one_frame(options, &positions, clip);
        }
        let latents = store(&encode_frames(&self.vae, &clip.frames, &self.device)?)?;
        let n = clip.frames.len();
        let frame = |i: usize| -> Result<Tensor> {
            Ok(self.vae.pixels(&frames_to_tensor(&clip.frames[i..i + 1], &self.device)?)?)
        };
        let empty = item.kind == Kind::Image && options.i2v_images_as_t2v;
        let first = if empty { frame(0)?.zeros_like()? } else { frame(0)? };
        let last = if options.last_frame && n > 1 { Some(frame(n - 1)?) } else { None };
        let latents_image = match (options.i2v, empty) {
            (false, _) => None,
            (true, true) => Some(store(&empty_condition(&self.vae, &first)?)?),
            (true, false) => Some(store(&self.vae.condition(&first, last.as_ref(), n)?)?),
        };
        let latents_control = match &clip.control {
            None => None,
            Some(frames) => {
                let size = frames[0].dimensions();
                if size != clip.size || frames.len() != clip.frames.len() {
                    return Err(Failure::Medium(format!(
                        "its control has {} frames of {}x{}, it has {} of {}x{}: Wan models need them alike (is \
                         no_resize_control or control_resolution set?)",
                        frames.len(),
                        size.0,
                        size.1,
                        clip.frames.len(),
                        clip.size.0,
                        clip.size.1
                    )));
                }
                Some(store(&encode_frames(&self.vae, frames, &self.device)?)?)
            }
        };
        let clip_features = match &self.clip {
            None => None,
            Some((vision, _)) => {
                let see = |t: &Tensor| -> Result<Tensor> {
                    Ok(vision.encode(&t.squeeze(2)?.to_dtype(DType::F32)?)?.to_device(&Device::Cpu)?)
                };
                Some(match options.last_frame {
                    true => Tensor::cat(&[see(&first)?, see(last.as_ref().unwrap_or(&first))?], 0)?,
                    false => see(&first)?.squeeze(0)?,
                })
            }
        };
        proper(LatentTensors { latents, latents_image, latents_control, clip: clip_features, positions: None })
    }

    fn encode_one_frame(
        &self,
        options: &CacheOptions,
        positions: &Positions,
        clip: &Clip,
    ) -> Result<LatentTensors, Failure> {
        let controls = clip.control.as_deref().unwrap_or_default();
        if controls.len() != positions.controls.len() || controls.iter().any(|c| c.dimensions() != clip.size) {
            let sizes: Vec<String> = controls.iter().map(|c| format!("{}x{}", c.width(), c.height())).collect();
            return Err(Failure::Medium(format!(
                "one-frame training needs {} control pictures of {}x{} for it, it has [{}] (is no_resize_control or \
                 control_resolution set?)",
                positions.controls.len(),
                clip.size.0,
                clip.size.1,
                sizes.join(", ")
            )));
        }
        let see = self.clip.as_ref().map(|(vision, _)| (vision, if options.last_frame { 2 } else { 1 }));
        let made = one_frame::encode(&self.vae, see, positions, &clip.frames[0], controls, &self.device)?;
        let store = |t: &Tensor| -> Result<Tensor> {
            Ok(t.squeeze(0)?.to_device(&Device::Cpu)?.to_dtype(options.vae_dtype)?.contiguous()?)
        };
        proper(LatentTensors {
            latents: store(&made.latents)?,
            latents_image: Some(store(&made.condition)?),
            latents_control: None,
            clip: made.clip,
            positions: Some(made.positions),
        })
    }
}

/// The tensors, unless the models gave something that is no number.
fn proper(tensors: LatentTensors) -> Result<LatentTensors, Failure> {
    for (name, tensor) in tensors.named()? {
        format::check_finite(&name, &tensor).map_err(|e| {
            Failure::Numbers(format!("the models gave no proper numbers for it ({e}); try --vae_dtype float32"))
        })?;
    }
    Ok(tensors)
}

/// Why a clip has no latents: by its own fault, or by one that would meet every other clip too.
enum Failure {
    Medium(String),
    /// Infinite or not a number: the medium's fault, or that of a dtype too narrow for it.
    Numbers(String),
    Work(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(e: E) -> Self {
        Failure::Work(e.into())
    }
}

/// RGB frames of one size as bytes [1,3,T,H,W].
pub fn frames_to_tensor(frames: &[Arc<RgbImage>], device: &Device) -> Result<Tensor> {
    let (w, h) = frames[0].dimensions();
    let mut bytes = Vec::with_capacity(frames.len() * frames[0].len());
    for frame in frames {
        if frame.dimensions() != (w, h) {
            bail!("frames of {w}x{h} and {:?} in one clip", frame.dimensions());
        }
        bytes.extend_from_slice(frame.as_raw());
    }
    let thwc = Tensor::from_vec(bytes, (frames.len(), h as usize, w as usize, 3), device)?;
    Ok(thwc.permute((3, 0, 1, 2))?.contiguous()?.unsqueeze(0)?)
}

/// Normalised latents [1,c,F,h,w] of frames; only a chunk of them is held as numbers at a time.
pub fn encode_frames(vae: &Vae, frames: &[Arc<RgbImage>], device: &Device) -> Result<Tensor> {
    let mut encoder = Encoder::new(vae)?;
    let (first, rest) = frames.split_at(1);
    for chunk in std::iter::once(first).chain(rest.chunks(CHUNK)) {
        encoder.push(&vae.pixels(&frames_to_tensor(chunk, device)?)?)?;
    }
    let encoded = encoder.finish().context("encoding")?;
    if encoded.surplus_frames > 0 {
        bail!("a clip of {} frames is not 4n+1 long", frames.len());
    }
    Ok(encoded.latent)
}

/// The first-frame condition of a picture that is to be learnt as text-to-video: mask 0, and the latents of mid-grey.
/// `grey` is [1,3,1,H,W] of zeros; the result [1,4+c,1,h,w].
fn empty_condition(vae: &Vae, grey: &Tensor) -> Result<Tensor> {
    let grey = vae.encode(grey)?;
    let (b, _, f, h, w) = grey.dims5()?;
    let mask = Tensor::zeros((b, 4, f, h, w), grey.dtype(), grey.device())?;
    Ok(Tensor::cat(&[&mask, &grey], 1)?)
}
