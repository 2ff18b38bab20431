//! Pieces shared by the references: all are plain candle ops that the tape can follow.

use candle_core::{DType, Tensor};

use crate::Result;

/// The tensor in fp32 (no copy if it is already).
pub(crate) fn f32(t: &Tensor) -> Result<Tensor> {
    Ok(t.to_dtype(DType::F32)?)
}

/// `a·b` in fp32 after rounding both operands to `compute`: what a tensor core yields before its result is stored.
///
/// The rounded operands are multiplied in fp32: candle's CPU backend multiplies no bf16 matrices, and a device's own
/// 16-bit product would round the result once more.
pub(crate) fn matmul(a: &Tensor, b: &Tensor, compute: DType) -> Result<Tensor> {
    if compute == DType::F32 {
        return Ok(f32(a)?.matmul(&f32(b)?)?);
    }
    let (a, b) = (a.to_dtype(compute)?, b.to_dtype(compute)?);
    Ok(f32(&a)?.matmul(&f32(&b)?)?)
}

/// A modulation vector in fp32, shaped to broadcast over `[b, l, d]`: `[b, d]` becomes `[b, 1, d]`.
pub(crate) fn over_tokens(m: &Tensor) -> Result<Tensor> {
    let m = f32(m)?;
    Ok(if m.rank() == 2 { m.unsqueeze(1)? } else { m })
}
