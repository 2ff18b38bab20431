//! Patches on the card, see `patchify.cu`.

use candle_core::Tensor;

use super::Patch;
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::Result;

/// Tokens [b, l, c·patch] of a latent [b, c, f, y, x].
pub(super) fn to_tokens(op: &'static str, gpu: &Gpu, x: &Tensor, patch: Patch, channel_first: bool) -> Result<Tensor> {
    let (b, c, _, _, _) = x.dims5()?;
    let l = super::grid(x, patch)?.iter().product::<usize>();
    let tokens = gpu.empty((b, l, c * patch.iter().product::<usize>()), x.dtype())?;
    run(op, gpu, x, &tokens, x.dims(), patch, channel_first, true)?;
    Ok(tokens)
}

/// The latent [b, c, f, y, x] of tokens with the channel fastest.
pub(super) fn to_latent(
    op: &'static str,
    gpu: &Gpu,
    tokens: &Tensor,
    grid: [usize; 3],
    patch: Patch,
) -> Result<Tensor> {
    let (b, _, d) = tokens.dims3()?;
    let c = d / patch.iter().product::<usize>();
    let x = gpu.empty((b, c, grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2]), tokens.dtype())?;
    run(op, gpu, tokens, &x, x.dims(), patch, false, false)?;
    Ok(x)
}

#[allow(clippy::too_many_arguments)]
fn run(
    op: &'static str,
    gpu: &Gpu,
    from: &Tensor,
    to: &Tensor,
    latent: &[usize],
    patch: Patch,
    channel_first: bool,
    to_tokens: bool,
) -> Result<()> {
    let n = from.elem_count();
    let mut grid: Vec<u32> = latent.iter().chain(&patch).map(|&size| size as u32).collect();
    grid.push(u32::from(channel_first));
    let kernel = if from.dtype().size_in_bytes() == 2 { "patch_16" } else { "patch_32" };
    let (from_view, to_view) = (View::new(op, from)?, View::new(op, to)?);
    let args = [
        Arg::ptr(from_view.address),
        Arg::ptr(to_view.address),
        Arg::words(&grid),
        Arg::i32(usize::from(to_tokens)),
        Arg::i64(n),
    ];
    gpu.launch("patchify/patchify", kernel, Launch::over(n, 1), &args)
}
