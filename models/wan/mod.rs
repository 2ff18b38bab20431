//! The Wan DiT: explicit forward and backward, no tape. A block owns no weights; whoever has them lends them.
//!
//! Reading order: `dit` (the whole model) -> `block` (both passes of one block) -> `embed`, `head`, `rope`.
//! Axes in tensor names are those of `wan_kernels`: `b` batch, `l` tokens, `m` key tokens, `d` width, `n` heads,
//! `h` head width.

use candle_core::{DType, Tensor};

use crate::{Error, Result};

mod block;
mod dit;
mod embed;
mod head;
mod lend;
mod pieces;
mod probe;
mod random;
pub mod rope;
mod saved;
#[cfg(test)]
mod tests;
mod weights;

pub use dit::{Saved, WanModel};
pub use lend::{Lease, ResidentWeights, WeightProvider};
pub use random::{cast_all, random_weights};
pub use weights::{
    BlockWeights, CrossWeights, Getter, HeadWeights, ImageKv, ImgEmbWeights, NormAffine, SelfWeights, WanWeights,
};

/// Direction of a pass over the blocks: the order in which weights will be asked for next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    Forward,
    Backward,
}

/// Receives adapter gradients as backward produces them. Implementations add into their buffers (`+=`).
pub trait GradSink {
    /// `site` is the module name (`blocks.0.self_attn.q`), `param` the parameter's suffix (`lora_down.weight`,
    /// `lora_up.weight`, `hada_w1_a`, `lokr_w1`, ...), `grad` has the parameter's shape, fp32.
    fn add(&mut self, site: &str, param: &'static str, grad: &Tensor) -> Result<()>;
}

/// What one block keeps between forward and backward. Changes memory and time, never a bit of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SavePolicy {
    /// The block's input; everything else is computed again.
    #[default]
    Recompute,
    /// The input, the self-attention output and its log-sum-exp: attention is never computed again.
    KeepAttention,
    /// Everything backward reads.
    KeepAll,
}

/// Where kept tensors wait for backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Home {
    /// In the memory of the computing device.
    #[default]
    Device,
    /// In host memory; brought back when its block is due.
    Host,
}

/// The policy of every block, chosen by the planner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockPlan {
    pub keep: SavePolicy,
    pub home: Home,
}

/// One plan per block; blocks beyond its end take the last one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavePlan(Vec<BlockPlan>);

impl SavePlan {
    pub fn uniform(keep: SavePolicy) -> Self {
        Self(vec![BlockPlan { keep, home: Home::Device }])
    }

    pub fn per_block(plans: Vec<BlockPlan>) -> Self {
        Self(plans)
    }

    pub fn of(&self, block: usize) -> BlockPlan {
        self.0.get(block).or(self.0.last()).copied().unwrap_or_default()
    }
}

/// What is rounded to the compute dtype beside linears and attention, which always compute in the executor's
/// (`Exec::compute`). With an fp32 executor only `attention` makes a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numerics {
    /// Dtype of the residual stream: fp32 as in the official code, or 16-bit as in the old tool.
    pub residual: Width,
    /// Round the output of a LayerNorm before scale and shift are applied (the old tool).
    pub round_norms: bool,
    /// Dtype of the head's linear: fp32 as in the official code, or compute.
    pub head: Width,
    /// Round queries, keys, values and the output of attention to this dtype, whatever the executor computes in
    /// (both the official code and the old tool round to bf16, also in fp32 models).
    pub attention: Option<DType>,
    /// Multiply in 8 bits in forward's self-attention (`--fast_attention`).
    pub fast_attention: bool,
    /// Always treat the first 257 context rows as the image's (the old tool): wrong for two images, and for Fun
    /// Control without CLIP features, where 257 text rows go through the image keys and values.
    pub musubi_clip_split: bool,
}

/// Full precision, or the executor's compute dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    Full,
    Compute,
}

impl Width {
    pub fn dtype(self, compute: DType) -> DType {
        match self {
            Width::Full => DType::F32,
            Width::Compute => compute,
        }
    }
}

impl Default for Numerics {
    /// As the official code: fp32 residual stream, norms and head.
    fn default() -> Self {
        Self {
            residual: Width::Full,
            round_norms: false,
            head: Width::Full,
            attention: None,
            fast_attention: false,
            musubi_clip_split: false,
        }
    }
}

impl Numerics {
    /// As the old tool: 16-bit residual stream, rounded norms, 16-bit head, its split of image and text rows.
    pub fn musubi() -> Self {
        Self {
            residual: Width::Compute,
            round_norms: true,
            head: Width::Compute,
            attention: None,
            fast_attention: false,
            musubi_clip_split: true,
        }
    }
}

/// Timesteps in model units (0..1000), on the host: they come from the host's generator.
#[derive(Debug, Clone, PartialEq)]
pub enum Timesteps {
    /// One per sample, `[B]`.
    PerSample(Vec<f32>),
    /// One per token, `[B][L]` (ti2v: tokens of a clean first frame have 0).
    PerToken(Vec<Vec<f32>>),
}

impl Timesteps {
    /// From `[B]` or `[B, L]`.
    pub fn from_tensor(t: &Tensor) -> Result<Self> {
        let t = t.to_dtype(DType::F32)?;
        match t.rank() {
            1 => Ok(Timesteps::PerSample(t.to_vec1()?)),
            2 => Ok(Timesteps::PerToken(t.to_vec2()?)),
            _ => Err(Error::Invalid { model: "wan", what: format!("timesteps of shape {:?}", t.shape()) }),
        }
    }

    pub fn batch(&self) -> usize {
        match self {
            Timesteps::PerSample(t) => t.len(),
            Timesteps::PerToken(t) => t.len(),
        }
    }
}

/// One batch as the model sees it. All samples have one latent size; prompts may differ in length.
#[derive(Debug, Clone)]
pub struct WanInputs {
    /// Noisy latent `[B, C, F, H, W]`, C = latent channels.
    pub x: Tensor,
    pub t: Timesteps,
    /// Text features of each sample, `[L_b, text_dim]`, L_b ≤ text_len; padded with zero rows here.
    pub context: Vec<Tensor>,
    /// Conditioning channels `[B, in_dim - C, F, H, W]`, concatenated after `x`.
    pub y: Option<Tensor>,
    /// CLIP features `[B · images, tokens, clip_dim]`, sample by sample (first frame, last frame). Fun Control without
    /// an image takes blank ones: `WanArch::blank_clip`.
    pub clip_fea: Option<Tensor>,
    /// Rows of the frame axis' rotary table, one per latent frame; without it 0, 1, 2, ...
    pub f_indices: Option<Vec<usize>>,
}

/// Called with the name and value of an activation (names as in the reference: `block0.self_attn.q_linear`).
pub type Tap<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;
