//! The forward pass. There is no backward: prompts are encoded once and cached.

use candle_core::{DType, Device, Tensor, D};

use super::packed::{Pinned, Segment};
use super::store::{Layer, Matrix, Norm};
use super::{keys, Residence, Storage, Umt5Config, Umt5Options, WeightSource, MODEL};
use crate::{Error, Result};

/// Called with the name and value of intermediate tensors (`block0.attn`, `block0.ffn`, `block0.out`,
/// `block0.pos_bias`), for tests.
pub type Trace<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;

/// An encoder over a source of weights.
pub struct Umt5 {
    pub(super) config: Umt5Config,
    pub(super) options: Umt5Options,
    pub(super) source: Box<dyn WeightSource + Send + Sync>,
    /// Empty when read from the source for each call.
    pub(super) layers: Vec<Layer>,
    /// Keeps host memory in place that the card reads by itself.
    pub(super) _pinned: Option<Pinned>,
    /// All prompts' tokens side by side, through the ops that have kernels (see `packed.rs`): 16-bit computing on a card.
    pub(super) packed: bool,
}

impl Umt5 {
    /// Infers the sizes, checks every shape, and reads the layers unless they are streamed.
    pub fn new(source: Box<dyn WeightSource + Send + Sync>, options: Umt5Options) -> Result<Self> {
        let config = Umt5Config::from_shapes(source.as_ref())?;
        Self::with_config(config, source, options)
    }

    /// As [`Umt5::new`] for a known configuration (other `eps` or `max_distance`).
    pub fn with_config(
        config: Umt5Config,
        source: Box<dyn WeightSource + Send + Sync>,
        options: Umt5Options,
    ) -> Result<Self> {
        config.check(source.as_ref())?;
        let mut layers = Vec::new();
        let on_card = options.exec.device().is_cuda();
        if options.residence != Residence::Source {
            for i in 0..config.layers {
                let layer = Layer::load(source.as_ref(), i, &config, &options)?;
                layers.push(match options.residence {
                    // By way of the card, which converts and quantises faster.
                    Residence::Host => layer.map(&mut |t| Ok(t.to_device(&Device::Cpu)?))?,
                    _ => layer,
                });
            }
        }
        let pinned = match options.residence == Residence::Host && on_card {
            true => Pinned::new(&options.exec, &layers)?,
            false => None,
        };
        let packed = on_card && options.exec.compute() != DType::F32;
        Ok(Umt5 { config, options, source, layers, _pinned: pinned, packed })
    }

    pub fn config(&self) -> &Umt5Config {
        &self.config
    }

    /// Encodes a padded batch: `ids` and `mask` (1 = token, 0 = padding) are `[b, l]` integers; the result is
    /// `[b, l, d]` in the compute dtype (fp32 where a card computes in 16 bit). Padding keys are masked, padding rows are
    /// computed like any other.
    pub fn encode(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        self.encode_traced(ids, mask, &mut |_, _| Ok(()))
    }

    /// [`Umt5::encode`], showing intermediate tensors on the way.
    pub fn encode_traced(&self, ids_bl: &Tensor, mask_bl: &Tensor, trace: Trace<'_>) -> Result<Tensor> {
        if ids_bl.dims().len() != 2 || ids_bl.dims() != mask_bl.dims() {
            return Err(Error::Invalid {
                model: MODEL,
                what: format!("ids {:?} and mask {:?} must both be [prompts, tokens]", ids_bl.dims(), mask_bl.dims()),
            });
        }
        let x_bld = self.embed(ids_bl)?;
        if self.packed {
            let (b, l, d) = x_bld.dims3()?;
            let x = self.run_packed(x_bld.reshape((1, b * l, d))?, &Segment::padded(mask_bl)?, trace)?;
            return Ok(x.reshape((b, l, d))?);
        }
        let out = self.run(vec![(x_bld, Some(self.key_mask(mask_bl)?))], trace)?;
        out.into_iter().next().ok_or_else(|| Error::Invalid { model: MODEL, what: "no output".into() })
    }

    /// The context of one prompt: `ids` are its tokens including the final `</s>`, without padding; the result is
    /// `[tokens, d]`, what the text caches hold.
    pub fn context(&self, ids: &[u32]) -> Result<Tensor> {
        let mut all = self.contexts(&[ids])?;
        all.pop().ok_or_else(|| Error::Invalid { model: MODEL, what: "no output".into() })
    }

