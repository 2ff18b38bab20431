//! Tensors on their way between the ops of this folder: weights made ready, frames cut out, channels to frames. On the CPU
//! all of it is plain candle; on a card 16-bit tensors stay channels-last.

#[cfg(feature = "cuda")]
use super::cuda;
use crate::{Exec, Result};
use candle_core::Tensor;

/// A convolution's weight `[o,c,kt,ky,kx]` as it is read fastest: the same shape and values, laid out for the card.
pub fn prepare(exec: &Exec, weight: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Exec::Cuda { gpu, compute, .. } = exec {
        return cuda::prepare(gpu, weight, *compute);
    }
    let _ = exec;
    Ok(weight.clone())
}

/// `n` frames of `[b,c,f,y,x]` from frame `i`, in memory of their own; all of them without a copy.
pub fn frames(x: &Tensor, i: usize, n: usize) -> Result<Tensor> {
    if (i, n) == (0, x.dim(2)?) {
        return Ok(x.clone());
    }
    #[cfg(feature = "cuda")]
    if let Some(cut) = cuda::frames(x, i, n)? {
        return Ok(cut);
    }
    // `contiguous` alone may keep sharing the storage of the whole clip and so keep it alive.
    let cut = x.narrow(2, i, n)?;
    Ok(if cut.is_contiguous() { cut.copy()? } else { cut.contiguous()? })
}

/// `[b,2c,f,y,x]` to `[b,c,2f,y,x]`: the two halves of the channels are the even and the odd frames.
pub fn interleave(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(y) = cuda::interleave(x)? {
        return Ok(y);
    }
    let (b, c, f, y, w) = x.dims5()?;
    let x = x.reshape(&[b, 2, c / 2, f, y, w][..])?.permute(vec![0, 2, 3, 1, 4, 5])?;
    Ok(x.contiguous()?.reshape((b, c / 2, 2 * f, y, w))?)
}

/// The same tensor, contiguous as its shape `[b,c,f,y,x]` says.
pub fn planes(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(y) = cuda::planes(x)? {
        return Ok(y);
    }
    Ok(x.contiguous()?)
}
