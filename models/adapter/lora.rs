//! LoRA: `Δy = scale · up(down(x))`. Both passes on one page.

use candle_core::Tensor;
use wan_kernels::linear::{
    low_rank, Linear, LinearArgs, LinearBackward, LinearBackwardArgs, LinearWeightGrad, LinearWeightGradArgs,
};

use super::{At, Dx, Lora};
use crate::wan::GradSink;
use crate::Result;

impl Lora {
    /// `x` `[B, L, i]` -> `Δy` `[B, L, o]` in the compute dtype, and what backward needs: `scale · mask · down(x)`,
    /// `[B, L, r]` (`r` may be filled up with zeros, see [`low_rank`]).
    pub fn forward(&self, at: &At, x_bli: &Tensor) -> Result<(Tensor, Tensor)> {
        let (down, up) = self.operands(at)?;
        let h_blr = self.down_scaled_with(at, &down, x_bli)?;
        let args = LinearArgs { x: &h_blr, weight_oi: &up, bias_o: None, base: None, out: at.exec.compute() };
        Ok((at.exec.run::<Linear>(&args)?, h_blr))
    }

    /// The low-rank activation that forward saves; backward asks for it where forward kept nothing.
    pub fn down_scaled(&self, at: &At, x_bli: &Tensor) -> Result<Tensor> {
        self.down_scaled_with(at, &self.operands(at)?.0, x_bli)
    }

    fn down_scaled_with(&self, at: &At, down_ri: &Tensor, x_bli: &Tensor) -> Result<Tensor> {
        let args = LinearArgs { x: x_bli, weight_oi: down_ri, bias_o: None, base: None, out: at.exec.compute() };
        self.scale_and_mask(at, at.exec.run::<Linear>(&args)?)
    }

    /// Hands `dup` and `ddown` to the sink (`+=` there); returns its share of `dx`, onto the base, where that is
    /// wanted.
    pub fn backward(
        &self,
        at: &At,
        x_bli: &Tensor,
        h_blr: &Tensor,
        dy_blo: &Tensor,
        dx: Dx,
        sink: &mut dyn GradSink,
    ) -> Result<Option<Tensor>> {
        let (exec, out, rank) = (at.exec, at.exec.compute(), self.down.dim(0)?);
        let (down, up) = self.operands(at)?;
        let dup_or = exec.run::<LinearWeightGrad>(&LinearWeightGradArgs { x: h_blr, dy: dy_blo })?;
        let dh_blr = exec.run::<LinearBackward>(&LinearBackwardArgs { dy: dy_blo, weight_oi: &up, base: None, out })?;
        let dh_blr = self.scale_and_mask(at, dh_blr)?;
        let ddown_ri = exec.run::<LinearWeightGrad>(&LinearWeightGradArgs { x: x_bli, dy: &dh_blr })?;
        sink.add(at.site, "lora_down.weight", &ddown_ri.narrow(0, 0, rank)?)?;
        sink.add(at.site, "lora_up.weight", &dup_or.narrow(1, 0, rank)?)?;
        let Dx::Onto(base) = dx else { return Ok(None) };
        Ok(Some(exec.run::<LinearBackward>(&LinearBackwardArgs { dy: &dh_blr, weight_oi: &down, base, out })?))
    }

    /// `down` and `up` as the products take them. Masks have the rank's own width, so with dropout nothing is filled up.
    fn operands(&self, at: &At) -> Result<(Tensor, Tensor)> {
        match (&at.dropout.neuron, &at.dropout.rank) {
            (None, None) => Ok(low_rank(at.exec, &self.down, &self.up)?),
            _ => Ok((self.down.clone(), self.up.clone())),
        }
    }

    /// The diagonal between `down` and `up`: its own transpose, so forward and backward share it.
    fn scale_and_mask(&self, at: &At, h_blr: Tensor) -> Result<Tensor> {
        // With alpha = rank, as in the templates, there is nothing to scale.
        let mut h_blr = at.exec.scaled(h_blr, self.scale)?;
        for mask in [&at.dropout.neuron, &at.dropout.rank].into_iter().flatten() {
            h_blr = h_blr.broadcast_mul(&mask.to_dtype(h_blr.dtype())?)?;
        }
        Ok(h_blr)
    }
}
