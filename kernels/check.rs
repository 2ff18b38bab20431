//! Kernels against their definitions, on the card at hand: what `wan-train bench ops --check` runs.
//!
//! Each case is one piece of code that runs three times on the same rounded inputs: as the definition (plain fp32 on the
//! CPU), as the naive low-precision answer (the reference with 16-bit operands), and as the kernel. The kernel is right
//! when its error is at most twice the naive one's. Sizes are ugly on purpose.

use candle_core::{DType, Device, Tensor};

use crate::attention::{Attention, AttentionArgs, AttentionBackward, AttentionBackwardArgs, AttentionOut};
use crate::fast_attention::FastAttention;
use crate::flow::{FlowLoss, FlowLossArgs, FlowLossBackward, FlowLossBackwardArgs, FlowMix, FlowMixArgs};
use crate::gate_residual::{
    GateResidual, GateResidualArgs, GateResidualBackward, GateResidualBackwardArgs, Residual, ResidualArgs,
};
use crate::gelu::{ActivationArgs, GeluErf, GeluTanh, GeluTanhBackward, GeluTanhBackwardArgs, Silu};
use crate::gpu::{Gpu, KernelsOf::*};
use crate::linear::{
    Linear, LinearArgs, LinearBackward, LinearBackwardArgs, LinearFp8, LinearFp8Args, LinearFp8Backward,
    LinearFp8BackwardArgs, LinearStackBackward, LinearStackBackwardArgs, LinearWeightGrad, LinearWeightGradArgs, Stack,
};
use crate::philox::{stream, Philox};
use crate::{adamw, adamw8bit, fp8, Exec, Result, CHECK_GROUPS};

mod caching;
mod exact;
mod norms;

/// One compared result.
#[derive(Debug, Clone)]
pub struct Row {
    pub op: String,
    pub case: String,
    /// ‖kernel − definition‖ / ‖definition‖, and the same of the naive answer.
    pub error: f64,
    pub naive: f64,
    pub right: bool,
}

/// Where and how one of the three runs takes place.
struct Place {
    exec: Exec,
    /// What inputs are rounded to.
    rounded: DType,
    /// What they are held in, and results asked for in.
    held: DType,
}

impl Place {
    /// Standard normals, a set for each seed, in the place's dtype.
    fn normal(&self, seed: u64, shape: &[usize]) -> Result<Tensor> {
        let values = Philox::new(seed, stream::INIT, 0, 0).normal(shape, &Device::Cpu)?;
        Ok(values.to_dtype(self.rounded)?.to_dtype(self.held)?.to_device(self.exec.device())?)
    }

    /// The same in F32.
    fn full(&self, seed: u64, shape: &[usize]) -> Result<Tensor> {
        Ok(Philox::new(seed, stream::INIT, 0, 0).normal(shape, &Device::Cpu)?.to_device(self.exec.device())?)
    }
}

type Case<'a> = &'a dyn Fn(&Place) -> Result<Vec<Tensor>>;

struct Checker<'a> {
    exec: &'a dyn Fn(DType) -> Exec,
    rows: Vec<Row>,
}

fn values(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn distance(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(f64::from(*g) - f64::from(*w))).sum();
    let size: f64 = want.iter().map(|w| square(f64::from(*w))).sum();
    (error / size.max(1e-60)).sqrt()
}

impl Checker<'_> {
    fn run(&mut self, op: &str, case: &str, dtypes: &[DType], body: Case<'_>) -> Result<()> {
        for &dtype in dtypes {
            let cpu = |compute| Exec::Reference { device: Device::Cpu, compute };
            let want = body(&Place { exec: cpu(DType::F32), rounded: dtype, held: DType::F32 })?;
            let naive = body(&Place { exec: cpu(dtype), rounded: dtype, held: dtype })?;
            let got = body(&Place { exec: (self.exec)(dtype), rounded: dtype, held: dtype })?;
            for (part, ((got, want), naive)) in got.iter().zip(&want).zip(&naive).enumerate() {
                let want_values = values(want)?;
                let got_values = values(got)?;
                let error = distance(&got_values, &want_values);
                let naive = distance(&values(naive)?, &want_values);
                // Where the exact answer is nothing but rounding (one key: its softmax is 1 and has no gradient), errors are
                // held against the inputs, which are of size 1.
                let nothing = got_values.iter().chain(&want_values).all(|v| v.abs() < 2e-5);
                let right = got.dims() == want.dims() && (nothing || error <= 2.0 * naive + 2e-6);
                let case = format!("{case} {dtype:?} #{part}");
                self.rows.push(Row { op: op.to_string(), case, error, naive, right });
            }
        }
        Ok(())
    }
}

