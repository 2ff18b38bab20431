//! Launches of the flash kernels for Hopper alone, see `forward_sm90a.cu` and `backward_sm90a.cu`. Same results as the
//! portable ones up to rounding; deterministic like them.

use candle_core::{DType, Tensor};

use super::cuda::suffix;
use super::tile::{self, hopper as tiles};
use super::{Attention, AttentionArgs, AttentionBackward, AttentionBackwardArgs, AttentionGrads, AttentionOut};
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::common::tensor_map::tensor_map;
use crate::linear::cuda::cast;
use crate::{Op, Result};

/// Whether these kernels run here and take heads of this width.
pub(super) fn fits(gpu: &Gpu, q_blnh: &Tensor) -> bool {
    gpu.hopper() && q_blnh.dims()[3] == tiles::HEAD
}

pub(super) fn forward(gpu: &Gpu, a: &AttentionArgs<'_>) -> Result<AttentionOut> {
    const OP: &str = Attention::NAME;
    let ((b, l, n, h), m) = (a.q_blnh.dims4()?, a.k_bmnh.dims()[1]);
    let o_blnh = gpu.empty(a.q_blnh.shape(), a.q_blnh.dtype())?;
    let lse_bnl = gpu.empty((b, n, l), DType::F32)?;
    let tile = tiles::FORWARD;
    let [q, k, v] = [View::new(OP, a.q_blnh)?, View::new(OP, a.k_bmnh)?, View::new(OP, a.v_bmnh)?];
    let args = [
        tensor_map(OP, &q, [b, l, n, h], tiles::WARPGROUP_ROWS)?,
        tensor_map(OP, &k, [b, m, n, h], tile.keys)?,
        tensor_map(OP, &v, [b, m, n, h], tile.keys)?,
        tensor_map(OP, &View::new(OP, &o_blnh)?, [b, l, n, h], tiles::WARPGROUP_ROWS)?,
        Arg::ptr(View::new(OP, &lse_bnl)?.address),
        Arg::i32(l),
        Arg::i32(m),
        Arg::i32(n),
        Arg::f32(super::scale(h) as f32),
        Arg::f32(super::lift(a.last_stands_for, h)),
    ];
    let name = format!("attention_fwd_hopper_{}", suffix(a.q_blnh.dtype()));
    let launch = Launch { shared: tile.shared, ..Launch::blocks((l.div_ceil(tile.rows), n, b), tiles::THREADS) };
    gpu.launch("attention/forward_sm90a", &name, launch, &args)?;
    Ok(AttentionOut { o_blnh, lse_bnl })
}

pub(super) fn backward(gpu: &Gpu, a: &AttentionBackwardArgs<'_>) -> Result<AttentionGrads> {
    const OP: &str = AttentionBackward::NAME;
    const FILE: &str = "attention/backward_sm90a";
    let ((b, l, n, h), m) = (a.q_blnh.dims4()?, a.k_bmnh.dims()[1]);
    let dtype = a.q_blnh.dtype();
    let tile = tiles::BACKWARD;
    let count = l.div_ceil(tile.rows);
    let scale = Arg::f32(super::scale(h) as f32);

    // Log-sum-exp and delta of a tile's rows side by side: one copy brings both.
    let rows = gpu.empty((b, n, count, 2 * tile.rows), DType::F32)?;
    let turns = gpu.empty((b, n, count), DType::U32)?;
    let dq_sum = gpu.empty((b, n, count, tile.rows * h), DType::F32)?;
    let dq_blnh = gpu.empty(a.q_blnh.shape(), dtype)?;
    let dk_bmnh = gpu.empty(a.k_bmnh.shape(), dtype)?;
    let dv_bmnh = gpu.empty(a.v_bmnh.shape(), dtype)?;
    let at = |t: &Tensor| -> Result<Arg> { Ok(Arg::ptr(View::new(OP, t)?.address)) };
    let [q, k, v] = [View::new(OP, a.q_blnh)?, View::new(OP, a.k_bmnh)?, View::new(OP, a.v_bmnh)?];
    let o = View::new(OP, &cast(gpu, OP, a.o_blnh, dtype)?)?;
    let d_o = View::new(OP, &cast(gpu, OP, a.do_blnh, dtype)?)?;
    let lse = View::new(OP, a.lse_bnl)?;

    let args = [
        Arg::ptr(o.address),
        Arg::ptr(d_o.address),
        Arg::ptr(lse.address),
        at(&rows)?,
        at(&turns)?,
        Arg::i32(l),
        Arg::i32(n),
        Arg::i32(b),
    ];
    let name = |part: &str| format!("attention_{part}_hopper_{}", suffix(dtype));
    gpu.launch(FILE, &name("rows"), Launch::over(b * count * tile.rows * n * 32, 1), &args)?;

    let processors = gpu.card().processors;
    let group = tiles::HEAD_GROUP.min(n);
    let splits = tile::splits(b * n * m.div_ceil(tile.keys), count, processors);
    let parts = match splits {
        1 => None,
        _ => Some(gpu.empty((2, splits, a.k_bmnh.elem_count()), DType::F32)?),
    };
    let args = [
        tensor_map(OP, &q, [b, l, n, h], tile.rows)?,
        tensor_map(OP, &k, [b, m, n, h], tile.keys)?,
        tensor_map(OP, &v, [b, m, n, h], tile.keys)?,
        tensor_map(OP, &d_o, [b, l, n, h], tile.rows)?,
        at(&rows)?,
        at(&dq_sum)?,
        at(&turns)?,
        at(&dk_bmnh)?,
        at(&dv_bmnh)?,
        parts.as_ref().map_or(Ok(Arg::ptr(0)), at)?,
        Arg::i32(l),
        Arg::i32(m),
        Arg::i32(n),
        scale,
        Arg::i32(group),
        Arg::f32(a.last_stands_for as f32),
    ];
    let blocks = n.div_ceil(group) * group * m.div_ceil(tile.keys);
    let launch = Launch { shared: tile.shared, ..Launch::blocks((blocks, b, splits), tiles::THREADS) };
    gpu.launch(FILE, &name("bwd"), launch, &args)?;

    if let Some(parts) = &parts {
        let size = a.k_bmnh.elem_count();
        let args = [at(parts)?, at(&dk_bmnh)?, at(&dv_bmnh)?, Arg::i64(size), Arg::i32(splits)];
        let name = format!("attention_keys_{}", suffix(dtype));
        gpu.launch("attention/backward", &name, Launch::over(size, 4), &args)?;
    }
    let args = [at(&dq_sum)?, at(&dq_blnh)?, Arg::i32(l), Arg::i32(n), scale];
    gpu.launch(FILE, &name("dq"), Launch::blocks((count, n, b), 128), &args)?;
    Ok(AttentionGrads { dq_blnh, dk_bmnh, dv_bmnh })
}
