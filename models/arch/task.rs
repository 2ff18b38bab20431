//! What `configs/models/<task>.toml` says about a task: architecture, experts, inference defaults, VAE, files on the hub.

use serde::{Deserialize, Serialize};

use super::WanArch;
use crate::{Error, Result};

/// Every task that has a file in `configs/models/`.
pub const TASKS: [&str; 12] = [
    "t2v-1.3B",
    "t2v-14B",
    "t2i-14B",
    "i2v-14B",
    "flf2v-14B",
    "t2v-1.3B-FC",
    "t2v-14B-FC",
    "i2v-14B-FC",
    "t2v-A14B",
    "i2v-A14B",
    "ti2v-5B",
    "demo",
];

/// One task: everything about a model that is data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The name the user types.
    pub task: String,
    /// One line for `--help` and error messages.
    pub summary: String,
    /// Model family: `2.1` or `2.2`.
    pub version: String,
    /// What the model is given besides noise and text.
    pub conditioning: Conditioning,
    pub arch: WanArch,
    /// Present where two experts share the timesteps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<Experts>,
    pub inference: Inference,
    pub vae: VaeConfig,
    /// Where the weights are on the Hugging Face hub.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<ModelFile>,
}

/// What enters the model besides the noisy latent and the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Conditioning {
    /// Text alone.
    None,
    /// 4 mask channels and the latent of the first frame, concatenated after the noisy latent.
    FirstFrame,
    /// The same with first and last frame.
    FirstLastFrame,
    /// The latent of a control video; the start image's channels are zero (Fun Control without an image).
    Control,
    /// The latents of a control video and of the first frame.
    ControlFirstFrame,
    /// The first latent frame is replaced by the clean one and its tokens get timestep 0.
    CleanFirstFrame,
}

/// Two models that share the denoising: `high` above the boundary, `low` below.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// Fraction of the timesteps (0..1) from which on the high-noise expert works.
    pub boundary: f64,
}

/// Defaults of the official pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inference {
    /// Flow shift of the sampler.
    pub shift: f64,
    pub steps: usize,
    /// Classifier-free guidance: one number, or low-noise then high-noise expert.
    pub guidance: Vec<f64>,
    /// Pixel frames of a default video.
    pub frames: usize,
    pub fps: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaeConfig {
    pub kind: VaeKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VaeKind {
    /// 16 latent channels, stride 4x8x8.
    #[serde(rename = "wan2.1")]
    Wan21,
    /// 48 latent channels, stride 4x16x16.
    #[serde(rename = "wan2.2")]
    Wan22,
}

impl VaeKind {
    pub fn channels(self) -> usize {
        match self {
            VaeKind::Wan21 => 16,
            VaeKind::Wan22 => 48,
        }
    }

    /// Pixels per latent element: frames, rows, columns (the first frame stands alone).
    pub fn stride(self) -> [usize; 3] {
        match self {
            VaeKind::Wan21 => [4, 8, 8],
            VaeKind::Wan22 => [4, 16, 16],
        }
    }
}

/// One file of the hub manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFile {
    pub role: Role,
    /// Tells apart several files of one role (`480p`, `720p`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Repository on the hub, `owner/name`.
    pub repo: String,
    /// Path inside the repository.
    pub path: String,
    /// File name, or relative path, under the models directory (`lightning_loras/` for the Lightning roles).
    pub name: String,
}

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Dit,
    DitHigh,
    DitLow,
    Vae,
    T5,
    Clip,
    LightningHigh,
    LightningLow,
}

impl ModelConfig {
    /// Parses one of `configs/models/*.toml`. Errors carry line and column.
    pub fn from_toml(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| invalid(e.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        self.arch.validate()?;
        if self.arch.out_dim != self.vae.kind.channels() {
            let (out, vae) = (self.arch.out_dim, self.vae.kind.channels());
            return Err(invalid(format!("{}: out_dim {out} against {vae} channels of the VAE", self.task)));
        }
        if let Some(e) = self.experts {
            if !(e.boundary > 0.0 && e.boundary < 1.0) {
                return Err(invalid(format!("{}: expert boundary {} is outside 0..1", self.task, e.boundary)));
            }
        }
        if !(1..=2).contains(&self.inference.guidance.len()) {
            return Err(invalid(format!("{}: guidance takes one number, or low and high", self.task)));
        }
        Ok(())
    }

    /// The file of a role; without a variant, the first of that role.
    pub fn file(&self, role: Role, variant: Option<&str>) -> Option<&ModelFile> {
        self.files.iter().find(|f| f.role == role && (variant.is_none() || f.variant.as_deref() == variant))
    }
}

fn invalid(what: String) -> Error {
    Error::Invalid { model: "wan", what }
}