const HALVES: &[DType] = &[DType::BF16, DType::F16];
const ALL: &[DType] = &[DType::BF16, DType::F16, DType::F32];

/// Every kernel at sizes that fit nothing; with `only`, those of one of the [`CHECK_GROUPS`].
pub fn all(gpu: &Gpu, only: Option<&str>) -> Result<Vec<Row>> {
    let exec = |compute| Exec::Cuda { gpu: gpu.clone(), device: gpu.device(), compute };
    let mut c = Checker { exec: &exec, rows: Vec::new() };
    for group in CHECK_GROUPS.iter().filter(|group| only.is_none_or(|only| only == **group)) {
        match *group {
            "norms" => norms::all(&mut c)?,
            "elementwise" => elementwise(&mut c)?,
            "linears" => linears(&mut c)?,
            "attention" => attention(&mut c, "attention")?,
            "fast_attention" => fast_attention(&mut c, "fast_attention")?,
            // Elsewhere than on Hopper these kernels are the ones of the group before.
            "portable" if gpu.hopper() => {
                for (card, what) in [(Sm80, "attention, mma.sync"), (Sm86, "attention, mma.sync in 99 KB")] {
                    gpu.use_kernels_of(card);
                    attention(&mut c, what)?;
                }
                fast_attention(&mut c, "fast_attention, mma.sync")?;
                caching::convolutions(&mut c, "causal_conv3d in 99 KB")?;
                gpu.use_kernels_of(ThisCard);
            }
            "flow" => flow(&mut c)?,
            "caching" => caching::all(&mut c)?,
            "exact" => c.rows.extend(exact::all(gpu)?),
            "optimizers" => c.rows.extend(optimizers(gpu)?),
            "portable" => {}
            other => unreachable!("group {other} has no kernels"),
        }
    }
    Ok(c.rows)
}

fn elementwise(c: &mut Checker<'_>) -> Result<()> {
    for shape in [&[1usize, 1, 1][..], &[2, 97, 24], &[1, 33, 13], &[1, 129, 5120]] {
        let (b, l, d) = (shape[0], shape[1], shape[2]);
        let case = format!("{shape:?}");
        c.run("activations", &case, ALL, &|p| {
            let (x, dy) = ((p.normal(1, shape)? * 3.0)?, p.normal(2, shape)?);
            let args = ActivationArgs { x: &x };
            let back = GeluTanhBackwardArgs { x: &x, dy: &dy };
            let (exact, silu) = (p.exec.run::<GeluErf>(&args)?, p.exec.run::<Silu>(&args)?);
            Ok(vec![p.exec.run::<GeluTanh>(&args)?, p.exec.run::<GeluTanhBackward>(&back)?, exact, silu])
        })?;
        c.run("gate_residual", &case, ALL, &|p| {
            let (x, y) = (p.full(1, shape)?, p.normal(2, shape)?);
            let (gate, per_token, out) = (p.full(3, &[b, d])?, p.full(4, &[b, l, d])?, p.held);
            let (x_bld, y_bld) = (&x, &y);
            let gated = p.exec.run::<GateResidual>(&GateResidualArgs { x_bld, y_bld, gate: &gate, out })?;
            let back = GateResidualBackwardArgs { dout_bld: &x, gate: &per_token, out };
            let sum = p.exec.run::<Residual>(&ResidualArgs { x: &x, y: &y, out: DType::F32 })?;
            Ok(vec![gated, p.exec.run::<GateResidualBackward>(&back)?, sum])
        })?;
    }
    Ok(())
}

