//! Previews of a run: the prompt file held against task, files and memory before anything is loaded, what the encoders make
//! of it before the DiT is, and the decoder for when it is needed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::ensure;
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use wan_kernels::Exec;
use wan_models::arch::{Conditioning, Role};
use wan_models::clip::ClipVision;
use wan_models::vae::{Vae, VaeArch, VaeOptions};

use super::cache::{load_clip, load_vae, published_vae, vae_numbers};
use super::job::Job;
use super::plan::Planned;
use super::text;
use crate::cache::latents::{encode_frames, frames_to_tensor};
use crate::config::RunConfig;
use crate::data::{picture, resize, video};
use crate::error::{wrong, UserError};
use crate::fsio::{self, human};
use crate::train::batch::channels;
use crate::train::preview::prompts::{self, Prompt};
use crate::train::preview::sample::{Given, How};
use crate::train::preview::{fit, write, Previews, Scene, NEGATIVE};
use crate::train::{Expert, TrainSettings};

/// The old tool's, made for another model.
const MUSUBI_SHIFT: f64 = 14.5;
const MUSUBI_FPS: u32 = 24;
/// flf2v leads away from still scenes, and from cuts.
const CUTS: &str = "镜头切换，";

/// What is to be previewed, checked; nothing where no preview is ever due. All that is wrong is told at once.
pub fn prompts(job: &Job) -> anyhow::Result<Vec<Prompt>> {
    let c = &job.config;
    let settings = TrainSettings::from_config(c, &job.model, c.seed.unwrap_or_default())?;
    let (Some(path), false) = (&c.sample_prompts, settings.previews.is_never()) else { return Ok(Vec::new()) };
    if c.one_frame {
        return Err(UserError::usage("--one_frame runs make no previews yet")
            .hint("leave the --sample options out, and try the LoRA in ComfyUI")
            .into());
    }
    let mut all = prompts::read(path)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut faults = Vec::new();
    for prompt in &mut all {
        faults.extend(fit::fit(prompt, &job.model, dir).into_iter().map(|what| format!("{}: {what}", prompt.place)));
    }
    let files =
        [("vae", Role::Vae, &c.vae, true), ("t5", Role::T5, &c.t5, true), ("clip", Role::Clip, &c.clip, sees(job))];
    for (option, role, path, _) in files.into_iter().filter(|(.., needed)| *needed) {
        faults.extend(job.model_file(option, role, path.as_ref()).err().map(|e| format!("previews need it: {e:#}")));
    }
    match faults.len() {
        0 => Ok(all),
        n => {
            let list = faults.join("\n").replace('\n', "\n  ");
            Err(UserError::new(format!("{} with the previews of {}:\n  {list}", wrong(n), path.display())).into())
        }
    }
}

/// The same for `wan-train check`, with what is worth knowing.
pub fn check(job: &Job) -> anyhow::Result<()> {
    let prompts = prompts(job)?;
    for (prompt, note) in prompts.iter().flat_map(|p| p.notes.iter().map(move |note| (p, note))) {
        println!("note: {}: {note}", prompt.place);
    }
    Ok(())
}

/// Whether the model sees CLIP features of a picture.
fn sees(job: &Job) -> bool {
    job.conditions().1
}

/// What decoding takes on a card, in bytes. An estimate, held against one measurement (7.1 GiB for 21 frames of 1280x720,
/// `2026-11-22-h200-cache.jsonl`): weights and workspace, the frames that the layers of
/// the four levels remember (27 and a half frames of the last level), and those that are computed.
fn decoding(vae: &VaeArch, width: usize, height: usize) -> u64 {
    let frame = (width * height / vae.patch().pow(2) * vae.dec_dim * 2) as u64;
    (1 << 30) + 33 * frame
}

