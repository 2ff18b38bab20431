//! The Wan 2.1 and 2.2 VAE: pixels to latents and back, streamed through a causal feature cache.
//!
//! The first latent frame comes from the first pixel frame alone, each later one from four more (`VaeArch` says how
//! many). No layer looks ahead, so a clip is pushed through frame by frame; memory depends on the picture's size only.
//!
//! Axes in names: `b` batch, `c` channels, `z` latent channels, `f`/`y`/`x` frames, rows, columns.

mod arch;
mod cost;
mod layers;
mod net;
pub(crate) mod random;
mod stream;
#[cfg(test)]
mod tests;

pub use arch::{VaeArch, VaeKind};
pub use random::{random_vae, random_vae_on};
pub use stream::{Decoder, Encoded, Encoder};

use crate::{Error, Result};
use candle_core::{DType, Tensor};
use layers::{Builder, Conv, Source, MODEL};
use net::Net;
use wan_kernels::conv3d::prepare;
use wan_kernels::Exec;

/// How a VAE computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VaeOptions {
    /// Dtype of activations between ops; sums are fp32 always.
    pub compute: DType,
    /// Round pixels, latent statistics and latents to `compute`, as the old trainer does. Otherwise they are fp32.
    pub rounded_io: bool,
    /// Which halves to load: caching needs no decoder.
    pub encoder: bool,
    pub decoder: bool,
    /// Frames computed at a time: 1 takes least memory. Changes no result.
    pub frames_per_step: usize,
}

impl Default for VaeOptions {
    fn default() -> Self {
        Self { compute: DType::F32, rounded_io: false, encoder: true, decoder: true, frames_per_step: 1 }
    }
}

impl VaeOptions {
    /// The numbers of the old trainer with its `--vae_dtype` (`BF16` unless the user chose another).
    pub fn compat(compute: DType) -> Self {
        Self { compute, rounded_io: true, ..Self::default() }
    }

    pub fn encoder_only(self) -> Self {
        Self { encoder: true, decoder: false, ..self }
    }

    /// Dtype of pixels, latent statistics and latents.
    fn io(&self) -> DType {
        if self.rounded_io {
            self.compute
        } else {
            DType::F32
        }
    }
}

/// Called with the official module name (`encoder.downsamples.3`) and its output `[b,c,f,y,x]`.
pub type Trace<'a> = dyn FnMut(&str, &Tensor) -> Result<()> + 'a;

/// A loaded VAE; immutable, so that many clips can be encoded or decoded with it.
pub struct Vae {
    arch: VaeArch,
    opts: VaeOptions,
    exec: Exec,
    encoder: Option<Half>,
    decoder: Option<Half>,
    /// `[1,z,1,1,1]` in the io dtype.
    latent_mean: Tensor,
    latent_inv_std: Tensor,
}

/// One half and the pointwise convolution between it and the latent.
struct Half {
    net: Net,
    pointwise: Conv,
}

/// A checkpoint as a source of weights, checked for shape.
struct Checkpoint<'a>(&'a mut dyn FnMut(&str) -> Result<Tensor>);

impl Source for Checkpoint<'_> {
    fn take(&mut self, key: &str, shape: &[usize]) -> Result<Tensor> {
        let t = (self.0)(key)?;
        if t.dims() != shape {
            let (got, want) = (t.dims().to_vec(), shape.to_vec());
            return Err(Error::WeightShape { model: MODEL, key: key.to_owned(), got, want });
        }
        Ok(t)
    }
}

fn invalid<T>(what: String) -> Result<T> {
    Err(Error::Invalid { model: MODEL, what })
}

/// uint8 pixels of any shape to [-1, 1]: `u8 / 127.5 - 1`, every step rounded to `dtype`.
pub fn pixels(u8: &Tensor, dtype: DType) -> Result<Tensor> {
    let x = u8.to_dtype(dtype)?;
    // A true division, as in the definition: multiplying by 1/127.5 differs in the last bit.
    let by = Tensor::full(127.5f32, (), x.device())?.to_dtype(dtype)?;
    let one = Tensor::ones((), dtype, x.device())?;
    Ok(x.broadcast_div(&by)?.broadcast_sub(&one)?)
}

