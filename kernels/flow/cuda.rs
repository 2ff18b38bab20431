//! Flow matching on the card, see `flow.cu`.

use candle_core::{DType, Tensor};

use super::{FlowLossArgs, FlowLossBackwardArgs, FlowLossOut, FlowMixArgs};
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::Result;

const FILE: &str = "flow/flow";

pub(super) fn mix(op: &'static str, gpu: &Gpu, a: &FlowMixArgs<'_>) -> Result<Tensor> {
    let (n, out) = (a.latents.elem_count(), gpu.empty(a.latents.shape(), DType::F32)?);
    let (latents, noise, sigma) = (View::new(op, a.latents)?, View::new(op, a.noise)?, View::new(op, a.sigma_b)?);
    let args = [
        Arg::tensor(&latents),
        Arg::tensor(&noise),
        Arg::ptr(sigma.address),
        Arg::ptr(View::new(op, &out)?.address),
        Arg::i64(n / a.latents.dims()[0]),
        Arg::i64(n),
    ];
    gpu.launch(FILE, "flow_mix", Launch::over(n, 1), &args)?;
    Ok(out)
}

pub(super) fn loss(op: &'static str, gpu: &Gpu, a: &FlowLossArgs<'_>) -> Result<FlowLossOut> {
    let b = a.pred.dims()[0];
    let loss_b = gpu.empty(b, DType::F32)?;
    let (pred, latents, noise) = (View::new(op, a.pred)?, View::new(op, a.latents)?, View::new(op, a.noise)?);
    let weight = a.weight_b.map(|w| View::new(op, w)).transpose()?;
    let args = [
        Arg::tensor(&pred),
        Arg::tensor(&latents),
        Arg::tensor(&noise),
        Arg::ptr(weight.as_ref().map_or(0, |w| w.address)),
        Arg::ptr(View::new(op, &loss_b)?.address),
        Arg::i64(a.pred.elem_count() / b),
    ];
    gpu.launch(FILE, "flow_loss", Launch::blocks((b, 1, 1), 1024), &args)?;
    Ok(FlowLossOut { loss_b })
}

pub(super) fn loss_backward(op: &'static str, gpu: &Gpu, a: &FlowLossBackwardArgs<'_>) -> Result<Tensor> {
    let (n, dpred) = (a.pred.elem_count(), gpu.empty(a.pred.shape(), DType::F32)?);
    let (pred, latents, noise) = (View::new(op, a.pred)?, View::new(op, a.latents)?, View::new(op, a.noise)?);
    let weight = a.weight_b.map(|w| View::new(op, w)).transpose()?;
    let args = [
        Arg::tensor(&pred),
        Arg::tensor(&latents),
        Arg::tensor(&noise),
        Arg::ptr(weight.as_ref().map_or(0, |w| w.address)),
        Arg::f32((2.0 * a.dloss / n as f64) as f32),
        Arg::ptr(View::new(op, &dpred)?.address),
        Arg::i64(n / a.pred.dims()[0]),
        Arg::i64(n),
    ];
    gpu.launch(FILE, "flow_loss_bwd", Launch::over(n, 1), &args)?;
    Ok(dpred)
}
