//! Norm, modulation, linear and unpatchify at the end of the model, and the first steps of backward.

use candle_core::{DType, Tensor};
use wan_kernels::norm::{LayerNormModulateBackward, LayerNormModulateBackwardArgs};
use wan_kernels::patchify::{Unpatchify, UnpatchifyArgs, UnpatchifyBackward, UnpatchifyBackwardArgs};
use wan_kernels::Exec;

use super::embed::TimeEmbedding;
use super::pieces::norm_modulate;
use super::probe::Probe;
use super::{HeadWeights, Numerics};
use crate::arch::WanArch;
use crate::Result;

/// The head at work: it owns nothing.
pub(super) struct Head<'a> {
    pub exec: &'a Exec,
    pub arch: &'a WanArch,
    pub numerics: &'a Numerics,
    pub w: &'a HeadWeights,
    pub time: &'a TimeEmbedding,
}

impl Head<'_> {
    /// Tokens `[B, L, dim]` to the prediction `[B, C, F, H, W]` fp32. Backward needs `x` again, nothing else.
    pub fn forward(&self, grid: [usize; 3], x_bld: &Tensor, probe: &mut Probe) -> Result<Tensor> {
        let (exec, width) = (self.exec, self.width());
        let mods = self.time.modulation(exec, &self.w.modulation)?;
        let vectors = [&mods.get(0)?, &mods.get(1)?];
        let h_bld = norm_modulate(exec, self.numerics, x_bld, vectors, self.arch.eps, width)?;
        let tokens_blo = self.w.linear.forward(&exec.with_compute(width), &h_bld, None, width)?.to_dtype(DType::F32)?;
        probe.see("head_out", &tokens_blo)?;
        Ok(exec.run::<Unpatchify>(&UnpatchifyArgs { tokens_bld: &tokens_blo, grid, patch: self.arch.patch })?)
    }

    /// `dpred` `[B, C, F, H, W]` to `dx` `[B, L, dim]` of the residual stream.
    pub fn backward(&self, x_bld: &Tensor, dpred_bcfyx: &Tensor) -> Result<Tensor> {
        let (exec, width) = (self.exec, self.width());
        let args = UnpatchifyBackwardArgs { dx_bcfyx: dpred_bcfyx, patch: self.arch.patch };
        let dtokens_blo = exec.run::<UnpatchifyBackward>(&args)?;
        let dh_bld = self.w.linear.backward(&exec.with_compute(width), &dtokens_blo, None, width)?;
        let scale = self.time.modulation(exec, &self.w.modulation)?.get(1)?;
        Ok(exec.run::<LayerNormModulateBackward>(&LayerNormModulateBackwardArgs {
            x_bld,
            scale: &scale,
            dy_bld: &dh_bld,
            dres_bld: None,
            eps: self.arch.eps,
            out: x_bld.dtype(),
        })?)
    }

    fn width(&self) -> DType {
        self.numerics.head.dtype(self.exec.compute())
    }
}
