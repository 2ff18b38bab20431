//! int8 on the card, see `int8.cu` and `product.cu`.

use candle_core::{DType, Tensor};

use super::{LinearInt8Args, LinearInt8BackwardArgs, Weight, BLOCK, SUMS};
use crate::common::blas::Int8;
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::linear::cuda::{output, row_launch};
use crate::linear::Rounded;
use crate::Result;

const FILE: &str = "int8/int8";
const PRODUCT: &str = "int8/product";

/// What a block of `int8_product` makes, and its shared memory: see there.
const TILE: [usize; 2] = [128, 256];
const SHARED: usize = 4 * (128 + 256) * 64;

/// Rows that the library's int8 products come in.
const SIXTEEN: usize = 16;

/// [`Weight::quantize`] on the card, to the same bits.
pub(super) fn quantize(gpu: &Gpu, weight_oi: &Tensor) -> Result<Weight> {
    const NAME: &str = "int8_quantize";
    let (o, i) = weight_oi.dims2()?;
    let (codes_oi, scales_2o) = (gpu.empty((o, i), DType::U8)?, gpu.empty((2, o), DType::F32)?);
    let weight = View::new(NAME, weight_oi)?;
    let codes = View::new(NAME, &codes_oi)?.address;
    let outer = View::new(NAME, &scales_2o)?.address;
    let inner = outer + 4 * o as u64;
    let tops = Tensor::zeros(o, DType::U32, &gpu.device())?;
    let tops_at = View::new(NAME, &tops)?.address;
    let args = [Arg::tensor(&weight), Arg::ptr(outer), Arg::i32(o), Arg::i32(i)];
    gpu.launch(FILE, "int8_weight_sizes", Launch::blocks((o.div_ceil(8), 1, 1), 256), &args)?;
    let tiles = Launch::blocks((i / BLOCK, o / BLOCK, 1), 256);
    let args = [Arg::tensor(&weight), Arg::ptr(outer), Arg::ptr(tops_at), Arg::i32(i)];
    gpu.launch(FILE, "int8_weight_tops", tiles, &args)?;
    let args =
        [Arg::tensor(&weight), Arg::ptr(outer), Arg::ptr(tops_at), Arg::ptr(codes), Arg::ptr(inner), Arg::i32(i)];
    gpu.launch(FILE, "int8_weight_codes", tiles, &args)?;
    Weight::new(codes_oi, scales_2o)
}

pub(super) fn forward(gpu: &Gpu, op: &'static str, a: &LinearInt8Args<'_>) -> Result<Tensor> {
    let [o, i] = a.weight.shape();
    let codes = View::new(op, a.weight.codes_oi())?;
    let [outer, inner] = scales(op, a.weight)?;
    let bias = a.bias_o.map(|bias| View::new(op, bias)).transpose()?;
    let rounded;
    let rows = match a.rounded {
        Some(rounded) => rounded,
        None => {
            rounded = rounded_rows(gpu, op, a.x, [0, 0])?;
            &rounded
        }
    };
    let right = Right { codes: codes.address, columns: o, inner, outer, bias: bias.as_ref(), base: a.base.as_ref() };
    times(rows, gpu, op, &right, a.x, i, a.out)
}

pub(super) fn backward(gpu: &Gpu, op: &'static str, a: &LinearInt8BackwardArgs<'_>) -> Result<Tensor> {
    let [o, i] = a.weight.shape();
    let codes = View::new(op, a.weight.codes_oi())?;
    // Tensor cores read both operands along the summed axis.
    let across = gpu.scratch("weight", o * i)?;
    let args = [Arg::ptr(codes.address), Arg::ptr(across), Arg::i32(o), Arg::i32(i)];
    gpu.launch(FILE, "int8_transpose", Launch::blocks((i / BLOCK, o / BLOCK, 1), 256), &args)?;
    let rows = rounded_rows(gpu, op, a.dy, scales(op, a.weight)?)?;
    let right = Right { codes: across, columns: i, inner: 0, outer: 0, bias: None, base: a.base.as_ref() };
    times(&rows, gpu, op, &right, a.dy, o, a.out)
}

/// Addresses of `outer` and `inner`.
fn scales(op: &'static str, weight: &Weight) -> Result<[u64; 2]> {
    let outer = View::new(op, weight.scales_2o())?.address;
    Ok([outer, outer + 4 * weight.shape()[0] as u64])
}

