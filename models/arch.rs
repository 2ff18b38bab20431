//! The numbers of a Wan DiT, from a TOML table and from tensor shapes; the two must agree before anything is loaded.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

mod task;

pub use task::{Conditioning, Experts, Inference, ModelConfig, ModelFile, Role, VaeConfig, VaeKind, TASKS};

/// Tensor shapes of a checkpoint under canonical names (`keys::canonical`).
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// Architecture numbers of one DiT. Everything the model computes follows from these and from the tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WanArch {
    /// Width of the residual stream.
    pub dim: usize,
    /// Hidden width of the feed-forward part.
    pub ffn_dim: usize,
    pub num_heads: usize,
    pub num_layers: usize,
    /// Input channels: latent channels, plus conditioning channels where the task has them.
    pub in_dim: usize,
    /// Output (latent) channels.
    pub out_dim: usize,
    /// Width of the text encoder's output.
    pub text_dim: usize,
    /// Text rows every prompt is padded to (with zeros, before the text embedding).
    #[serde(default = "default_text_len")]
    pub text_len: usize,
    /// Width of the sinusoidal timestep embedding.
    #[serde(default = "default_freq_dim")]
    pub freq_dim: usize,
    #[serde(default = "default_eps")]
    pub eps: f64,
    /// Patch size: frames, rows, columns.
    #[serde(default = "default_patch")]
    pub patch: [usize; 3],
    /// Present where image features enter through `img_emb` and their own keys and values (Wan 2.1 i2v, flf2v, Fun control).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<ClipArch>,
    /// The task is trained with one timestep per token (ti2v): tokens of a clean first frame have timestep 0.
    #[serde(default)]
    pub per_token_time: bool,
}

/// The image-feature entrance of Wan 2.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClipArch {
    /// Width of a CLIP feature.
    pub dim: usize,
    /// Feature rows per image (class token and patches).
    pub tokens: usize,
    /// Images per sample; 2 means `img_emb.emb_pos` exists (first and last frame).
    pub images: usize,
}

impl ClipArch {
    /// Image rows in front of the text rows of one sample.
    pub fn rows(&self) -> usize {
        self.tokens * self.images
    }
}

fn default_text_len() -> usize {
    512
}
fn default_freq_dim() -> usize {
    256
}
fn default_eps() -> f64 {
    1e-6
}
fn default_patch() -> [usize; 3] {
    [1, 2, 2]
}

/// What tensor shapes do not tell. The default is what every published Wan model has.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct NotInShapes {
    /// `None`: heads of width 128, or one head where the width is no multiple of 128.
    pub num_heads: Option<usize>,
    pub text_len: Option<usize>,
    pub eps: Option<f64>,
}

/// One adaptable linear of the DiT: its module name and its features.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// `blocks.0.self_attn.q`
    pub name: String,
    pub in_features: usize,
    pub out_features: usize,
}

/// The linears of one block in creation order, with (in, out) given as widths of the architecture.
const BLOCK_LINEARS: [(&str, Width, Width); 10] = [
    ("self_attn.q", Width::Dim, Width::Dim),
    ("self_attn.k", Width::Dim, Width::Dim),
    ("self_attn.v", Width::Dim, Width::Dim),
    ("self_attn.o", Width::Dim, Width::Dim),
    ("cross_attn.q", Width::Dim, Width::Dim),
    ("cross_attn.k", Width::Dim, Width::Dim),
    ("cross_attn.v", Width::Dim, Width::Dim),
    ("cross_attn.o", Width::Dim, Width::Dim),
    ("ffn.0", Width::Dim, Width::Ffn),
    ("ffn.2", Width::Ffn, Width::Dim),
];

#[derive(Clone, Copy)]
enum Width {
    Dim,
    Ffn,
}

impl WanArch {
    pub fn head_dim(&self) -> usize {
        self.dim / self.num_heads
    }

