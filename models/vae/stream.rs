//! Clips that arrive in pieces: the state of one encoding or decoding run.

use super::layers::{frames, Cache};
use super::{invalid, Half, Trace, Vae};
use crate::Result;
use candle_core::{DType, Tensor};
use wan_kernels::conv3d::planes;

/// What `Encoder::finish` gives.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// `[b,z,f,y,x]`, normalised, in `Vae::latent_dtype`.
    pub latent: Tensor,
    /// Encoder mean before normalisation, same shape.
    pub mean: Tensor,
    /// Pixel frames at the end that did not fill a chunk of four and are in no latent frame.
    pub surplus_frames: usize,
}

/// Encodes a clip that arrives in pieces of any length; holds the causal feature cache and at most one unfinished
/// chunk of pixels.
pub struct Encoder<'a> {
    vae: &'a Vae,
    half: &'a Half,
    cache: Cache,
    /// Pixels of an unfinished chunk, each `[b,3,1,H,W]`.
    waiting: Vec<Tensor>,
    /// Encoder means so far, each `[b,z,1,h,w]`.
    means: Vec<Tensor>,
    /// Batch and sides of the first push.
    size: Option<[usize; 3]>,
    started: bool,
}

impl<'a> Encoder<'a> {
    pub fn new(vae: &'a Vae) -> Result<Self> {
        let half = vae.half(&vae.encoder, "encoder")?;
        let cache = half.net.cache();
        Ok(Self { vae, half, cache, waiting: Vec::new(), means: Vec::new(), size: None, started: false })
    }

    /// Appends frames `[b,3,T,H,W]` in [-1,1], any T. The sides must be multiples of the VAE's stride.
    pub fn push(&mut self, video: &Tensor) -> Result<()> {
        self.push_traced(video, &mut |_, _| Ok(()))
    }

    /// `push`, calling `trace` with the output of every stage that puts one out.
    pub fn push_traced(&mut self, video: &Tensor, trace: &mut Trace<'_>) -> Result<()> {
        let dims = video.dims();
        if dims.len() != 5 || dims[1] != 3 {
            return invalid(format!("pixels have shape {dims:?}, expected [batch, 3, frames, height, width]"));
        }
        let (b, f, h, w) = (dims[0], dims[2], dims[3], dims[4]);
        let side = self.vae.arch.spatial_stride();
        if h == 0 || w == 0 || h % side != 0 || w % side != 0 {
            return invalid(format!("a picture of {w}x{h} pixels: both sides must be multiples of {side}"));
        }
        match self.size {
            Some(size) if size != [b, h, w] => {
                return invalid(format!("frames of [batch, height, width] {:?} after frames of {size:?}", [b, h, w]));
            }
            _ => self.size = Some([b, h, w]),
        }
        for i in 0..f {
            self.waiting.push(frames(video, i, 1)?);
            // The first frame is a chunk of its own; the VAE sees whole chunks only.
            let chunk = if self.started { self.vae.arch.temporal_stride() } else { 1 };
            if self.waiting.len() == chunk {
                self.started = true;
                let mut chunk = std::mem::take(&mut self.waiting);
                while !chunk.is_empty() {
                    let rest = chunk.split_off(self.vae.opts.frames_per_step.min(chunk.len()));
                    self.encode(std::mem::replace(&mut chunk, rest), trace)?;
                }
            }
        }
        Ok(())
    }

