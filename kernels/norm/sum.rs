//! Where a branch joins the residual stream and the next norm reads the sum: both in one pass over the stream.
//!
//! The same bits as [`GateResidual`] or [`Residual`] followed by [`LayerNormModulate`] or [`LayerNorm`], and as those
//! norms' backward followed by [`GateResidualBackward`] or a cast.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda::{self, Branch, Kind};
use super::{
    LayerNorm, LayerNormArgs, LayerNormBackward, LayerNormBackwardArgs, LayerNormModulate, LayerNormModulateArgs,
    LayerNormModulateBackward, LayerNormModulateBackwardArgs,
};
#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::gate_residual::{
    GateResidual, GateResidualArgs, GateResidualBackward, GateResidualBackwardArgs, Residual, ResidualArgs,
};
use crate::{gate, Cost, Op, Result};

/// What follows a LayerNorm's normalised value.
#[derive(Clone, Copy)]
pub enum After<'a> {
    /// `·(1 + scale) + shift`; [b, d], or [b, l, d] where every token has its own timestep.
    Modulation { shift: &'a Tensor, scale: &'a Tensor },
    /// `·weight + bias`, [d].
    Affine { weight_d: &'a Tensor, bias_d: &'a Tensor },
}

/// `sum = x + gate·branch` and `y = LayerNorm(sum)` with what follows it.
pub struct ResidualNorm;

/// `x_bld` and `branch_bld` [b, l, d]; `gate` [b, d] or [b, l, d].
pub struct ResidualNormArgs<'a> {
    pub x_bld: &'a Tensor,
    pub branch_bld: &'a Tensor,
    pub gate: Option<&'a Tensor>,
    pub after: After<'a>,
    pub eps: f64,
    /// Dtype of the sum.
    pub stream: DType,
    /// Dtype of `y`.
    pub out: DType,
}

/// [b, l, d] each.
pub struct Normed {
    pub sum_bld: Tensor,
    pub y_bld: Tensor,
}

/// The gradients of `x`, which is that of the sum, and of `branch`.
pub struct ResidualNormBackward;

/// `sum_bld`, `gate`, `after` and `eps` as in the forward; `dy_bld`, and `dsum_bld` that reaches the sum past the norm,
/// [b, l, d].
pub struct ResidualNormBackwardArgs<'a> {
    pub sum_bld: &'a Tensor,
    pub gate: Option<&'a Tensor>,
    pub after: After<'a>,
    pub dy_bld: &'a Tensor,
    pub dsum_bld: &'a Tensor,
    pub eps: f64,
    /// Dtype of `dx`.
    pub stream: DType,
    /// Dtype of `dbranch`.
    pub out: DType,
}

/// [b, l, d] each.
pub struct NormedGrads {
    pub dx_bld: Tensor,
    pub dbranch_bld: Tensor,
}

impl<'a> After<'a> {
    #[cfg(feature = "cuda")]
    fn kind(self) -> (&'a Tensor, Kind<'a>) {
        match self {
            After::Modulation { shift, scale } => (scale, Kind::Layer { one: 1.0, b: Some(shift) }),
            After::Affine { weight_d, bias_d } => (weight_d, Kind::Layer { one: 0.0, b: Some(bias_d) }),
        }
    }

    fn check(self, op: &'static str, bld: [usize; 3]) -> Result<()> {
        for (name, t) in match self {
            After::Modulation { shift, scale } => [("shift", shift), ("scale", scale)],
            After::Affine { weight_d, bias_d } => [("weight_d", weight_d), ("bias_d", bias_d)],
        } {
            match self {
                After::Modulation { .. } => gate::per_sample_or_token(op, name, t, bld)?,
                After::Affine { .. } => gate::shape(op, name, t, &bld[2..], "[d]")?,
            }
            gate::float(op, name, t)?;
        }
        Ok(())
    }

    fn bytes(self) -> f64 {
        let (After::Modulation { shift: a, scale: b } | After::Affine { weight_d: a, bias_d: b }) = self;
        gate::bytes(a) + gate::bytes(b)
    }
}

/// The first tensor's shape, which the others share; their gate's.
fn check_all(op: &'static str, all: &[(&'static str, &Tensor)], gate: Option<&Tensor>) -> Result<[usize; 3]> {
    let bld = gate::dims::<3>(op, all[0].0, all[0].1, "[b, l, d], nothing empty")?;
    for (name, t) in all {
        gate::float(op, name, t)?;
        gate::shape(op, name, t, &bld, "[b, l, d]")?;
    }
    if let Some(gate) = gate {
        gate::float(op, "gate", gate)?;
        gate::per_sample_or_token(op, "gate", gate, bld)?;
    }
    Ok(bld)
}

impl Op for ResidualNorm {
    type Args<'a> = ResidualNormArgs<'a>;
    type Out = Normed;
    const NAME: &'static str = "residual_norm";