    /// Output features of the head linear: one patch of every output channel.
    pub fn patch_out(&self) -> usize {
        self.out_dim * self.patch.iter().product::<usize>()
    }

    /// Input features of the patch embedding.
    pub fn patch_in(&self) -> usize {
        self.in_dim * self.patch.iter().product::<usize>()
    }

    /// Patch grid (frames, rows, columns) of a latent of this size.
    /// Errors when a side is no multiple of the patch: the reference would drop the rest and fail later.
    pub fn grid(&self, latent_fhw: [usize; 3]) -> Result<[usize; 3]> {
        let [f, h, w] = latent_fhw;
        let [pf, ph, pw] = self.patch;
        if f == 0 || h == 0 || w == 0 || f % pf != 0 || h % ph != 0 || w % pw != 0 {
            return Err(self.invalid(format!("latent {f}x{h}x{w} does not divide into patches of {pf}x{ph}x{pw}")));
        }
        Ok([f / pf, h / ph, w / pw])
    }

    /// Tokens of a latent of this size.
    pub fn tokens(&self, latent_fhw: [usize; 3]) -> Result<usize> {
        Ok(self.grid(latent_fhw)?.iter().product())
    }

    /// CLIP features that stand for "no image" (Fun Control driven by text alone): zeros, as that model was trained
    /// with. `None` where the architecture takes no features.
    pub fn blank_clip(&self, batch: usize, device: &Device) -> Result<Option<Tensor>> {
        match self.clip {
            Some(c) => Ok(Some(Tensor::zeros((batch * c.images, c.tokens, c.dim), DType::F32, device)?)),
            None => Ok(None),
        }
    }

    /// The linears of one block, in the order in which the old tool creates its adapters.
    pub fn block_sites(&self, block: usize) -> Vec<Site> {
        let width = |w| match w {
            Width::Dim => self.dim,
            Width::Ffn => self.ffn_dim,
        };
        let site = |suffix: &str, i, o| Site {
            name: format!("blocks.{block}.{suffix}"),
            in_features: width(i),
            out_features: width(o),
        };
        let mut sites = Vec::with_capacity(12);
        for (suffix, i, o) in BLOCK_LINEARS {
            sites.push(site(suffix, i, o));
            if suffix == "cross_attn.o" && self.clip.is_some() {
                sites.push(site("cross_attn.k_img", Width::Dim, Width::Dim));
                sites.push(site("cross_attn.v_img", Width::Dim, Width::Dim));
            }
        }
        sites
    }

    /// Every adaptable linear of the model, in creation order.
    pub fn sites(&self) -> Vec<Site> {
        (0..self.num_layers).flat_map(|i| self.block_sites(i)).collect()
    }

    /// Checks that the numbers can make a model.
    pub fn validate(&self) -> Result<()> {
        let zero = [
            ("dim", self.dim),
            ("ffn_dim", self.ffn_dim),
            ("num_heads", self.num_heads),
            ("num_layers", self.num_layers),
            ("in_dim", self.in_dim),
            ("out_dim", self.out_dim),
            ("text_dim", self.text_dim),
            ("text_len", self.text_len),
            ("freq_dim", self.freq_dim),
        ]
        .into_iter()
        .find(|(_, n)| *n == 0);
        if let Some((name, _)) = zero {
            return Err(self.invalid(format!("{name} is 0")));
        }
        if self.patch.contains(&0) {
            return Err(self.invalid(format!("patch {:?} has a zero side", self.patch)));
        }
        if !self.dim.is_multiple_of(self.num_heads) || !self.head_dim().is_multiple_of(2) {
            let (dim, heads) = (self.dim, self.num_heads);
            return Err(self.invalid(format!("dim {dim} does not make {heads} heads of even width")));
        }
        if !self.freq_dim.is_multiple_of(2) {
            return Err(self.invalid(format!("freq_dim {} is odd", self.freq_dim)));
        }
        if self.in_dim < self.out_dim {
            return Err(self.invalid(format!("in_dim {} is less than out_dim {}", self.in_dim, self.out_dim)));
        }
        if let Some(clip) = self.clip {
            if clip.dim == 0 || clip.tokens == 0 || !(1..=2).contains(&clip.images) {
                return Err(self.invalid(format!("clip {clip:?}: sizes must be positive, images 1 or 2")));
            }
        }
        Ok(())
    }

