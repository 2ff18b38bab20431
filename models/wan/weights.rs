//! The tensors of a DiT, as they are stored: what a block needs, and what stands outside the blocks.

use candle_core::Tensor;

use crate::arch::WanArch;
use crate::linear::{Frozen, Weight};
use crate::{Error, Result};

/// Hands out the tensor of a canonical key. Matrices of blocks may come quantised; norms, biases and modulation come
/// dense.
pub type Getter<'a> = dyn FnMut(&str) -> Result<Weight> + 'a;

/// LayerNorm with scale and shift, both `[width]`.
#[derive(Debug, Clone)]
pub struct NormAffine {
    pub weight: Tensor,
    pub bias: Tensor,
}

/// Self-attention: four linears, RMSNorm scales `[dim]` for queries and keys.
#[derive(Debug, Clone)]
pub struct SelfWeights {
    pub q: Frozen,
    pub k: Frozen,
    pub v: Frozen,
    pub o: Frozen,
    pub norm_q: Tensor,
    pub norm_k: Tensor,
}

/// Cross-attention to the text, and in Wan 2.1 i2v to the image.
#[derive(Debug, Clone)]
pub struct CrossWeights {
    pub q: Frozen,
    pub k: Frozen,
    pub v: Frozen,
    pub o: Frozen,
    pub norm_q: Tensor,
    pub norm_k: Tensor,
    pub image: Option<ImageKv>,
}

/// Keys and values of image rows.
#[derive(Debug, Clone)]
pub struct ImageKv {
    pub k: Frozen,
    pub v: Frozen,
    pub norm_k: Tensor,
}

/// Everything one block computes with.
#[derive(Debug, Clone)]
pub struct BlockWeights {
    /// `[1, 6, dim]`: shift, scale, gate of self-attention, then of the feed-forward part.
    pub modulation: Tensor,
    pub self_attn: SelfWeights,
    pub norm3: NormAffine,
    pub cross_attn: CrossWeights,
    pub ffn_0: Frozen,
    pub ffn_2: Frozen,
}

/// `img_emb`: norm, linear, GELU, linear, norm.
#[derive(Debug, Clone)]
pub struct ImgEmbWeights {
    /// `[1, rows, clip_dim]`, added to the features of two images.
    pub emb_pos: Option<Tensor>,
    pub norm_in: NormAffine,
    pub fc_in: Frozen,
    pub fc_out: Frozen,
    pub norm_out: NormAffine,
}

#[derive(Debug, Clone)]
pub struct HeadWeights {
    pub linear: Frozen,
    /// `[1, 2, dim]`: shift, scale.
    pub modulation: Tensor,
}

/// Everything outside the blocks.
#[derive(Debug, Clone)]
pub struct WanWeights {
    /// The patch convolution as a linear: `[dim, in_dim · patch]`.
    pub patch_embedding: Frozen,
    pub text_in: Frozen,
    pub text_out: Frozen,
    pub time_in: Frozen,
    pub time_out: Frozen,
    pub time_projection: Frozen,
    pub img_emb: Option<ImgEmbWeights>,
    pub head: HeadWeights,
}

impl BlockWeights {
    /// Asks for every tensor of block `block` and checks its shape.
    pub fn from_getter(arch: &WanArch, block: usize, get: &mut Getter) -> Result<Self> {
        let (dim, ffn) = (arch.dim, arch.ffn_dim);
        let mut read = Reader { get, prefix: format!("blocks.{block}.") };
        let self_attn = SelfWeights {
            q: read.linear("self_attn.q", dim, dim)?,
            k: read.linear("self_attn.k", dim, dim)?,
            v: read.linear("self_attn.v", dim, dim)?,
            o: read.linear("self_attn.o", dim, dim)?,
            norm_q: read.dense("self_attn.norm_q.weight", &[dim])?,
            norm_k: read.dense("self_attn.norm_k.weight", &[dim])?,
        };
        let image = match arch.clip {
            Some(_) => Some(ImageKv {
                k: read.linear("cross_attn.k_img", dim, dim)?,
                v: read.linear("cross_attn.v_img", dim, dim)?,
                norm_k: read.dense("cross_attn.norm_k_img.weight", &[dim])?,
            }),
            None => None,
        };
        let cross_attn = CrossWeights {
            q: read.linear("cross_attn.q", dim, dim)?,
            k: read.linear("cross_attn.k", dim, dim)?,
            v: read.linear("cross_attn.v", dim, dim)?,
            o: read.linear("cross_attn.o", dim, dim)?,
            norm_q: read.dense("cross_attn.norm_q.weight", &[dim])?,
            norm_k: read.dense("cross_attn.norm_k.weight", &[dim])?,
            image,
        };
        Ok(Self {
            modulation: read.dense("modulation", &[1, 6, dim])?,
            self_attn,
            norm3: read.norm("norm3", dim)?,
            cross_attn,
            ffn_0: read.linear("ffn.0", dim, ffn)?,
            ffn_2: read.linear("ffn.2", ffn, dim)?,
        })
    }

    /// Bytes of the linears' weights and scales: what swapping a block moves.
    pub fn linear_bytes(&self) -> usize {
        self.linears().iter().map(|l| l.weight.bytes()).sum()
    }

