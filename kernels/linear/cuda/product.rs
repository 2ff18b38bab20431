//! Launches of `product_sm90a.cu`: a product of codes and an adapter's share in one kernel.

use candle_core::DType;

use super::super::eight::Share;
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::common::tensor_map::matrix_map;
use crate::Result;

/// Rows and columns of the result that a block makes at a time; a pair of blocks makes two side by side.
const TILE: usize = 128;
const STAGES: usize = 6;
/// As `kSharedBytes` there: the stages, what the end of a tile needs, its scales and bias, barriers.
const SHARED: usize = (STAGES + 1) * 2 * TILE * 128 + TILE * 6 + 16 * STAGES + 48;
const _: () = assert!(SHARED <= 227 << 10, "what a block may use");
/// Bytes of codes of the right operand that stay in the L2 cache while rows are walked down (H200: 10 pairs of tiles at 5120
/// inner, 4 at 13824).
const BAND_BYTES: usize = 13 << 20;
/// Fewer rows leave processors without work.
const FROM_ROWS: usize = 1024;
/// What tensor maps and 16-byte copies ask of every axis.
const MULTIPLE: usize = 16;

/// Whether the kernel runs here and takes a product of [rows, columns, inner] with this share.
pub(super) fn takes(
    gpu: &Gpu,
    [rows, columns, inner]: [usize; 3],
    share: Share<'_>,
    [compute, out]: [DType; 2],
) -> bool {
    let sixteen_bit = matches!(compute, DType::BF16 | DType::F16) && out == compute;
    let held = [share.low, share.matrix].iter().all(|t| t.dtype() == compute);
    let rank = super::super::last(share.low);
    let aligned = [columns, inner, rank].iter().all(|n| n % MULTIPLE == 0);
    gpu.hopper() && sixteen_bit && held && aligned && rows >= FROM_ROWS
}

/// `codes`: addresses of left [rows, inner] and right [columns, inner]; `scales`: of left's rows and of right's, the latter 0 in
/// backward, where the share's matrix is [r, columns]; `more`: bias, and what is added.
#[allow(clippy::too_many_arguments)]
pub(super) fn run(
    gpu: &Gpu,
    op: &'static str,
    [rows, columns, inner]: [usize; 3],
    [left, right]: [u64; 2],
    [left_scales, right_scales]: [u64; 2],
    share: Share<'_>,
    [bias, add]: [Option<u64>; 2],
    out: &View,
) -> Result<()> {
    let backward = right_scales == 0;
    let rank = super::super::last(share.low);
    let (low, low_stride) = View::rows(op, share.low)?;
    let matrix = View::new(op, share.matrix)?;
    let codes = |address, rows, box_rows| matrix_map(op, address, DType::U8, [rows, inner, inner], box_rows);
    let of_matrix = match backward {
        true => matrix_map(op, matrix.address, out.dtype, [rank, columns, columns], TILE / 2)?,
        false => matrix_map(op, matrix.address, out.dtype, [columns, rank, rank], TILE)?,
    };
    let result = |address| matrix_map(op, address, out.dtype, [rows, columns, columns], 16);
    let pairs = rows.div_ceil(TILE) * columns.div_ceil(2 * TILE);
    let blocks = 2 * pairs.min(gpu.card().processors / 2);
    let args = [
        codes(left, rows, TILE / 2)?,
        codes(right, columns, TILE)?,
        matrix_map(op, low.address, out.dtype, [rows, rank, low_stride.unwrap_or(rank)], TILE)?,
        of_matrix,
        result(out.address)?,
        result(add.unwrap_or(out.address))?,
        Arg::ptr(left_scales),
        Arg::ptr(right_scales),
        Arg::ptr(bias.unwrap_or(0)),
        Arg::i32(rows),
        Arg::i32(columns),
        Arg::i32(inner),
        Arg::i32(rank),
        Arg::i32(usize::from(add.is_some())),
        Arg::i32((BAND_BYTES / (2 * TILE * inner)).max(1)),
    ];
    let dtype = if out.dtype == DType::BF16 { "bf16" } else { "f16" };
    let name = format!("eight_product_{}{dtype}", if backward { "backward_" } else { "" });
    let launch = Launch { shared: SHARED, ..Launch::blocks((blocks, 1, 1), 384) };
    gpu.launch("linear/product_sm90a", &name, launch, &args)
}