    fn check(a: &ResidualNormArgs<'_>) -> Result<()> {
        let bld = check_all(Self::NAME, &[("x_bld", a.x_bld), ("branch_bld", a.branch_bld)], a.gate)?;
        a.after.check(Self::NAME, bld)?;
        gate::out(Self::NAME, a.stream)?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &ResidualNormArgs<'_>) -> Cost {
        let elements = a.x_bld.elem_count() as f64;
        let read = gate::bytes(a.x_bld) + gate::bytes(a.branch_bld) + a.gate.map_or(0.0, gate::bytes) + a.after.bytes();
        let written = elements * (a.stream.size_in_bytes() + a.out.size_in_bytes()) as f64;
        Cost { flops: 11.0 * elements, bytes: read + written }
    }

    fn reference(a: &ResidualNormArgs<'_>, compute: DType) -> Result<Normed> {
        let &ResidualNormArgs { x_bld, branch_bld: y_bld, eps, stream, out, .. } = a;
        let sum_bld = match a.gate {
            Some(gate) => GateResidual::reference(&GateResidualArgs { x_bld, y_bld, gate, out: stream }, compute)?,
            None => Residual::reference(&ResidualArgs { x: x_bld, y: y_bld, out: stream }, compute)?,
        };
        let x = &sum_bld;
        let y_bld = match a.after {
            After::Modulation { shift, scale } => {
                LayerNormModulate::reference(&LayerNormModulateArgs { x_bld: x, shift, scale, eps, out }, compute)?
            }
            After::Affine { weight_d, bias_d } => {
                LayerNorm::reference(&LayerNormArgs { x, weight_d, bias_d, eps, out }, compute)?
            }
        };
        Ok(Normed { sum_bld, y_bld })
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &ResidualNormArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Normed> {
        let dims = a.x_bld.dims();
        if !cuda::fits(dims[2], None) {
            return Self::reference(a, compute);
        }
        let (vector, kind) = a.after.kind();
        let sum_bld = gpu.empty(dims, a.stream)?;
        let branch = Some(Branch { gate: a.gate, joins: Some(a.branch_bld), written: &sum_bld });
        let y_bld = cuda::forward(Self::NAME, gpu, a.x_bld, vector, kind, branch, a.eps, (a.out, dims))?;
        Ok(Normed { sum_bld, y_bld })
    }
}

impl Op for ResidualNormBackward {
    type Args<'a> = ResidualNormBackwardArgs<'a>;
    type Out = NormedGrads;
    const NAME: &'static str = "residual_norm_backward";

    fn check(a: &ResidualNormBackwardArgs<'_>) -> Result<()> {
        let all = [("sum_bld", a.sum_bld), ("dy_bld", a.dy_bld), ("dsum_bld", a.dsum_bld)];
        a.after.check(Self::NAME, check_all(Self::NAME, &all, a.gate)?)?;
        gate::out(Self::NAME, a.stream)?;
        gate::out(Self::NAME, a.out)
    }

    fn cost(a: &ResidualNormBackwardArgs<'_>) -> Cost {
        let elements = a.sum_bld.elem_count() as f64;
        let streams = gate::bytes(a.sum_bld) + gate::bytes(a.dy_bld) + gate::bytes(a.dsum_bld);
        let written = elements * (a.stream.size_in_bytes() + a.out.size_in_bytes()) as f64;
        let vectors = a.gate.map_or(0.0, gate::bytes) + a.after.bytes() / 2.0;
        Cost { flops: 16.0 * elements, bytes: streams + vectors + written }
    }

    fn reference(a: &ResidualNormBackwardArgs<'_>, compute: DType) -> Result<NormedGrads> {
        let &ResidualNormBackwardArgs { sum_bld, dy_bld, eps, stream, out, .. } = a;
        let dres = Some(a.dsum_bld);
        let dx_bld = match a.after {
            After::Modulation { scale, .. } => {
                let (x_bld, dres_bld) = (sum_bld, dres);
                let args = LayerNormModulateBackwardArgs { x_bld, scale, dy_bld, dres_bld, eps, out: stream };
                LayerNormModulateBackward::reference(&args, compute)?
            }
            After::Affine { weight_d, .. } => {
                let args = LayerNormBackwardArgs { x: sum_bld, weight_d, dy: dy_bld, dres, eps, out: stream };
                LayerNormBackward::reference(&args, compute)?
            }
        };
        let dbranch_bld = match a.gate {
            Some(gate) => {
                let args = GateResidualBackwardArgs { dout_bld: &dx_bld, gate, out };
                GateResidualBackward::reference(&args, compute)?
            }
            None => dx_bld.to_dtype(out)?,
        };
        Ok(NormedGrads { dx_bld, dbranch_bld })
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &ResidualNormBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<NormedGrads> {
        if !cuda::fits(a.sum_bld.dims()[2], None) {
            return Self::reference(a, compute);
        }
        let (vector, kind) = a.after.kind();
        let dbranch_bld = gpu.empty(a.sum_bld.shape(), a.out)?;
        let branch = Some(Branch { gate: a.gate, joins: None, written: &dbranch_bld });
        let (x, dy, dres) = (a.sum_bld, a.dy_bld, Some(a.dsum_bld));
        let dx_bld = cuda::backward(Self::NAME, gpu, x, vector, kind, dy, dres, branch, a.eps, a.stream)?;
        Ok(NormedGrads { dx_bld, dbranch_bld })
    }
}
