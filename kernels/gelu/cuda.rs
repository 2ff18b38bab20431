//! Element-wise kernels: eight values a thread, see `gelu.cu`.

use candle_core::Tensor;

use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::Result;

pub(super) fn forward(op: &'static str, kernel: &str, gpu: &Gpu, x: &Tensor) -> Result<Tensor> {
    let (n, y) = (x.elem_count(), gpu.empty(x.shape(), x.dtype())?);
    if n > 0 {
        let x_view = View::new(op, x)?;
        let args = [Arg::tensor(&x_view), Arg::tensor(&View::new(op, &y)?), Arg::i64(n)];
        gpu.launch("gelu/gelu", kernel, Launch::over(n, 8), &args)?;
    }
    Ok(y)
}

/// A kernel of two tensors; the result is like the second.
pub(super) fn two(op: &'static str, kernel: &str, gpu: &Gpu, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (n, y) = (b.elem_count(), gpu.empty(b.shape(), b.dtype())?);
    if n > 0 {
        let (a_view, b_view) = (View::new(op, a)?, View::new(op, b)?);
        let args = [Arg::tensor(&a_view), Arg::tensor(&b_view), Arg::tensor(&View::new(op, &y)?), Arg::i64(n)];
        gpu.launch("gelu/gelu", kernel, Launch::over(n, 8), &args)?;
    }
    Ok(y)
}