fn linears(c: &mut Checker<'_>) -> Result<()> {
    for (t, i, o) in [(1, 64, 128), (97, 5120, 42), (1025, 42, 320), (130, 256, 512)] {
        let case = format!("[{t}, {i}] x [{o}, {i}]");
        c.run("linear", &case, ALL, &|p| {
            let (x, dy) = (p.normal(1, &[1, t, i])?, p.normal(2, &[1, t, o])?);
            let (w, bias_o) = ((p.full(3, &[o, i])? * 0.1)?.to_dtype(p.rounded)?.to_dtype(p.held)?, p.normal(4, &[o])?);
            let (x, dy, weight_oi) = (&x, &dy, &w);
            let run = |base, out| p.exec.run::<Linear>(&LinearArgs { x, weight_oi, bias_o: Some(&bias_o), base, out });
            let back = |base| p.exec.run::<LinearBackward>(&LinearBackwardArgs { dy, weight_oi, base, out: p.held });
            let dw = p.exec.run::<LinearWeightGrad>(&LinearWeightGradArgs { x, dy })?;
            // One each: the sum may be written over it.
            let base_o = || p.normal(5, &[1, t, o]).map(Some);
            let (added_f32, added) = (run(base_o()?, DType::F32)?, run(base_o()?, p.held)?);
            let back_added = back(Some(p.normal(6, &[1, t, i])?))?;
            Ok(vec![run(None, p.held)?, run(None, DType::F32)?, back(None)?, dw, added_f32, added, back_added])
        })?;
    }
    c.run("linear_fp8", "[97, 320] x [256, 320]", HALVES, &|p| {
        let (x, dy, bias_o) = (p.normal(1, &[97, 320])?, p.normal(2, &[97, 256])?, p.normal(3, &[256])?);
        let dense = Philox::new(4, stream::INIT, 0, 0).normal(&[256, 320], &Device::Cpu)?.to_dtype(p.rounded)?;
        let weight = fp8::Weight::quantize(&dense, fp8::Granularity::Block)?.to_device(p.exec.device())?;
        let (x, dy, weight, out) = (&x, &dy, &weight, p.held);
        let run = |base| p.exec.run::<LinearFp8>(&LinearFp8Args { x, weight, bias_o: Some(&bias_o), base, out });
        let back = |base| p.exec.run::<LinearFp8Backward>(&LinearFp8BackwardArgs { dy, weight, base, out });
        let (base_o, base_i) = (p.normal(5, &[97, 256])?, p.normal(6, &[97, 320])?);
        Ok(vec![run(None)?, back(None)?, run(Some(base_o))?, back(Some(base_i))?])
    })?;
    // Ranks that are filled up, columns that are read and written where they lie in a wider matrix.
    for (l, i, ranks) in [(1, 64, [16, 16, 16]), (97, 192, [42, 7, 42]), (1025, 320, [4, 48, 16])] {
        c.run("linear_stack", &format!("[1, {l}, {i}], ranks {ranks:?}"), ALL, &|p| {
            let weight = |seed, shape: &[usize]| -> Result<Tensor> {
                Ok((p.full(seed, shape)? * 0.1)?.to_dtype(p.rounded)?.to_dtype(p.held)?)
            };
            let downs = [weight(1, &[ranks[0], i])?, weight(2, &[ranks[1], i])?, weight(3, &[ranks[2], i])?];
            let ups = [weight(4, &[96, ranks[0]])?, weight(5, &[320, ranks[1]])?, weight(6, &[33, ranks[2]])?];
            let stack = Stack::new(&p.exec, &[(&downs[0], &ups[0]), (&downs[1], &ups[1]), (&downs[2], &ups[2])])?;
            let x = p.normal(7, &[1, l, i])?;
            let dys = [p.normal(8, &[1, l, 96])?, p.normal(9, &[1, l, 320])?, p.normal(10, &[1, l, 33])?];
            let args = LinearArgs { x: &x, weight_oi: &stack.down_ri, bias_o: None, base: None, out: p.held };
            let h = p.exec.run::<Linear>(&args)?;
            let args = LinearStackBackwardArgs { dys: &dys.each_ref(), ups_or: &stack.ups_or };
            let dh = p.exec.run::<LinearStackBackward>(&args)?;
            let ddown = p.exec.run::<LinearWeightGrad>(&LinearWeightGradArgs { x: &x, dy: &dh })?;
            let mut results = Vec::new();
            for (j, (at, r)) in stack.parts().enumerate() {
                // What fills a rank up is not compared.
                let rank = ranks[j];
                let h_blr = h.narrow(2, at, r)?;
                let args = LinearArgs { x: &h_blr, weight_oi: &stack.ups_or[j], bias_o: None, base: None, out: p.held };
                results.push(p.exec.run::<Linear>(&args)?);
                let dup = p.exec.run::<LinearWeightGrad>(&LinearWeightGradArgs { x: &h_blr, dy: &dys[j] })?;
                results.extend([h.narrow(2, at, rank)?, dh.narrow(2, at, rank)?]);
                results.extend([ddown.narrow(0, at, rank)?, dup.narrow(1, 0, rank)?]);
            }
            let base = Some(p.normal(12, &[1, l, i])?);
            let args = LinearBackwardArgs { dy: &dh, weight_oi: &stack.down_ri, base, out: p.held };
            results.push(p.exec.run::<LinearBackward>(&args)?);
            Ok(results)
        })?;
    }
    Ok(())
}