    /// The contexts of many prompts. Every prompt runs at its own length (padding keys are masked anyway, so the rows
    /// are the same), and each layer's weights are fetched once for all of them.
    pub fn contexts<P: AsRef<[u32]>>(&self, prompts: &[P]) -> Result<Vec<Tensor>> {
        let mut rows = Vec::with_capacity(prompts.len());
        for ids in prompts {
            let ids = ids.as_ref();
            if ids.is_empty() {
                return Err(Error::Invalid {
                    model: MODEL,
                    what: "a prompt without tokens (even an empty one has </s>)".into(),
                });
            }
            let ids_bl = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu)?;
            rows.push((self.embed(&ids_bl)?, None));
        }
        if self.packed {
            let segments = Segment::in_a_row(rows.iter().map(|(x, _)| x.dim(1).unwrap_or(0)));
            let all: Vec<Tensor> = rows.into_iter().map(|(x, _)| x).collect();
            let x = self.run_packed(Tensor::cat(&all, 1)?, &segments, &mut |_, _| Ok(()))?;
            return segments.iter().map(|s| Ok(x.narrow(1, s.first, s.rows)?.squeeze(0)?.contiguous()?)).collect();
        }
        self.run(rows, &mut |_, _| Ok(()))?.into_iter().map(|x| Ok(x.squeeze(0)?)).collect()
    }

    /// Token ids `[b, l]` to embeddings `[b, l, d]` in the compute dtype.
    fn embed(&self, ids_bl: &Tensor) -> Result<Tensor> {
        let (b, l) = ids_bl.dims2()?;
        let ids = ids_bl.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::U32)?;
        if let Some(id) = ids.to_vec1::<u32>()?.into_iter().find(|id| *id as usize >= self.config.vocab) {
            return Err(Error::Invalid {
                model: MODEL,
                what: format!(
                    "token {id} is outside the vocabulary of {} (tokenizer and encoder differ)",
                    self.config.vocab
                ),
            });
        }
        let rows = self.source.rows("token_embedding.weight", &ids)?.to_device(self.options.exec.device())?;
        let rows = match self.options.storage {
            Storage::Fp8Cast => super::store::through_e4m3(&rows)?,
            _ => rows,
        };
        let dtype = if self.packed { DType::F32 } else { self.options.exec.compute() };
        Ok(rows.to_dtype(dtype)?.reshape((b, l, self.config.dim))?)
    }

    /// 0 where a key is a token and the smallest finite number where it is padding: `[b, 1, 1, m]` fp32.
    fn key_mask(&self, mask_bl: &Tensor) -> Result<Tensor> {
        let (b, l) = mask_bl.dims2()?;
        let padding =
            mask_bl.to_device(self.options.exec.device())?.to_dtype(DType::F32)?.eq(0f32)?.to_dtype(DType::F32)?;
        Ok((padding * f64::from(f32::MIN))?.reshape((b, 1, 1, l))?)
    }

    /// All layers over a list of inputs `(x_bld, key mask)`, layer by layer, then the final norm.
    fn run(&self, mut xs: Vec<(Tensor, Option<Tensor>)>, trace: Trace<'_>) -> Result<Vec<Tensor>> {
        let norm = Norm::load(self.source.as_ref(), "norm.weight", &self.options)?;
        let shared = match self.config.shared_bias {
            true => Some(super::store::bias_table(self.source.as_ref(), 0, &self.config, &self.options)?),
            false => None,
        };
        for i in 0..self.config.layers {
            let fetched;
            let layer = match self.layers.get(i) {
                Some(layer) => layer,
                None => {
                    fetched = Layer::load(self.source.as_ref(), i, &self.config, &self.options)?;
                    &fetched
                }
            };
            let table = layer.bias.as_ref().or(shared.as_ref()).ok_or_else(|| Error::MissingWeight {
                model: MODEL,
                key: keys::bias_key(i, self.config.shared_bias),
            })?;
            for (x_bld, mask) in &mut xs {
                *x_bld = self.layer(i, layer, table, x_bld, mask.as_ref(), trace)?;
            }
        }
        xs.iter().map(|(x_bld, _)| norm.forward(x_bld, self.config.eps)).collect()
    }

    /// `x + attn(norm1(x))`, then `x + ffn(norm2(x))`.
    fn layer(
        &self,
        i: usize,
        w: &Layer,
        table: &Tensor,
        x_bld: &Tensor,
        mask: Option<&Tensor>,
        trace: Trace<'_>,
    ) -> Result<Tensor> {
        let bias_nlm = self.position_bias(table, x_bld.dim(1)?)?;
        trace(&format!("block{i}.pos_bias"), &bias_nlm)?;
        let attn = self.attention(w, &w.norm1.forward(x_bld, self.config.eps)?, &bias_nlm, mask)?;
        trace(&format!("block{i}.attn"), &attn)?;
        let x_bld = clamp_f16((x_bld + attn)?)?;
        let ffn = ffn(w, &w.norm2.forward(&x_bld, self.config.eps)?)?;
        trace(&format!("block{i}.ffn"), &ffn)?;
        let x_bld = clamp_f16((x_bld + ffn)?)?;
        trace(&format!("block{i}.out"), &x_bld)?;
        Ok(x_bld)
    }

    /// Self-attention without the usual 1/sqrt(h): the weights were trained to be scaled already. Softmax in fp32.
    fn attention(&self, w: &Layer, x_bld: &Tensor, bias_nlm: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (b, l, _) = x_bld.dims3()?;
        let (n, h) = (self.config.heads, self.config.dim_attn / self.config.heads);
        let heads = |m: &Matrix| -> Result<Tensor> {
            Ok(m.forward(x_bld)?.reshape((b, l, n, h))?.transpose(1, 2)?.contiguous()?)
        };
        let (q_bnlh, k_bnmh, v_bnmh) = (heads(&w.q)?, heads(&w.k)?, heads(&w.v)?);
        let logits = q_bnlh.matmul(&k_bnmh.transpose(2, 3)?.contiguous()?)?.to_dtype(DType::F32)?;
        let mut logits = logits.broadcast_add(bias_nlm)?;
        if let Some(mask) = mask {
            logits = logits.broadcast_add(mask)?;
        }
        let logits = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
        let p_bnlm = logits.broadcast_div(&logits.sum_keepdim(D::Minus1)?)?.to_dtype(v_bnmh.dtype())?;
        let y_bld = p_bnlm.matmul(&v_bnmh)?.transpose(1, 2)?.reshape((b, l, n * h))?;
        w.o.forward(&y_bld)
    }

    /// Bias of every head for every pair of positions: `[1, n, l, m]` fp32.
    fn position_bias(&self, table: &Tensor, l: usize) -> Result<Tensor> {
        // rel = key - query only takes 2l-1 values: bucket those, then read them out for all pairs.
        let near = l as i64 - 1;
        let by_distance: Vec<u32> =
            (-near..=near).map(|rel| relative_bucket(rel, self.config.buckets, self.config.max_distance)).collect();
        let ids: Vec<u32> = (0..l).flat_map(|q| by_distance[l - 1 - q..][..l].iter().copied()).collect();
        let ids = Tensor::from_vec(ids, l * l, table.device())?;
        let bias = table.to_dtype(DType::F32)?.index_select(&ids, 0)?;
        Ok(bias.reshape((1, l, l, self.config.heads))?.permute((0, 3, 1, 2))?.contiguous()?)
    }
}

