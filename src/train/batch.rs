//! From cached items to what the model is given: latents mixed with noise, timesteps, text, conditioning.
//!
//! Axes: `b` samples, `c` latent channels, `f`, `h`, `w` latent frames, rows, columns.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use wan_kernels::flow::{FlowMix, FlowMixArgs};
use wan_kernels::Exec;
use wan_models::arch::{Conditioning, WanArch};
use wan_models::wan::{Timesteps, WanInputs};

use super::expert::{self, Chance, Expert};
use super::noise::{self, SampleDraws};
use super::order::{BatchPlan, Sample};
use super::settings::TrainSettings;
use super::timesteps::Timestep;
use crate::cache::index::{Bucket, CacheIndex, ItemTensors};
use crate::error::UserError;

/// What training reads from. Items are loaded from several threads.
pub trait Items: Sync {
    fn buckets(&self) -> &[Bucket];
    fn load(&self, item: usize) -> Result<ItemTensors>;
    /// How messages call the item.
    fn name(&self, item: usize) -> String;
}

impl Items for CacheIndex {
    fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    fn load(&self, item: usize) -> Result<ItemTensors> {
        self.load_item(item)
    }

    fn name(&self, item: usize) -> String {
        self.items[item].name.clone()
    }
}

/// One micro-batch, ready for the model.
pub struct Batch {
    /// Items by index, in the order of the batch.
    pub items: Vec<usize>,
    /// `[b, c, f, h, w]`, fp32.
    pub latents: Tensor,
    /// `[b, c, f, h, w]`, fp32.
    pub noise: Tensor,
    pub timesteps: Vec<Timestep>,
    /// Who computes it, where one adapter is trained over two experts.
    pub expert: Option<Expert>,
    /// Weight of each sample's loss, `[b]`; absent: 1.
    pub weight_b: Option<Tensor>,
    /// The first latent frame is given clean and carries no loss (ti2v).
    pub clean_first_frame: bool,
    pub inputs: WanInputs,
}

/// What turns a plan into a batch; shared with the thread that prefetches.
pub struct Assembler<'a> {
    pub settings: &'a TrainSettings,
    pub arch: &'a WanArch,
    pub items: &'a dyn Items,
    pub exec: &'a Exec,
}

