//! Linears by cublasLt. Operands that are not in the compute dtype are cast first (adapters' fp32 masters, a dense
//! weight of another dtype); an fp8 weight is expanded to one scratch that all of them share.

use candle_core::{DType, Tensor};

use crate::common::blas::{Matrix, Product};
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::{fp8, Result};

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
    // Each element is read once, by the thread that writes it.
    let y = match t.add {
        Some(add) if add.dtype() == result && t.out == result && View::direct(t.op, add)? => add.clone(),
        _ => gpu.empty(shape, result)?,
    };
    let left = operand(gpu, t.op, t.left, compute)?;
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
        left: Matrix { address: left.address, transposed: false },
        right: Matrix { address, transposed: t.transposed },
        operands: compute,
        out: View::new(t.op, &y)?.address,
        result,
        bias: bias.as_ref().map(|v| v.address),
        add: add.as_ref().map(|v| v.address),
    })?;
    drop(weight);
    cast(gpu, t.op, &y, t.out)
}

/// `dyᵀ·x` in F32.
pub(super) fn weight_grad(op: &'static str, gpu: &Gpu, x: &Tensor, dy: &Tensor, compute: DType) -> Result<Tensor> {
    let (i, o) = (super::last(x), super::last(dy));
    let dw_oi = gpu.empty((o, i), DType::F32)?;
    let (x_view, dy_view) = (operand(gpu, op, x, compute)?, operand(gpu, op, dy, compute)?);
    gpu.blas().run(&Product {
        rows: o,
        columns: i,
        inner: x.elem_count() / i,
        left: Matrix { address: dy_view.address, transposed: true },
        right: Matrix { address: x_view.address, transposed: false },
        operands: compute,
        out: View::new(op, &dw_oi)?.address,
        result: DType::F32,
        bias: None,
        add: None,
    })?;
    Ok(dw_oi)
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
    let args = [Arg::tensor(&View::new(op, t)?), Arg::tensor(&View::new(op, &y)?), Arg::i64(n)];
    gpu.launch("linear/cast", "cast", Launch::over(n, 8), &args)?;
    Ok(y)
}

/// What the rank of an adapter is filled up to on the card.
const RANK: usize = 16;

/// A matrix in `dtype` with zeros behind its rows (`axis` 0) or columns (1), up to a multiple of [`RANK`].
pub(super) fn padded(gpu: &Gpu, t: &Tensor, dtype: DType, axis: usize) -> Result<Tensor> {
    const OP: &str = "low_rank";
    let (rows, columns) = t.dims2()?;
    let (tall, wide) = match axis {
        0 => (rows.next_multiple_of(RANK), columns),
        _ => (rows, columns.next_multiple_of(RANK)),
    };
    let y = gpu.empty((tall, wide), dtype)?;
    let n = tall * wide;
    let (from, to) = (View::new(OP, t)?, View::new(OP, &y)?);
    let args = [Arg::tensor(&from), Arg::tensor(&to), Arg::i32(rows), Arg::i32(columns), Arg::i32(wide), Arg::i64(n)];
    gpu.launch("linear/cast", "pad", Launch::over(n, 1), &args)?;
    Ok(y)
}

/// `dst += src`, both contiguous F32 of one size; `dst` may be a part of a larger buffer.
pub fn add_assign(gpu: &Gpu, dst: &Tensor, src: &Tensor) -> Result<()> {
    const NAME: &str = "add_assign";
    let n = src.elem_count();
    let src_view = View::new(NAME, src)?;
    let dst = crate::common::gpu::tensor_address(NAME, dst)?;
    let args = [Arg::ptr(dst), Arg::ptr(src_view.address), Arg::i64(n)];
    gpu.launch("linear/cast", "add_assign", Launch::over(n, 1), &args)
}