fn attention(c: &mut Checker<'_>, op: &str) -> Result<()> {
    let shapes = [
        (1, 97, 97, 9, 128, 1),
        (2, 1, 1, 3, 128, 1),
        (1, 1025, 513, 2, 128, 1),
        (2, 130, 769, 3, 128, 1),
        (1, 1, 300, 9, 128, 1),
        (2, 130, 769, 3, 64, 1),
        (1, 50, 512, 3, 16, 1),
        // Ends in the middle, at the end and behind the end of a tile, and a single key.
        (1, 1025, 121, 2, 128, 392),
        (2, 130, 256, 3, 128, 257),
        (1, 97, 385, 3, 128, 7),
        (1, 70, 1, 3, 128, 512),
        (2, 130, 33, 3, 64, 480),
        (1, 50, 100, 3, 16, 413),
    ];
    for (b, l, m, n, h, last_stands_for) in shapes {
        let times = if last_stands_for > 1 { format!(", the last {last_stands_for} times") } else { String::new() };
        c.run(op, &format!("[{b}, {l}, {n}, {h}] x {m}{times}"), HALVES, &|p| {
            let (q, k) = (p.normal(1, &[b, l, n, h])?, p.normal(2, &[b, m, n, h])?);
            let (v, d_o) = (p.normal(3, &[b, m, n, h])?, p.normal(4, &[b, l, n, h])?);
            let (q_blnh, k_bmnh, v_bmnh, do_blnh) = (&q, &k, &v, &d_o);
            let o = p.exec.run::<Attention>(&AttentionArgs { q_blnh, k_bmnh, v_bmnh, last_stands_for })?;
            let (o_blnh, lse_bnl) = (&o.o_blnh, &o.lse_bnl);
            let args = AttentionBackwardArgs { q_blnh, k_bmnh, v_bmnh, o_blnh, lse_bnl, do_blnh, last_stands_for };
            let d = p.exec.run::<AttentionBackward>(&args)?;
            let again = p.exec.run::<AttentionBackward>(&args)?;
            let same = values(&again.dq_blnh)? == values(&d.dq_blnh)?;
            let same = Tensor::full(if same { 1f32 } else { 0.0 }, 1, &Device::Cpu)?;
            Ok(vec![o.o_blnh, o.lse_bnl, d.dq_blnh, d.dk_bmnh, d.dv_bmnh, same])
        })?;
    }
    Ok(())
}

/// Against attention in full; the definition in 8 bits is the naive answer. Twice on the card: the same bits.
fn fast_attention(c: &mut Checker<'_>, op: &str) -> Result<()> {
    // Scores spread by 1 and by 3. One tile, ends inside and at the end of a tile, an odd number of tiles, many.
    let shapes = [
        (1, 97, 97, 9, 128, 1.0),
        (2, 130, 256, 3, 128, 3.0),
        (1, 1025, 513, 2, 128, 1.0),
        (2, 129, 769, 3, 128, 3.0),
        (1, 64, 2100, 2, 128, 1.0),
        (1, 1, 1, 3, 128, 1.0),
        (1, 50, 512, 3, 64, 1.0),
    ];
    for (b, l, m, n, h, spread) in shapes {
        c.run(op, &format!("[{b}, {l}, {n}, {h}] x {m}, spread by {spread}"), HALVES, &|p| {
            let q = (p.normal(1, &[b, l, n, h])? * spread)?;
            let (k, v) = (p.normal(2, &[b, m, n, h])?, p.normal(3, &[b, m, n, h])?);
            let args = AttentionArgs { q_blnh: &q, k_bmnh: &k, v_bmnh: &v, last_stands_for: 1 };
            if p.held == DType::F32 {
                let o = p.exec.run::<Attention>(&args)?;
                return Ok(vec![o.o_blnh, o.lse_bnl, Tensor::ones(1, DType::F32, &Device::Cpu)?]);
            }
            let (o, again) = (p.exec.run::<FastAttention>(&args)?, p.exec.run::<FastAttention>(&args)?);
            let bits = |o: &AttentionOut| -> Result<_> { Ok((values(&o.o_blnh)?, values(&o.lse_bnl)?)) };
            let same = if bits(&o)? == bits(&again)? { 1f32 } else { 0.0 };
            Ok(vec![o.o_blnh, o.lse_bnl, Tensor::full(same, 1, &Device::Cpu)?])
        })?;
    }
    Ok(())
}

