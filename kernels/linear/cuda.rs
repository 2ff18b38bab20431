//! Linears by cublasLt. Operands that are not in the compute dtype are cast first (adapters' fp32 masters, a dense
//! weight of another dtype); an fp8 weight is expanded to one scratch that all of them share.

use candle_core::{DType, Tensor};

use super::Rounded;
use crate::common::blas::{Eight, Matrix, Product};
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::{fp8, Result};

const EIGHT: &str = "linear/eight";

/// The right-hand side of a product.
pub(super) enum Weight<'a> {
    Dense(&'a Tensor),
    Fp8(&'a fp8::Weight),
}

/// `left · weight` (or `weightᵀ` with `transposed`) over the last axis of `left`, then bias and addition.
pub(super) struct Times<'a> {
    pub op: &'static str,
    pub left: &'a Tensor,
    pub weight_oi: Weight<'a>,
    /// The product is with `weightᵀ`: [.., i] to [.., o].
    pub transposed: bool,
    pub bias: Option<&'a Tensor>,
    /// The result is written over it where dtype and layout allow.
    pub add: Option<&'a Tensor>,
    pub out: DType,
}

pub(super) fn times(gpu: &Gpu, t: &Times<'_>, compute: DType) -> Result<Tensor> {
    let result = result_dtype(compute, t.out);
    let [o, i] = match t.weight_oi {
        Weight::Dense(w) => [w.dims()[0], w.dims()[1]],
        Weight::Fp8(w) => w.shape(),
    };
    let (inner, columns) = if t.transposed { (i, o) } else { (o, i) };
    let mut shape = t.left.dims().to_vec();
    shape[t.left.rank() - 1] = columns;
    let y = output(gpu, t.op, shape, t.add, result, t.out)?;
    let (left, stride) = View::rows(t.op, &cast(gpu, t.op, t.left, compute)?)?;
    let (weight, address) = match t.weight_oi {
        Weight::Dense(w) => {
            let view = operand(gpu, t.op, w, compute)?;
            let address = view.address;
            (Some(view), address)
        }
        Weight::Fp8(w) => (None, fp8::cuda::dequantize_to_scratch(gpu, w, compute)?),
    };
    let bias = t.bias.map(|bias| operand(gpu, t.op, bias, result)).transpose()?;
    let add = t.add.map(|add| operand(gpu, t.op, add, result)).transpose()?;
    gpu.blas().run(&Product {
        rows: t.left.elem_count() / inner,
        columns,
        inner,
        left: Matrix { address: left.address, transposed: false, stride },
        right: Matrix { address, transposed: t.transposed, stride: None },
        operands: compute,
        out: View::new(t.op, &y)?.address,
        out_stride: None,
        result,
        bias: bias.as_ref().map(|v| v.address),
        add: add.as_ref().map(|v| v.address),
    })?;
    drop(weight);
    cast(gpu, t.op, &y, t.out)
}

/// `out [rows, columns] = x [rows, inner] · weightᵀ (+ bias) (+ add)` on memory: for callers with layouts of their own.
pub(crate) struct Plain {
    pub rows: usize,
    pub inner: usize,
    pub columns: usize,
    pub x: u64,
    pub weight_oi: u64,
    pub bias: Option<u64>,
    pub add: Option<u64>,
    pub out: u64,
    /// Of everything.
    pub dtype: DType,
}

pub(crate) fn plain_product(gpu: &Gpu, p: &Plain) -> Result<()> {
    gpu.blas().run(&Product {
        rows: p.rows,
        columns: p.columns,
        inner: p.inner,
        left: Matrix { address: p.x, transposed: false, stride: None },
        right: Matrix { address: p.weight_oi, transposed: true, stride: None },
        operands: p.dtype,
        out: p.out,
        out_stride: None,
        result: p.dtype,
        bias: p.bias,
        add: p.add,
    })
}

/// `dyᵀ·x` in F32.
pub(super) fn weight_grad(op: &'static str, gpu: &Gpu, x: &Tensor, dy: &Tensor, compute: DType) -> Result<Tensor> {
    let (i, o) = (super::last(x), super::last(dy));
    let dw_oi = gpu.empty((o, i), DType::F32)?;
    let (x_view, x_stride) = View::rows(op, &cast(gpu, op, x, compute)?)?;
    let (dy_view, dy_stride) = View::rows(op, &cast(gpu, op, dy, compute)?)?;
    gpu.blas().run(&Product {
        rows: o,
        columns: i,
        inner: x.elem_count() / i,
        left: Matrix { address: dy_view.address, transposed: true, stride: dy_stride },
        right: Matrix { address: x_view.address, transposed: false, stride: x_stride },
        operands: compute,
        out: View::new(op, &dw_oi)?.address,
        out_stride: None,
        result: DType::F32,
        bias: None,
        add: None,
    })?;
    Ok(dw_oi)
}

