//! Scaled dot-product attention over heads, forward and backward, without a mask.
//!
//! `o = softmax(q·kᵀ / √h)·v`. Self-attention has `m = l`; cross-attention has any `m` (text rows beyond the prompt are
//! attended to, as the model was trained). Where a context ends in equal rows, as a padded prompt does, one key stands for all
//! of them: it counts that often in the softmax, which is the same sum with fewer terms. The backward is the flash formulation: probabilities are recomputed from
//! `lse`, the row-wise log-sum-exp of the scaled scores, and `delta = rowsum(do ∘ o)` replaces the softmax Jacobian.
//! Every gradient is written (`=`), none is accumulated. Softmax is fp32 whatever `compute` is.

use candle_core::{DType, Tensor, D};

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, num, Cost, Error, Op, Result};

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod hopper;
pub mod tile;

/// A score tile above this many bytes is split: first over heads, then over query rows.
/// Tiling heads changes no bit; tiling rows changes the order in which dk and dv are summed.
const TILE_BYTES: usize = 256 << 20;

/// Attention forward.
pub struct Attention;

/// `q_blnh` [b, l, n, h], `k_bmnh` and `v_bmnh` [b, m, n, h]; one dtype for all three.
pub struct AttentionArgs<'a> {
    pub q_blnh: &'a Tensor,
    pub k_bmnh: &'a Tensor,
    pub v_bmnh: &'a Tensor,
    /// How many equal keys and values the last one stands for; 1 where it is one like the others.
    pub last_stands_for: usize,
}

pub struct AttentionOut {
    /// [b, l, n, h] in the dtype of `q`.
    pub o_blnh: Tensor,
    /// Natural log of the sum of exponentials of a row of scaled scores: [b, n, l], F32.
    pub lse_bnl: Tensor,
}

/// Attention backward.
pub struct AttentionBackward;

/// The forward's arguments, its two results, and `do_blnh` [b, l, n, h], the gradient of `o`. Gradients of a last key and
/// value that stand for several are the sums of theirs.
pub struct AttentionBackwardArgs<'a> {
    pub q_blnh: &'a Tensor,
    pub k_bmnh: &'a Tensor,
    pub v_bmnh: &'a Tensor,
    pub o_blnh: &'a Tensor,
    pub lse_bnl: &'a Tensor,
    pub do_blnh: &'a Tensor,
    pub last_stands_for: usize,
}

/// Gradients in the shapes and dtypes of `q`, `k`, `v`.
pub struct AttentionGrads {
    pub dq_blnh: Tensor,
    pub dk_bmnh: Tensor,
    pub dv_bmnh: Tensor,
}

impl Op for Attention {
    type Args<'a> = AttentionArgs<'a>;
    type Out = AttentionOut;
    const NAME: &'static str = "attention";

    fn check(a: &AttentionArgs<'_>) -> Result<()> {
        check_qkv(Self::NAME, a.q_blnh, a.k_bmnh, a.v_bmnh, a.last_stands_for)
    }

    fn cost(a: &AttentionArgs<'_>) -> Cost {
        // Two products of 2·l·m·h flops a head.
        let flops = 2.0 * score_flops(a.q_blnh, a.k_bmnh);
        let lse_bytes = (a.q_blnh.elem_count() / a.q_blnh.dims()[3] * 4) as f64;
        let bytes = 2.0 * gate::bytes(a.q_blnh) + gate::bytes(a.k_bmnh) + gate::bytes(a.v_bmnh) + lse_bytes;
        Cost { flops, bytes }
    }

    fn reference(a: &AttentionArgs<'_>, compute: DType) -> Result<AttentionOut> {
        forward(a, compute, TILE_BYTES)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &AttentionArgs<'_>, gpu: &Gpu, compute: DType) -> Result<AttentionOut> {
        if !cuda::fits(a.q_blnh) {
            return Self::reference(a, compute);
        }
        cuda::forward(gpu, a)
    }
}

impl Op for AttentionBackward {
    type Args<'a> = AttentionBackwardArgs<'a>;
    type Out = AttentionGrads;
    const NAME: &'static str = "attention_backward";

