//! Launches of the flash kernels that every card runs, see `forward.cu` and `backward.cu`, and the choice between them and
//! Hopper's own.

use candle_core::{DType, Tensor};

use super::{
    hopper, tile, Attention, AttentionArgs, AttentionBackward, AttentionBackwardArgs, AttentionGrads, AttentionOut,
};
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::linear::cuda::cast;
use crate::{Op, Result};

/// Whether the kernels take these arguments; other dtypes and head widths go the plain way.
pub(super) fn fits(q_blnh: &Tensor) -> bool {
    matches!(q_blnh.dtype(), DType::BF16 | DType::F16) && tile::supported(q_blnh.dims()[3])
}

pub(super) fn suffix(dtype: DType) -> &'static str {
    if dtype == DType::BF16 {
        "bf16"
    } else {
        "f16"
    }
}

pub(super) fn forward(gpu: &Gpu, a: &AttentionArgs<'_>) -> Result<AttentionOut> {
    if hopper::fits(gpu, a.q_blnh) {
        return hopper::forward(gpu, a);
    }
    const OP: &str = Attention::NAME;
    let ((b, l, n, h), m) = (a.q_blnh.dims4()?, a.k_bmnh.dims()[1]);
    let o_blnh = gpu.empty(a.q_blnh.shape(), a.q_blnh.dtype())?;
    let lse_bnl = gpu.empty((b, n, l), DType::F32)?;
    let tile = tile::forward(h, gpu.shared_bytes());
    let views = [View::new(OP, a.q_blnh)?, View::new(OP, a.k_bmnh)?, View::new(OP, a.v_bmnh)?];
    let args = [
        Arg::ptr(views[0].address),
        Arg::ptr(views[1].address),
        Arg::ptr(views[2].address),
        Arg::ptr(View::new(OP, &o_blnh)?.address),
        Arg::ptr(View::new(OP, &lse_bnl)?.address),
        Arg::i32(l),
        Arg::i32(m),
        Arg::i32(n),
        Arg::f32(super::scale(h) as f32),
        Arg::f32(super::lift(a.last_stands_for, h)),
    ];
    let name = format!("attention_fwd_{}_{h}_{}x{}", suffix(a.q_blnh.dtype()), tile.rows, tile.keys);
    let launch = Launch { shared: tile.shared, ..Launch::blocks((l.div_ceil(tile.rows), n, b), 128) };
    gpu.launch("attention/forward", &name, launch, &args)?;
    Ok(AttentionOut { o_blnh, lse_bnl })
}

pub(super) fn backward(gpu: &Gpu, a: &AttentionBackwardArgs<'_>) -> Result<AttentionGrads> {
    if hopper::fits(gpu, a.q_blnh) {
        return hopper::backward(gpu, a);
    }
    const OP: &str = AttentionBackward::NAME;
    const FILE: &str = "attention/backward";
    let ((b, l, n, h), m) = (a.q_blnh.dims4()?, a.k_bmnh.dims()[1]);
    let dtype = a.q_blnh.dtype();
    let tile = tile::backward(h, gpu.shared_bytes());
    let (tiles, key_blocks, processors) = (l.div_ceil(tile.rows), m.div_ceil(tile.keys), gpu.card().processors);
    let splits = tile::splits(b * n * key_blocks, tiles, processors);
    let held = if tile.v_held { "v" } else { "" };
    let variant = format!("{}_{h}_{}x{}{held}", suffix(dtype), tile.rows, tile.keys);
    let scale = Arg::f32(super::scale(h) as f32);

    // Log-sum-exp and delta of a tile's rows side by side; how many tiles each block has added to dq.
    let rows = gpu.empty((b, n, tiles, 2 * tile.rows), DType::F32)?;
    let turns = gpu.empty((b, n, splits, key_blocks), DType::U32)?;
    let parts = match splits {
        1 => None,
        _ => Some(gpu.empty((2, splits, a.k_bmnh.elem_count()), DType::F32)?),
    };
    let dq_sum = gpu.empty((b, n, tiles, tile.rows * h), DType::F32)?;
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
        Arg::i32(turns.elem_count()),
        Arg::i32(l),
        Arg::i32(n),
        Arg::i32(b),
    ];
    let threads = (b * tiles * tile.rows * n * 32).max(turns.elem_count());
    gpu.launch(FILE, &format!("attention_rows_{variant}"), Launch::over(threads, 1), &args)?;

    let group = tile::head_group(n, m, processors);
    let args = [
        Arg::ptr(q.address),
        Arg::ptr(k.address),
        Arg::ptr(v.address),
        Arg::ptr(d_o.address),
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
    let blocks = n.div_ceil(group) * group * key_blocks;
    let launch = Launch { shared: tile.shared, ..Launch::blocks((blocks, b, splits), 256) };
    let repeated = if a.last_stands_for > 1 { "r" } else { "" };
    gpu.launch(FILE, &format!("attention_bwd_{variant}{repeated}"), launch, &args)?;

    if let Some(parts) = &parts {
        let size = a.k_bmnh.elem_count();
        let args = [at(parts)?, at(&dk_bmnh)?, at(&dv_bmnh)?, Arg::i64(size), Arg::i32(splits)];
        let name = format!("attention_keys_{}", suffix(dtype));
        gpu.launch(FILE, &name, Launch::over(size, 4), &args)?;
    }
    let args = [at(&dq_sum)?, at(&dq_blnh)?, Arg::i32(l), Arg::i32(n), scale];
    gpu.launch(FILE, &format!("attention_dq_{variant}"), Launch::blocks((tiles, n, b), 256), &args)?;
    Ok(AttentionGrads { dq_blnh, dk_bmnh, dv_bmnh })
}