impl Assembler<'_> {
    /// Loads the items and draws noise and timesteps. Errors name the item.
    pub fn assemble(&self, plan: &BatchPlan, epoch: u64) -> Result<Batch> {
        let mut loaded = Vec::with_capacity(plan.samples.len());
        for sample in &plan.samples {
            loaded.push(self.items.load(sample.item)?);
        }
        let items: Vec<usize> = plan.samples.iter().map(|s| s.item).collect();
        let latents = self.stack(&items, &loaded, "latents", |t| Some(&t.latents))?;
        let (_, channels, frames, rows, columns) = latents.dims5()?;
        if channels != self.arch.out_dim {
            return Err(UserError::new(format!(
                "the cached latents of {} have {channels} channels, the model's have {}",
                self.items.name(items[0]),
                self.arch.out_dim
            ))
            .hint("these caches were made with another VAE: use another cache_directory, or --recache")
            .into());
        }
        let mut noise_b = Vec::new();
        for (sample, item) in plan.samples.iter().zip(&loaded) {
            let rounded = self.settings.compat.noise.then(|| item.latents.dtype());
            let (seed, dims, device) = (self.settings.seed, item.latents.dims(), self.exec.device());
            noise_b.push(noise::sample(seed, epoch, sample.id, dims, rounded, device)?);
        }
        let (timesteps, expert) = self.timesteps(plan, epoch, (rows, columns));
        let noise = Tensor::stack(&noise_b, 0)?;
        let sigma_b = Tensor::from_vec(self.sigmas(&timesteps)?, timesteps.len(), self.exec.device())?;
        let mut x = self.exec.run::<FlowMix>(&FlowMixArgs { latents: &latents, noise: &noise, sigma_b: &sigma_b })?;
        // A single frame has nothing left to predict beside a clean first one: pictures train as text-to-image.
        let clean_first_frame = self.settings.conditioning == Conditioning::CleanFirstFrame && frames > 1;
        let mut t = Timesteps::PerSample(timesteps.iter().map(|s| s.t).collect());
        if clean_first_frame {
            x = Tensor::cat(&[latents.narrow(2, 0, 1)?, x.narrow(2, 1, frames - 1)?], 2)?;
            t = self.per_token(&timesteps, [frames, rows, columns])?;
        }
        let weights = self.settings.timesteps.loss_weights(&timesteps);
        let weight_b = weights.map(|w| Tensor::from_vec(w, timesteps.len(), self.exec.device())).transpose()?;
        let y = self.conditioning(&items, &loaded)?;
        let clip_fea = self.clip(&items, &loaded)?;
        let device = self.exec.device();
        let context = loaded.iter().map(|item| Ok(item.context.to_device(device)?)).collect::<Result<_>>()?;
        let f_indices = self.positions(&items, &loaded)?;
        let inputs = WanInputs { x, t, context, y, clip_fea, f_indices };
        Ok(Batch { items, latents, noise, timesteps, expert, weight_b, clean_first_frame, inputs })
    }

    /// The noise level of each sample, and of two experts the one that computes the batch.
    fn timesteps(&self, plan: &BatchPlan, epoch: u64, hw: (usize, usize)) -> (Vec<Timestep>, Option<Expert>) {
        let spec = &self.settings.timesteps;
        let chance = |sample: &Sample| Chance {
            draws: SampleDraws::new(self.settings.seed, epoch, sample.id),
            stratum: sample.stratum,
        };
        let mut samples: Vec<_> = plan.samples.iter().map(chance).collect();
        if let Some(boundary) = self.settings.shared_boundary {
            let (timesteps, expert) = expert::draw_batch(spec, boundary, hw, &mut samples);
            return (timesteps, Some(expert));
        }
        let one = |s: &mut Chance<SampleDraws>| {
            spec.sample(&mut s.draws, hw, s.stratum.as_ref().map(std::slice::from_ref), 1)
        };
        (samples.iter_mut().flat_map(one).collect(), None)
    }

    /// The noise shares used in the mix.
    fn sigmas(&self, timesteps: &[Timestep]) -> Result<Vec<f32>> {
        use super::timesteps::Sampling;
        let sigma_b: Vec<f32> = timesteps.iter().map(|s| s.sigma).collect();
        if !(self.settings.compat.sigma_rounding && self.settings.timesteps.sampling == Sampling::Sigma) {
            return Ok(sigma_b);
        }
        let rounded = Tensor::new(sigma_b.as_slice(), &Device::Cpu)?.to_dtype(self.exec.compute())?;
        Ok(rounded.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// Timestep 0 for the tokens of the first frame, the sample's own for the others.
    fn per_token(&self, timesteps: &[Timestep], fhw: [usize; 3]) -> Result<Timesteps> {
        let [frames, rows, columns] = self.arch.grid(fhw)?;
        let first = rows * columns;
        let of_sample = |t: f32| (0..frames * first).map(|i| if i < first { 0.0 } else { t }).collect();
        Ok(Timesteps::PerToken(timesteps.iter().map(|s| of_sample(s.t)).collect()))
    }

    /// One tensor of every item as fp32 `[b, ..]`; all must be there and of one shape.
    fn stack<'t>(
        &self,
        items: &[usize],
        loaded: &'t [ItemTensors],
        what: &str,
        get: impl Fn(&'t ItemTensors) -> Option<&'t Tensor>,
    ) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(loaded.len());
        for (item, tensors) in items.iter().zip(loaded) {
            let Some(t) = get(tensors) else {
                return Err(UserError::new(format!(
                    "the cache of {} holds no {what}, which this task trains with",
                    self.items.name(*item)
                ))
                .hint("it was made for another task: use another cache_directory, or --recache")
                .into());
            };
            parts.push(t.to_device(self.exec.device())?.to_dtype(DType::F32)?);
        }
        let names = || items.iter().map(|i| self.items.name(*i)).collect::<Vec<_>>().join(", ");
        Tensor::stack(&parts, 0).with_context(|| format!("the {what} of {} have different shapes", names()))
    }

    /// Where the latent frames stand in time, for one-frame caches; the old tool stores this and counts from 0 anyway.
    fn positions(&self, items: &[usize], loaded: &[ItemTensors]) -> Result<Option<Vec<usize>>> {
        let first = loaded.first().and_then(|t| t.positions.clone());
        if let Some(other) = loaded.iter().position(|t| t.positions != first) {
            return Err(UserError::new(format!(
                "{} and {} stand at different positions in time and cannot share a batch",
                self.items.name(items[0]),
                self.items.name(items[other])
            ))
            .hint("one of the two caches is old: run with --recache")
            .into());
        }
        Ok(first.filter(|_| !self.settings.compat.frame_positions))
    }

    /// The channels that stand behind the noisy latent, `[b, in_dim - c, f, h, w]`.
    fn conditioning(&self, items: &[usize], loaded: &[ItemTensors]) -> Result<Option<Tensor>> {
        channels(
            self.settings.conditioning,
            || self.stack(items, loaded, "first-frame conditioning", |t| t.latents_image.as_ref()),
            || self.stack(items, loaded, "control latents", |t| t.control.as_ref()),
        )
    }

    /// CLIP features `[b · images, tokens, width]` where the model takes them.
    fn clip(&self, items: &[usize], loaded: &[ItemTensors]) -> Result<Option<Tensor>> {
        let Some(clip) = self.arch.clip else { return Ok(None) };
        let optional = self.settings.conditioning == Conditioning::Control;
        if optional && loaded.iter().all(|t| t.clip.is_none()) {
            // No image is an image of zero features; the old tool sends text rows through the image's weights instead.
            let none = (items.len() * clip.images, clip.tokens, clip.dim);
            return match self.settings.compat.missing_clip {
                true => Ok(None),
                false => Ok(Some(Tensor::zeros(none, DType::F32, self.exec.device())?)),
            };
        }
        let features = self.stack(items, loaded, "CLIP features", |t| t.clip.as_ref())?;
        let features = if features.rank() == 4 { features.flatten(0, 1)? } else { features };
        let (images, tokens, width) = features.dims3()?;
        if images != items.len() * clip.images || tokens != clip.tokens || width != clip.dim {
            return Err(UserError::new(format!(
                "the cached CLIP features of {} are {} images of {tokens}x{width}, the model takes {} of {}x{}",
                self.items.name(items[0]),
                images / items.len(),
                clip.images,
                clip.tokens,
                clip.dim
            ))
            .hint("the cache was made for another task: use another cache_directory, or --recache")
            .into());
        }
        Ok(Some(features))
    }
}

/// The channels that stand behind the noisy latent, `[b, in_dim - c, f, h, w]`, of what the task has: a first-frame
/// condition (mask and latents), the latents of a control video.
pub fn channels(
    conditioning: Conditioning,
    image: impl FnOnce() -> Result<Tensor>,
    control: impl FnOnce() -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    const MASK: usize = 4;
    Ok(match conditioning {
        Conditioning::None | Conditioning::CleanFirstFrame => None,
        Conditioning::FirstFrame | Conditioning::FirstLastFrame => Some(image()?),
        Conditioning::Control => {
            let control = control()?;
            Some(Tensor::cat(&[&control, &control.zeros_like()?], 1)?)
        }
        Conditioning::ControlFirstFrame => {
            let (control, image) = (control()?, image()?);
            let frames = image.dim(2)?;
            let image = image.narrow(1, MASK, image.dim(1)? - MASK)?;
            let first = image.narrow(2, 0, 1)?;
            let rest = image.narrow(2, 1, frames - 1)?.zeros_like()?;
            Some(Tensor::cat(&[&control, &Tensor::cat(&[&first, &rest], 2)?], 1)?)
        }
    })
}
