//! The whole model: embeddings, blocks, head, and the way back.

use candle_core::Tensor;
use wan_kernels::Exec;

use super::{GradSink, Numerics, SavePlan, Tap, WanInputs, WanWeights, WeightProvider};
use crate::adapter::Adapters;
use crate::arch::WanArch;
use crate::{Error, Result};

/// The DiT without its blocks' weights, which are lent block by block.
pub struct WanModel {
    arch: WanArch,
    weights: WanWeights,
    numerics: Numerics,
}

/// What backward needs of one forward pass.
pub struct Saved {
    _private: (),
}

impl WanModel {
    pub fn new(arch: WanArch, weights: WanWeights, numerics: Numerics) -> Result<Self> {
        arch.validate()?;
        Ok(Self { arch, weights, numerics })
    }

    pub fn arch(&self) -> &WanArch {
        &self.arch
    }

    pub fn numerics(&self) -> &Numerics {
        &self.numerics
    }

    pub fn weights(&self) -> &WanWeights {
        &self.weights
    }

    /// The prediction alone, `[B, C, F, H, W]` fp32. `tap` sees every activation on the way.
    pub fn predict(
        &self,
        _exec: &Exec,
        _inputs: &WanInputs,
        _adapters: &dyn Adapters,
        _blocks: &dyn WeightProvider,
        _tap: Option<Tap>,
    ) -> Result<Tensor> {
        Err(unfinished())
    }

    /// Prediction `[B, C, F, H, W]` fp32 and what backward needs.
    pub fn forward(
        &self,
        _exec: &Exec,
        _inputs: &WanInputs,
        _adapters: &dyn Adapters,
        _blocks: &dyn WeightProvider,
        _plan: &SavePlan,
    ) -> Result<(Tensor, Saved)> {
        Err(unfinished())
    }

    /// From the gradient of the prediction to the gradients of all adapters, handed to `sink` as they come up.
    pub fn backward(
        &self,
        _exec: &Exec,
        _adapters: &dyn Adapters,
        _blocks: &dyn WeightProvider,
        _saved: Saved,
        _dpred: &Tensor,
        _sink: &mut dyn GradSink,
    ) -> Result<()> {
        Err(unfinished())
    }
}

fn unfinished() -> Error {
    Error::Invalid { model: "wan", what: "this pass is not built yet".to_string() }
}