/// Counts previews into the plan, and refuses before the hours what cannot be made on this device. Returns notes.
pub fn count(
    job: &Job,
    settings: &TrainSettings,
    plan: &mut Planned,
    prompts: &[Prompt],
) -> anyhow::Result<Vec<String>> {
    let (mut faults, mut notes, mut most) = (Vec::new(), Vec::new(), 0);
    let vae = published_vae(job);
    for prompt in prompts {
        let (needs, room) = plan.preview(job, settings, (prompt.width, prompt.height, prompt.frames))?;
        most = most.max(needs);
        let decoding = decoding(&vae, prompt.width, prompt.height);
        if plan.on_card() && decoding > room {
            notes.push(format!(
                "{}: decoding {}x{} is estimated at {}, and {} are left: if that is not enough, this preview is left out with a \
                 warning",
                prompt.place,
                prompt.width,
                prompt.height,
                human(decoding),
                human(room)
            ));
        }
        if needs > room {
            let Prompt { place, width, height, frames, .. } = prompt;
            faults.push(format!(
                "{place}: {frames} frames of {width}x{height} need {} beside what stays in memory, which leaves {}",
                human(needs),
                human(room)
            ));
        }
    }
    match faults.is_empty() {
        true => {
            plan.count_previews(most);
            Ok(notes)
        }
        false => Err(UserError::new(format!("previews do not fit:\n  {}", faults.join("\n  ")))
            .hint("ask for less in the prompt file (--w, --h, --f), or stream more of the model with --blocks_to_swap")
            .into()),
    }
}

/// Encodes everything that a run's previews are given; VAE, CLIP and text encoder are gone again afterwards.
pub fn prepare<'a>(
    job: &'a Job,
    config: &RunConfig,
    settings: &TrainSettings,
    exec: &'a Exec,
    prompts: Vec<Prompt>,
) -> anyhow::Result<Option<Previews<'a>>> {
    let (Some(dir), Some(name), false) = (&config.output_dir, &config.output_name, prompts.is_empty()) else {
        return Ok(None);
    };
    let say = |line: &str| job.progress.say(line);
    for (prompt, note) in prompts.iter().flat_map(|p| p.notes.iter().map(move |note| (p, note))) {
        say(&format!("note: {}: {note}", prompt.place));
    }
    if let (Some(level), false) = (&config.noise_level, config.is_shared()) {
        say(&format!("note: previews are made by the {level}-noise expert alone, which is the one that is trained"));
    }
    let model = &job.model;
    let mut given = pictures(job, exec, &prompts)?;
    let negative = |prompt: &Prompt| {
        let cuts = if model.conditioning == Conditioning::FirstLastFrame { CUTS } else { "" };
        prompt.negative.clone().unwrap_or_else(|| format!("{cuts}{NEGATIVE}"))
    };
    let hows: Vec<How> = prompts.iter().enumerate().map(|(i, p)| how(job, config, settings, p, i)).collect();
    let negatives: Vec<String> = prompts.iter().map(negative).collect();
    let guided = |how: &How| how.guidance.iter().any(|g| *g != 1.0);
    let mut texts: Vec<&str> = prompts.iter().map(|p| p.text.as_str()).collect();
    texts.extend(negatives.iter().zip(&hows).filter(|(_, how)| guided(how)).map(|(text, _)| text.as_str()));
    texts.sort_unstable();
    texts.dedup();
    let (contexts, notes) = text::contexts(job, exec, &texts)?;
    notes.iter().for_each(|note| say(&format!("note: {note}")));
    // Every text is in the list.
    let context = |text: &str| texts.binary_search(&text).ok().map(|at| contexts[at].clone());
    let mut scenes = Vec::with_capacity(prompts.len());
    for (i, how) in hows.into_iter().enumerate() {
        let (Some(given), Some(context_md)) = (given.pop_front(), context(&prompts[i].text)) else {
            anyhow::bail!("a prompt without its features");
        };
        let negative_md = if guided(&how) { context(&negatives[i]) } else { None };
        scenes.push((Given { context_md, negative_md, ..given }, how));
    }
    // The DiT finds the card as it was, and the peak will be the training's and the previews'.
    #[cfg(feature = "cuda")]
    if let Exec::Cuda { gpu, .. } = exec {
        gpu.tidy()?;
        gpu.reset_peak()?;
    }
    let scenes = prompts.into_iter().zip(scenes).map(|(prompt, (given, how))| Scene { prompt, given, how }).collect();
    let fps = if config.musubi_compat { MUSUBI_FPS } else { model.inference.fps as u32 };
    let dir = dir.join("sample");
    say(&format!("previews go to {} (PNG; clips as {} with {fps} frames a second)", dir.display(), write::MOVING));
    // Also removes what a killed run has left there.
    if let Err(e) = fsio::ensure_writable_dir(&dir) {
        say(&format!("warning: previews cannot be written, training goes on without them: {e:#}"));
    }
    let path = job.model_file("vae", Role::Vae, config.vae.as_ref())?;
    let vae = Box::new(move |wide: bool| {
        let how = VaeOptions { encoder: false, ..vae_numbers(job, exec) };
        let how = if wide { wider(how) } else { Some(how) };
        how.map(|how| load_vae(job, exec, &path, how)).transpose()
    });
    Ok(Some(Previews { scenes, dir, name: name.clone(), fps, vae, stop: &job.stop }))
}

