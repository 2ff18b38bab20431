//! Normalisation over the model width, fused with what follows it: LayerNorm + modulation, affine LayerNorm, RMSNorm,
//! RMSNorm + rotary embedding; LayerNorm of a sum that is written, too. Each backward stands next to its forward.
//!
//! Inputs may be fp32 or 16-bit, everything inside is fp32, the result is rounded once, to `out`; `compute` plays no
//! part. Statistics are not returned: a backward recomputes them from `x`, which costs less than keeping two values a
//! row alive and in step with `x`. Weights, biases, modulation and rotary tables are frozen, so only `dx` exists. Where a
//! backward takes `dres` (the gradient that reaches `x` past the norm, by the residual path) it is added in fp32, and
//! `dx` is written (`=`).

use candle_core::{Tensor, D};

use crate::{num, Result};

#[cfg(feature = "cuda")]
mod cuda;
mod layer;
mod rms;
#[cfg(any(test, feature = "cuda"))]
mod rows;
mod sum;
#[cfg(test)]
mod tests;

pub use layer::{
    LayerNorm, LayerNormArgs, LayerNormBackward, LayerNormBackwardArgs, LayerNormModulate, LayerNormModulateArgs,
    LayerNormModulateBackward, LayerNormModulateBackwardArgs,
};
pub use rms::{
    RmsNorm, RmsNormArgs, RmsNormBackward, RmsNormBackwardArgs, RmsNormRope, RmsNormRopeArgs, RmsNormRopeBackward,
    RmsNormRopeBackwardArgs,
};
pub use sum::{
    After, Normed, NormedGrads, ResidualNorm, ResidualNormArgs, ResidualNormBackward, ResidualNormBackwardArgs,
};

/// `dx` through a LayerNorm for the gradient `g` of its normalised value:
/// `rstd·(g − mean(g) − x̂·mean(g∘x̂))`.
fn layer_dx(xhat: &Tensor, rstd: &Tensor, g: &Tensor) -> Result<Tensor> {
    let centred = g.broadcast_sub(&g.mean_keepdim(D::Minus1)?)?;
    rms_dx(xhat, rstd, &centred)
}

/// `dx` through an RMSNorm for the gradient `g` of its normalised value: `rstd·(g − x̂·mean(g∘x̂))`.
///
/// In a LayerNorm `mean(x̂) = 0`, so a constant taken from `g` leaves `mean(g∘x̂)` as it was and the two share this.
fn rms_dx(xhat: &Tensor, rstd: &Tensor, g: &Tensor) -> Result<Tensor> {
    let along = (g * xhat)?.mean_keepdim(D::Minus1)?;
    Ok((g - xhat.broadcast_mul(&along)?)?.broadcast_mul(rstd)?)
}

fn plus_residual(dx: Tensor, dres: Option<&Tensor>) -> Result<Tensor> {
    Ok(match dres {
        Some(dres) => (dx + num::f32(dres)?)?,
        None => dx,
    })
}
