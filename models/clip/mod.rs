//! The CLIP vision tower (ViT) of the Wan 2.1 image-to-video models: one picture to its patch features.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

/// The numbers of a vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipArch {
    pub image_size: usize,
    pub patch_size: usize,
    pub dim: usize,
    pub mlp_dim: usize,
    pub num_heads: usize,
    pub num_layers: usize,
    pub norm_eps: f64,
}

/// A loaded vision tower. Computes in fp32; weights may be stored in 16 bit.
pub struct ClipVision {
    arch: ClipArch,
}

fn unbuilt<T>() -> Result<T> {
    Err(Error::Invalid { model: "clip", what: "not built yet".into() })
}

impl ClipArch {
    /// ViT-H/14 at 224 pixels.
    pub fn vit_h14() -> Self {
        Self {
            image_size: 224,
            patch_size: 14,
            dim: 1280,
            mlp_dim: 5120,
            num_heads: 16,
            num_layers: 32,
            norm_eps: 1e-5,
        }
    }

    /// Reads the numbers off a checkpoint, under official or `clip_vision_h` keys. Heads are not in any shape: without
    /// `num_heads` they are 80 wide as in ViT-H.
    pub fn infer(_shape: &dyn Fn(&str) -> Option<Vec<usize>>, _num_heads: Option<usize>) -> Result<Self> {
        unbuilt()
    }

    /// From an official configuration object (`image_size`, `patch_size`, `dim`, `mlp_ratio`, `num_heads`, ...).
    pub fn from_official(_config: &serde_json::Value) -> Result<Self> {
        unbuilt()
    }

    /// Tokens of the output: one class token and one a patch.
    pub fn tokens(&self) -> usize {
        1 + (self.image_size / self.patch_size).pow(2)
    }
}

impl ClipVision {
    /// `get` returns a tensor by key or `None`; official keys are tried first, then `clip_vision_h` ones. The textual
    /// tower of a whole checkpoint is never asked for. `storage` is the dtype in which matrices are kept.
    pub fn load(
        _arch: ClipArch,
        _device: &Device,
        _storage: DType,
        _get: &mut dyn FnMut(&str) -> Result<Option<Tensor>>,
    ) -> Result<Self> {
        unbuilt()
    }

    pub fn arch(&self) -> &ClipArch {
        &self.arch
    }

    /// `[b,3,H,W]` in [-1,1] to the tower's normalised square input `[b,3,S,S]`.
    pub fn preprocess(&self, _images: &Tensor) -> Result<Tensor> {
        unbuilt()
    }

    /// Preprocessed images to all tokens before the last block: `[b,tokens,dim]` in fp32.
    pub fn penultimate(&self, _pixels: &Tensor) -> Result<Tensor> {
        unbuilt()
    }

    /// All blocks; no final norm.
    pub fn full_depth(&self, _pixels: &Tensor) -> Result<Tensor> {
        unbuilt()
    }

    /// Tokens after embedding, class token, positions and the first norm.
    pub fn embed(&self, _pixels: &Tensor) -> Result<Tensor> {
        unbuilt()
    }

    /// What the DiT reads: `[b,3,H,W]` in [-1,1] to `[b,tokens,dim]` in fp32.
    pub fn encode(&self, images: &Tensor) -> Result<Tensor> {
        self.penultimate(&self.preprocess(images)?)
    }
}

/// Seeded random weights under the official keys, for demonstrations and tests.
pub fn random_clip(_arch: &ClipArch, _seed: u64) -> Result<BTreeMap<String, Tensor>> {
    unbuilt()
}