/// How the `number`-th prompt is made. Without a seed of its own it has one of the run's: the same at every occasion, so
/// that previews can be compared.
fn how(job: &Job, config: &RunConfig, settings: &TrainSettings, prompt: &Prompt, number: usize) -> How {
    let defaults = &job.model.inference;
    let low = defaults.guidance.first().copied().unwrap_or(1.0);
    // The old tool knows the low-noise expert's only.
    let high = defaults.guidance.get(1).copied().filter(|_| !config.musubi_compat).unwrap_or(low);
    let [_, f, h, w] = super::plan::geometry(job).shape((prompt.width as u32, prompt.height as u32), prompt.frames);
    let shift = if config.musubi_compat { MUSUBI_SHIFT } else { defaults.shift };
    How {
        fhw: [f, h, w],
        seed: prompt.seed.unwrap_or(settings.seed.wrapping_add(number as u64)),
        steps: prompt.steps,
        shift: prompt.shift.unwrap_or(shift),
        guidance: prompt.guidance.map_or([low, high], |g| [g, g]),
        alone: if config.noise_level.as_deref() == Some("high") { Expert::High } else { Expert::Low },
        musubi: config.musubi_compat,
    }
}

/// What the VAE and CLIP make of the prompts' pictures, in their order; the text features are still empty.
fn pictures(job: &Job, exec: &Exec, prompts: &[Prompt]) -> anyhow::Result<std::collections::VecDeque<Given>> {
    let none = Given {
        context_md: Tensor::zeros((0, job.model.arch.text_dim), DType::F32, &Device::Cpu)?,
        negative_md: None,
        y: None,
        // Fun Control without a picture; the old tool sends text rows through the image's weights instead.
        clip: job.model.arch.blank_clip(1, &Device::Cpu)?.filter(|_| !sees(job) && !job.config.musubi_compat),
        first: None,
    };
    let needs = |p: &Prompt| p.image.is_some() || p.control_video.is_some();
    if !prompts.iter().any(needs) {
        return Ok(prompts.iter().map(|_| none.clone()).collect());
    }
    let path = job.model_file("vae", Role::Vae, job.config.vae.as_ref())?;
    let how = vae_numbers(job, exec).encoder_only();
    let mut vae = load_vae(job, exec, &path, how)?;
    let clip = match sees(job) {
        true => Some(load_clip(job, &job.model_file("clip", Role::Clip, job.config.clip.as_ref())?, exec.device())?),
        false => None,
    };
    let mut all = std::collections::VecDeque::with_capacity(prompts.len());
    for prompt in prompts {
        let mut given = one(job, prompt, &vae, clip.as_ref(), none.clone())?;
        if let (Some(wide), false) = (wider(how), proper(&given)?) {
            vae = load_vae(job, exec, &path, wide)?;
            given = one(job, prompt, &vae, clip.as_ref(), none.clone())?;
        }
        if !proper(&given)? {
            let what = format!("{}: the VAE gives no proper numbers for its picture or video", prompt.place);
            return Err(UserError::new(what).hint("take another one, or --vae_dtype float32").into());
        }
        all.push_back(given);
    }
    Ok(all)
}

