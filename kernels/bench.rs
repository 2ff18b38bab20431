//! Time of every kernel at the shapes of a training step, against what the card can do: what `wan-train bench ops` runs.

use candle_core::{DType, Tensor};

use crate::attention::{Attention, AttentionArgs, AttentionBackward, AttentionBackwardArgs};
use crate::fast_attention::FastAttention;
use crate::gate_residual::{GateResidual, GateResidualArgs, GateResidualBackward, GateResidualBackwardArgs};
use crate::gate_residual::{Residual, ResidualArgs};
use crate::gelu::{ActivationArgs, GeluTanh, GeluTanhBackward, GeluTanhBackwardArgs};
use crate::gpu::{Gpu, KernelsOf::*};
use crate::int8::{LinearInt8, LinearInt8Args, LinearInt8Backward, LinearInt8BackwardArgs};
use crate::linear::{
    eight, Linear, LinearArgs, LinearBackward, LinearBackwardArgs, LinearEight, LinearEightArgs, LinearEightBackward,
    LinearEightBackwardArgs, LinearFp8, LinearFp8Args, LinearWeightGrad, LinearWeightGradArgs,
};
use crate::norm::{
    After, LayerNormModulate, LayerNormModulateArgs, LayerNormModulateBackward, LayerNormModulateBackwardArgs,
    ResidualNorm, ResidualNormArgs, ResidualNormBackward, ResidualNormBackwardArgs, RmsNormRope, RmsNormRopeArgs,
    RmsNormRopeBackward, RmsNormRopeBackwardArgs,
};
use crate::{fp8, int8, Cost, Exec, Op, Result};

/// One timed op.
#[derive(Debug, Clone)]
pub struct Row {
    pub op: String,
    pub case: String,
    /// Median of the runs.
    pub ms: f64,
    pub cost: Cost,
}

impl Row {
    pub fn tflops(&self) -> f64 {
        self.cost.flops / self.ms / 1e9
    }

    pub fn gbytes(&self) -> f64 {
        self.cost.bytes / self.ms / 1e6
    }
}

/// Values that look like activations; their spread matters little for time.
fn random(gpu: &Gpu, shape: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1f32, shape, &gpu.device())?.to_dtype(dtype)?)
}

/// Median milliseconds of `runs` calls, after two that warm up.
fn time<O: Op>(exec: &Exec, gpu: &Gpu, case: String, args: &O::Args<'_>, runs: usize) -> Result<Row> {
    let mut all = Vec::with_capacity(runs);
    for run in 0..runs + 2 {
        let start = gpu.event()?;
        drop(exec.run::<O>(args)?);
        let end = gpu.event()?;
        let ms = start.elapsed_ms(&end).map_err(|e| crate::gpu::error("bench", e.to_string()))?;
        if run >= 2 {
            all.push(f64::from(ms));
        }
    }
    all.sort_by(f64::total_cmp);
    Ok(Row { op: O::NAME.into(), case, ms: all[runs / 2], cost: O::cost(args) })
}