/// `dys[j] · ups[j]` side by side, in `compute`.
pub(super) fn stack_backward(
    op: &'static str,
    gpu: &Gpu,
    dys: &[&Tensor],
    ups_or: &[Tensor],
    compute: DType,
) -> Result<Tensor> {
    let width: usize = ups_or.iter().map(super::last).sum();
    let mut shape = dys[0].dims().to_vec();
    shape[dys[0].rank() - 1] = width;
    let dh = gpu.empty(shape, compute)?;
    let mut out = View::new(op, &dh)?.address;
    for (dy, up_or) in dys.iter().zip(ups_or) {
        let (o, r) = up_or.dims2()?;
        let (left, stride) = View::rows(op, &cast(gpu, op, dy, compute)?)?;
        let right = operand(gpu, op, up_or, compute)?;
        gpu.blas().run(&Product {
            rows: dy.elem_count() / o,
            columns: r,
            inner: o,
            left: Matrix { address: left.address, transposed: false, stride },
            right: Matrix { address: right.address, transposed: false, stride: None },
            operands: compute,
            out,
            out_stride: Some(width),
            result: compute,
            bias: None,
            add: None,
        })?;
        out += (r * compute.size_in_bytes()) as u64;
    }
    Ok(dh)
}

/// [`super::eight::by_rows`].
pub(super) fn by_rows(gpu: &Gpu, weight: &fp8::Weight) -> Result<fp8::Weight> {
    const NAME: &str = "eight_by_rows";
    let [o, i] = weight.shape();
    let (codes, scale) = (View::new(NAME, weight.codes_oi())?, View::new(NAME, weight.scale())?);
    let group = o * i / weight.scale().elem_count();
    let (made, rows) = (gpu.empty((o, i), DType::U8)?, gpu.empty((o, 1), DType::F32)?);
    let (to, by) = (View::new(NAME, &made)?.address, View::new(NAME, &rows)?.address);
    // A single scale is every row's.
    let (per_row, step) = if group == o * i { (1, 0) } else { (i / group, i / group) };
    let args = [Arg::tensor(&scale), Arg::ptr(by), Arg::i32(o), Arg::i32(per_row), Arg::i32(step)];
    gpu.launch(EIGHT, "eight_weight_scales", Launch::blocks((o.div_ceil(8), 1, 1), 256), &args)?;
    let (from, n) = (Arg::ptr(codes.address), Arg::i64(o * i));
    let args = [from, Arg::tensor(&scale), Arg::ptr(by), Arg::ptr(to), Arg::i32(i), Arg::i32(group), n];
    gpu.launch(EIGHT, "eight_weight", Launch::over(o * i, 16), &args)?;
    fp8::Weight::new(made, rows)
}

/// Rows of `x` rounded to e4m3, each with its scale; before that times a vector of factors, where its address is not 0.
pub(super) fn rounded_rows(gpu: &Gpu, op: &'static str, x: &Tensor, factors: u64) -> Result<Rounded> {
    let width = super::last(x);
    let rows = x.elem_count() / width;
    let (codes, scales) = (gpu.empty((rows, width), DType::U8)?, gpu.empty(rows, DType::F32)?);
    // A view may be a copy: it is held until the kernel is issued.
    let from = View::new(op, x)?;
    let (to, by) = (View::new(op, &codes)?.address, View::new(op, &scales)?.address);
    let args = [Arg::tensor(&from), Arg::ptr(factors), Arg::ptr(to), Arg::ptr(by), Arg::i32(width)];
    let (trips, threads) = row_launch(width);
    gpu.launch(EIGHT, &format!("eight_rows_{trips}"), Launch::blocks((rows, 1, 1), threads), &args)?;
    Ok(Rounded { codes, scales })
}

/// The same of `gelu_tanh(x)`, or of `dy` times its slope; also that. All 16-bit.
pub(super) fn rounded_gelu(
    gpu: &Gpu,
    op: &'static str,
    x: &Tensor,
    dy: Option<&Tensor>,
    factors: u64,
) -> Result<(Tensor, Rounded)> {
    let kernel = if dy.is_some() { "eight_gelu_backward" } else { "eight_gelu" };
    let made = gpu.empty(x.shape(), dy.unwrap_or(x).dtype())?;
    let width = super::last(x);
    let rows = x.elem_count() / width;
    let (codes, scales) = (gpu.empty((rows, width), DType::U8)?, gpu.empty(rows, DType::F32)?);
    let (from, dy) = (View::new(op, x)?, dy.map(|dy| View::new(op, dy)).transpose()?);
    let (to, by) = (View::new(op, &codes)?.address, View::new(op, &scales)?.address);
    let args = [
        Arg::tensor(&from),
        Arg::optional(dy.as_ref()),
        Arg::tensor(&View::new(op, &made)?),
        Arg::ptr(factors),
        Arg::ptr(to),
        Arg::ptr(by),
        Arg::i32(width),
    ];
    let (trips, threads) = row_launch(width);
    gpu.launch(EIGHT, &format!("{kernel}_{trips}"), Launch::blocks((rows, 1, 1), threads), &args)?;
    Ok((made, Rounded { codes, scales }))
}