impl Vae {
    /// Builds the VAE; `get` returns a tensor by its official key and is asked only for what `opts` needs.
    pub fn load(
        arch: VaeArch,
        exec: &Exec,
        opts: VaeOptions,
        get: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<Self> {
        Self::build(arch, exec, opts, &mut Checkpoint(get))
    }

    fn build(arch: VaeArch, exec: &Exec, opts: VaeOptions, source: &mut dyn Source) -> Result<Self> {
        arch.validate()?;
        if opts.frames_per_step == 0 {
            return invalid("frames_per_step must be at least 1".into());
        }
        let exec = exec.with_compute(opts.compute);
        let z = arch.z_dim;
        let builder = |source: &mut dyn Source, half: fn(&VaeArch, &mut Builder<'_>) -> Result<Net>, key, c, o| {
            let mut b = Builder { source, exec: &exec, slots: 0 };
            let pointwise = b.pointwise(key, c, o)?;
            Result::Ok(Half { net: half(&arch, &mut b)?, pointwise })
        };
        let mut encoder = None;
        if opts.encoder {
            let mut half = builder(source, Net::encoder, "conv1", 2 * z, 2 * z)?;
            // Its second half is the log-variance, which nothing reads: the mean is the latent, without sampling.
            let weight = half.pointwise.weight.narrow(0, 0, z)?.contiguous()?;
            half.pointwise.weight = prepare(&exec, &weight)?;
            half.pointwise.bias = half.pointwise.bias.narrow(0, 0, z)?.contiguous()?;
            encoder = Some(half);
        }
        let decoder = if opts.decoder { Some(builder(source, Net::decoder, "conv2", z, z)?) } else { None };
        let io = opts.io();
        let stat = |v: &[f32]| Tensor::from_slice(v, (1, z, 1, 1, 1), exec.device())?.to_dtype(io);
        let latent_mean = stat(&arch.latent_mean)?;
        let latent_inv_std = stat(&arch.latent_std)?.recip()?;
        Ok(Self { arch, opts, exec, encoder, decoder, latent_mean, latent_inv_std })
    }

    pub fn arch(&self) -> &VaeArch {
        &self.arch
    }

    pub fn options(&self) -> &VaeOptions {
        &self.opts
    }

    /// Dtype of the latents this VAE gives: fp32, or the compute dtype in compat mode.
    pub fn latent_dtype(&self) -> DType {
        self.opts.io()
    }

    /// uint8 pixels of any shape to [-1, 1], rounded as the options say.
    pub fn pixels(&self, u8: &Tensor) -> Result<Tensor> {
        pixels(&u8.to_device(self.exec.device())?, self.opts.io())
    }

    fn half<'a>(&self, half: &'a Option<Half>, name: &str) -> Result<&'a Half> {
        match half {
            Some(half) => Ok(half),
            None => invalid(format!("the {name} was not loaded")),
        }
    }

    /// Encoder mean `[b,z,f,y,x]` to the normalised latent.
    pub fn normalize(&self, mean: &Tensor) -> Result<Tensor> {
        let mean = mean.to_dtype(self.opts.io())?;
        Ok(mean.broadcast_sub(&self.latent_mean)?.broadcast_mul(&self.latent_inv_std)?)
    }

    /// The reverse of `normalize`.
    pub fn denormalize(&self, latent: &Tensor) -> Result<Tensor> {
        let latent = latent.to_device(self.exec.device())?.to_dtype(self.opts.io())?;
        Ok(latent.broadcast_div(&self.latent_inv_std)?.broadcast_add(&self.latent_mean)?)
    }

    /// `[b,3,T,H,W]` in [-1,1] to the normalised latent `[b,z,F,h,w]`. T must be 1 + 4k and the sides multiples of the
    /// stride; `Encoder` takes other lengths and reports what is left over.
    pub fn encode(&self, video: &Tensor) -> Result<Tensor> {
        let mut encoder = Encoder::new(self)?;
        encoder.push(video)?;
        let encoded = encoder.finish()?;
        if encoded.surplus_frames > 0 {
            let (n, t) = (video.dim(2)?, self.arch.temporal_stride());
            return invalid(format!(
                "{n} frames are not 1 + a multiple of {t}: the last {} would be lost",
                encoded.surplus_frames
            ));
        }
        Ok(encoded.latent)
    }

    /// What an image-to-video model is told: four mask channels, 1 where pixels are given, then the latent of those
    /// pixels among mid-grey frames. `first` and `last` are `[b,3,1,H,W]` in [-1,1]; the result is `[b,4+z,F,h,w]` for a
    /// clip of `frames` (1 + 4k) frames.
    pub fn condition(&self, first: &Tensor, last: Option<&Tensor>, frames: usize) -> Result<Tensor> {
        let stride = self.arch.temporal_stride();
        if frames == 0 || !(frames - 1).is_multiple_of(stride) || (last.is_some() && frames < 2) {
            return invalid(format!("a condition for {frames} frames, which are not 1 + a multiple of {stride}"));
        }
        let grey = first.zeros_like()?;
        let mut encoder = Encoder::new(self)?;
        encoder.push(first)?;
        for i in 1..frames {
            encoder.push(if i + 1 == frames { last.unwrap_or(&grey) } else { &grey })?;
        }
        let latent = encoder.finish()?.latent;
        let (b, _, f, y, x) = latent.dims5()?;
        // A mask value for each pixel frame, the first one `stride` times, so that each latent frame has `stride`.
        let given = |pixel: usize| pixel < stride || (last.is_some() && pixel + 1 == f * stride);
        let mask: Vec<f32> = (0..stride * f).map(|i| f32::from(u8::from(given(i % f * stride + i / f)))).collect();
        let mask = Tensor::from_vec(mask, (1, stride, f, 1, 1), latent.device())?.to_dtype(latent.dtype())?;
        let mask = mask.broadcast_as((b, stride, f, y, x))?;
        Ok(Tensor::cat(&[mask, latent], 1)?)
    }

    /// `condition` on the first frame alone.
    pub fn first_frame_condition(&self, first: &Tensor, frames: usize) -> Result<Tensor> {
        self.condition(first, None, frames)
    }

    /// Normalised latent `[b,z,F,h,w]` to video `[b,3,T,H,W]`, clamped to [-1,1].
    pub fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        Ok(self.decode_unclamped(latent)?.clamp(-1.0, 1.0)?)
    }

    /// `decode` without the clamp.
    pub fn decode_unclamped(&self, latent: &Tensor) -> Result<Tensor> {
        let frames = Decoder::new(self)?.push(latent)?;
        if frames.is_empty() {
            return invalid("a latent without frames cannot be decoded".into());
        }
        Ok(Tensor::cat(&frames, 2)?)
    }
}
