//! `wan-train bench fast`: how far 8-bit products, weights and attention depart from 16 bit, on one item and random weights of the
//! real sizes: loss, the adapter's gradients as a whole, by kind of linear and by block.

use std::collections::BTreeMap;
use std::ops::Range;
use std::process::ExitCode;

use candle_core::DType;
use serde_json::json;
use wan_kernels::fast_attention;
use wan_kernels::gpu::Gpu;
use wan_kernels::philox::Philox;
use wan_kernels::Exec;
use wan_models::linear::Products;
use wan_models::wan::{Numerics, SavePlan, Timesteps, WanInputs, WanModel};

use super::bench::on_card::{plan_for, residency, TEXT_ROWS};
use super::bench::{latent, pixels};
use super::{job::Job, synthetic};
use crate::adapter::{select, AdapterParams, Grads};
use crate::cli::BenchOptions;
use crate::residency::Residency;

/// How weights are held and multiplied with: name, stored in fp8, products; and whether attention is fast.
type Form = (&'static str, bool, Products, bool);

const FULL: Form = ("16 bit", false, Products::Full, false);
const FP8: Form = ("fp8", true, Products::Full, false);
const FP8_FAST: Form = ("fp8_fast", true, Products::Fp8, false);
const INT8_FAST: Form = ("int8_fast", false, Products::Int8, false);
const FAST_ATTENTION: Form = ("fast_attention", false, Products::Full, true);
const BOTH: Form = ("fp8_fast and fast_attention", true, Products::Fp8, true);

struct Step {
    loss: f32,
    grads: Vec<f32>,
}

pub fn run(gpu: &Gpu, job: &Job, exec: &Exec, options: &BenchOptions) -> anyhow::Result<ExitCode> {
    let arch = &job.model.arch;
    let (planned, tokens, settings) = plan_for(job, exec, options)?;
    if !fast_attention::pays(exec, tokens as usize) {
        eprintln!("note: {tokens} tokens are too few for --fast_attention to be used: it departs by nothing here");
    }
    let device = exec.device();
    let normal = |stream, shape: &[usize]| Philox::new(3, stream, 0, 0).normal(shape, device);
    let [c, f, h, w] = latent(pixels(&options.case)?);
    let target = normal(1, &[1, c, f, h, w])?;
    let inputs = WanInputs {
        x: normal(0, &[1, c, f, h, w])?,
        t: Timesteps::PerSample(vec![700.0]),
        context: vec![(normal(2, &[TEXT_ROWS, arch.text_dim])? * 0.1)?.to_dtype(DType::BF16)?],
        y: None,
        clip_fea: None,
        f_indices: None,
    };
    let params = AdapterParams::new(settings.network.clone(), select(arch, &settings.network.patterns)?, 1, device)?;
    // `up` begins as zero, and `down` has no gradient then.
    params.master().edit(|all| {
        let mut noise = vec![0f32; all.len()];
        Philox::new(4, 0, 0, 0).fill_normal(&mut noise);
        all.iter_mut().zip(noise).for_each(|(value, noise)| *value += 2e-3 * noise);
    })?;
    let step = |(_, fp8, products, fast_attention): Form| -> anyhow::Result<Step> {
        device.set_seed(7)?;
        let spec = residency(&planned);
        let streamed = spec.streamed(arch.num_layers);
        let (rest, blocks) = synthetic::on_card(exec, arch, &streamed, (fp8, products))?;
        let model = WanModel::new(arch.clone(), rest, Numerics { fast_attention, ..Numerics::default() })?;
        let (residency, _) = Residency::on(exec, blocks, spec)?;
        let plan = SavePlan::per_block(planned.arrangement.saving.clone());
        let (pred, saved) = model.forward(exec, &inputs, &params, &residency, &plan)?;
        let error = (&pred - &target)?;
        let loss = error.sqr()?.mean_all()?.to_scalar::<f32>()?;
        let dpred = (error * (2.0 / pred.elem_count() as f64))?;
        let mut grads = Grads::new(params.layout().clone(), device)?;
        model.backward(exec, &params, &residency, saved, &dpred, &mut grads)?;
        Ok(Step { loss, grads: grads.flat().to_vec()? })
    };

    let layout = params.layout();
    let mut by_kind: BTreeMap<String, Vec<Range<usize>>> = BTreeMap::new();
    let mut by_block: BTreeMap<usize, Vec<Range<usize>>> = BTreeMap::new();
    for p in &layout.params {
        let name = &layout.sites[p.site].name;
        let mut parts = name.splitn(3, '.').skip(1);
        let (block, kind) = (parts.next().and_then(|n| n.parse().ok()), parts.next().unwrap_or(name));
        by_kind.entry(kind.to_string()).or_default().push(p.range.clone());
        by_block.entry(block.unwrap_or_default()).or_default().push(p.range.clone());
    }
    let compare = |form: Form, got: &Step, against: Form, want: &Step| {
        let of = |ranges: &[Range<usize>]| departs(&got.grads, &want.grads, ranges);
        let [cosine, error] = of(std::slice::from_ref(&(0..want.grads.len())));
        let mut single: Vec<_> =
            layout.params.iter().map(|p| (of(std::slice::from_ref(&p.range)), layout.full_name(p))).collect();
        single.sort_by(|a, b| a.0[0].total_cmp(&b.0[0]));
        let kinds: BTreeMap<&String, [f64; 2]> = by_kind.iter().map(|(kind, ranges)| (kind, of(ranges))).collect();
        let blocks: Vec<[f64; 2]> = by_block.values().map(|ranges| of(ranges)).collect();
        let off = (got.loss - want.loss).abs() / want.loss;
        if options.json {
            let row = json!({
                "bench": "fast", "case": options.case, "card": gpu.card().name, "commit": env!("WAN_COMMIT"),
                "form": form.0, "against": against.0, "loss": got.loss, "loss_there": want.loss, "loss_off": off,
                "gradient_cosine": cosine, "gradient_error": error, "median_cosine": single[single.len() / 2].0[0],
                "by_kind": kinds, "by_block": blocks,
                "lowest": single.iter().take(8).map(|(d, name)| json!([name, d[0], d[1]])).collect::<Vec<_>>(),
            });
            println!("{row}");
            return;
        }
        println!("{} against {}: loss {} and {}, off by {:.3} %", form.0, against.0, got.loss, want.loss, 100.0 * off);
        println!("  gradients of the whole adapter: cosine {cosine:.5}, relative error {error:.4}");
        kinds.iter().for_each(|(kind, [c, e])| println!("  {kind:16} cosine {c:.5}, error {e:.4}"));
        let least = blocks.iter().map(|b| b[0]).fold(1.0, f64::min);
        println!("  lowest of a block: {least:.5}; of a single parameter: {:.5} {}", single[0].0[0], single[0].1);
    };

    let full = step(FULL)?;
    compare(FAST_ATTENTION, &step(FAST_ATTENTION)?, FULL, &full);
    let int8 = step(INT8_FAST)?;
    compare(INT8_FAST, &int8, FULL, &full);
    let fp8 = step(FP8)?;
    compare(FP8, &fp8, FULL, &full);
    match gpu.card().capability >= (8, 9) {
        true => {
            let fast = step(FP8_FAST)?;
            compare(FP8_FAST, &fast, FULL, &full);
            compare(FP8_FAST, &fast, FP8, &fp8);
            compare(BOTH, &step(BOTH)?, FULL, &full);
        }
        false => eprintln!("note: {} has no fp8 tensor cores: --fp8_fast is left out", gpu.card().name),
    }
    Ok(ExitCode::SUCCESS)
}

/// Cosine and relative error of some parts of two gradients.
fn departs(got: &[f32], want: &[f32], ranges: &[Range<usize>]) -> [f64; 2] {
    let (mut gg, mut gw, mut ww) = (0.0, 0.0, 0.0);
    for range in ranges {
        for (g, w) in got[range.clone()].iter().zip(&want[range.clone()]) {
            let (g, w) = (f64::from(*g), f64::from(*w));
            (gg, gw, ww) = (gg + g * g, gw + g * w, ww + w * w);
        }
    }
    [gw / (gg * ww).sqrt(), ((gg - 2.0 * gw + ww).max(0.0) / ww).sqrt()]
}