    fn check(a: &AttentionBackwardArgs<'_>) -> Result<()> {
        check_qkv(Self::NAME, a.q_blnh, a.k_bmnh, a.v_bmnh, a.last_stands_for)?;
        let q = a.q_blnh.dims();
        gate::float(Self::NAME, "o_blnh", a.o_blnh)?;
        gate::float(Self::NAME, "do_blnh", a.do_blnh)?;
        gate::dtype(Self::NAME, "lse_bnl", a.lse_bnl, DType::F32)?;
        gate::shape(Self::NAME, "o_blnh", a.o_blnh, q, "[b, l, n, h]")?;
        gate::shape(Self::NAME, "do_blnh", a.do_blnh, q, "[b, l, n, h]")?;
        gate::shape(Self::NAME, "lse_bnl", a.lse_bnl, &[q[0], q[2], q[1]], "[b, n, l]")
    }

    fn cost(a: &AttentionBackwardArgs<'_>) -> Cost {
        // Scores again, then dp, dv, dq, dk.
        let flops = 5.0 * score_flops(a.q_blnh, a.k_bmnh);
        let bytes = 4.0 * gate::bytes(a.q_blnh)
            + 2.0 * (gate::bytes(a.k_bmnh) + gate::bytes(a.v_bmnh))
            + gate::bytes(a.lse_bnl);
        Cost { flops, bytes }
    }