/// [`super::eight`]: `left · weightᵀ` with `transposed`, else `left · weight`; then bias and base. `like` has the shape that
/// `left` had.
#[allow(clippy::too_many_arguments)]
pub(super) fn eight(
    gpu: &Gpu,
    op: &'static str,
    like: &Tensor,
    left: &Rounded,
    weight: &fp8::Weight,
    transposed: bool,
    [bias, base]: [Option<&Tensor>; 2],
    (compute, out): (DType, DType),
) -> Result<Tensor> {
    let [o, i] = weight.shape();
    let (inner, columns) = if transposed { (i, o) } else { (o, i) };
    let rows = like.elem_count() / inner;
    let codes = View::new(op, weight.codes_oi())?;
    let scale_o = View::new(op, weight.scale())?.address;
    let right = match transposed {
        true => codes.address,
        false => {
            let across = gpu.scratch("weight", o * i)?;
            let args = [Arg::ptr(codes.address), Arg::ptr(across), Arg::i32(o), Arg::i32(i)];
            let grid = Launch::blocks((i.div_ceil(64), o.div_ceil(64), 1), 256);
            gpu.launch(EIGHT, "eight_transposed", grid, &args)?;
            across
        }
    };

    let (left_codes, left_scales) = (View::new(op, &left.codes)?, View::new(op, &left.scales)?);
    let result = result_dtype(compute, out);
    let mut shape = like.dims().to_vec();
    shape[like.rank() - 1] = columns;
    let y = output(gpu, op, shape, base, result, out)?;
    let y_view = View::new(op, &y)?;
    let bias = bias.map(|bias| operand(gpu, op, bias, result)).transpose()?;
    let base = base.map(|base| operand(gpu, op, base, result)).transpose()?;
    let product = Eight {
        rows,
        columns,
        inner,
        left: left_codes.address,
        right,
        left_scales: left_scales.address,
        right_scales: transposed.then_some(scale_o),
        out: y_view.address,
        result,
        bias: bias.as_ref().map(|v| v.address),
        add: base.as_ref().map(|v| v.address),
    };
    // What cards below sm_90 do can be asked for on any.
    if gpu.portable() || !gpu.blas().run_eight(&product)? {
        // The base may lie where the result goes: the sums go elsewhere first.
        let sums = gpu.empty((rows, columns), result)?;
        let sums = View::new(op, &sums)?;
        let unit = gpu.blas().run_eight_sums(&Eight { out: sums.address, ..product })?;
        let args = [
            Arg::tensor(&sums),
            Arg::ptr(left_scales.address),
            Arg::ptr(if transposed { scale_o } else { 0 }),
            Arg::optional(bias.as_ref()),
            Arg::optional(base.as_ref()),
            Arg::f32(unit),
            Arg::tensor(&y_view),
            Arg::i32(columns),
            Arg::i64(rows * columns),
        ];
        gpu.launch(EIGHT, "eight_scale", Launch::over(rows * columns, 8), &args)?;
    }
    cast(gpu, op, &y, out)
}

/// Trips and threads of a block that keeps a row of `width` values in registers, eight a thread and trip (`vector.cuh`):
/// five or six trips, whichever leaves fewer threads idle, of 320 threads at most. On an H200, rows of 13824 take 0.24 ms so, 0.33 with four trips
/// of larger blocks, which wait for one another at the maximum.
pub(crate) fn row_launch(width: usize) -> (usize, u32) {
    let eights = width.div_ceil(8);
    let threads = |trips: usize| eights.div_ceil(trips).next_multiple_of(32);
    let trips = if threads(5) <= 320 && 5 * threads(5) < 6 * threads(6) { 5 } else { 6 };
    (trips, threads(trips) as u32)
}

/// Where a product goes: over what is added to it, where that is possible. Each element of it is read once, by the thread
/// that writes it.
pub(crate) fn output(
    gpu: &Gpu,
    op: &'static str,
    shape: Vec<usize>,
    add: Option<&Tensor>,
    result: DType,
    out: DType,
) -> Result<Tensor> {
    match add {
        Some(add) if add.dtype() == result && out == result && View::direct(op, add)? => Ok(add.clone()),
        _ => gpu.empty(shape, result),
    }
}