/// All ops of a block of the 14B model at `l` tokens, LoRA of `rank`.
pub fn ops(gpu: &Gpu, compute: DType, l: usize, rank: usize) -> Result<Vec<Row>> {
    let exec = &Exec::Cuda { gpu: gpu.clone(), device: gpu.device(), compute };
    let (n, h, d, f, runs, eps) = (40, 128, 5120, 13824, 8, 1e-6);
    let mut rows = Vec::new();
    let case = |what: &str| format!("{l} tokens{what}");

    // Self-attention, a prompt of full length, and one of 120 tokens whose padding one key stands for.
    for (m, last_stands_for) in [(l, 1), (512, 1), (121, 392)] {
        let (q, k, v) = (
            random(gpu, &[1, l, n, h], compute)?,
            random(gpu, &[1, m, n, h], compute)?,
            random(gpu, &[1, m, n, h], compute)?,
        );
        let (q_blnh, k_bmnh, v_bmnh, d_o) = (&q, &k, &v, random(gpu, &[1, l, n, h], compute)?);
        // Where a card has kernels of its own, the ones that all cards run are timed as well.
        for (card, what) in match gpu.hopper() {
            true => &[(ThisCard, ", wgmma"), (Sm80, ", mma.sync"), (Sm86, ", mma.sync in 99 KB")][..],
            false => &[(ThisCard, ", mma.sync")],
        } {
            gpu.use_kernels_of(*card);
            let case = case(&format!(", {m} keys{what}"));
            let args = AttentionArgs { q_blnh, k_bmnh, v_bmnh, last_stands_for };
            rows.push(time::<Attention>(exec, gpu, case.clone(), &args, runs)?);
            if m == l && *card != Sm80 {
                rows.push(time::<FastAttention>(exec, gpu, case.clone(), &args, runs)?);
            }
            let o = exec.run::<Attention>(&args)?;
            let (o_blnh, lse_bnl, do_blnh) = (&o.o_blnh, &o.lse_bnl, &d_o);
            let args = AttentionBackwardArgs { q_blnh, k_bmnh, v_bmnh, o_blnh, lse_bnl, do_blnh, last_stands_for };
            rows.push(time::<AttentionBackward>(exec, gpu, case, &args, runs)?);
        }
        gpu.use_kernels_of(ThisCard);
    }
    for (o, i) in [(d, d), (f, d), (d, f), (rank, d), (d, rank), (rank.next_multiple_of(16), d)] {
        let (x, w, dy) =
            (random(gpu, &[1, l, i], compute)?, random(gpu, &[o, i], compute)?, random(gpu, &[1, l, o], compute)?);
        let (x, weight_oi, dy, bias, what) = (&x, &w, &dy, random(gpu, &[o], compute)?, format!(", {i} to {o}"));
        let args = LinearArgs { x, weight_oi, bias_o: Some(&bias), base: None, out: compute };
        rows.push(time::<Linear>(exec, gpu, case(&what), &args, runs)?);
        let args = LinearBackwardArgs { dy, weight_oi, base: None, out: compute };
        rows.push(time::<LinearBackward>(exec, gpu, case(&what), &args, runs)?);
        if o.min(i) < 256 {
            rows.push(time::<LinearWeightGrad>(exec, gpu, case(&what), &LinearWeightGradArgs { x, dy }, runs)?);
            let args = LinearArgs { x, weight_oi, bias_o: None, base: Some(dy.copy()?), out: compute };
            rows.push(time::<Linear>(exec, gpu, case(&format!("{what}, onto")), &args, runs)?);
        } else {
            let weight = fp8::Weight::quantize(weight_oi, fp8::Granularity::Block)?;
            let args = LinearFp8Args { x, weight: &weight, bias_o: Some(&bias), base: None, out: compute };
            rows.push(time::<LinearFp8>(exec, gpu, case(&what), &args, runs)?);
            if gpu.card().capability >= (8, 9) {
                let weight = eight::by_rows(&weight)?;
                let args = LinearEightArgs {
                    x,
                    rounded: None,
                    weight: &weight,
                    bias_o: Some(&bias),
                    base: None,
                    out: compute,
                };
                rows.push(time::<LinearEight>(exec, gpu, case(&what), &args, runs)?);
                let args = LinearEightBackwardArgs { dy, rounded: None, weight: &weight, base: None, out: compute };
                rows.push(time::<LinearEightBackward>(exec, gpu, case(&what), &args, runs)?);
            }
            let weight8 = int8::Weight::quantize(weight_oi)?;
            for card in if gpu.hopper() { &[ThisCard, Sm86][..] } else { &[ThisCard] } {
                gpu.use_kernels_of(*card);
                let case = case(&format!("{what}{}", if gpu.hopper() { "" } else { ", mma.sync" }));
                let args = LinearInt8Args {
                    x,
                    rounded: None,
                    weight: &weight8,
                    bias_o: Some(&bias),
                    base: None,
                    out: compute,
                };
                rows.push(time::<LinearInt8>(exec, gpu, case.clone(), &args, runs)?);
                let args = LinearInt8BackwardArgs { dy, weight: &weight8, base: None, out: compute };
                rows.push(time::<LinearInt8Backward>(exec, gpu, case, &args, runs)?);
            }
            gpu.use_kernels_of(ThisCard);
            let args = fp8::DequantizeArgs { weight: &weight, out: compute };
            rows.push(time::<fp8::Dequantize>(exec, gpu, format!("[{o}, {i}]"), &args, runs)?);
        }
    }
    let (x32, x, dy) =
        (random(gpu, &[1, l, d], DType::F32)?, random(gpu, &[1, l, d], compute)?, random(gpu, &[1, l, d], compute)?);
    let vector = random(gpu, &[1, d], DType::F32)?;
    let args = LayerNormModulateArgs { x_bld: &x32, shift: &vector, scale: &vector, eps, out: compute };
    rows.push(time::<LayerNormModulate>(exec, gpu, case(""), &args, runs)?);
    let (x_bld, dres_bld) = (&x32, Some(&x32));
    let args = LayerNormModulateBackwardArgs { x_bld, scale: &vector, dy_bld: &dy, dres_bld, eps, out: DType::F32 };
    rows.push(time::<LayerNormModulateBackward>(exec, gpu, case(""), &args, runs)?);
    let after = After::Modulation { shift: &vector, scale: &vector };
    let (gate, stream, out) = (Some(&vector), DType::F32, compute);
    let args = ResidualNormArgs { x_bld, branch_bld: &dy, gate, after, eps, stream, out };
    rows.push(time::<ResidualNorm>(exec, gpu, case(""), &args, runs)?);
    let dsum_bld = &x32;
    let args = ResidualNormBackwardArgs { sum_bld: x_bld, gate, after, dy_bld: &dy, dsum_bld, eps, stream, out };
    rows.push(time::<ResidualNormBackward>(exec, gpu, case(""), &args, runs)?);
    let (weight, angle) = (random(gpu, &[d], compute)?, random(gpu, &[l, h / 2], DType::F32)?);
    let (x_bld, weight_d, cos_lk, sin_lk, dy_blnh) = (&x, &weight, &angle, &angle, &dy.reshape((1, l, n, h))?);
    let args = RmsNormRopeArgs { x_bld, weight_d, cos_lk, sin_lk, eps, out: compute };
    rows.push(time::<RmsNormRope>(exec, gpu, case(""), &args, runs)?);
    let args = RmsNormRopeBackwardArgs { x_bld, weight_d, cos_lk, sin_lk, dy_blnh, eps, out: compute };
    rows.push(time::<RmsNormRopeBackward>(exec, gpu, case(""), &args, runs)?);
    let args = GateResidualArgs { x_bld: &x32, y_bld: &x, gate: &vector, out: DType::F32 };
    rows.push(time::<GateResidual>(exec, gpu, case(""), &args, runs)?);
    let args = GateResidualBackwardArgs { dout_bld: &x32, gate: &vector, out: compute };
    rows.push(time::<GateResidualBackward>(exec, gpu, case(""), &args, runs)?);
    rows.push(time::<Residual>(exec, gpu, case(""), &ResidualArgs { x: &x32, y: &x, out: DType::F32 }, runs)?);
    let (x, dy) = (random(gpu, &[1, l, f], compute)?, random(gpu, &[1, l, f], compute)?);
    rows.push(time::<GeluTanh>(exec, gpu, case(""), &ActivationArgs { x: &x }, runs)?);
    rows.push(time::<GeluTanhBackward>(exec, gpu, case(""), &GeluTanhBackwardArgs { x: &x, dy: &dy }, runs)?);
    Ok(rows)
}
