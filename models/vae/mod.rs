//! The Wan 2.1 and 2.2 VAE: pixels to latents and back, streamed through a causal feature cache.
//!
//! Axes in names: `b` batch, `c` channels, `z` latent channels, `f`/`y`/`x` frames, rows, columns.

mod arch;

pub use arch::{VaeArch, VaeKind};

use crate::{Error, Result};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use wan_kernels::Exec;

/// How a VAE computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VaeOptions {
    /// Dtype of activations between ops and of the latents; sums are fp32 always.
    pub compute: DType,
    /// Round pixels and latent statistics to `compute` before use, as the old trainer does.
    pub rounded_io: bool,
    /// Which halves to load: caching needs no decoder.
    pub encoder: bool,
    pub decoder: bool,
}

impl Default for VaeOptions {
    fn default() -> Self {
        Self { compute: DType::F32, rounded_io: false, encoder: true, decoder: true }
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
}

/// Called with the official module name (`encoder.downsamples.3`) and its output `[b,c,f,y,x]`.
pub type Trace<'a> = dyn FnMut(&str, &Tensor) -> Result<()> + 'a;

/// A loaded VAE; immutable, so that many clips can be encoded or decoded with it.
pub struct Vae {
    arch: VaeArch,
}

/// What `Encoder::finish` gives.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// `[b,z,f,y,x]`, normalised, in the compute dtype.
    pub latent: Tensor,
    /// Encoder mean before normalisation, same shape.
    pub mean: Tensor,
    /// Pixel frames at the end that did not fill a chunk of four and are in no latent frame.
    pub surplus_frames: usize,
}

/// Encodes a clip that arrives in pieces; holds at most one chunk of pixels and the causal feature cache.
pub struct Encoder<'a> {
    vae: &'a Vae,
}

fn unbuilt<T>() -> Result<T> {
    Err(Error::Invalid { model: "vae", what: "not built yet".into() })
}

impl Vae {
    /// Builds the VAE; `get` returns a tensor by its official key and is asked only for what `opts` needs.
    pub fn load(
        _arch: VaeArch,
        _exec: &Exec,
        _opts: VaeOptions,
        _get: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<Self> {
        unbuilt()
    }

    pub fn arch(&self) -> &VaeArch {
        &self.arch
    }

    /// uint8 pixels of any shape to [-1, 1], rounded as the options say.
    pub fn pixels(&self, _u8: &Tensor) -> Result<Tensor> {
        unbuilt()
    }

    /// `[b,3,T,H,W]` in [-1,1] to the normalised latent `[b,z,F,h,w]`; T must be 1 + 4k.
    pub fn encode(&self, _video: &Tensor) -> Result<Tensor> {
        unbuilt()
    }

    /// The latent of `first` followed by mid-grey frames up to `frames`, under four mask channels that are 1 on the
    /// first latent frame: `first` `[b,3,1,H,W]` to `[b,4+z,F,h,w]`.
    pub fn first_frame_condition(&self, _first: &Tensor, _frames: usize) -> Result<Tensor> {
        unbuilt()
    }

    /// Normalised latent `[b,z,F,h,w]` to video `[b,3,T,H,W]`, clamped to [-1,1].
    pub fn decode(&self, _latent: &Tensor) -> Result<Tensor> {
        unbuilt()
    }

    /// `decode` without the clamp.
    pub fn decode_unclamped(&self, _latent: &Tensor) -> Result<Tensor> {
        unbuilt()
    }
}

impl<'a> Encoder<'a> {
    pub fn new(vae: &'a Vae) -> Result<Self> {
        Ok(Self { vae })
    }

    /// Appends frames `[b,3,T,H,W]` in [-1,1], any T.
    pub fn push(&mut self, _frames: &Tensor) -> Result<()> {
        unbuilt()
    }

    /// `push`, calling `trace` for every stage.
    pub fn push_traced(&mut self, _frames: &Tensor, _trace: &mut Trace<'_>) -> Result<()> {
        unbuilt()
    }

    pub fn finish(self) -> Result<Encoded> {
        let _ = self.vae;
        unbuilt()
    }
}

/// Seeded random weights under the official keys (F32, every value exact in bf16) whose latents are near zero mean and
/// unit deviation: for demonstrations and tests.
pub fn random_vae(_arch: &VaeArch, _seed: u64) -> Result<BTreeMap<String, Tensor>> {
    unbuilt()
}