/// `fc2(fc1(x) * gelu_tanh(gate(x)))`.
fn ffn(w: &Layer, x_bld: &Tensor) -> Result<Tensor> {
    let gate = w.gate.forward(x_bld)?.gelu()?;
    w.fc2.forward(&(w.fc1.forward(x_bld)? * gate)?)
}

/// fp16 overflows in the residual stream of T5: the reference clamps there, and only in fp16.
fn clamp_f16(x: Tensor) -> Result<Tensor> {
    const LIMIT: f64 = 65_504.0 - 1_000.0;
    match x.dtype() {
        DType::F16 => Ok(x.clamp(-LIMIT, LIMIT)?),
        _ => Ok(x),
    }
}

/// Bucket of a relative position `rel = key - query`: the upper half of the buckets is for keys to the right; within a
/// half, small distances have their own bucket and larger ones share logarithmic buckets up to `max_distance`.
pub fn relative_bucket(rel: i64, buckets: usize, max_distance: usize) -> u32 {
    let half = buckets / 2;
    let exact = half / 2;
    let side = if rel > 0 { half } else { 0 };
    let n = rel.unsigned_abs() as usize;
    let bucket = if n < exact {
        n
    } else {
        // fp32 like the reference: distances on a bucket's edge fall where its rounding puts them.
        let ratio = (n as f32 / exact as f32).ln() / (max_distance as f64 / exact as f64).ln() as f32;
        (exact + (ratio * (half - exact) as f32) as usize).min(half - 1)
    };
    (side + bucket) as u32
}
