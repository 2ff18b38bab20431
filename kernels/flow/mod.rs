//! Flow matching: the noised sample, the loss on the predicted velocity, and its gradient. All fp32; `compute` plays no
//! part. Axes after the batch axis are free (`..`): latents are [b, c, f, y, x].

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, num, Cost, Op, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// `x_t = (1 − σ)·x + σ·noise`, σ per sample.
pub struct FlowMix;

/// `latents` and `noise` [b, ..], `sigma_b` F32 [b]; the result is F32 [b, ..].
pub struct FlowMixArgs<'a> {
    pub latents: &'a Tensor,
    pub noise: &'a Tensor,
    pub sigma_b: &'a Tensor,
}

/// `mean(w·(pred − (noise − latents))²)`, w per sample.
pub struct FlowLoss;

/// `pred`, `latents`, `noise` [b, ..], `weight_b` F32 [b] (absent: 1).
pub struct FlowLossArgs<'a> {
    pub pred: &'a Tensor,
    pub latents: &'a Tensor,
    pub noise: &'a Tensor,
    pub weight_b: Option<&'a Tensor>,
}

pub struct FlowLossOut {
    /// Each sample's weighted mean, F32 [b].
    pub loss_b: Tensor,
}

impl FlowLossOut {
    /// The losses of the samples, and their mean, which is what is trained on. Waits for the card.
    pub fn read(&self) -> Result<(f32, Vec<f32>)> {
        let each = self.loss_b.to_vec1::<f32>()?;
        Ok((each.iter().sum::<f32>() / each.len() as f32, each))
    }
}

/// `dpred` of [`FlowLoss`].
pub struct FlowLossBackward;

/// The forward's arguments; `dloss` multiplies the result (loss scale over accumulation steps).
pub struct FlowLossBackwardArgs<'a> {
    pub pred: &'a Tensor,
    pub latents: &'a Tensor,
    pub noise: &'a Tensor,
    pub weight_b: Option<&'a Tensor>,
    pub dloss: f64,
}

/// The velocity that the model learns: `noise − latents`, F32.
pub fn velocity(latents: &Tensor, noise: &Tensor) -> Result<Tensor> {
    Ok((num::f32(noise)? - num::f32(latents)?)?)
}

impl Op for FlowMix {
    type Args<'a> = FlowMixArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "flow_mix";

    fn check(a: &FlowMixArgs<'_>) -> Result<()> {
        check_pair(Self::NAME, "latents", a.latents, "noise", a.noise)?;
        check_per_sample(Self::NAME, "sigma_b", a.sigma_b, a.latents)
    }

    fn cost(a: &FlowMixArgs<'_>) -> Cost {
        let elements = a.latents.elem_count() as f64;
        Cost { flops: 3.0 * elements, bytes: gate::bytes(a.latents) + gate::bytes(a.noise) + 4.0 * elements }
    }

    fn reference(a: &FlowMixArgs<'_>, _compute: DType) -> Result<Tensor> {
        let sigma = per_sample(a.sigma_b, a.latents.rank())?;
        let clean = num::f32(a.latents)?.broadcast_mul(&sigma.affine(-1.0, 1.0)?)?;
        Ok((clean + num::f32(a.noise)?.broadcast_mul(&sigma)?)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &FlowMixArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::mix(Self::NAME, gpu, a)
    }
}

impl Op for FlowLoss {
    type Args<'a> = FlowLossArgs<'a>;
    type Out = FlowLossOut;
    const NAME: &'static str = "flow_loss";

    fn check(a: &FlowLossArgs<'_>) -> Result<()> {
        check_loss(Self::NAME, a.pred, a.latents, a.noise, a.weight_b)
    }

    fn cost(a: &FlowLossArgs<'_>) -> Cost {
        let bytes = gate::bytes(a.pred) + gate::bytes(a.latents) + gate::bytes(a.noise);
        Cost { flops: 4.0 * a.pred.elem_count() as f64, bytes }
    }

    fn reference(a: &FlowLossArgs<'_>, _compute: DType) -> Result<FlowLossOut> {
        let mut loss_b = (num::f32(a.pred)? - velocity(a.latents, a.noise)?)?.sqr()?;
        // Axis by axis: a mean of means of equal counts, which keeps fp32 sums short.
        while loss_b.rank() > 1 {
            loss_b = loss_b.mean(loss_b.rank() - 1)?;
        }
        if let Some(weight_b) = a.weight_b {
            loss_b = (loss_b * weight_b)?;
        }
        Ok(FlowLossOut { loss_b })
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &FlowLossArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<FlowLossOut> {
        cuda::loss(Self::NAME, gpu, a)
    }
}

impl Op for FlowLossBackward {
    type Args<'a> = FlowLossBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "flow_loss_backward";

    fn check(a: &FlowLossBackwardArgs<'_>) -> Result<()> {
        check_loss(Self::NAME, a.pred, a.latents, a.noise, a.weight_b)
    }

    fn cost(a: &FlowLossBackwardArgs<'_>) -> Cost {
        let elements = a.pred.elem_count() as f64;
        let bytes = gate::bytes(a.pred) + gate::bytes(a.latents) + gate::bytes(a.noise) + 4.0 * elements;
        Cost { flops: 4.0 * elements, bytes }
    }

    fn reference(a: &FlowLossBackwardArgs<'_>, _compute: DType) -> Result<Tensor> {
        let error = (num::f32(a.pred)? - velocity(a.latents, a.noise)?)?;
        let slope = 2.0 * a.dloss / a.pred.elem_count() as f64;
        Ok(match a.weight_b {
            Some(weight_b) => error.broadcast_mul(&(per_sample(weight_b, error.rank())? * slope)?)?,
            None => (error * slope)?,
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &FlowLossBackwardArgs<'_>, gpu: &Gpu, _compute: DType) -> Result<Tensor> {
        cuda::loss_backward(Self::NAME, gpu, a)
    }
}

/// [b] as [b, 1, ..] of the given rank.
fn per_sample(t_b: &Tensor, rank: usize) -> Result<Tensor> {
    let mut shape = vec![1; rank];
    shape[0] = t_b.dim(0)?;
    Ok(t_b.reshape(shape)?)
}

fn check_pair(op: &'static str, a_name: &'static str, a: &Tensor, b_name: &'static str, b: &Tensor) -> Result<()> {
    gate::rows(op, a_name, a)?;
    gate::float(op, a_name, a)?;
    gate::float(op, b_name, b)?;
    gate::shape(op, b_name, b, a.dims(), "[b, ..]")
}

fn check_per_sample(op: &'static str, name: &'static str, t_b: &Tensor, samples: &Tensor) -> Result<()> {
    gate::dtype(op, name, t_b, DType::F32)?;
    gate::shape(op, name, t_b, &samples.dims()[..1], "[b]")
}

fn check_loss(
    op: &'static str,
    pred: &Tensor,
    latents: &Tensor,
    noise: &Tensor,
    weight_b: Option<&Tensor>,
) -> Result<()> {
    check_pair(op, "pred", pred, "latents", latents)?;
    check_pair(op, "pred", pred, "noise", noise)?;
    match weight_b {
        Some(weight_b) => check_per_sample(op, "weight_b", weight_b, pred),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