    fn invalid(&self, what: String) -> Error {
        Error::Invalid { model: "wan", what }
    }

    /// Reads the architecture off the tensor shapes (canonical names).
    /// Errors name the first key that is missing or has a shape no Wan DiT has.
    pub fn from_shapes(shapes: &Shapes, rest: NotInShapes) -> Result<Self> {
        let patch_w = shape_of(shapes, "patch_embedding.weight", 5)?;
        let (dim, in_dim) = (patch_w[0], patch_w[1]);
        let patch = [patch_w[2], patch_w[3], patch_w[4]];
        let text_dim = shape_of(shapes, "text_embedding.0.weight", 2)?[1];
        let freq_dim = shape_of(shapes, "time_embedding.0.weight", 2)?[1];
        let ffn_dim = shape_of(shapes, "blocks.0.ffn.0.weight", 2)?[0];
        let patch_out = shape_of(shapes, "head.head.weight", 2)?[0];
        let per_patch = patch.iter().product::<usize>();
        if per_patch == 0 || patch_out % per_patch != 0 {
            let what = format!("head.head.weight has {patch_out} rows, no multiple of the patch {patch:?}");
            return Err(Error::Invalid { model: "wan", what });
        }
        let num_layers = shapes.keys().filter_map(|k| block_index(k)).max().map_or(0, |i| i + 1);
        let clip = match shapes.contains_key("img_emb.proj.0.weight") {
            true => {
                let dim = shape_of(shapes, "img_emb.proj.0.weight", 1)?[0];
                match shapes.contains_key("img_emb.emb_pos") {
                    true => {
                        let rows = shape_of(shapes, "img_emb.emb_pos", 3)?[1];
                        Some(ClipArch { dim, tokens: rows / 2, images: 2 })
                    }
                    false => Some(ClipArch { dim, tokens: 257, images: 1 }),
                }
            }
            false => None,
        };
        let num_heads = rest.num_heads.unwrap_or(if dim % 128 == 0 { dim / 128 } else { 1 });
        let arch = Self {
            dim,
            ffn_dim,
            num_heads,
            num_layers,
            in_dim,
            out_dim: patch_out / per_patch,
            text_dim,
            text_len: rest.text_len.unwrap_or_else(default_text_len),
            freq_dim,
            eps: rest.eps.unwrap_or_else(default_eps),
            patch,
            clip,
            per_token_time: false,
        };
        arch.validate()?;
        Ok(arch)
    }

    /// Checks the numbers that shapes tell (not heads, text length, eps) against a checkpoint's.
    pub fn agrees_with(&self, shapes: &Shapes) -> std::result::Result<(), Mismatch> {
        let seen = match Self::from_shapes(shapes, NotInShapes::default()) {
            Ok(seen) => seen,
            Err(e) => return Err(Mismatch { differences: vec![], looks_like: None, unreadable: Some(e.to_string()) }),
        };
        let clip = |a: &Self| a.clip.map_or((0, 0, 0), |c| (1, c.dim, if c.images == 2 { c.rows() } else { 0 }));
        let (want, got) = (clip(self), clip(&seen));
        let pairs = [
            ("dim", self.dim, seen.dim),
            ("ffn_dim", self.ffn_dim, seen.ffn_dim),
            ("layers", self.num_layers, seen.num_layers),
            ("input channels", self.in_dim, seen.in_dim),
            ("output channels", self.out_dim, seen.out_dim),
            ("text_dim", self.text_dim, seen.text_dim),
            ("freq_dim", self.freq_dim, seen.freq_dim),
            ("patch frames", self.patch[0], seen.patch[0]),
            ("patch rows", self.patch[1], seen.patch[1]),
            ("patch columns", self.patch[2], seen.patch[2]),
            ("image embedding", want.0, got.0),
            ("image feature width", want.1, got.1),
            ("image position rows", want.2, got.2),
        ];
        let differences: Vec<_> = pairs
            .into_iter()
            .filter(|(_, want, got)| want != got)
            .map(|(what, want, got)| Difference { what, want, got })
            .collect();
        match differences.is_empty() {
            true => Ok(()),
            false => Err(Mismatch { differences, looks_like: seen.describe_task(), unreadable: None }),
        }
    }