/// What cublasLt can write from operands of `compute`: the same dtype or fp32.
fn result_dtype(compute: DType, out: DType) -> DType {
    match (compute, out) {
        (DType::F32, _) | (_, DType::F32) => DType::F32,
        (compute, _) => compute,
    }
}

fn operand(gpu: &Gpu, op: &'static str, t: &Tensor, dtype: DType) -> Result<View> {
    View::new(op, &cast(gpu, op, t, dtype)?)
}

/// The tensor in `dtype`; itself where it is already.
pub(crate) fn cast(gpu: &Gpu, op: &'static str, t: &Tensor, dtype: DType) -> Result<Tensor> {
    if t.dtype() == dtype {
        return Ok(t.clone());
    }
    let (n, y) = (t.elem_count(), gpu.empty(t.shape(), dtype)?);
    let from = View::new(op, t)?;
    let args = [Arg::tensor(&from), Arg::tensor(&View::new(op, &y)?), Arg::i64(n)];
    gpu.launch("linear/cast", "cast", Launch::over(n, 8), &args)?;
    Ok(y)
}

/// What the rank of an adapter is filled up to on the card.
const RANK: usize = 16;
/// Matrices that one launch fills up.
const PADS: usize = 6;

/// Pairs `down` [r, i] and `up` [o, r] in `dtype`, each rank filled up with zeros to a multiple of [`RANK`]: the first
/// matrices one below the other, and the second ones.
pub(super) fn low_rank(gpu: &Gpu, pairs: &[(&Tensor, &Tensor)], dtype: DType) -> Result<(Tensor, Vec<Tensor>)> {
    const OP: &str = "low_rank";
    let ranks: Vec<usize> = pairs.iter().map(|(down, _)| down.dims()[0].next_multiple_of(RANK)).collect();
    let down_ri = gpu.empty((ranks.iter().sum::<usize>(), super::last(pairs[0].0)), dtype)?;
    let (mut jobs, mut ups_or, mut at) = (Vec::new(), Vec::new(), 0);
    for ((down, up), rank) in pairs.iter().zip(&ranks) {
        // It begins aligned: so does every [`RANK`]th row.
        jobs.push((*down, down_ri.narrow(0, at, *rank)?));
        let up_or = gpu.empty((up.dims()[0], *rank), dtype)?;
        jobs.push((*up, up_or.clone()));
        ups_or.push(up_or);
        at += rank;
    }
    for jobs in jobs.chunks(PADS) {
        let mut views = Vec::new();
        for (from, to) in jobs {
            debug_assert!(View::direct(OP, to)?, "what is written has to lie in it");
            views.push((View::new(OP, from)?, View::new(OP, to)?));
        }
        let mut args = [Arg::longs(&[]); PADS];
        for (((from, to), (x, y)), arg) in jobs.iter().zip(&views).zip(&mut args) {
            let ((rows, columns), wide, n) = (from.dims2()?, super::last(to), to.elem_count());
            let sizes = Arg::words(&[rows as u32, columns as u32, wide as u32, n as u32]);
            *arg = Arg::join(&[(Arg::tensor(x), 2), (Arg::tensor(y), 2), (sizes, 2)]);
        }
        let most = jobs.iter().map(|(_, to)| to.elem_count()).max().unwrap_or(0);
        gpu.launch("linear/cast", "pad", Launch::blocks((most.div_ceil(256), jobs.len(), 1), 256), &args)?;
    }
    Ok((down_ri, ups_or))
}

/// `t · factor` in its own dtype.
pub(super) fn scaled(gpu: &Gpu, t: &Tensor, factor: f64) -> Result<Tensor> {
    const OP: &str = "scale";
    let (n, y) = (t.elem_count(), gpu.empty(t.shape(), t.dtype())?);
    let (from, to) = (View::new(OP, t)?, View::new(OP, &y)?);
    let args = [Arg::tensor(&from), Arg::tensor(&to), Arg::f32(factor as f32), Arg::i64(n)];
    gpu.launch("linear/cast", "scale", Launch::over(n, 8), &args)?;
    Ok(y)
}

/// `dst += src`, F32 of one size; `dst` may be a part of a larger buffer, `src` columns of a wider matrix.
pub fn add_assign(gpu: &Gpu, dst: &Tensor, src: &Tensor) -> Result<()> {
    const NAME: &str = "add_assign";
    let n = src.elem_count();
    let (from, stride) = View::rows(NAME, src)?;
    let columns = if stride.is_some() { super::last(src) } else { n };
    let to = Arg::ptr(crate::common::gpu::tensor_address(NAME, dst)?);
    let args = [to, Arg::ptr(from.address), Arg::i32(columns), Arg::i32(stride.unwrap_or(n)), Arg::i64(n)];
    gpu.launch("linear/cast", "add_assign", Launch::over(n, 1), &args)
}
