//! Norms, alone and of a sum.

use candle_core::{DType, Tensor};

use super::exact::bits;
use super::{Checker, Place, Row, ALL};
use crate::gate_residual::{GateResidual, GateResidualArgs, GateResidualBackward, GateResidualBackwardArgs};
use crate::norm::{
    After, LayerNorm, LayerNormArgs, LayerNormBackward, LayerNormBackwardArgs, LayerNormModulate,
    LayerNormModulateArgs, LayerNormModulateBackward, LayerNormModulateBackwardArgs, Normed, NormedGrads, ResidualNorm,
    ResidualNormArgs, ResidualNormBackward, ResidualNormBackwardArgs, RmsNorm, RmsNormArgs, RmsNormBackward,
    RmsNormBackwardArgs, RmsNormRope, RmsNormRopeArgs, RmsNormRopeBackward, RmsNormRopeBackwardArgs,
};
use crate::{Exec, Result};

pub(super) fn all(c: &mut Checker<'_>) -> Result<()> {
    for (b, l, d, n) in [(2, 7, 64, 4), (1, 97, 1536, 12), (2, 3, 3072, 24), (1, 33, 5120, 40), (2, 5, 20, 2)] {
        let case = format!("[{b}, {l}, {d}]");
        let eps = 1e-6;
        c.run("layer_norm_modulate", &case, ALL, &|p| {
            let (x_bld, shift, scale) = (p.normal(1, &[b, l, d])?, p.full(2, &[b, d])?, p.full(3, &[b, l, d])?);
            let dy_bld = p.normal(4, &[b, l, d])?;
            let (dres, out, per_sample) = (p.full(5, &[b, l, d])?, p.held, p.full(6, &[b, d])?);
            let args = LayerNormModulateArgs { x_bld: &x_bld, shift: &shift, scale: &per_sample, eps, out };
            let y = p.exec.run::<LayerNormModulate>(&args)?;
            let dx = |scale, dres_bld| {
                let args = LayerNormModulateBackwardArgs { x_bld: &x_bld, scale, dy_bld: &dy_bld, dres_bld, eps, out };
                p.exec.run::<LayerNormModulateBackward>(&args)
            };
            Ok(vec![y, dx(&per_sample, None)?, dx(&scale, Some(&dres))?])
        })?;
        c.run("layer_norm", &case, ALL, &|p| {
            let (x, dy, dres) = (p.normal(1, &[b, l, d])?, p.normal(4, &[b, l, d])?, p.full(5, &[b, l, d])?);
            let (weight_d, bias_d, out) = (p.normal(2, &[d])?, p.normal(3, &[d])?, p.held);
            let args = LayerNormArgs { x: &x, weight_d: &weight_d, bias_d: &bias_d, eps, out };
            let back = LayerNormBackwardArgs { x: &x, weight_d: &weight_d, dy: &dy, dres: Some(&dres), eps, out };
            Ok(vec![p.exec.run::<LayerNorm>(&args)?, p.exec.run::<LayerNormBackward>(&back)?])
        })?;
        c.run("rms_norm", &case, ALL, &|p| {
            let (x, dy, weight_d) = (p.normal(1, &[b, l, d])?, p.normal(4, &[b, l, d])?, p.normal(2, &[d])?);
            let args = RmsNormArgs { x: &x, weight_d: &weight_d, eps, out: p.held };
            let back = RmsNormBackwardArgs { x: &x, weight_d: &weight_d, dy: &dy, eps, out: p.held };
            Ok(vec![p.exec.run::<RmsNorm>(&args)?, p.exec.run::<RmsNormBackward>(&back)?])
        })?;
        c.run("rms_norm_rope", &case, ALL, &|p| {
            let h = d / n;
            let angle = p.full(7, &[l, h / 2])?;
            let (cos_lk, sin_lk) = (angle.cos()?, angle.sin()?);
            let (x_bld, weight_d) = (p.normal(1, &[b, l, d])?, p.normal(2, &[d])?);
            let dy_blnh = p.normal(4, &[b, l, n, h])?;
            let (cos_lk, sin_lk, x_bld, weight_d) = (&cos_lk, &sin_lk, &x_bld, &weight_d);
            let args = RmsNormRopeArgs { x_bld, weight_d, cos_lk, sin_lk, eps, out: p.held };
            let dy_blnh = &dy_blnh;
            let back = RmsNormRopeBackwardArgs { x_bld, weight_d, cos_lk, sin_lk, dy_blnh, eps, out: p.held };
            Ok(vec![p.exec.run::<RmsNormRope>(&args)?, p.exec.run::<RmsNormRopeBackward>(&back)?])
        })?;
        c.run("residual_norm", &case, ALL, &|p| residual_norms(p, [b, l, d]))?;
    }
    Ok(())
}

