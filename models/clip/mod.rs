//! The CLIP vision tower (ViT) of the Wan 2.1 image-to-video models: one picture to its patch features.
//!
//! The DiT reads all tokens as they are before the last block; the last block, the final norm and the projection of a
//! whole CLIP are never used for it. Axes in names: `b` batch, `l` tokens (class token, then patches by rows), `d` width.

mod arch;
mod preprocess;
#[cfg(test)]
mod tests;

pub use arch::{random_clip, ClipArch};

use crate::{Error, Result};
use arch::{Names, MODEL};
use candle_core::{DType, Device, Tensor};

/// A loaded vision tower. Computes in fp32; matrices may be stored in 16 bit.
pub struct ClipVision {
    arch: ClipArch,
    /// `[3 * patch * patch, d]`.
    patch: Tensor,
    cls: Tensor,
    positions: Tensor,
    pre_norm: LayerNorm,
    blocks: Vec<Block>,
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(candle_nn::ops::layer_norm(x, &self.weight, &self.bias, self.eps)?)
    }
}

/// `x Wᵀ + b`; the matrix in its storage dtype, raised to fp32 for each use.
struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn forward(&self, x_bli: &Tensor) -> Result<Tensor> {
        let w_oi = self.weight.to_dtype(DType::F32)?;
        let (b, l, i) = x_bli.dims3()?;
        let y = x_bli.reshape((b * l, i))?.matmul(&w_oi.t()?)?.broadcast_add(&self.bias)?;
        Ok(y.reshape((b, l, w_oi.dim(0)?))?)
    }
}

struct Block {
    norm_1: LayerNorm,
    to_qkv: Linear,
    proj: Linear,
    norm_2: LayerNorm,
    fc_1: Linear,
    fc_2: Linear,
}

impl Block {
    fn forward(&self, heads: usize, x_bld: &Tensor) -> Result<Tensor> {
        let (b, l, d) = x_bld.dims3()?;
        let h = d / heads;
        let qkv = self.to_qkv.forward(&self.norm_1.forward(x_bld)?)?.reshape((b, l, 3, heads, h))?;
        let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
        let (q_bnlh, k_bnlh, v_bnlh) = ((part(0)? / (h as f64).sqrt())?, part(1)?, part(2)?);
        let p_bnlm = candle_nn::ops::softmax_last_dim(&q_bnlh.matmul(&k_bnlh.t()?)?)?;
        let y_bld = p_bnlm.matmul(&v_bnlh)?.transpose(1, 2)?.contiguous()?.reshape((b, l, d))?;
        let x_bld = (x_bld + self.proj.forward(&y_bld)?)?;
        // GELU in its exact form, by the error function.
        let y = self.fc_1.forward(&self.norm_2.forward(&x_bld)?)?.gelu_erf()?;
        Ok((&x_bld + self.fc_2.forward(&y)?)?)
    }
}

/// Takes weights by their official names from files of either spelling.
struct Loader<'a> {
    names: Names,
    get: &'a mut dyn FnMut(&str) -> Result<Option<Tensor>>,
    device: &'a Device,
    storage: DType,
}

impl Loader<'_> {
    /// One tensor of the file, of so many elements in this shape: the spellings differ in axes of length 1.
    fn raw(&mut self, key: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let t = (self.get)(key)?.ok_or_else(|| Error::MissingWeight { model: MODEL, key: key.to_owned() })?;
        let squeezed = |dims: &[usize]| dims.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
        if squeezed(t.dims()) != squeezed(shape) {
            let (got, want) = (t.dims().to_vec(), shape.to_vec());
            return Err(Error::WeightShape { model: MODEL, key: key.to_owned(), got, want });
        }
        Ok(t.to_device(self.device)?.to_dtype(dtype)?.reshape(shape)?.contiguous()?)
    }

    fn take(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let parts = self.names.keys(name);
        if parts.len() == 1 {
            return self.raw(&parts[0], shape, dtype);
        }
        // Three matrices in the file are one of ours, rows of q, k and v in this order.
        let mut part = shape.to_vec();
        part[0] /= parts.len();
        let parts = parts.iter().map(|key| self.raw(key, &part, dtype)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }

    fn norm(&mut self, name: &str, arch: &ClipArch) -> Result<LayerNorm> {
        let weight = self.take(&format!("{name}.weight"), &[arch.dim], DType::F32)?;
        let bias = self.take(&format!("{name}.bias"), &[arch.dim], DType::F32)?;
        Ok(LayerNorm { weight, bias, eps: arch.norm_eps as f32 })
    }

    fn linear(&mut self, name: &str, i: usize, o: usize) -> Result<Linear> {
        let weight = self.take(&format!("{name}.weight"), &[o, i], self.storage)?;
        let bias = self.take(&format!("{name}.bias"), &[o], DType::F32)?;
        Ok(Linear { weight, bias })
    }
}

