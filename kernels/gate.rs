//! What the ops' gates are made of: each helper names the op and the tensor, so an error carries its facts.

use candle_core::{DType, Tensor};

use crate::{Error, Result};

/// `tensor` has exactly this shape; `axes` is how the error spells it (`[b, l, d]`).
pub(crate) fn shape(op: &'static str, tensor: &'static str, t: &Tensor, want: &[usize], axes: &str) -> Result<()> {
    if t.dims() == want {
        return Ok(());
    }
    Err(Error::Shape { op, tensor, got: t.shape().clone(), want: format!("{axes} = {want:?}") })
}

/// The tensor's shape as an array of `R` sizes, none of them zero.
pub(crate) fn dims<const R: usize>(
    op: &'static str,
    tensor: &'static str,
    t: &Tensor,
    axes: &str,
) -> Result<[usize; R]> {
    match <[usize; R]>::try_from(t.dims()) {
        Ok(sizes) if !sizes.contains(&0) => Ok(sizes),
        _ => Err(Error::Shape { op, tensor, got: t.shape().clone(), want: axes.to_string() }),
    }
}

/// Rows and width of `[.., d]`, of any rank from one on, nothing empty.
pub(crate) fn rows(op: &'static str, tensor: &'static str, t: &Tensor) -> Result<(usize, usize)> {
    match t.dims() {
        [lead @ .., width] if t.elem_count() > 0 => Ok((lead.iter().product(), *width)),
        _ => Err(Error::Shape { op, tensor, got: t.shape().clone(), want: "[.., d]".to_string() }),
    }
}

/// The dtypes that activations come in.
pub(crate) fn float(op: &'static str, tensor: &'static str, t: &Tensor) -> Result<()> {
    match t.dtype() {
        DType::F32 | DType::BF16 | DType::F16 => Ok(()),
        got => Err(Error::Dtype { op, tensor, got, want: "F32, BF16 or F16" }),
    }
}

pub(crate) fn dtype(op: &'static str, tensor: &'static str, t: &Tensor, want: DType) -> Result<()> {
    if t.dtype() == want {
        return Ok(());
    }
    Err(Error::Dtype { op, tensor, got: t.dtype(), want: want.as_str() })
}

/// The dtypes that an op may be asked to answer in.
pub(crate) fn out(op: &'static str, out: DType) -> Result<()> {
    match out {
        DType::F32 | DType::BF16 | DType::F16 => Ok(()),
        got => Err(Error::Dtype { op, tensor: "out", got, want: "F32, BF16 or F16" }),
    }
}

/// A modulation vector: one row a sample `[b, d]` or one a token `[b, l, d]`.
pub(crate) fn per_sample_or_token(
    op: &'static str,
    tensor: &'static str,
    t: &Tensor,
    [b, l, d]: [usize; 3],
) -> Result<()> {
    float(op, tensor, t)?;
    if t.dims() == [b, d] || t.dims() == [b, l, d] {
        return Ok(());
    }
    let want = format!("[b, d] = {:?} or [b, l, d] = {:?}", [b, d], [b, l, d]);
    Err(Error::Shape { op, tensor, got: t.shape().clone(), want })
}

/// Bytes of a tensor, for `Cost`.
pub(crate) fn bytes(t: &Tensor) -> f64 {
    (t.elem_count() * t.dtype().size_in_bytes()) as f64
}
