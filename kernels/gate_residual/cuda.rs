//! Element-wise kernels: eight values a thread, see `gate_residual.cu`.

use candle_core::{DType, Tensor};

use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::Result;

/// `x + gate·y`, or `gate·y` without `x`; the width is a multiple of 8.
pub(super) fn gate(
    op: &'static str,
    gpu: &Gpu,
    x_bld: Option<&Tensor>,
    y_bld: &Tensor,
    gate: &Tensor,
    out: DType,
) -> Result<Tensor> {
    let (_, l, d) = y_bld.dims3()?;
    let (n, result) = (y_bld.elem_count(), gpu.empty(y_bld.shape(), out)?);
    let x_view = x_bld.map(|t| View::new(op, t)).transpose()?;
    let (y_view, gate_view) = (View::new(op, y_bld)?, View::new(op, gate)?);
    let args = [
        Arg::optional(x_view.as_ref()),
        Arg::tensor(&y_view),
        Arg::tensor(&gate_view),
        Arg::i32(if gate.rank() == 2 { l } else { 1 }),
        Arg::tensor(&View::new(op, &result)?),
        Arg::i32(d),
        Arg::i64(n),
    ];
    gpu.launch("gate_residual/gate_residual", "gate_fwd", Launch::over(n, 8), &args)?;
    Ok(result)
}

pub(super) fn residual(op: &'static str, gpu: &Gpu, x: &Tensor, y: &Tensor, out: DType) -> Result<Tensor> {
    let (n, result) = (x.elem_count(), gpu.empty(x.shape(), out)?);
    if n > 0 {
        let (x_view, y_view) = (View::new(op, x)?, View::new(op, y)?);
        let args = [Arg::tensor(&x_view), Arg::tensor(&y_view), Arg::tensor(&View::new(op, &result)?), Arg::i64(n)];
        gpu.launch("gate_residual/gate_residual", "residual_fwd", Launch::over(n, 8), &args)?;
    }
    Ok(result)
}
