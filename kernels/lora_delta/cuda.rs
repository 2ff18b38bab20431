//! The same sums on the card, see `lora_delta.cu`.

use candle_core::{DType, Tensor};

use super::NAME;
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::Result;

/// Rows and columns of a block of threads.
const TILE: usize = 64;

pub(super) fn delta(gpu: &Gpu, up_or: &Tensor, down_ri: &Tensor) -> Result<Tensor> {
    let ((o, r), (_, i)) = (up_or.dims2()?, down_ri.dims2()?);
    let delta_oi = gpu.empty((o, i), DType::F32)?;
    // Views may be copies: they are held until the kernel is issued.
    let (up, down, out) = (View::new(NAME, up_or)?, View::new(NAME, down_ri)?, View::new(NAME, &delta_oi)?);
    let [up, down, out] = [&up, &down, &out].map(|view| Arg::ptr(view.address));
    // Columns first: the grid's other axes end at 65535.
    let grid = Launch::blocks((i.div_ceil(TILE), o.div_ceil(TILE), 1), 256);
    gpu.launch("lora_delta/lora_delta", "lora_delta", grid, &[up, down, out, Arg::i32(o), Arg::i32(r), Arg::i32(i)])?;
    Ok(delta_oi)
}