    fn reference(a: &AttentionBackwardArgs<'_>, compute: DType) -> Result<AttentionGrads> {
        backward(a, compute, TILE_BYTES)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &AttentionBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<AttentionGrads> {
        if !cuda::fits(a.q_blnh) {
            return Self::reference(a, compute);
        }
        cuda::backward(gpu, a)
    }
}

fn forward(a: &AttentionArgs<'_>, compute: DType, tile_bytes: usize) -> Result<AttentionOut> {
    let (b, l, n, _) = a.q_blnh.dims4()?;
    let (q_glh, k_gmh, v_gmh) = (heads_first(a.q_blnh)?, heads_first(a.k_bmnh)?, heads_first(a.v_bmnh)?);
    let (mut o, mut lse) = (vec![], vec![]);
    for group in groups(b * n, l, k_gmh.dim(1)?, tile_bytes) {
        let k_gmh = k_gmh.narrow(0, group.head, group.heads)?;
        let v_gmh = v_gmh.narrow(0, group.head, group.heads)?;
        let (mut o_rows, mut lse_rows) = (vec![], vec![]);
        for (row, rows) in group.rows {
            let q_grh = q_glh.narrow(0, group.head, group.heads)?.narrow(1, row, rows)?;
            let s_grm = scores(&q_grh, &k_gmh, a.last_stands_for, compute)?;
            // The row maximum cancels out of o, so the tape need not follow it.
            let max_gr1 = s_grm.max_keepdim(D::Minus1)?.detach();
            let e_grm = s_grm.broadcast_sub(&max_gr1)?.exp()?;
            let sum_gr1 = e_grm.sum_keepdim(D::Minus1)?;
            o_rows.push(over_keys(&e_grm, &v_gmh, compute)?.broadcast_div(&sum_gr1)?);
            lse_rows.push((sum_gr1.log()? + max_gr1)?.squeeze(D::Minus1)?);
        }
        o.push(join(o_rows, 1)?);
        lse.push(join(lse_rows, 1)?);
    }
    Ok(AttentionOut {
        o_blnh: tokens_first(&join(o, 0)?, b, a.q_blnh.dtype())?,
        lse_bnl: join(lse, 0)?.reshape((b, n, l))?,
    })
}

fn backward(a: &AttentionBackwardArgs<'_>, compute: DType, tile_bytes: usize) -> Result<AttentionGrads> {
    let (b, l, n, h) = a.q_blnh.dims4()?;
    let scale = scale(h);
    let (q_glh, k_gmh, v_gmh) = (heads_first(a.q_blnh)?, heads_first(a.k_bmnh)?, heads_first(a.v_bmnh)?);
    let do_glh = num::f32(&heads_first(a.do_blnh)?)?;
    let delta_gl1 = (&do_glh * num::f32(&heads_first(a.o_blnh)?)?)?.sum_keepdim(D::Minus1)?;
    let lse_gl1 = a.lse_bnl.reshape((b * n, l, 1))?;
    let (mut dq, mut dk, mut dv) = (vec![], vec![], vec![]);
    for group in groups(b * n, l, k_gmh.dim(1)?, tile_bytes) {
        let of_group = |t: &Tensor| t.narrow(0, group.head, group.heads);
        let (k_gmh, v_gmh) = (of_group(&k_gmh)?, of_group(&v_gmh)?);
        let vt_ghm = v_gmh.t()?;
        let mut dq_rows = vec![];
        // dk and dv sum over query rows; `+=` only where one head needs more than one tile of rows.
        let (mut dk_gmh, mut dv_gmh): (Option<Tensor>, Option<Tensor>) = (None, None);
        for &(row, rows) in &group.rows {
            let of_rows = |t: &Tensor| of_group(t)?.narrow(1, row, rows);
            let (q_grh, do_grh) = (of_rows(&q_glh)?, of_rows(&do_glh)?);
            let p_grm =
                scores(&q_grh, &k_gmh, a.last_stands_for, compute)?.broadcast_sub(&of_rows(&lse_gl1)?)?.exp()?;
            let dp_grm = num::matmul(&do_grh, &vt_ghm, compute)?;
            let ds_grm = (dp_grm.broadcast_sub(&of_rows(&delta_gl1)?)? * &p_grm)?;
            dv_gmh = plus(dv_gmh, num::matmul(&p_grm.t()?, &do_grh, compute)?)?;
            dk_gmh = plus(dk_gmh, (num::matmul(&ds_grm.t()?, &q_grh, compute)? * scale)?)?;
            dq_rows.push((over_keys(&ds_grm, &k_gmh, compute)? * scale)?);
        }
        dq.push(join(dq_rows, 1)?);
        dk.extend(dk_gmh);
        dv.extend(dv_gmh);
    }
    Ok(AttentionGrads {
        dq_blnh: tokens_first(&join(dq, 0)?, b, a.q_blnh.dtype())?,
        dk_bmnh: tokens_first(&join(dk, 0)?, b, a.k_bmnh.dtype())?,
        dv_bmnh: tokens_first(&join(dv, 0)?, b, a.v_bmnh.dtype())?,
    })
}

fn check_qkv(op: &'static str, q: &Tensor, k: &Tensor, v: &Tensor, last_stands_for: usize) -> Result<()> {
    if last_stands_for == 0 {
        return Err(Error::Argument { op, what: "the last key stands for none".to_string() });
    }
    let [b, _, n, h] = gate::dims::<4>(op, "q_blnh", q, "[b, l, n, h], nothing empty")?;
    let [_, m, _, _] = gate::dims::<4>(op, "k_bmnh", k, "[b, m, n, h], nothing empty")?;
    gate::shape(op, "k_bmnh", k, &[b, m, n, h], "[b, m, n, h]")?;
    gate::shape(op, "v_bmnh", v, &[b, m, n, h], "[b, m, n, h]")?;
    gate::float(op, "q_blnh", q)?;
    gate::dtype(op, "k_bmnh", k, q.dtype())?;
    gate::dtype(op, "v_bmnh", v, q.dtype())
}

/// The softmax scale 1/√h.
fn scale(h: usize) -> f64 {
    1.0 / (h as f64).sqrt()
}

fn score_flops(q_blnh: &Tensor, k_bmnh: &Tensor) -> f64 {
    2.0 * q_blnh.elem_count() as f64 * k_bmnh.dims()[1] as f64
}

/// Scaled scores in fp32, that of a last key that counts `n` times greater by ln n. The scale goes onto `q` only where that
/// rounds nothing to 16 bit.
fn scores(q_grh: &Tensor, k_gmh: &Tensor, last_stands_for: usize, compute: DType) -> Result<Tensor> {
    let scale = scale(q_grh.dim(D::Minus1)?);
    let s_grm = match compute {
        DType::F32 => num::matmul(&(num::f32(q_grh)? * scale)?, &k_gmh.t()?, compute)?,
        _ => (num::matmul(q_grh, &k_gmh.t()?, compute)? * scale)?,
    };
    if last_stands_for == 1 {
        return Ok(s_grm);
    }
    let mut more = vec![0f32; s_grm.dim(D::Minus1)? - 1];
    more.push((last_stands_for as f32).ln());
    let more_m = Tensor::new(more, s_grm.device())?;
    Ok(s_grm.broadcast_add(&more_m)?)
}

/// What the kernels add to the last key's score before they scale it.
#[cfg(feature = "cuda")]
fn lift(last_stands_for: usize, head: usize) -> f32 {
    ((last_stands_for as f64).ln() / scale(head)) as f32
}

/// [b, l, n, h] to [b·n, l, h].
fn heads_first(t_blnh: &Tensor) -> Result<Tensor> {
    Ok(t_blnh.transpose(1, 2)?.contiguous()?.flatten(0, 1)?)
}

/// [b·n, l, h] to [b, l, n, h] in `dtype`.
fn tokens_first(t_glh: &Tensor, b: usize, dtype: DType) -> Result<Tensor> {
    let (g, l, h) = t_glh.dims3()?;
    Ok(t_glh.to_dtype(dtype)?.reshape((b, g / b, l, h))?.transpose(1, 2)?.contiguous()?)
}

struct Group {
    head: usize,
    heads: usize,
    /// (first query row, number of rows) of each tile.
    rows: Vec<(usize, usize)>,
}

/// Cuts `heads × l × m` fp32 scores into tiles of at most `limit` bytes, or one query row.
fn groups(heads: usize, l: usize, m: usize, limit: usize) -> Vec<Group> {
    let per_tile = (limit / (l * m * 4)).clamp(1, heads);
    let rows_per_tile = (limit / (per_tile * m * 4)).clamp(1, l);
    let cut = |total: usize, step: usize| (0..total).step_by(step).map(move |at| (at, step.min(total - at)));
    cut(heads, per_tile).map(|(head, heads)| Group { head, heads, rows: cut(l, rows_per_tile).collect() }).collect()
}

fn join(mut parts: Vec<Tensor>, dim: usize) -> Result<Tensor> {
    if parts.len() == 1 {
        return Ok(parts.remove(0));
    }
    Ok(Tensor::cat(&parts, dim)?)
}

/// `p [g, r, m] · w [g, m, h]`, keys summed in pieces. A padded prompt ends in hundreds of equal keys: added one after
/// another in fp32, their rounding errors all point the same way (1e-5 of the result at 512 keys, 1e-6 in pieces).
fn over_keys(p_grm: &Tensor, w_gmh: &Tensor, compute: DType) -> Result<Tensor> {
    let keys = p_grm.dim(2)?;
    let piece = keys.div_ceil(16).max(64);
    let mut sum = None;
    for start in (0..keys).step_by(piece) {
        let len = piece.min(keys - start);
        let (mut p_grk, mut w_gkh) = (p_grm.narrow(2, start, len)?, w_gmh.narrow(1, start, len)?);
        // candle's products on a card take no rows with gaps between them.
        if !p_grk.device().is_cpu() {
            (p_grk, w_gkh) = (p_grk.contiguous()?, w_gkh.contiguous()?);
        }
        sum = plus(sum, num::matmul(&p_grk, &w_gkh, compute)?)?;
    }
    match sum {
        Some(sum) => Ok(sum),
        None => num::matmul(p_grm, w_gmh, compute),
    }
}

fn plus(sum: Option<Tensor>, part: Tensor) -> Result<Option<Tensor>> {
    Ok(Some(match sum {
        Some(sum) => (sum + part)?,
        None => part,
    }))
}

#[cfg(test)]
mod tests;