    /// The published task these numbers belong to, as the user types it; `None` for a size nobody published.
    /// Wan 2.1 and 2.2 T2V 14B have equal shapes, so has t2i-14B: those are named together.
    pub fn describe_task(&self) -> Option<&'static str> {
        let size = match (self.dim, self.num_layers, self.ffn_dim) {
            (1536, 30, 8960) => "1.3B",
            (5120, 40, 13824) => "14B",
            (3072, 30, 14336) => "5B",
            _ => return None,
        };
        let images = self.clip.map(|c| c.images);
        match (size, self.in_dim, images) {
            ("1.3B", 16, None) => Some("t2v-1.3B"),
            ("1.3B", 48, Some(1)) => Some("t2v-1.3B-FC"),
            ("14B", 16, None) => Some("t2v-A14B, t2v-14B or t2i-14B"),
            ("14B", 36, None) => Some("i2v-A14B"),
            ("14B", 36, Some(1)) => Some("i2v-14B"),
            ("14B", 36, Some(2)) => Some("flf2v-14B"),
            ("14B", 48, Some(1)) => Some("i2v-14B-FC or t2v-14B-FC"),
            ("5B", 48, None) => Some("ti2v-5B"),
            _ => None,
        }
    }
}

fn shape_of<'a>(shapes: &'a Shapes, key: &str, rank: usize) -> Result<&'a [usize]> {
    let shape = shapes.get(key).ok_or_else(|| Error::MissingWeight { model: "wan", key: key.to_string() })?;
    if shape.len() != rank {
        let what = format!("{key} has shape {shape:?}, expected {rank} axes");
        return Err(Error::Invalid { model: "wan", what });
    }
    Ok(shape)
}

/// `blocks.7.…` -> 7.
pub fn block_index(key: &str) -> Option<usize> {
    key.strip_prefix("blocks.")?.split('.').next()?.parse().ok()
}

/// Why a checkpoint's shapes contradict an architecture, and what they look like instead.
#[derive(Debug, Clone, PartialEq)]
pub struct Mismatch {
    pub differences: Vec<Difference>,
    /// The published task of those shapes, if there is one.
    pub looks_like: Option<&'static str>,
    /// Set when the shapes are no Wan DiT's at all: the first contradiction.
    pub unreadable: Option<String>,
}

/// One number: what the task has, what the checkpoint has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    pub what: &'static str,
    pub want: usize,
    pub got: usize,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = &self.unreadable {
            return write!(f, "these are not the weights of a Wan DiT ({why})");
        }
        f.write_str("the weights have ")?;
        for (i, d) in self.differences.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            match (d.what, d.want, d.got) {
                ("image embedding", 0, _) => f.write_str("an image embedding that the task has not")?,
                ("image embedding", _, 0) => f.write_str("no image embedding where the task needs one")?,
                (what, want, got) => write!(f, "{what} {got} (the task has {want})")?,
            }
        }
        match self.looks_like {
            Some(task) => write!(f, "; they look like {task}"),
            None => f.write_str("; they look like no published task"),
        }
    }
}

impl std::error::Error for Mismatch {}
