//! Launches of `round.cu`, and of `forward.cu` or `forward_sm90a.cu`.

use candle_core::{DType, Tensor};

use super::{FastAttention, HEAD, TILE};
use crate::attention::{AttentionArgs, AttentionOut};
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::common::tensor_map::tensor_map;
use crate::{Op, Result};

const ROUND: &str = "fast_attention/round";
/// Codes of a tile.
const TILE_BYTES: u32 = (TILE * HEAD) as u32;
/// Of `forward_sm90a.cu`: codes of Q, in a place that O fits, four stages of K and V with their scales, barriers, and up to
/// the first multiple of 1024. Of `forward.cu`: codes of Q, 64 keys of K and of 16-bit V.
const HOPPER_SHARED: u32 = 2 * TILE_BYTES + 2 * 4 * TILE_BYTES + 4 * 16 + 256 + 1024;
const SHARED: u32 = TILE_BYTES + TILE_BYTES / 2 + TILE_BYTES;
/// Query rows of a box of O.
const BOX_ROWS: usize = 64;

/// Whether the kernels take these arguments here.
pub(super) fn fits(gpu: &Gpu, q_blnh: &Tensor) -> bool {
    let sixteen_bit = matches!(q_blnh.dtype(), DType::BF16 | DType::F16);
    sixteen_bit && q_blnh.dims()[3] == HEAD && gpu.card().capability >= (8, 0)
}

pub(super) fn forward(gpu: &Gpu, a: &AttentionArgs<'_>) -> Result<AttentionOut> {
    const OP: &str = FastAttention::NAME;
    let ((b, l, n, h), m) = (a.q_blnh.dims4()?, a.k_bmnh.dims()[1]);
    let [q, k, v] = [View::new(OP, a.q_blnh)?, View::new(OP, a.k_bmnh)?, View::new(OP, a.v_bmnh)?];
    let at = |t: &Tensor| -> Result<u64> { Ok(View::new(OP, t)?.address) };
    let hopper = gpu.hopper();
    let [q_tiles, kv_tiles] = [l.div_ceil(TILE), m.div_ceil(TILE)];

    let codes = |tiles: usize| gpu.empty((b, n, tiles, TILE, HEAD), DType::U8);
    let (q_codes, k_codes) = (codes(q_tiles)?, codes(kv_tiles)?);
    let q_scales = gpu.empty((b, n, q_tiles), DType::F32)?;
    // The scales of a tile's keys and values, 16 bytes a tile, as copies bring them.
    let kv_scales = gpu.empty((b, n, kv_tiles, 4), DType::F32)?;
    let (mean, shift) = (gpu.empty((b, n, HEAD), DType::F32)?, gpu.empty((b, n, l), DType::F32)?);
    let (o_blnh, lse_bnl) = (gpu.empty(a.q_blnh.shape(), a.q_blnh.dtype())?, gpu.empty((b, n, l), DType::F32)?);

    let args = [Arg::tensor(&k), Arg::ptr(at(&mean)?), Arg::i32(m), Arg::i32(n)];
    gpu.launch(ROUND, "fast_attention_mean", Launch::blocks((n, b, 1), 1024), &args)?;
    let rows = |x: &View, codes: &Tensor, [scales, stride, shift]: [u64; 3], l: usize| {
        let args = [
            Arg::tensor(x),
            Arg::ptr(at(&mean)?),
            Arg::ptr(at(codes)?),
            Arg::ptr(scales),
            Arg::i32(stride as usize),
            Arg::ptr(shift),
            Arg::i32(l),
            Arg::i32(n),
        ];
        gpu.launch(ROUND, "fast_attention_rows", Launch::blocks((l.div_ceil(TILE), n, b), 512), &args)
    };
    rows(&q, &q_codes, [at(&q_scales)?, 1, at(&shift)?], l)?;
    rows(&k, &k_codes, [at(&kv_scales)?, 4, 0], m)?;
    let v_codes = hopper.then(|| codes(kv_tiles)).transpose()?;
    if let Some(codes) = &v_codes {
        let scales = Arg::ptr(at(&kv_scales)? + 4);
        let args = [Arg::tensor(&v), Arg::ptr(at(codes)?), scales, Arg::i32(4), Arg::i32(m), Arg::i32(n)];
        gpu.launch(ROUND, "fast_attention_values", Launch::blocks((kv_tiles.div_ceil(2), n, b), 1024), &args)?;
    }

    let values = v_codes.as_ref().map_or(Ok(v.address), at)?;
    let out = match hopper {
        true => tensor_map(OP, &View::new(OP, &o_blnh)?, [b, l, n, h], BOX_ROWS)?,
        false => Arg::ptr(at(&o_blnh)?),
    };
    let args = [
        Arg::ptr(at(&q_codes)?),
        Arg::ptr(at(&k_codes)?),
        Arg::ptr(values),
        Arg::ptr(at(&q_scales)?),
        Arg::ptr(at(&kv_scales)?),
        Arg::ptr(at(&shift)?),
        out,
        Arg::ptr(at(&lse_bnl)?),
        Arg::i32(l),
        Arg::i32(m),
        Arg::i32(n),
        Arg::f32(1.0 / (HEAD as f32).sqrt()),
    ];
    let dtype = if a.q_blnh.dtype() == DType::BF16 { "bf16" } else { "f16" };
    let (file, name, threads, shared) = match hopper {
        true => ("fast_attention/forward_sm90a", format!("fast_attention_hopper_{dtype}"), 384, HOPPER_SHARED),
        false => ("fast_attention/forward", format!("fast_attention_{dtype}"), 128, SHARED),
    };
    let launch = Launch { shared: shared as usize, ..Launch::blocks((q_tiles, n, b), threads) };
    gpu.launch(file, &name, launch, &args)?;
    Ok(AttentionOut { o_blnh, lse_bnl })
}
