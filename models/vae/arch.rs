//! The numbers of a Wan VAE: from TOML, from a checkpoint's tensor shapes, or from an official configuration object.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

const MODEL: &str = "vae";
const WAN_21: &str = include_str!("../../configs/models/vae-2.1.toml");
const WAN_22: &str = include_str!("../../configs/models/vae-2.2.toml");

/// The two designs: 2.2 patches pixels 2x2 first and puts a parameter-free skip around every level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VaeKind {
    #[serde(rename = "2.1")]
    Wan21,
    #[serde(rename = "2.2")]
    Wan22,
}

/// Everything needed to build a VAE but its weights. See `configs/models/vae-2.1.toml` for the meaning of each field.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaeArch {
    pub kind: VaeKind,
    pub base_dim: usize,
    pub dec_dim: usize,
    pub z_dim: usize,
    pub dim_mult: Vec<usize>,
    pub res_blocks: usize,
    pub temporal_downsample: Vec<bool>,
    /// Per latent channel; `z_dim` long.
    pub latent_mean: Vec<f32>,
    pub latent_std: Vec<f32>,
}

fn invalid(what: String) -> Error {
    Error::Invalid { model: MODEL, what }
}

impl VaeArch {
    /// Parses the form of `configs/models/vae-*.toml` and validates it.
    pub fn from_toml(text: &str) -> Result<Self> {
        let arch: Self = toml::from_str(text).map_err(|e| invalid(e.to_string()))?;
        arch.validate()?;
        Ok(arch)
    }

    /// The VAE of Wan 2.1 and of Wan 2.2 A14B.
    pub fn wan21() -> Self {
        Self::from_toml(WAN_21).expect("the embedded vae-2.1.toml is valid")
    }

    /// The VAE of Wan 2.2 TI2V-5B.
    pub fn wan22() -> Self {
        Self::from_toml(WAN_22).expect("the embedded vae-2.2.toml is valid")
    }

    /// From an official configuration object: `version`, `dim`, `z_dim`, `dim_mult`, `num_res_blocks`,
    /// `temperal_downsample` (spelled so), and `dec_dim` where the decoder is of another width.
    /// `mean` and `std` are the latent statistics, `z_dim` values each.
    pub fn from_official(config: &serde_json::Value, mean: Vec<f32>, std: Vec<f32>) -> Result<Self> {
        #[derive(Deserialize)]
        struct Official {
            version: VaeKind,
            dim: usize,
            dec_dim: Option<usize>,
            z_dim: usize,
            dim_mult: Vec<usize>,
            num_res_blocks: usize,
            #[serde(default)]
            attn_scales: Vec<f64>,
            temperal_downsample: Vec<bool>,
        }
        let c: Official = serde_json::from_value(config.clone()).map_err(|e| invalid(format!("configuration: {e}")))?;
        if !c.attn_scales.is_empty() {
            return Err(invalid(format!(
                "attention inside the levels (attn_scales {:?}) is not a Wan VAE",
                c.attn_scales
            )));
        }
        let arch = Self {
            kind: c.version,
            base_dim: c.dim,
            dec_dim: c.dec_dim.unwrap_or(c.dim),
            z_dim: c.z_dim,
            dim_mult: c.dim_mult,
            res_blocks: c.num_res_blocks,
            temporal_downsample: c.temperal_downsample,
            latent_mean: mean,
            latent_std: std,
        };
        arch.validate()?;
        Ok(arch)
    }

    /// The same VAE with other latent statistics (`z_dim` values each).
    pub fn with_latent_stats(mut self, mean: Vec<f32>, std: Vec<f32>) -> Result<Self> {
        self.latent_mean = mean;
        self.latent_std = std;
        self.validate()?;
        Ok(self)
    }

    /// Number of resolutions; between two of them the sides are halved.
    pub fn levels(&self) -> usize {
        self.dim_mult.len()
    }

