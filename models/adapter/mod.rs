//! Adapters: LoRA, LoHa, LoKr. Each is a forward/backward pair beside the frozen linear, never wrapped around it,
//! so a block whose weights are swapped moves no trainable tensor.

use std::collections::{BTreeMap, HashMap};

use candle_core::Tensor;
use wan_kernels::Exec;

use crate::{Error, Result};

mod active;
mod delta;
mod lora;
mod spec;

pub use active::{Active, Dx};
pub use delta::WeightDelta;
pub use spec::{factorization, AdapterSpec, Init, Kind, Layout, ParamSpec};

/// The trainable parameters of one site as plain tensors: fp32 masters, or views of them in the compute dtype.
#[derive(Debug, Clone)]
pub enum Adapter {
    Lora(Lora),
    Loha(Loha),
    Lokr(Lokr),
}

/// `Δy = scale · up(down(x))`.
#[derive(Debug, Clone)]
pub struct Lora {
    /// `[r, i]`
    pub down: Tensor,
    /// `[o, r]`
    pub up: Tensor,
    /// alpha / r, times the multiplier.
    pub scale: f64,
}

/// `ΔW = scale · (w1_a w1_b) ⊙ (w2_a w2_b)`.
#[derive(Debug, Clone)]
pub struct Loha {
    /// `[o, r]`
    pub w1_a: Tensor,
    /// `[r, i]`
    pub w1_b: Tensor,
    /// `[o, r]`
    pub w2_a: Tensor,
    /// `[r, i]`
    pub w2_b: Tensor,
    pub scale: f64,
}

/// `ΔW = scale · w1 ⊗ w2` with w1 `[o1, i1]` and w2 `[o2, i2]`, o = o1·o2, i = i1·i2.
#[derive(Debug, Clone)]
pub struct Lokr {
    /// `[o1, i1]`
    pub w1: Tensor,
    pub w2: LokrW2,
    pub scale: f64,
}

/// The large factor of LoKr: whole, or a product of low rank.
#[derive(Debug, Clone)]
pub enum LokrW2 {
    /// `[o2, i2]`
    Full(Tensor),
    /// `a` `[o2, r]`, `b` `[r, i2]`
    LowRank { a: Tensor, b: Tensor },
}

impl Adapter {
    /// Parameter names (suffixes of the site) and tensors, in the order in which they are created and saved.
    pub fn params(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Adapter::Lora(a) => vec![("lora_down.weight", &a.down), ("lora_up.weight", &a.up)],
            Adapter::Loha(a) => {
                vec![("hada_w1_a", &a.w1_a), ("hada_w1_b", &a.w1_b), ("hada_w2_a", &a.w2_a), ("hada_w2_b", &a.w2_b)]
            }
            Adapter::Lokr(a) => match &a.w2 {
                LokrW2::Full(w2) => vec![("lokr_w1", &a.w1), ("lokr_w2", w2)],
                LokrW2::LowRank { a: w2_a, b: w2_b } => {
                    vec![("lokr_w1", &a.w1), ("lokr_w2_a", w2_a), ("lokr_w2_b", w2_b)]
                }
            },
        }
    }

    /// Builds the adapter whose parameters are given by name; which kind it is follows from the names present.
    /// `scale` is alpha / rank times the multiplier (1 for a LoKr with a full w2).
    pub fn from_params(get: &mut dyn FnMut(&'static str) -> Option<Tensor>, scale: f64) -> Result<Self> {
        let mut need = |name: &'static str| {
            get(name).ok_or_else(|| Error::MissingWeight { model: "adapter", key: name.to_string() })
        };
        if let Ok(down) = need("lora_down.weight") {
            return Ok(Adapter::Lora(Lora { down, up: need("lora_up.weight")?, scale }));
        }
        if let Ok(w1_a) = need("hada_w1_a") {
            let (w1_b, w2_a, w2_b) = (need("hada_w1_b")?, need("hada_w2_a")?, need("hada_w2_b")?);
            return Ok(Adapter::Loha(Loha { w1_a, w1_b, w2_a, w2_b, scale }));
        }
        let w1 = need("lokr_w1")?;
        let w2 = match need("lokr_w2") {
            Ok(w2) => LokrW2::Full(w2),
            Err(_) => LokrW2::LowRank { a: need("lokr_w2_a")?, b: need("lokr_w2_b")? },
        };
        Ok(Adapter::Lokr(Lokr { w1, w2, scale }))
    }
}

/// What dropout does to one site in one step. The masks hold factors (0, or the rescale of the kept ones), drawn by
/// the caller from a generator keyed by (seed, step, site): forward, recompute and backward ask again and must get
/// the same.
#[derive(Debug, Clone, Default)]
pub struct Dropout {
    /// Module dropout: the site is the bare frozen linear in this step.
    pub skip: bool,
    /// LoRA only: factor on `down(x)`, `[B, L, r]` (0 or 1/(1-p)).
    pub neuron: Option<Tensor>,
    /// LoRA: factor on `down(x)`, `[B, 1, r]` (0 or 1/(1-p)). LoHa and LoKr: factor per output row of ΔW, `[o]`.
    pub rank: Option<Tensor>,
}

/// Where and how an adapter works in this step.
pub struct At<'a> {
    pub exec: &'a Exec,
    /// Module name, for the gradient sink.
    pub site: &'a str,
    pub dropout: &'a Dropout,
}

/// Looks adapters up by module name (`blocks.0.self_attn.q`).
pub trait Adapters {
    fn get(&self, site: &str) -> Option<&Adapter>;

    /// Whether dropout draws for every row of an input by itself: rows that are equal then need not stay so.
    fn draws_by_row(&self) -> bool {
        false
    }

    /// The dropout of this site in this step, for an input of `batch` x `rows` vectors. Pure within a step.
    fn dropout(&self, _site: &str, _batch: usize, _rows: usize) -> Result<Dropout> {
        Ok(Dropout::default())
    }
}

/// The bare base model.
pub struct NoAdapters;

impl Adapters for NoAdapters {
    fn get(&self, _site: &str) -> Option<&Adapter> {
        None
    }
}

impl Adapters for HashMap<String, Adapter> {
    fn get(&self, site: &str) -> Option<&Adapter> {
        HashMap::get(self, site)
    }
}

impl Adapters for BTreeMap<String, Adapter> {
    fn get(&self, site: &str) -> Option<&Adapter> {
        BTreeMap::get(self, site)
    }
}
