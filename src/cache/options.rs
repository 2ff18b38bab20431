//! Everything that decides what a cache file must hold.

use candle_core::DType;
use wan_models::vae::VaeArch;

/// What the models make of a clip: latent channels, and pixels a latent position covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentGeometry {
    pub channels: usize,
    pub spatial: usize,
    pub temporal: usize,
}

impl From<&VaeArch> for LatentGeometry {
    fn from(arch: &VaeArch) -> Self {
        Self { channels: arch.z_dim, spatial: arch.spatial_stride(), temporal: arch.temporal_stride() }
    }
}

impl LatentGeometry {
    /// [c,F,h,w] of a clip.
    pub fn shape(&self, (width, height): (u32, u32), frames: usize) -> [usize; 4] {
        let f = frames.div_ceil(self.temporal);
        [self.channels, f, height as usize / self.spatial, width as usize / self.spatial]
    }
}

/// Everything that decides what a cache file must hold. Fingerprints are `None` where the weights are not at hand:
/// then they are not compared.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    pub geometry: LatentGeometry,
    /// Dtype of stored latents and of stored caption embeddings.
    pub vae_dtype: DType,
    pub text_dtype: DType,
    /// Store the first-frame condition, as image-to-video models need it (not TI2V-5B).
    pub i2v: bool,
    /// The condition shows the last frame too, and CLIP features are those of both (first-last-frame-to-video).
    pub last_frame: bool,
    /// Pictures get the condition of an empty frame instead of themselves.
    pub i2v_images_as_t2v: bool,
    /// Pictures and their controls are frames of one sequence.
    pub one_frame: bool,
    /// Store CLIP features (Wan 2.1 image-to-video).
    pub clip: bool,
    /// The old trainer's pixels and constants.
    pub musubi_compat: bool,
    /// Make everything again.
    pub recache: bool,
    /// Leave out media that cannot be read or yield no clip, instead of stopping.
    pub allow_bad_media: bool,
    pub vae: Option<String>,
    pub clip_vision: Option<String>,
    pub umt5: Option<String>,
    pub tokenizer: Option<String>,
    /// Width of the caption embeddings the model reads; `None` where it is not known yet.
    pub text_width: Option<usize>,
}

impl CacheOptions {
    /// Text-to-video caches in bf16, no fingerprints.
    pub fn new(geometry: LatentGeometry) -> Self {
        Self {
            geometry,
            vae_dtype: DType::BF16,
            text_dtype: DType::BF16,
            i2v: false,
            last_frame: false,
            i2v_images_as_t2v: false,
            one_frame: false,
            clip: false,
            musubi_compat: false,
            recache: false,
            allow_bad_media: false,
            vae: None,
            clip_vision: None,
            umt5: None,
            tokenizer: None,
            text_width: None,
        }
    }
}
