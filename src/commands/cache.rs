//! `wan-train cache`: every latent, condition and caption that is missing or stale is made; one table says what became
//! of each file.

use std::path::Path;
use std::process::ExitCode;

use candle_core::{DType, Device};
use wan_kernels::Exec;
use wan_models::arch::{Conditioning, Role, VaeKind};
use wan_models::clip::{ClipArch, ClipVision};
use wan_models::vae::{Vae, VaeArch, VaeOptions};

use super::job::{dtype, exec, Job};
use super::text;
use crate::cache::{cache_latents, cache_text};
use crate::cache::{fingerprint, CacheOptions, CacheReport, LatentModels, Lazy, Survey};
use crate::cli::CacheWhat;
use crate::data::{DatasetConfig, ScanReport};
use crate::error::UserError;
use crate::loader::{clip_name, vae_name, Keyed};

pub fn run(job: &Job, what: CacheWhat) -> anyhow::Result<ExitCode> {
    job.catch_interrupts();
    let mut prepared = Prepared::for_work(job, Some(what))?;
    prepared.make(job, what)?;
    prepared.table(job);
    prepared.scan.check()?;
    if job.stopped() {
        job.progress.say("stopped; run the same command again to go on");
        return Ok(ExitCode::from(130));
    }
    if what == CacheWhat::Both {
        prepared.survey.check()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A dataset, surveyed: what there is, what can be reused, what is to be made.
pub struct Prepared {
    pub scan: ScanReport,
    pub survey: Survey,
}

impl Prepared {
    /// Scans the dataset and compares every cache file with its recipe. Without `models` (training on caches that are
    /// there already) missing model files are no error: then their fingerprints are not compared.
    #[tracing::instrument(level = "debug", skip_all, name = "survey")]
    pub fn new(job: &Job, models: bool) -> anyhow::Result<Self> {
        Self::for_work(job, models.then_some(CacheWhat::Both))
    }

    /// The same for what is to be made: only the models that this takes must be at hand.
    fn for_work(job: &Job, work: Option<CacheWhat>) -> anyhow::Result<Self> {
        let (dataset, scan) = job.dataset()?;
        let options = options(job, work)?;
        let survey = Survey::take(&dataset, &scan.items, &options)?;
        survey.notes().iter().for_each(|note| job.progress.say(&format!("note: {note}")));
        Ok(Self { scan, survey })
    }

    /// Loads what is needed for what is missing, uses it, drops it: the VAE first, then the text encoder.
    #[tracing::instrument(level = "debug", skip_all, name = "encode")]
    pub fn make(&mut self, job: &Job, what: CacheWhat) -> anyhow::Result<()> {
        if self.scan.check().is_err() {
            return Ok(()); // the table comes first, then the error
        }
        let progress = job.progress.as_ref();
        let latents = what != CacheWhat::Text && self.survey.latents_to_make() > 0;
        let texts = what != CacheWhat::Latents && self.survey.texts_to_make() > 0;
        if !latents && !texts {
            return Ok(());
        }
        let exec = exec(&job.config.device, DType::F32)?;
        if latents {
            let how = vae_options(job, &exec, &self.survey);
            let models = latent_models(job, &self.survey.options, &exec, how)?;
            cache_latents(&mut self.survey, models, &exec, progress, &job.stop)?;
        }
        if texts && !job.stopped() {
            let models = text::models(job, &self.survey.options, &exec)?;
            cache_text(&mut self.survey, models, progress, &job.stop)?;
        }
        Ok(())
    }

    /// Each file used, dropped, why; with the totals.
    pub fn table(&self, job: &Job) {
        job.progress.say(&self.report());
    }

    /// The same as text.
    pub fn report(&self) -> String {
        CacheReport::of(&self.scan, &self.survey).render()
    }

    pub fn dataset(&self) -> &DatasetConfig {
        &self.survey.config
    }
}

/// How the VAE computes while caching.
fn vae_options(job: &Job, exec: &Exec, survey: &Survey) -> VaeOptions {
    let how = vae_numbers(job, exec);
    let area = |(w, h): (u32, u32)| u64::from(w) * u64::from(h);
    let largest = survey.entries.iter().flat_map(|e| &e.clips).map(|c| area(c.span.size)).max().unwrap_or_default();
    let frames_per_step = free_memory(exec).map_or(how.frames_per_step, |free| frames_per_step(free, largest));
    VaeOptions { frames_per_step, ..how }.encoder_only()
}

/// The VAE's numbers: in fp32 on the CPU; on a card in fp16 with fp32 sums, which has an eighth of bf16's error and the
/// same speed, or in fp32 where latents are stored so. The old trainer's numbers take its `--vae_dtype`.
pub fn vae_numbers(job: &Job, exec: &Exec) -> VaeOptions {
    let stored = dtype(&job.config.vae_dtype);
    match (job.config.musubi_compat, exec.device().is_cuda()) {
        (true, _) => VaeOptions::compat(stored),
        (false, true) if stored != DType::F32 => VaeOptions { compute: DType::F16, ..VaeOptions::default() },
        (false, _) => VaeOptions::default(),
    }
}

/// Frames encoded at a time. Four fill a card; where they do not fit, fewer take less. At 1280x720 a frame of the first
/// level is 177 MB, and four at a time were measured at 5.6 GiB: 15 frames that layers remember, 4.3 for each that is
/// computed, weights.
fn frames_per_step(free: u64, area: u64) -> usize {
    let frame = area * 96 * 2;
    let takes = |step: u64| (1 << 30) + frame * 15 + frame * 43 / 10 * step;
    [4, 2].into_iter().find(|step| takes(*step) <= free).unwrap_or(1) as usize
}

/// What the card has left; `None` without a card.
fn free_memory(exec: &Exec) -> Option<u64> {
    match exec {
        #[cfg(feature = "cuda")]
        Exec::Cuda { gpu, .. } => gpu.memory().ok().map(|m| m.free + m.reserved_peak.saturating_sub(m.used)),
        Exec::Reference { .. } => None,
    }
}

fn options(job: &Job, work: Option<CacheWhat>) -> anyhow::Result<CacheOptions> {
    let c = &job.config;
    let models = matches!(work, Some(CacheWhat::Both | CacheWhat::Latents));
    let (i2v, clip) = job.conditions();
    if c.one_frame && !i2v {
        return Err(UserError::usage(format!("--one_frame trains image-to-video models, and {} is none", c.task))
            .hint("leave it out, or choose an image-to-video --task")
            .into());
    }
    if c.one_frame && c.i2v_images_as_t2v {
        return Err(UserError::usage("--one_frame and --i2v_images_as_t2v exclude each other")
            .hint("with --one_frame the condition holds the control pictures")
            .into());
    }
    let found = |option: &str, role: Role, path: Option<&std::path::PathBuf>| -> anyhow::Result<Option<String>> {
        match job.model_file(option, role, path) {
            Ok(path) => Ok(Some(fingerprint::of_weights(&[path])?)),
            Err(_) if !models => Ok(None),
            Err(e) => Err(e),
        }
    };
    let vae_path = job.model_file("vae", Role::Vae, c.vae.as_ref());
    let geometry = match &vae_path {
        Ok(path) => (&vae_arch(job, &open_vae(job, path)?)?).into(),
        Err(_) if !models => (&published_vae(job)).into(),
        Err(_) => return Err(vae_path.unwrap_err()),
    };
    let text = text::fingerprints(job, matches!(work, Some(CacheWhat::Both | CacheWhat::Text)))?;
    Ok(CacheOptions {
        vae_dtype: dtype(&c.vae_dtype),
        i2v,
        last_frame: job.model.conditioning == Conditioning::FirstLastFrame,
        i2v_images_as_t2v: c.i2v_images_as_t2v,
        one_frame: c.one_frame,
        clip,
        musubi_compat: c.musubi_compat,
        recache: c.recache && work.is_some(),
        allow_bad_media: c.allow_bad_media,
        vae: found("vae", Role::Vae, c.vae.as_ref())?,
        clip_vision: if clip { found("clip", Role::Clip, c.clip.as_ref())? } else { None },
        umt5: text.encoder,
        tokenizer: text.tokenizer,
        text_width: Some(job.model.arch.text_dim),
        ..CacheOptions::new(geometry)
    })
}

pub fn published_vae(job: &Job) -> VaeArch {
    match job.model.vae.kind {
        VaeKind::Wan21 => VaeArch::wan21(),
        VaeKind::Wan22 => VaeArch::wan22(),
    }
}

fn open_vae(job: &Job, path: &Path) -> anyhow::Result<Keyed> {
    Keyed::open(path, job.config.reading(), "the VAE", vae_name)
}

/// The VAE's numbers from its tensors, checked against what the task needs.
fn vae_arch(job: &Job, file: &Keyed) -> anyhow::Result<VaeArch> {
    let refuse = |what: String| {
        UserError::new(format!("{} cannot be used as the VAE: {what}", file.source().path().display()))
            .hint(crate::hub::where_to_get(&job.model, Role::Vae))
    };
    let arch = VaeArch::infer(&|key| file.shape(key)).map_err(|e| refuse(e.to_string()))?;
    if arch.z_dim != job.model.arch.out_dim {
        return Err(refuse(format!(
            "it makes latents of {} channels, and {} takes {}",
            arch.z_dim, job.config.task, job.model.arch.out_dim
        ))
        .into());
    }
    Ok(arch)
}

fn latent_models<'a>(
    job: &'a Job,
    options: &CacheOptions,
    exec: &'a Exec,
    how: VaeOptions,
) -> anyhow::Result<LatentModels<'a>> {
    let c = &job.config;
    let vae_path = job.model_file("vae", Role::Vae, c.vae.as_ref())?;
    let load = move |path: &Path, how: VaeOptions| load_vae(job, exec, path, how);
    let path = vae_path.clone();
    let vae = Lazy { fingerprint: options.vae.clone().unwrap_or_default(), load: Box::new(move || load(&path, how)) };
    let wide_vae: Option<Box<dyn FnOnce() -> anyhow::Result<Vae>>> = match how.compute == DType::F16 && !c.musubi_compat
    {
        true => Some(Box::new(move || load(&vae_path, VaeOptions { compute: DType::BF16, ..how }))),
        false => None,
    };
    let clip = match options.clip {
        false => None,
        true => {
            let path = job.model_file("clip", Role::Clip, c.clip.as_ref())?;
            Some(Lazy {
                fingerprint: options.clip_vision.clone().unwrap_or_default(),
                load: Box::new(move || load_clip(job, &path, exec.device())),
            })
        }
    };
    // Decoding keeps a card busy only if several files are decoded at a time; on the CPU encoding is what takes time.
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let decoders = if exec.device().is_cuda() { (cores / 2).clamp(1, 4) } else { 1 };
    Ok(LatentModels { vae, wide_vae, clip, decoders })
}