fn flow(c: &mut Checker<'_>) -> Result<()> {
    let shape = &[2, 3, 5, 7, 11][..];
    c.run("flow", "[2, 3, 5, 7, 11]", ALL, &|p| {
        let (latents, noise, pred) = (&p.normal(1, shape)?, &p.normal(2, shape)?, &p.normal(3, shape)?);
        let (sigma_b, weight_b) = (&p.full(4, &[2])?, &p.full(5, &[2])?);
        let mixed = p.exec.run::<FlowMix>(&FlowMixArgs { latents, noise, sigma_b })?;
        let loss = p.exec.run::<FlowLoss>(&FlowLossArgs { pred, latents, noise, weight_b: Some(weight_b) })?;
        let args = FlowLossBackwardArgs { pred, latents, noise, weight_b: None, dloss: 0.5 };
        Ok(vec![mixed, loss.loss_b, p.exec.run::<FlowLossBackward>(&args)?])
    })
}

/// A few steps beside the CPU's; fp32 sums in another order, so not to the bit.
fn optimizers(gpu: &Gpu) -> Result<Vec<Row>> {
    let (n, card) = (4096 + 300 + 700, gpu.device());
    let normal = |seed| Philox::new(seed, stream::INIT, 0, 0).normal(&[n], &Device::Cpu);
    let (start, grads) = (normal(1)?.to_vec1::<f32>()?, normal(2)?.to_vec1::<f32>()?);
    let adamw = adamw::AdamW::default();
    let flat = |v: &[f32]| Tensor::from_slice(v, n, &card);
    let row = |op: &str, got: &[f32], want: &[f32]| {
        let moved: Vec<f32> = want.iter().zip(&start).map(|(w, s)| w - s).collect();
        let got: Vec<f32> = got.iter().zip(&start).map(|(g, s)| g - s).collect();
        let error = distance(&got, &moved);
        Row { op: op.into(), case: "4 steps".into(), error, naive: 1e-5, right: error < 1e-4 }
    };
    let (mut p, mut m, mut v) = (start.clone(), vec![0f32; n], vec![0f32; n]);
    let (p_card, g_card, m_card, v_card) = (flat(&start)?, flat(&grads)?, flat(&m)?, flat(&v)?);
    let ranges = [(0..300, 1e-3), (300..n, 2e-3)];
    for number in 1..=4 {
        let at = adamw::Step { number, lr: 0.0, grad_scale: 0.7 };
        adamw::step_ranges(&adamw, &at, &ranges, &mut p, &grads, &mut m, &mut v)?;
        adamw::cuda::step_ranges(gpu, &adamw, &at, &ranges, [&p_card, &g_card, &m_card, &v_card])?;
    }
    let mut rows = vec![row("adamw", &p_card.to_vec1::<f32>()?, &p)];
    let (got, want) = (adamw::cuda::global_norm(gpu, &g_card)?, adamw::global_norm(&grads));
    let error = (got - want).abs() / want;
    rows.push(Row { op: "global_norm".into(), case: n.to_string(), error, naive: 1e-12, right: error < 1e-12 });

    let parts = [0..4396, 4396..n].map(|range| adamw8bit::cuda::Part { plus: range.start > 0, range });
    let mut moments: Vec<_> = parts.iter().map(|p| adamw8bit::Moments::new(p.range.len())).collect();
    let mut state = adamw8bit::cuda::State::new(gpu, parts.to_vec())?;
    let (mut p, p_card) = (start.clone(), flat(&start)?);
    for number in 1..=4 {
        let at = adamw::Step { number, lr: 1e-3, grad_scale: 0.7 };
        for (part, moments) in parts.iter().zip(&mut moments) {
            let (r, lr) = (|| part.range.clone(), if part.plus { 4e-3 } else { 1e-3 });
            adamw8bit::step(&adamw, &adamw::Step { lr, ..at }, &mut p[r()], &grads[r()], moments)?;
        }
        state.step(gpu, &adamw, &at, 4e-3, &p_card, &g_card)?;
        let saved = state.export()?;
        state.import(&saved)?;
    }
    rows.push(row("adamw8bit", &p_card.to_vec1::<f32>()?, &p));
    Ok(rows)
}
