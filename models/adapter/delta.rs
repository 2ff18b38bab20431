//! LoHa and LoKr: the change of the weight is made as a whole matrix, applied, and its gradient taken apart again.

use candle_core::{DType, Tensor};
use wan_kernels::linear::{
    Linear, LinearArgs, LinearBackward, LinearBackwardArgs, LinearWeightGrad, LinearWeightGradArgs,
};

use super::{At, Dropout, Dx, Loha, Lokr, LokrW2};
use crate::wan::GradSink;
use crate::Result;

/// An adapter whose effect is `Δy = x ΔWᵀ`.
pub trait WeightDelta {
    /// `ΔW` `[o, i]` fp32, with its scale.
    fn delta(&self) -> Result<Tensor>;

    /// From `dΔW` `[o, i]` fp32 to the gradients of the parameters.
    fn delta_backward(&self, site: &str, ddelta_oi: &Tensor, sink: &mut dyn GradSink) -> Result<()>;

    /// `x` `[B, L, i]` -> `Δy` `[B, L, o]` in the compute dtype.
    fn forward(&self, at: &At, x_bli: &Tensor) -> Result<Tensor> {
        let delta_oi = mask_rows(self.delta()?, at.dropout)?;
        let args = LinearArgs { x: x_bli, weight_oi: &delta_oi, bias_o: None, base: None, out: at.exec.compute() };
        Ok(at.exec.run::<Linear>(&args)?)
    }

    /// Hands the parameters' gradients to the sink (`+=` there); returns its share of `dx`, onto the base, where that is wanted.
    fn backward(
        &self,
        at: &At,
        x_bli: &Tensor,
        dy_blo: &Tensor,
        dx: Dx,
        sink: &mut dyn GradSink,
    ) -> Result<Option<Tensor>> {
        let ddelta_oi = at.exec.run::<LinearWeightGrad>(&LinearWeightGradArgs { x: x_bli, dy: dy_blo })?;
        self.delta_backward(at.site, &mask_rows(ddelta_oi, at.dropout)?, sink)?;
        let Dx::Onto(base) = dx else { return Ok(None) };
        let delta_oi = mask_rows(self.delta()?, at.dropout)?;
        let args = LinearBackwardArgs { dy: dy_blo, weight_oi: &delta_oi, base, out: at.exec.compute() };
        Ok(Some(at.exec.run::<LinearBackward>(&args)?))
    }
}

/// Rank dropout of these adapters drops output rows of ΔW.
fn mask_rows(delta_oi: Tensor, dropout: &Dropout) -> Result<Tensor> {
    match &dropout.rank {
        Some(mask_o) => Ok(delta_oi.broadcast_mul(&mask_o.to_dtype(DType::F32)?.unsqueeze(1)?)?),
        None => Ok(delta_oi),
    }
}

fn f32(t: &Tensor) -> Result<Tensor> {
    Ok(t.to_dtype(DType::F32)?)
}

impl WeightDelta for Loha {
    fn delta(&self) -> Result<Tensor> {
        let w1_oi = f32(&self.w1_a)?.matmul(&f32(&self.w1_b)?)?;
        let w2_oi = f32(&self.w2_a)?.matmul(&f32(&self.w2_b)?)?;
        Ok(((w1_oi * w2_oi)? * self.scale)?)
    }

    fn delta_backward(&self, site: &str, ddelta_oi: &Tensor, sink: &mut dyn GradSink) -> Result<()> {
        let (w1_a, w1_b) = (f32(&self.w1_a)?, f32(&self.w1_b)?);
        let (w2_a, w2_b) = (f32(&self.w2_a)?, f32(&self.w2_b)?);
        let g_oi = (ddelta_oi * self.scale)?;
        let dw1_oi = (&g_oi * w2_a.matmul(&w2_b)?)?;
        let dw2_oi = (g_oi * w1_a.matmul(&w1_b)?)?;
        sink.add(site, "hada_w1_a", &dw1_oi.matmul(&w1_b.t()?)?)?;
        sink.add(site, "hada_w1_b", &w1_a.t()?.matmul(&dw1_oi)?)?;
        sink.add(site, "hada_w2_a", &dw2_oi.matmul(&w2_b.t()?)?)?;
        sink.add(site, "hada_w2_b", &w2_a.t()?.matmul(&dw2_oi)?)
    }
}

impl Lokr {
    /// The large factor as a matrix `[o2, i2]` fp32.
    fn w2_full(&self) -> Result<Tensor> {
        match &self.w2 {
            LokrW2::Full(w2) => f32(w2),
            LokrW2::LowRank { a, b } => Ok(f32(a)?.matmul(&f32(b)?)?),
        }
    }
}

impl WeightDelta for Lokr {
    fn delta(&self) -> Result<Tensor> {
        let (w1, w2) = (f32(&self.w1)?, self.w2_full()?);
        let ((o1, i1), (o2, i2)) = (w1.dims2()?, w2.dims2()?);
        let kron = w1.reshape((o1, 1, i1, 1))?.broadcast_mul(&w2.reshape((1, o2, 1, i2))?)?;
        Ok((kron.reshape((o1 * o2, i1 * i2))? * self.scale)?)
    }

    fn delta_backward(&self, site: &str, ddelta_oi: &Tensor, sink: &mut dyn GradSink) -> Result<()> {
        let (w1, w2) = (f32(&self.w1)?, self.w2_full()?);
        let ((o1, i1), (o2, i2)) = (w1.dims2()?, w2.dims2()?);
        // [o1, o2, i1, i2] -> a matrix of (o1, i1) by (o2, i2), which each factor contracts from its side.
        let g = (ddelta_oi.reshape((o1, o2, i1, i2))?.permute((0, 2, 1, 3))?.contiguous()? * self.scale)?;
        let g = g.reshape((o1 * i1, o2 * i2))?;
        let dw1 = g.matmul(&w2.reshape((o2 * i2, 1))?)?.reshape((o1, i1))?;
        let dw2 = w1.reshape((1, o1 * i1))?.matmul(&g)?.reshape((o2, i2))?;
        sink.add(site, "lokr_w1", &dw1)?;
        match &self.w2 {
            LokrW2::Full(_) => sink.add(site, "lokr_w2", &dw2),
            LokrW2::LowRank { a, b } => {
                sink.add(site, "lokr_w2_a", &dw2.matmul(&f32(b)?.t()?)?)?;
                sink.add(site, "lokr_w2_b", &f32(a)?.t()?.matmul(&dw2)?)
            }
        }
    }
}