    fn encode(&mut self, pixels: Vec<Tensor>, trace: &mut Trace<'_>) -> Result<()> {
        let exec = &self.vae.exec;
        let mut x = if pixels.len() == 1 { pixels[0].clone() } else { Tensor::cat(&pixels, 2)? };
        drop(pixels);
        x = x.to_device(exec.device())?.to_dtype(self.vae.opts.io())?.to_dtype(exec.compute())?;
        x = patchify(&x, self.vae.arch.patch())?;
        let mut moments = Vec::new();
        self.half.net.push(exec, &mut self.cache, x, self.vae.opts.frames_per_step, trace, &mut moments)?;
        for m in moments {
            // On a card the means are not rounded to 16 bit: one small matrix in fp32. The CPU's definition is.
            let mean = match exec.device().is_cuda() && !self.vae.opts.rounded_io {
                true => {
                    let m = planes(&m)?.to_dtype(DType::F32)?;
                    self.half.pointwise.causal(&exec.with_compute(DType::F32), &mut self.cache, &m)?
                }
                false => planes(&self.half.pointwise.causal(exec, &mut self.cache, &m)?)?,
            };
            self.means.push(mean);
        }
        Ok(())
    }

    /// The latent of everything pushed. Frames beyond 1 + 4k are left out and counted.
    pub fn finish(self) -> Result<Encoded> {
        if self.means.is_empty() {
            return invalid("a clip of no frames cannot be encoded".into());
        }
        let mean = Tensor::cat(&self.means, 2)?;
        Ok(Encoded { latent: self.vae.normalize(&mean)?, mean, surplus_frames: self.waiting.len() })
    }
}

/// Decodes latent frames as they come; holds the causal feature cache.
pub struct Decoder<'a> {
    vae: &'a Vae,
    half: &'a Half,
    cache: Cache,
}

impl<'a> Decoder<'a> {
    pub fn new(vae: &'a Vae) -> Result<Self> {
        let half = vae.half(&vae.decoder, "decoder")?;
        Ok(Self { vae, half, cache: half.net.cache() })
    }

    /// Normalised latent frames `[b,z,F,h,w]` to pixels, not clamped, in pieces `[b,3,T,H,W]` in the compute dtype: one
    /// frame for the first latent frame of the stream, four for each later one.
    pub fn push(&mut self, latent: &Tensor) -> Result<Vec<Tensor>> {
        let (exec, z) = (&self.vae.exec, self.vae.arch.z_dim);
        let dims = latent.dims();
        if dims.len() != 5 || dims[1] != z || dims[3] * dims[4] == 0 {
            return invalid(format!("latent has shape {dims:?}, expected [batch, {z}, frames, height, width]"));
        }
        let x = self.vae.denormalize(latent)?.to_dtype(exec.compute())?;
        let (mut out, mut channels_last) = (Vec::new(), Vec::new());
        for i in 0..dims[2] {
            let x = self.half.pointwise.causal(exec, &mut self.cache, &frames(&x, i, 1)?)?;
            self.half.net.push(
                exec,
                &mut self.cache,
                x,
                self.vae.opts.frames_per_step,
                &mut |_, _| Ok(()),
                &mut channels_last,
            )?;
            for x in channels_last.drain(..) {
                out.push(planes(&x)?);
            }
        }
        out.iter().map(|x| unpatchify(x, self.vae.arch.patch())).collect()
    }
}

/// `[b,c,f,y*q,x*r]` to `[b,c*r*q,f,y,x]`, column within the patch before row.
fn patchify(x: &Tensor, p: usize) -> Result<Tensor> {
    if p == 1 {
        return Ok(x.clone());
    }
    let (b, c, f, h, w) = x.dims5()?;
    let x = x.reshape(&[b, c, f, h / p, p, w / p, p][..])?.permute(vec![0, 1, 6, 4, 2, 3, 5])?;
    Ok(x.contiguous()?.reshape((b, c * p * p, f, h / p, w / p))?)
}

/// The reverse of `patchify`.
fn unpatchify(x: &Tensor, p: usize) -> Result<Tensor> {
    if p == 1 {
        return Ok(x.clone());
    }
    let (b, c, f, y, w) = x.dims5()?;
    let x = x.reshape(&[b, c / (p * p), p, p, f, y, w][..])?.permute(vec![0, 1, 4, 5, 3, 6, 2])?;
    Ok(x.contiguous()?.reshape((b, c / (p * p), f, y * p, w * p))?)
}