impl ClipVision {
    /// Builds the tower. `get` returns a tensor by key or `None`; files with official names (`visual.…`) and with those
    /// of `clip_vision_h` (`vision_model.…`) are told apart by their first tensor. Nothing of a textual tower is asked
    /// for. `storage` is the dtype in which matrices are kept: F32, BF16 or F16.
    pub fn load(
        arch: ClipArch,
        device: &Device,
        storage: DType,
        get: &mut dyn FnMut(&str) -> Result<Option<Tensor>>,
    ) -> Result<Self> {
        arch.validate()?;
        let official = get("visual.patch_embedding.weight")?.is_some();
        let names = if official { Names::Official } else { Names::Hf };
        let mut l = Loader { names, get, device, storage };
        let (d, p) = (arch.dim, arch.patch_size);
        let patch = l.take("patch_embedding.weight", &[d, 3, p, p], DType::F32)?;
        let patch = patch.reshape((d, 3 * p * p))?.t()?.contiguous()?;
        let cls = l.take("cls_embedding", &[1, 1, d], DType::F32)?;
        let positions = l.take("pos_embedding", &[1, arch.tokens(), d], DType::F32)?;
        let pre_norm = l.norm("pre_norm", &arch)?;
        let mut blocks = Vec::with_capacity(arch.num_layers);
        for i in 0..arch.num_layers {
            let name = |part: &str| format!("transformer.{i}.{part}");
            blocks.push(Block {
                norm_1: l.norm(&name("norm1"), &arch)?,
                to_qkv: l.linear(&name("attn.to_qkv"), d, 3 * d)?,
                proj: l.linear(&name("attn.proj"), d, d)?,
                norm_2: l.norm(&name("norm2"), &arch)?,
                fc_1: l.linear(&name("mlp.0"), d, arch.mlp_dim)?,
                fc_2: l.linear(&name("mlp.2"), arch.mlp_dim, d)?,
            });
        }
        Ok(Self { arch, patch, cls, positions, pre_norm, blocks })
    }

    pub fn arch(&self) -> &ClipArch {
        &self.arch
    }

    /// `[b,3,H,W]` in [-1,1] to the tower's normalised square input `[b,3,S,S]` in fp32: bicubic, the whole picture
    /// squeezed into the square.
    pub fn preprocess(&self, images: &Tensor) -> Result<Tensor> {
        preprocess::preprocess(&images.to_device(self.cls.device())?, self.arch.image_size)
    }

    /// Tokens after embedding, class token, positions and the first norm: `[b,3,S,S]` to `[b,l,d]`.
    pub fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        let (s, p, d) = (self.arch.image_size, self.arch.patch_size, self.arch.dim);
        let b = match *pixels.dims() {
            [b, 3, h, w] if (h, w) == (s, s) => b,
            ref got => {
                let what = format!("preprocessed images have shape {got:?}, expected [batch, 3, {s}, {s}]");
                return Err(Error::Invalid { model: MODEL, what });
            }
        };
        let g = s / p;
        let patches = pixels.to_dtype(DType::F32)?.reshape(&[b, 3, g, p, g, p][..])?;
        let patches = patches.permute(vec![0, 2, 4, 1, 3, 5])?.contiguous()?.reshape((b * g * g, 3 * p * p))?;
        let x_bld = patches.matmul(&self.patch)?.reshape((b, g * g, d))?;
        let x_bld = Tensor::cat(&[self.cls.broadcast_as((b, 1, d))?, x_bld], 1)?;
        self.pre_norm.forward(&x_bld.broadcast_add(&self.positions)?)
    }

    fn run(&self, pixels: &Tensor, blocks: usize) -> Result<Tensor> {
        let mut x_bld = self.embed(pixels)?;
        for block in &self.blocks[..blocks] {
            x_bld = block.forward(self.arch.num_heads, &x_bld)?;
        }
        Ok(x_bld)
    }

    /// Preprocessed images to all tokens before the last block: `[b,l,d]` in fp32.
    pub fn penultimate(&self, pixels: &Tensor) -> Result<Tensor> {
        self.run(pixels, self.blocks.len() - 1)
    }

    /// All blocks; no final norm.
    pub fn full_depth(&self, pixels: &Tensor) -> Result<Tensor> {
        self.run(pixels, self.blocks.len())
    }

    /// What the DiT reads: `[b,3,H,W]` in [-1,1] to `[b,l,d]` in fp32.
    pub fn encode(&self, images: &Tensor) -> Result<Tensor> {
        self.penultimate(&self.preprocess(images)?)
    }
}
