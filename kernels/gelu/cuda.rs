//! Element-wise kernels: eight values a thread, see `gelu.cu`.

use candle_core::Tensor;

use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::Result;

pub(super) fn forward(op: &'static str, kernel: &str, gpu: &Gpu, x: &Tensor) -> Result<Tensor> {
    let (n, y) = (x.elem_count(), gpu.empty(x.shape(), x.dtype())?);
    if n > 0 {
        let args = [Arg::tensor(&View::new(op, x)?), Arg::tensor(&View::new(op, &y)?), Arg::i64(n)];
        gpu.launch("gelu/gelu", kernel, Launch::over(n, 8), &args)?;
    }
    Ok(y)
}

pub(super) fn backward(op: &'static str, gpu: &Gpu, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (n, dx) = (x.elem_count(), gpu.empty(dy.shape(), dy.dtype())?);
    if n > 0 {
        let (x_view, dy_view) = (View::new(op, x)?, View::new(op, dy)?);
        let args = [Arg::tensor(&x_view), Arg::tensor(&dy_view), Arg::tensor(&View::new(op, &dx)?), Arg::i64(n)];
        gpu.launch("gelu/gelu", "gelu_tanh_bwd", Launch::over(n, 8), &args)?;
    }
    Ok(dx)
}