/// With a gate for each sample and affine, with one for each token and modulated, and without one.
fn residual_norms(p: &Place, [b, l, d]: [usize; 3]) -> Result<Vec<Tensor>> {
    let (x, branch, dy) = (p.full(1, &[b, l, d])?, p.normal(2, &[b, l, d])?, p.normal(3, &[b, l, d])?);
    let (dsum, gate, per_token) = (p.full(4, &[b, l, d])?, p.full(5, &[b, d])?, p.full(6, &[b, l, d])?);
    let (weight_d, bias_d) = (&p.normal(7, &[d])?, &p.normal(8, &[d])?);
    let (shift, scale) = (&p.full(9, &[b, d])?, &p.full(10, &[b, d])?);
    let mut all = Vec::new();
    for (gate, after) in [
        (Some(&gate), After::Affine { weight_d, bias_d }),
        (Some(&per_token), After::Modulation { shift, scale }),
        (None, After::Modulation { shift: &per_token, scale: &dsum }),
        (None, After::Affine { weight_d, bias_d }),
    ] {
        let (eps, stream, out, x_bld, branch_bld) = (1e-6, DType::F32, p.held, &x, &branch);
        let args = ResidualNormArgs { x_bld, branch_bld, gate, after, eps, stream, out };
        let Normed { sum_bld, y_bld } = p.exec.run::<ResidualNorm>(&args)?;
        let (dy_bld, dsum_bld) = (&dy, &dsum);
        let args = ResidualNormBackwardArgs { sum_bld: &sum_bld, gate, after, dy_bld, dsum_bld, eps, stream, out };
        let NormedGrads { dx_bld, dbranch_bld } = p.exec.run::<ResidualNormBackward>(&args)?;
        all.extend([sum_bld, y_bld, dx_bld, dbranch_bld]);
    }
    Ok(all)
}

/// A norm of a sum in one pass gives the bits of the two passes that it replaces.
pub(super) fn one_pass(exec: &Exec, rows: &mut Vec<Row>) -> Result<()> {
    for (b, l, d) in [(2, 97, 1536), (1, 1025, 5120)] {
        let p = Place { exec: exec.clone(), rounded: DType::BF16, held: DType::BF16 };
        let (x, branch, dy) = (p.full(1, &[b, l, d])?, p.normal(2, &[b, l, d])?, p.normal(3, &[b, l, d])?);
        let (dsum, gate) = (&p.full(4, &[b, l, d])?, &p.full(5, &[b, d])?);
        let (weight_d, bias_d) = (&p.normal(7, &[d])?, &p.normal(8, &[d])?);
        let (eps, stream, out, after) = (1e-6, DType::F32, DType::BF16, After::Affine { weight_d, bias_d });
        let args = ResidualNormArgs { x_bld: &x, branch_bld: &branch, gate: Some(gate), after, eps, stream, out };
        let Normed { sum_bld, y_bld } = exec.run::<ResidualNorm>(&args)?;
        let sum = exec.run::<GateResidual>(&GateResidualArgs { x_bld: &x, y_bld: &branch, gate, out: stream })?;
        let y = exec.run::<LayerNorm>(&LayerNormArgs { x: &sum, weight_d, bias_d, eps, out })?;
        let (sum_bld, dy_bld, dsum_bld) = (&sum_bld, &dy, dsum);
        let args = ResidualNormBackwardArgs { sum_bld, gate: Some(gate), after, dy_bld, dsum_bld, eps, stream, out };
        let NormedGrads { dx_bld, dbranch_bld } = exec.run::<ResidualNormBackward>(&args)?;
        let args = LayerNormBackwardArgs { x: &sum, weight_d, dy: &dy, dres: Some(dsum), eps, out: stream };
        let dx = exec.run::<LayerNormBackward>(&args)?;
        let args = GateResidualBackwardArgs { dout_bld: &dx, gate, out };
        let dbranch = exec.run::<GateResidualBackward>(&args)?;
        let case = format!("[{b}, {l}, {d}]");
        for (what, got, want) in [
            ("sum", sum_bld, &sum),
            ("norm", &y_bld, &y),
            ("backward", &dx_bld, &dx),
            ("backward of the branch", &dbranch_bld, &dbranch),
        ] {
            rows.push(bits(&format!("residual_norm, {what}"), &case, got, want)?);
        }
    }
    Ok(())
}
