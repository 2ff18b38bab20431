//! The Wan DiT: explicit forward and backward, no tape. A block owns no weights; whoever has them lends them.

use candle_core::Tensor;

use crate::Result;

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
