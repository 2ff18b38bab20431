//! The flow-matching loss of a batch and its gradient with respect to the prediction.

use anyhow::Result;
use candle_core::Tensor;
use wan_kernels::flow::{FlowLoss, FlowLossArgs, FlowLossBackward, FlowLossBackwardArgs};
use wan_kernels::Exec;

use super::batch::Batch;

/// Loss values on the host, gradient on the device.
pub struct Loss {
    /// Mean over the batch.
    pub mean: f32,
    /// Of each sample; their mean is `mean`.
    pub per_sample: Vec<f32>,
    /// `dloss · d mean / d pred`, shape of the prediction.
    pub dpred: Tensor,
}

/// `mean(w (pred - (noise - latents))²)` over the frames that carry loss, and its gradient times `dloss`.
pub fn flow(exec: &Exec, batch: &Batch, pred: &Tensor, dloss: f64) -> Result<Loss> {
    let frames = pred.dim(2)?;
    let skipped = usize::from(batch.clean_first_frame);
    let cut = |t: &Tensor| match skipped {
        0 => Ok(t.clone()),
        n => t.narrow(2, n, frames - n)?.contiguous(),
    };
    let (pred, latents, noise) = (cut(pred)?, cut(&batch.latents)?, cut(&batch.noise)?);
    let weight_b = batch.weight_b.as_ref();
    let out = exec.run::<FlowLoss>(&FlowLossArgs { pred: &pred, latents: &latents, noise: &noise, weight_b })?;
    let args = FlowLossBackwardArgs { pred: &pred, latents: &latents, noise: &noise, weight_b, dloss };
    let mut dpred = exec.run::<FlowLossBackward>(&args)?;
    if skipped > 0 {
        dpred = dpred.pad_with_zeros(2, skipped, 0)?;
    }
    let (mean, per_sample) = out.read()?;
    Ok(Loss { mean, per_sample, dpred })
}
