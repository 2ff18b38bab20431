//! The umT5 text encoder: an encoder-only T5 whose every layer owns a relative position bias.
//!
//! Weights are pulled by official key through [`WeightSource`], either once (resident) or one layer at a time for each
//! call (streamed: an 11 GB file never sits in memory at once). Axes: `b` prompts, `l` query tokens, `m` key tokens,
//! `d` model width, `n` heads, `h` head width, `i`/`o` in/out features.

use std::collections::HashMap;

use candle_core::Tensor;
use wan_kernels::Exec;

use crate::{Error, Result};

mod encoder;
pub mod keys;
mod packed;
pub mod random;
mod store;
#[cfg(test)]
mod tests;

pub use encoder::{relative_bucket, Trace, Umt5};
pub use keys::official_key;

pub(crate) const MODEL: &str = "umT5";

/// Gives weights by official key (`blocks.0.attn.q.weight`); [`official_key`] maps other names to these.
pub trait WeightSource {
    /// The whole tensor, in any float dtype, on any device.
    fn get(&self, key: &str) -> Result<Tensor>;

    /// Shape without reading the data; `None` if the key does not exist.
    fn shape(&self, key: &str) -> Option<Vec<usize>>;

    /// Some rows of a matrix. A source over a memory-mapped file should read only these: the token table of the real
    /// model is 2 GB of which a prompt needs a few kilobytes.
    fn rows(&self, key: &str, ids: &Tensor) -> Result<Tensor> {
        let table = self.get(key)?;
        Ok(table.index_select(&ids.to_device(table.device())?, 0)?)
    }
}

impl WeightSource for HashMap<String, Tensor> {
    fn get(&self, key: &str) -> Result<Tensor> {
        HashMap::get(self, key).cloned().ok_or_else(|| Error::MissingWeight { model: MODEL, key: key.to_string() })
    }

    fn shape(&self, key: &str) -> Option<Vec<usize>> {
        HashMap::get(self, key).map(|t| t.dims().to_vec())
    }
}

/// Sizes of an encoder; all but `max_distance` and `eps` follow from the tensor shapes.
#[derive(Debug, Clone, PartialEq)]
pub struct Umt5Config {
    pub vocab: usize,
    pub dim: usize,
    pub dim_attn: usize,
    pub dim_ffn: usize,
    pub heads: usize,
    pub layers: usize,
    /// Buckets of the relative position table, both directions together.
    pub buckets: usize,
    /// Distance from which all keys share the last bucket.
    pub max_distance: usize,
    pub eps: f64,
    /// One table for all layers (T5 v1.1) instead of one per layer (umT5).
    pub shared_bias: bool,
}

impl Umt5Config {
    /// umT5-XXL, the encoder of every Wan model.
    pub fn xxl() -> Self {
        Umt5Config {
            vocab: 256_384,
            dim: 4096,
            dim_attn: 4096,
            dim_ffn: 10_240,
            heads: 64,
            layers: 24,
            buckets: 32,
            max_distance: 128,
            eps: 1e-6,
            shared_bias: false,
        }
    }

    /// Reads the sizes off the shapes of the official tensors, and checks that they agree in every layer.
    pub fn from_shapes(source: &dyn WeightSource) -> Result<Self> {
        let matrix = |key: &str| -> Result<(usize, usize)> {
            match source.shape(key).as_deref() {
                Some([rows, cols]) => Ok((*rows, *cols)),
                Some(other) => {
                    Err(Error::Invalid { model: MODEL, what: format!("{key} has shape {other:?}, expected two axes") })
                }
                None => Err(Error::MissingWeight { model: MODEL, key: key.to_string() }),
            }
        };
        let (vocab, dim) = matrix("token_embedding.weight")?;
        let layers = (0..).take_while(|i| source.shape(&format!("blocks.{i}.attn.q.weight")).is_some()).count();
        let (dim_attn, _) = matrix("blocks.0.attn.q.weight")?;
        let (dim_ffn, _) = matrix("blocks.0.ffn.fc1.weight")?;
        let shared_bias = source.shape("blocks.0.pos_embedding.embedding.weight").is_none();
        let (buckets, heads) = matrix(&keys::bias_key(0, shared_bias))?;
        let config = Umt5Config {
            vocab,
            dim,
            dim_attn,
            dim_ffn,
            heads,
            layers,
            buckets,
            max_distance: 128,
            eps: 1e-6,
            shared_bias,
        };
        config.check(source)?;
        Ok(config)
    }

    /// Every official tensor with the shape it must have, in the order in which the encoder reads them.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (d, a, f) = (self.dim, self.dim_attn, self.dim_ffn);
        let table = vec![self.buckets, self.heads];
        let mut all = vec![("token_embedding.weight".to_string(), vec![self.vocab, d])];
        if self.shared_bias {
            all.push((keys::bias_key(0, true), table.clone()));
        }
        for i in 0..self.layers {
            let mut layer = |name: &str, shape: Vec<usize>| all.push((format!("blocks.{i}.{name}.weight"), shape));
            layer("norm1", vec![d]);
            for matrix in ["attn.q", "attn.k", "attn.v"] {
                layer(matrix, vec![a, d]);
            }
            layer("attn.o", vec![d, a]);
            if !self.shared_bias {
                layer("pos_embedding.embedding", table.clone());
            }
            layer("norm2", vec![d]);
            layer("ffn.gate.0", vec![f, d]);
            layer("ffn.fc1", vec![f, d]);
            layer("ffn.fc2", vec![d, f]);
        }
        all.push(("norm.weight".to_string(), vec![d]));
        all
    }

    /// Compares every shape of `source` with these sizes, before anything is read.
    pub fn check(&self, source: &dyn WeightSource) -> Result<()> {
        if self.heads == 0 || !self.dim_attn.is_multiple_of(self.heads) {
            return Err(Error::Invalid {
                model: MODEL,
                what: format!("attention width {} does not split into {} heads", self.dim_attn, self.heads),
            });
        }
        for (key, want) in self.tensors() {
            match source.shape(&key) {
                Some(got) if got == want => {}
                Some(got) => return Err(Error::WeightShape { model: MODEL, key, got, want }),
                None => return Err(Error::MissingWeight { model: MODEL, key }),
            }
        }
        Ok(())
    }
}

/// How the matrices of the layers are held; norms, biases and embeddings keep the file's dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Storage {
    /// In the file's dtype, widened or narrowed to the compute dtype matrix by matrix when used.
    #[default]
    AsStored,
    /// e4m3 with a scale for every 64 inputs of an output.
    Fp8,
    /// e4m3 by plain cast, without a scale, norms and embeddings rounded through e4m3 as well: what the old tool's
    /// `--fp8_t5` does.
    Fp8Cast,
}

/// Where the layers' weights are between two calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Residence {
    /// Where they are computed with.
    #[default]
    Resident,
    /// In host memory; each is copied to the card while the layer before it computes. Without a card as `Resident`.
    Host,
    /// Nowhere: each layer is read from the source when it is needed, and dropped after.
    Source,
}

/// How an encoder runs.
#[derive(Clone)]
pub struct Umt5Options {
    /// Where and in which dtype: F32 is the definition; BF16 is what the old tool caches with.
    pub exec: Exec,
    pub storage: Storage,
    pub residence: Residence,
}

impl Default for Umt5Options {
    fn default() -> Self {
        Umt5Options { exec: Exec::cpu(), storage: Storage::AsStored, residence: Residence::Resident }
    }
}
