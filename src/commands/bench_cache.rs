//! `wan-train bench cache`: the VAE and the text encoder at their real sizes, on random weights made on the card.

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Tensor};
use serde_json::json;
use wan_kernels::gpu::Gpu;
use wan_kernels::Exec;
use wan_models::umt5::{Umt5, Umt5Config, Umt5Options, WeightSource};
use wan_models::vae::{random_vae_on, Vae, VaeArch, VaeOptions};

use super::bench::pixels;
use crate::cli::BenchOptions;

const GIB: f64 = (1u64 << 30) as f64;

struct Bench<'a> {
    gpu: &'a Gpu,
    options: &'a BenchOptions,
}

impl Bench<'_> {
    /// Times `body`, after one run that warms up, and prints a row.
    fn row(
        &self,
        what: &str,
        case: &str,
        tflop: f64,
        body: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.gpu.reset_peak()?;
        body()?;
        self.gpu.synchronize()?;
        let peak = self.gpu.memory()?.peak as f64 / GIB;
        let mut seconds = Vec::new();
        for _ in 0..self.options.steps {
            let clock = Instant::now();
            body()?;
            self.gpu.synchronize()?;
            seconds.push(clock.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        let (least, median, most) = (seconds[0], seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
        self.gpu.start_profile();
        body()?;
        let classes = self.gpu.finish_profile()?;
        let tflops = tflop / median;
        match self.options.json {
            true => println!(
                "{}",
                json!({
                    "kind": "cache", "op": what, "case": case, "card": self.gpu.card().name, "s": median, "s_min": least,
                    "s_max": most, "runs": seconds.len(), "tflop": tflop, "tflops": tflops, "peak_gib": peak,
                    "ms_by_op": classes.iter().map(|(op, calls, ms)| json!([op, calls, ms])).collect::<Vec<_>>(),
                })
            ),
            false => {
                println!(
                    "{what:24} {case:12} {median:7.4} s ({least:.4} to {most:.4}) {tflops:5.0} TFLOP/s, peak {peak:6.2} GiB"
                );
                for (op, calls, ms) in classes.iter().take(6) {
                    println!("    {op:28} {calls:6} calls {ms:9.2} ms");
                }
            }
        }
        Ok(())
    }
}

/// Every row.
pub fn run(gpu: &Gpu, exec: &Exec, options: &BenchOptions) -> anyhow::Result<ExitCode> {
    let bench = Bench { gpu, options };
    vae(&bench, exec)?;
    umt5(&bench, &exec.with_compute(DType::BF16))?;
    Ok(ExitCode::SUCCESS)
}

fn vae(bench: &Bench<'_>, exec: &Exec) -> anyhow::Result<()> {
    let arch = VaeArch::wan21();
    let how = VaeOptions { compute: DType::F16, frames_per_step: 4, ..VaeOptions::default() };
    let vae: Vae = random_vae_on(&arch, exec, how)?;
    for case in ["img720", "v21", "v45", "832x480x81"] {
        let [w, h, f] = pixels(case)?;
        let video = Tensor::rand(-1f32, 1f32, (1, 3, f, h, w), exec.device())?;
        bench.row("vae_encode", case, arch.encoder_flops([w, h, f]) / 1e12, &mut || {
            drop(vae.encode(&video)?);
            Ok(())
        })?;
    }
    for case in ["img720", "v21"] {
        let [w, h, f] = pixels(case)?;
        let (side, frames) = (arch.spatial_stride(), arch.latent_frames(f));
        let latent = Tensor::randn(0f32, 1f32, (1, arch.z_dim, frames, h / side, w / side), exec.device())?;
        bench.row("vae_decode", case, arch.decoder_flops([w, h, f]) / 1e12, &mut || {
            drop(vae.decode(&latent)?);
            Ok(())
        })?;
    }
    Ok(())
}

/// Random weights of the real sizes: matrices N(0, 1/inputs), as they would come from a file that lies on the card.
struct Random {
    exec: Exec,
    shapes: std::collections::HashMap<String, Vec<usize>>,
}

impl WeightSource for Random {
    fn get(&self, key: &str) -> wan_models::Result<Tensor> {
        let shape = self.shapes.get(key).cloned().unwrap_or_default();
        let (mean, std) = match key {
            k if k.contains("norm") => (1f32, 0.1),
            k if k.contains("pos_embedding") => (0.0, 0.5),
            _ => (0.0, 1.0 / (shape[1] as f32).sqrt()),
        };
        Ok(Tensor::randn(mean, std, shape, self.exec.device())?.to_dtype(DType::BF16)?)
    }

    fn shape(&self, key: &str) -> Option<Vec<usize>> {
        self.shapes.get(key).cloned()
    }

    fn rows(&self, key: &str, ids: &Tensor) -> wan_models::Result<Tensor> {
        let width = self.shapes.get(key).map_or(1, |s| s[1]);
        Ok(Tensor::randn(0f32, 1f32, (ids.elem_count(), width), self.exec.device())?.to_dtype(DType::BF16)?)
    }
}

/// 16 prompts of 512 tokens: nothing is padding.
fn umt5(bench: &Bench<'_>, exec: &Exec) -> anyhow::Result<()> {
    let config = Umt5Config::xxl();
    let source = Random { exec: exec.clone(), shapes: config.tensors().into_iter().collect() };
    let options = Umt5Options { exec: exec.clone(), ..Umt5Options::default() };
    let (prompts, tokens) = (16usize, 512usize);
    let ids: Vec<Vec<u32>> =
        (0..prompts).map(|p| (0..tokens).map(|t| (p * tokens + t) as u32 % 1000).collect()).collect();
    let encoder = Umt5::with_config(config.clone(), Box::new(source), options)?;
    let all = (prompts * tokens) as f64;
    let linears = 2.0 * all * (4 * config.dim * config.dim_attn + 3 * config.dim * config.dim_ffn) as f64;
    let attention = 4.0 * all * tokens as f64 * config.dim_attn as f64;
    let tflop = (linears + attention) * config.layers as f64 / 1e12;
    bench.row("umt5", "16x512", tflop, &mut || {
        drop(encoder.contexts(&ids)?);
        Ok(())
    })
}