/// The other operand, its rows along the summed axis, and what becomes of the sums; 0: no such vector.
struct Right<'a> {
    codes: u64,
    columns: usize,
    inner: u64,
    outer: u64,
    bias: Option<&'a View>,
    base: Option<&'a Tensor>,
}

/// Rotated and rounded rows; `outer` and `inner` are addresses of factors, or 0.
pub(super) fn rounded_rows(gpu: &Gpu, op: &'static str, t: &Tensor, [outer, inner]: [u64; 2]) -> Result<Rounded> {
    let width = t.dims()[t.rank() - 1];
    let count = t.elem_count() / width;
    // The library multiplies whole sixteens of rows: what lies behind the last one is read and its sums are not.
    let padded = count.next_multiple_of(SIXTEEN);
    let (codes, scales) = (gpu.empty((padded, width), DType::U8)?, gpu.empty(count, DType::F32)?);
    let (trips, threads) = row_launch(width);
    // A view may be a copy: it is held until the kernel is issued.
    let from = View::new(op, t)?;
    let args = [
        Arg::tensor(&from),
        Arg::ptr(outer),
        Arg::ptr(inner),
        Arg::ptr(View::new(op, &codes)?.address),
        Arg::ptr(View::new(op, &scales)?.address),
        Arg::i32(width),
    ];
    let blocks = Launch::blocks((count, 1, 1), threads);
    gpu.launch(FILE, &format!("int8_rows_{trips}"), blocks, &args)?;
    Ok(Rounded { codes, scales })
}

fn times(
    left: &Rounded,
    gpu: &Gpu,
    op: &'static str,
    right: &Right<'_>,
    like: &Tensor,
    inner: usize,
    out: DType,
) -> Result<Tensor> {
    let (rows, columns) = (left.scales.elem_count(), right.columns);
    let mut shape = like.dims().to_vec();
    shape[like.rank() - 1] = columns;
    let y = output(gpu, op, shape, right.base, out, out)?;
    let base = right.base.map(|base| View::new(op, base)).transpose()?;
    let (codes, scales) = (View::new(op, &left.codes)?.address, View::new(op, &left.scales)?.address);
    let y_view = View::new(op, &y)?;
    let factors = |first: usize| Arg::longs(&[scales + 4 * first as u64, right.inner, right.outer]);
    if !gpu.hopper() {
        let args = [
            Arg::longs(&[codes, right.codes]),
            factors(0),
            Arg::optional(right.bias),
            Arg::optional(base.as_ref()),
            Arg::tensor(&y_view),
            Arg::i32(rows),
            Arg::i32(columns),
            Arg::i32(inner),
        ];
        let tiles = rows.div_ceil(TILE[0]) * columns.div_ceil(TILE[1]);
        let launch = Launch { shared: SHARED, ..Launch::blocks((tiles, 1, 1), 256) };
        gpu.launch(PRODUCT, "int8_product", launch, &args)?;
        return Ok(y);
    }
    // mma.sync reaches 0.65 of Hopper's peak at most; the library's products are worth writing the sums and reading
    // them back, some rows at a time.
    let at_once = (SUMS / (4 * columns) / 256 * 256).clamp(256, rows.next_multiple_of(256));
    let sums = gpu.scratch("sums", 4 * at_once * columns)?;
    for first in (0..rows).step_by(at_once) {
        let rows = at_once.min(rows - first);
        let left = codes + (first * inner) as u64;
        let padded = rows.next_multiple_of(SIXTEEN);
        gpu.blas().run_int8(&Int8 { rows: padded, columns, inner, left, right: right.codes, out: sums })?;
        let at = |dtype: DType| (first * columns * dtype.size_in_bytes()) as u64;
        let args = [
            Arg::ptr(sums),
            factors(first),
            Arg::optional(right.bias),
            base.as_ref().map_or(Arg::optional(None), |base| base.moved(base.address + at(base.dtype))),
            y_view.moved(y_view.address + at(out)),
            Arg::i32(columns),
            Arg::i64(rows * columns),
        ];
        gpu.launch(PRODUCT, "int8_finish", Launch::over(rows * columns, 8), &args)?;
    }
    Ok(y)
}
