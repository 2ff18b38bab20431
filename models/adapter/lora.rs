//! LoRA: `Δy = scale · up(down(x))`. Both passes on one page.

use candle_core::Tensor;
use wan_kernels::linear::{
    Linear, LinearArgs, LinearBackward, LinearBackwardArgs, LinearWeightGrad, LinearWeightGradArgs,
};

use super::{At, Lora};
use crate::wan::GradSink;
use crate::Result;

impl Lora {
    /// `x` `[B, L, i]` -> `Δy` `[B, L, o]` in the compute dtype, and what backward needs: `scale · mask · down(x)`, `[B, L, r]`.
    pub fn forward(&self, at: &At, x_bli: &Tensor) -> Result<(Tensor, Tensor)> {
        let h_blr = self.down_scaled(at, x_bli)?;
        let args = LinearArgs { x: &h_blr, weight_oi: &self.up, bias_o: None, out: at.exec.compute() };
        Ok((at.exec.run::<Linear>(&args)?, h_blr))
    }

    /// The low-rank activation that forward saves; backward asks for it where forward kept nothing.
    pub fn down_scaled(&self, at: &At, x_bli: &Tensor) -> Result<Tensor> {
        let args = LinearArgs { x: x_bli, weight_oi: &self.down, bias_o: None, out: at.exec.compute() };
        self.scale_and_mask(at, at.exec.run::<Linear>(&args)?)
    }

    /// Hands `dup` and `ddown` to the sink (`+=` there); returns the adapter's share of `dx` where it is wanted.
    pub fn backward(
        &self,
        at: &At,
        x_bli: &Tensor,
        h_blr: &Tensor,
        dy_blo: &Tensor,
        need_dx: bool,
        sink: &mut dyn GradSink,
    ) -> Result<Option<Tensor>> {
        let (exec, out) = (at.exec, at.exec.compute());
        let dup_or = exec.run::<LinearWeightGrad>(&LinearWeightGradArgs { x: h_blr, dy: dy_blo })?;
        let dh_blr = exec.run::<LinearBackward>(&LinearBackwardArgs { dy: dy_blo, weight_oi: &self.up, out })?;
        let dh_blr = self.scale_and_mask(at, dh_blr)?;
        let ddown_ri = exec.run::<LinearWeightGrad>(&LinearWeightGradArgs { x: x_bli, dy: &dh_blr })?;
        sink.add(at.site, "lora_down.weight", &ddown_ri)?;
        sink.add(at.site, "lora_up.weight", &dup_or)?;
        match need_dx {
            true => {
                let args = LinearBackwardArgs { dy: &dh_blr, weight_oi: &self.down, out };
                Ok(Some(exec.run::<LinearBackward>(&args)?))
            }
            false => Ok(None),
        }
    }

    /// The diagonal between `down` and `up`: its own transpose, so forward and backward share it.
    fn scale_and_mask(&self, at: &At, h_blr: Tensor) -> Result<Tensor> {
        let mut h_blr = (h_blr * self.scale)?;
        for mask in [&at.dropout.neuron, &at.dropout.rank].into_iter().flatten() {
            h_blr = h_blr.broadcast_mul(&mask.to_dtype(h_blr.dtype())?)?;
        }
        Ok(h_blr)
    }
}