    /// Pixels of a side that become one latent position: 8 for Wan 2.1, 16 for Wan 2.2.
    pub fn spatial_stride(&self) -> usize {
        self.patch() << (self.levels() - 1)
    }

    /// Frames that become one latent frame, after the first frame, which stands alone: 4.
    pub fn temporal_stride(&self) -> usize {
        1 << self.temporal_downsample.iter().filter(|&&t| t).count()
    }

    /// Side of the pixel patches folded into channels before the first convolution.
    pub fn patch(&self) -> usize {
        match self.kind {
            VaeKind::Wan21 => 1,
            VaeKind::Wan22 => 2,
        }
    }

    /// Channels of the pixels as the first convolution sees them: 3, or 12 when patched.
    pub fn pixel_channels(&self) -> usize {
        3 * self.patch() * self.patch()
    }

    /// Latent frames of a clip of `frames` pixel frames (surplus frames beyond 1 + 4k do not count).
    pub fn latent_frames(&self, frames: usize) -> usize {
        match frames {
            0 => 0,
            n => 1 + (n - 1) / self.temporal_stride(),
        }
    }

    /// Pixel frames that `latent_frames` latent frames decode to.
    pub fn pixel_frames(&self, latent_frames: usize) -> usize {
        match latent_frames {
            0 => 0,
            n => 1 + (n - 1) * self.temporal_stride(),
        }
    }

    /// Whether the change after encoder level `i` also halves the frame rate.
    pub(crate) fn down_in_time(&self, i: usize) -> bool {
        self.temporal_downsample.get(i).copied().unwrap_or(false)
    }

    /// Whether the change after decoder level `i` also doubles the frame rate: the encoder's flags, reversed.
    pub(crate) fn up_in_time(&self, i: usize) -> bool {
        self.temporal_downsample.iter().rev().nth(i).copied().unwrap_or(false)
    }

    /// Channels in and out of encoder level `i`.
    pub(crate) fn enc_dims(&self, i: usize) -> (usize, usize) {
        let input = if i == 0 { 1 } else { self.dim_mult[i - 1] };
        (self.base_dim * input, self.base_dim * self.dim_mult[i])
    }

    /// Channels in and out of decoder level `i`, deepest first. In 2.1 each upsampling halves the channels before the
    /// next level reads them.
    pub(crate) fn dec_dims(&self, i: usize) -> (usize, usize) {
        let n = self.levels();
        let input = self.dec_dim * if i == 0 { self.dim_mult[n - 1] } else { self.dim_mult[n - i] };
        let halved = self.kind == VaeKind::Wan21 && i > 0;
        (if halved { input / 2 } else { input }, self.dec_dim * self.dim_mult[n - 1 - i])
    }

    /// Refuses numbers that no Wan VAE can have, naming the field.
    pub fn validate(&self) -> Result<()> {
        let n = self.levels();
        if n == 0 || self.base_dim == 0 || self.dec_dim == 0 || self.z_dim == 0 || self.dim_mult.contains(&0) {
            return Err(invalid("base_dim, dec_dim, z_dim and every dim_mult must be at least 1".into()));
        }
        if self.res_blocks == 0 {
            return Err(invalid("res_blocks must be at least 1".into()));
        }
        if self.temporal_downsample.len() + 1 != n {
            return Err(invalid(format!(
                "temporal_downsample has {} entries, {} levels need {}",
                self.temporal_downsample.len(),
                n,
                n - 1
            )));
        }
        for (name, v) in [("latent_mean", &self.latent_mean), ("latent_std", &self.latent_std)] {
            if v.len() != self.z_dim {
                return Err(invalid(format!("{name} has {} values, z_dim is {}", v.len(), self.z_dim)));
            }
            if v.iter().any(|x| !x.is_finite()) {
                return Err(invalid(format!("{name} has a value that is not finite")));
            }
        }
        if self.latent_std.contains(&0.0) {
            return Err(invalid("latent_std has a zero".into()));
        }
        for i in 0..n {
            let (enc_in, enc_out) = self.enc_dims(i);
            let (dec_in, dec_out) = self.dec_dims(i);
            let last = i + 1 == n;
            match self.kind {
                VaeKind::Wan21 if !last && dec_out % 2 != 0 => {
                    return Err(invalid(format!("decoder level {i} has {dec_out} channels; upsampling halves them")));
                }
                VaeKind::Wan22 => {
                    let space = if last { 1 } else { 4 };
                    let down = space * if self.down_in_time(i) { 2 } else { 1 };
                    let up = space * if self.up_in_time(i) { 2 } else { 1 };
                    if (enc_in * down) % enc_out != 0 {
                        return Err(invalid(format!(
                            "encoder level {i}: {enc_in} channels cannot average to {enc_out}"
                        )));
                    }
                    if !last && (dec_out * up) % dec_in != 0 {
                        return Err(invalid(format!(
                            "decoder level {i}: {dec_in} channels cannot spread to {dec_out}"
                        )));
                    }
                }
                VaeKind::Wan21 => {}
            }
        }
        Ok(())
    }