/// The VAE of a file, which must be the task's.
pub fn load_vae(job: &Job, exec: &Exec, path: &Path, how: VaeOptions) -> anyhow::Result<Vae> {
    let file = open_vae(job, path)?;
    let arch = vae_arch(job, &file)?;
    let mut get = |key: &str| file.get(key, exec.device()).map_err(|e| unreadable("vae", &e));
    Ok(Vae::load(arch, exec, how, &mut get)?)
}

/// On a card matrices are kept in 16 bit, as the published file has them; all of it computes in fp32.
pub fn load_clip(job: &Job, path: &Path, device: &Device) -> anyhow::Result<ClipVision> {
    let file = Keyed::open(path, job.config.reading(), "the CLIP vision tower", clip_name)?;
    let arch = ClipArch::infer(&|key| file.shape(key), None)?;
    let mut get = |key: &str| file.try_get(key, device).map_err(|e| unreadable("clip", &e));
    let storage = if device.is_cuda() { DType::F16 } else { DType::F32 };
    Ok(ClipVision::load(arch, device, storage, &mut get)?)
}

/// Carries a loader's error through a model's getter.
pub fn unreadable(model: &'static str, error: &anyhow::Error) -> wan_models::Error {
    wan_models::Error::Invalid { model, what: format!("{error:#}") }
}

#[cfg(test)]
mod tests {
    use super::frames_per_step;

    #[test]
    fn larger_pictures_are_encoded_in_shorter_steps() {
        const GIB: u64 = 1 << 30;
        assert_eq!(frames_per_step(11 * GIB, 1280 * 720), 4);
        assert_eq!(frames_per_step(11 * GIB, 1920 * 1088), 2);
        assert_eq!(frames_per_step(11 * GIB, 3840 * 2160), 1);
        assert_eq!(frames_per_step(139 * GIB, 3840 * 2160), 4);
    }
}
