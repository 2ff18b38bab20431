//! Latent video to tokens and back. The two directions order a patch differently, as the checkpoint does: the embedding
//! is a convolution whose weight is [d, c, pf, py, px] (channel slowest), the head writes (pf, py, px, c) (channel
//! fastest). Tokens run over frames, then rows, then columns. Data is moved only: dtypes are kept, `compute` plays no
//! part. The input of the model gets no gradient, so only the way back has a backward.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, Cost, Error, Op, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// Frames, rows and columns of one patch; (1, 2, 2) in every Wan model.
pub type Patch = [usize; 3];

/// [b, c, f, y, x] to tokens [b, l, c·pf·py·px], so that the patch embedding is a linear with the convolution's weight
/// flattened to [d, c·pf·py·px].
pub struct Patchify;

/// `x_bcfyx` [b, c, f, y, x], each of f, y, x a multiple of the patch.
pub struct PatchifyArgs<'a> {
    pub x_bcfyx: &'a Tensor,
    pub patch: Patch,
}

/// Tokens [b, l, pf·py·px·c] to [b, c, f, y, x].
pub struct Unpatchify;

/// `tokens_bld` [b, l, pf·py·px·c]; `grid`: patches along f, y, x, with `l` their product.
pub struct UnpatchifyArgs<'a> {
    pub tokens_bld: &'a Tensor,
    pub grid: [usize; 3],
    pub patch: Patch,
}

/// `dtokens` [b, l, pf·py·px·c] of [`Unpatchify`].
pub struct UnpatchifyBackward;

/// `dx_bcfyx` [b, c, f, y, x], each of f, y, x a multiple of the patch.
pub struct UnpatchifyBackwardArgs<'a> {
    pub dx_bcfyx: &'a Tensor,
    pub patch: Patch,
}

/// Patches along f, y, x of a latent of shape [.., f, y, x].
pub fn grid(latent: &Tensor, patch: Patch) -> Result<[usize; 3]> {
    let op = Patchify::NAME;
    let [_, _, f, y, x] = gate::dims::<5>(op, "x_bcfyx", latent, "[b, c, f, y, x], nothing empty")?;
    let [pf, py, px] = patch;
    if patch.contains(&0) || f % pf != 0 || y % py != 0 || x % px != 0 {
        let what = format!("latent of {f} x {y} x {x} does not divide into patches of {pf} x {py} x {px}");
        return Err(Error::Argument { op, what });
    }
    Ok([f / pf, y / py, x / px])
}

impl Op for Patchify {
    type Args<'a> = PatchifyArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "patchify";

    fn check(a: &PatchifyArgs<'_>) -> Result<()> {
        grid(a.x_bcfyx, a.patch).map(|_| ())
    }

    fn cost(a: &PatchifyArgs<'_>) -> Cost {
        Cost { flops: 0.0, bytes: 2.0 * gate::bytes(a.x_bcfyx) }
    }

    fn reference(a: &PatchifyArgs<'_>, _compute: DType) -> Result<Tensor> {
        // [b, c, f, pf, y, py, x, px] with channel before the patch's own axes.
        to_tokens(a.x_bcfyx, a.patch, [0, 2, 4, 6, 1, 3, 5, 7])
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &PatchifyArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !matches!(a.x_bcfyx.dtype().size_in_bytes(), 2 | 4) {
            return Self::reference(a, compute);
        }
        cuda::to_tokens(Self::NAME, gpu, a.x_bcfyx, a.patch, true)
    }
}

impl Op for Unpatchify {
    type Args<'a> = UnpatchifyArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "unpatchify";

    fn check(a: &UnpatchifyArgs<'_>) -> Result<()> {
        let [b, _, d] = gate::dims::<3>(Self::NAME, "tokens_bld", a.tokens_bld, "[b, l, d], nothing empty")?;
        let l = a.grid.iter().product();
        gate::shape(Self::NAME, "tokens_bld", a.tokens_bld, &[b, l, d], "[b, grid, d]")?;
        let volume: usize = a.patch.iter().product();
        if volume == 0 || d % volume != 0 {
            let what = format!("token width {d} is not a multiple of the patch volume {volume}");
            return Err(Error::Argument { op: Self::NAME, what });
        }
        Ok(())
    }

    fn cost(a: &UnpatchifyArgs<'_>) -> Cost {
        Cost { flops: 0.0, bytes: 2.0 * gate::bytes(a.tokens_bld) }
    }

    fn reference(a: &UnpatchifyArgs<'_>, _compute: DType) -> Result<Tensor> {
        let (b, _, d) = a.tokens_bld.dims3()?;
        let ([f, y, x], [pf, py, px]) = (a.grid, a.patch);
        let c = d / (pf * py * px);
        let split = a.tokens_bld.reshape(vec![b, f, y, x, pf, py, px, c])?;
        Ok(split.permute([0, 7, 1, 4, 2, 5, 3, 6].as_slice())?.reshape((b, c, f * pf, y * py, x * px))?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &UnpatchifyArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !matches!(a.tokens_bld.dtype().size_in_bytes(), 2 | 4) {
            return Self::reference(a, compute);
        }
        cuda::to_latent(Self::NAME, gpu, a.tokens_bld, a.grid, a.patch)
    }
}

impl Op for UnpatchifyBackward {
    type Args<'a> = UnpatchifyBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "unpatchify_backward";

    fn check(a: &UnpatchifyBackwardArgs<'_>) -> Result<()> {
        grid(a.dx_bcfyx, a.patch).map(|_| ())
    }

    fn cost(a: &UnpatchifyBackwardArgs<'_>) -> Cost {
        Cost { flops: 0.0, bytes: 2.0 * gate::bytes(a.dx_bcfyx) }
    }

    fn reference(a: &UnpatchifyBackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        // Channel after the patch's own axes.
        to_tokens(a.dx_bcfyx, a.patch, [0, 2, 4, 6, 3, 5, 7, 1])
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &UnpatchifyBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        if !matches!(a.dx_bcfyx.dtype().size_in_bytes(), 2 | 4) {
            return Self::reference(a, compute);
        }
        cuda::to_tokens(Self::NAME, gpu, a.dx_bcfyx, a.patch, false)
    }
}

/// Splits [b, c, f, y, x] into [b, c, f, pf, y, py, x, px], orders the axes, and flattens to tokens.
fn to_tokens(x_bcfyx: &Tensor, patch: Patch, order: [usize; 8]) -> Result<Tensor> {
    let (b, c, _, _, _) = x_bcfyx.dims5()?;
    let ([f, y, x], [pf, py, px]) = (grid(x_bcfyx, patch)?, patch);
    let split = x_bcfyx.reshape(vec![b, c, f, pf, y, py, x, px])?;
    Ok(split.permute(order.as_slice())?.reshape((b, f * y * x, c * pf * py * px))?)
}

#[cfg(test)]
mod tests;