    /// Reads the numbers off a checkpoint: `shape` gives a tensor's shape by its official key. The latent statistics
    /// are not in any checkpoint; they are those of the released VAE with as many latent channels, else 0 and 1.
    pub fn infer(shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<Self> {
        let need = |key: &str| shape(key).ok_or_else(|| Error::MissingWeight { model: MODEL, key: key.to_owned() });
        let base_dim = need("encoder.conv1.weight")?[0];
        let z_dim = need("conv2.weight")?[0];
        let kind = match need("encoder.conv1.weight")?.get(1) {
            Some(3) => VaeKind::Wan21,
            Some(12) => VaeKind::Wan22,
            other => {
                return Err(invalid(format!(
                    "encoder.conv1.weight reads {other:?} channels; 3 is Wan 2.1, 12 is Wan 2.2"
                )))
            }
        };
        // 2.1 numbers blocks and resamples of all levels in one list, 2.2 has a list a level.
        let mut dim_mult = Vec::new();
        let mut temporal = Vec::new();
        let mut blocks = 0;
        let mut max_blocks = 0;
        let mut out = 0;
        let (mut level, mut i) = (0, 0);
        loop {
            let p = match kind {
                VaeKind::Wan21 => format!("encoder.downsamples.{i}"),
                VaeKind::Wan22 => format!("encoder.downsamples.{level}.downsamples.{i}"),
            };
            if let Some(s) = shape(&format!("{p}.residual.2.weight")) {
                out = s[0];
                blocks += 1;
                max_blocks = max_blocks.max(blocks);
                i += 1;
            } else if shape(&format!("{p}.resample.1.weight")).is_some() {
                dim_mult.push(out / base_dim);
                temporal.push(shape(&format!("{p}.time_conv.weight")).is_some());
                blocks = 0;
                level += 1;
                i = if kind == VaeKind::Wan21 { i + 1 } else { 0 };
            } else {
                break;
            }
        }
        if blocks == 0 {
            return Err(Error::MissingWeight { model: MODEL, key: "encoder.downsamples.0".into() });
        }
        dim_mult.push(out / base_dim);
        let (latent_mean, latent_std) = [Self::wan21(), Self::wan22()]
            .into_iter()
            .find(|a| a.z_dim == z_dim)
            .map(|a| (a.latent_mean, a.latent_std))
            .unwrap_or_else(|| (vec![0.0; z_dim], vec![1.0; z_dim]));
        let arch = Self {
            kind,
            base_dim,
            // A file that holds the encoder alone says nothing of the decoder.
            dec_dim: shape("decoder.head.0.gamma").map_or(base_dim, |s| s[0] / dim_mult[0].max(1)),
            z_dim,
            dim_mult,
            res_blocks: max_blocks,
            temporal_downsample: temporal,
            latent_mean,
            latent_std,
        };
        arch.validate()?;
        Ok(arch)
    }
}