/// The same in a dtype of wider range, where there is one: some pictures overflow fp16.
fn wider(how: VaeOptions) -> Option<VaeOptions> {
    (how.compute == DType::F16 && !how.rounded_io).then_some(VaeOptions { compute: DType::BF16, ..how })
}

/// Whether what the VAE made is finite.
fn proper(given: &Given) -> anyhow::Result<bool> {
    for tensor in [&given.y, &given.first].into_iter().flatten() {
        if !tensor.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn one(job: &Job, prompt: &Prompt, vae: &Vae, clip: Option<&ClipVision>, none: Given) -> anyhow::Result<Given> {
    let size = (prompt.width as u32, prompt.height as u32);
    let device = Device::Cpu;
    let pixels = |path: &PathBuf| -> anyhow::Result<(Arc<RgbImage>, Tensor)> {
        let picture = Arc::new(resize::to_bucket(picture::read(path, true)?, size));
        let pixels = vae.pixels(&frames_to_tensor(std::slice::from_ref(&picture), &device)?)?;
        Ok((picture, pixels))
    };
    let first = prompt.image.as_ref().map(pixels).transpose()?;
    let last = prompt.end_image.as_ref().map(pixels).transpose()?;
    let store = |t: Tensor| -> anyhow::Result<Tensor> { Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?) };
    let conditioning = job.model.conditioning;
    if conditioning == Conditioning::CleanFirstFrame {
        let clean = first.map(|(picture, _)| store(encode_frames(vae, &[picture], &device)?)).transpose()?;
        return Ok(Given { first: clean, ..none });
    }
    let image = || match &first {
        Some((_, first)) => store(vae.condition(first, last.as_ref().map(|(_, last)| last), prompt.frames)?),
        None => anyhow::bail!("{} has no start picture", prompt.place),
    };
    let control = || match &prompt.control_video {
        Some(path) => store(encode_frames(vae, &control_frames(path, size, prompt.frames)?, &device)?),
        None => anyhow::bail!("{} has no control video", prompt.place),
    };
    let y = channels(conditioning, image, control)?;
    let features = match (clip, &first) {
        (Some(vision), Some((_, first))) => {
            let see = |pixels: &Tensor| store(vision.encode(&pixels.squeeze(2)?.to_dtype(DType::F32)?)?);
            let mut seen = vec![see(first)?];
            if conditioning == Conditioning::FirstLastFrame {
                seen.push(see(last.as_ref().map_or(first, |(_, last)| last))?);
            }
            Some(Tensor::cat(&seen, 0)?)
        }
        _ => none.clip.clone(),
    };
    Ok(Given { y, clip: features, ..none })
}

/// The first frames of a control video, at the preview's size.
fn control_frames(path: &Path, size: (u32, u32), count: usize) -> anyhow::Result<Vec<Arc<RgbImage>>> {
    let mut reader = video::Reader::open(path, true, true)?;
    let mut frames = Vec::with_capacity(count);
    while frames.len() < count && reader.advance()?.is_some() {
        frames.push(Arc::new(resize::to_bucket(reader.picture()?, size)));
    }
    ensure!(frames.len() == count, "{} has {} frames of the {count} asked for", path.display(), frames.len());
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use wan_models::arch::ClipArch;

    use super::*;
    use crate::config::{resolve_runs, Typed};

    /// The demo's job in `dir`, with its models and media.
    fn job(dir: &Path) -> Job {
        let mut typed = Typed::default();
        typed.flags.insert("template", vec!["demo".into()]);
        typed.flags.insert("base_dir", vec![dir.to_string_lossy().into_owned()]);
        Job::several(resolve_runs(&typed, "now").unwrap()).unwrap().remove(0)
    }

    fn sum(t: &Tensor) -> f32 {
        t.sqr().unwrap().sum_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn pictures_and_control_videos_become_what_the_task_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let mut job = job(dir.path());
        let media = dir.path().join("datasets/demo");
        let prompt = Prompt {
            width: 64,
            height: 48,
            frames: 5,
            image: Some(media.join("images/coffee.jpg")),
            control_video: Some(media.join("videos/bigbuckbunny.mp4")),
            ..Prompt::default()
        };
        let bare = Prompt { image: None, control_video: None, ..prompt.clone() };
        let mut given = |conditioning, prompt: &Prompt| {
            job.model.conditioning = conditioning;
            job.model.arch.clip = None;
            if matches!(conditioning, Conditioning::Control) {
                job.model.arch.clip = Some(ClipArch { dim: 8, tokens: 3, images: 1 });
            }
            pictures(&job, &Exec::cpu(), std::slice::from_ref(prompt)).unwrap().pop_front().unwrap()
        };
        let none = given(Conditioning::None, &bare);
        assert!(none.y.is_none() && none.first.is_none() && none.clip.is_none());

        let y = given(Conditioning::FirstFrame, &prompt).y.unwrap();
        assert_eq!(y.dims(), [1, 20, 2, 6, 8]);
        let mask = y.narrow(1, 0, 4).unwrap();
        assert_eq!((sum(&mask), sum(&mask.narrow(2, 0, 1).unwrap())), (4.0 * 48.0, 4.0 * 48.0));

        let first = given(Conditioning::CleanFirstFrame, &prompt).first.unwrap();
        assert_eq!(first.dims(), [1, 16, 1, 6, 8]);
        let latents = y.narrow(1, 4, 16).unwrap().narrow(2, 0, 1).unwrap();
        assert!(sum(&(&first - latents).unwrap()) < 1e-6 * sum(&first), "one picture, one latent");
        assert!(given(Conditioning::CleanFirstFrame, &bare).first.is_none());

        if cfg!(feature = "video") {
            let fun = given(Conditioning::Control, &prompt);
            let y = fun.y.unwrap();
            assert_eq!(y.dims(), [1, 32, 2, 6, 8]);
            assert!(sum(&y.narrow(1, 0, 16).unwrap()) > 1.0 && sum(&y.narrow(1, 16, 16).unwrap()) == 0.0);
            assert_eq!(fun.clip.map(|c| (c.dims().to_vec(), sum(&c))), Some((vec![1, 3, 8], 0.0)), "no picture");
        }
    }

    #[test]
    fn guidance_shift_and_seed_are_the_tasks_unless_the_prompt_or_the_old_tool_has_others() {
        let dir = tempfile::tempdir().unwrap();
        let mut job = job(dir.path());
        job.model.inference.guidance = vec![3.0, 4.0];
        job.model.inference.shift = 12.0;
        let settings = TrainSettings::from_config(&job.config, &job.model, 42).unwrap();
        let prompt = Prompt { width: 64, height: 48, frames: 5, steps: 9, ..Prompt::default() };
        let own = Prompt { seed: Some(7), guidance: Some(2.0), shift: Some(5.0), ..prompt.clone() };
        let get = |job: &Job, prompt: &Prompt| {
            let how = how(job, &job.config, &settings, prompt, 1);
            assert_eq!((how.fhw, how.steps), ([2, 6, 8], 9));
            (how.seed, how.guidance, how.shift, how.musubi)
        };
        assert_eq!(get(&job, &prompt), (43, [3.0, 4.0], 12.0, false));
        assert_eq!(get(&job, &own), (7, [2.0, 2.0], 5.0, false));
        job.config.musubi_compat = true;
        assert_eq!(get(&job, &prompt), (43, [3.0, 3.0], 14.5, true));
        assert_eq!(get(&job, &own), (7, [2.0, 2.0], 5.0, true));
    }
}