    /// The block with every tensor put through `f`.
    pub fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let (s, c) = (&self.self_attn, &self.cross_attn);
        Ok(Self {
            modulation: f(&self.modulation)?,
            self_attn: SelfWeights {
                q: s.q.map(f)?,
                k: s.k.map(f)?,
                v: s.v.map(f)?,
                o: s.o.map(f)?,
                norm_q: f(&s.norm_q)?,
                norm_k: f(&s.norm_k)?,
            },
            norm3: self.norm3.map(f)?,
            cross_attn: CrossWeights {
                q: c.q.map(f)?,
                k: c.k.map(f)?,
                v: c.v.map(f)?,
                o: c.o.map(f)?,
                norm_q: f(&c.norm_q)?,
                norm_k: f(&c.norm_k)?,
                image: match &c.image {
                    Some(i) => Some(ImageKv { k: i.k.map(f)?, v: i.v.map(f)?, norm_k: f(&i.norm_k)? }),
                    None => None,
                },
            },
            ffn_0: self.ffn_0.map(f)?,
            ffn_2: self.ffn_2.map(f)?,
        })
    }

    /// The block's linears in creation order.
    pub fn linears(&self) -> Vec<&Frozen> {
        let (s, c) = (&self.self_attn, &self.cross_attn);
        let mut all = vec![&s.q, &s.k, &s.v, &s.o, &c.q, &c.k, &c.v, &c.o];
        if let Some(image) = &c.image {
            all.extend([&image.k, &image.v]);
        }
        all.extend([&self.ffn_0, &self.ffn_2]);
        all
    }
}

impl NormAffine {
    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { weight: f(&self.weight)?, bias: f(&self.bias)? })
    }
}

impl WanWeights {
    /// The weights with every tensor put through `f`.
    pub fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let img_emb = match &self.img_emb {
            Some(i) => Some(ImgEmbWeights {
                emb_pos: i.emb_pos.as_ref().map(&mut *f).transpose()?,
                norm_in: i.norm_in.map(f)?,
                fc_in: i.fc_in.map(f)?,
                fc_out: i.fc_out.map(f)?,
                norm_out: i.norm_out.map(f)?,
            }),
            None => None,
        };
        Ok(Self {
            patch_embedding: self.patch_embedding.map(f)?,
            text_in: self.text_in.map(f)?,
            text_out: self.text_out.map(f)?,
            time_in: self.time_in.map(f)?,
            time_out: self.time_out.map(f)?,
            time_projection: self.time_projection.map(f)?,
            img_emb,
            head: HeadWeights { linear: self.head.linear.map(f)?, modulation: f(&self.head.modulation)? },
        })
    }

    /// Asks for every tensor outside the blocks and checks its shape.
    pub fn from_getter(arch: &WanArch, get: &mut Getter) -> Result<Self> {
        let dim = arch.dim;
        let mut read = Reader { get, prefix: String::new() };
        let img_emb = match arch.clip {
            Some(clip) => Some(ImgEmbWeights {
                emb_pos: match clip.images {
                    2 => Some(read.dense("img_emb.emb_pos", &[1, clip.rows(), clip.dim])?),
                    _ => None,
                },
                norm_in: read.norm("img_emb.proj.0", clip.dim)?,
                fc_in: read.linear("img_emb.proj.1", clip.dim, clip.dim)?,
                fc_out: read.linear("img_emb.proj.3", clip.dim, dim)?,
                norm_out: read.norm("img_emb.proj.4", dim)?,
            }),
            None => None,
        };
        let [pf, ph, pw] = arch.patch;
        let conv = read.dense("patch_embedding.weight", &[dim, arch.in_dim, pf, ph, pw])?;
        let conv_bias = read.dense("patch_embedding.bias", &[dim])?;
        let patch_embedding = Frozen::new(Weight::Dense(conv.reshape((dim, arch.patch_in()))?), Some(conv_bias))?;
        Ok(Self {
            patch_embedding,
            text_in: read.linear("text_embedding.0", arch.text_dim, dim)?,
            text_out: read.linear("text_embedding.2", dim, dim)?,
            time_in: read.linear("time_embedding.0", arch.freq_dim, dim)?,
            time_out: read.linear("time_embedding.2", dim, dim)?,
            time_projection: read.linear("time_projection.1", dim, 6 * dim)?,
            img_emb,
            head: HeadWeights {
                linear: read.linear("head.head", dim, arch.patch_out())?,
                modulation: read.dense("head.modulation", &[1, 2, dim])?,
            },
        })
    }
}

/// Reads tensors under a prefix and holds them against the shape that the architecture demands.
struct Reader<'a, 'b> {
    get: &'a mut Getter<'b>,
    prefix: String,
}

impl Reader<'_, '_> {
    fn weight(&mut self, name: &str, shape: &[usize]) -> Result<Weight> {
        let key = format!("{}{name}", self.prefix);
        let weight = (self.get)(&key)?;
        match weight.dims() == shape {
            true => Ok(weight),
            false => {
                let (got, want) = (weight.dims().to_vec(), shape.to_vec());
                Err(Error::WeightShape { model: "wan", key, got, want })
            }
        }
    }

    fn dense(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self.weight(name, shape)? {
            Weight::Dense(t) => Ok(t),
            Weight::Fp8(_) | Weight::Fp8Fast(_) | Weight::Int8(_) => {
                let what = format!("{}{name} came quantised; only linears of blocks may", self.prefix);
                Err(Error::Invalid { model: "wan", what })
            }
        }
    }

    fn linear(&mut self, module: &str, i: usize, o: usize) -> Result<Frozen> {
        let weight = self.weight(&format!("{module}.weight"), &[o, i])?;
        let bias = self.dense(&format!("{module}.bias"), &[o])?;
        Frozen::new(weight, Some(bias))
    }

    fn norm(&mut self, module: &str, width: usize) -> Result<NormAffine> {
        Ok(NormAffine {
            weight: self.dense(&format!("{module}.weight"), &[width])?,
            bias: self.dense(&format!("{module}.bias"), &[width])?,
        })
    }
}
