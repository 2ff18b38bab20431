//! `wan-train bench start`: from a checkpoint file of the real size to the end of the first step, part by part. On the CPU
//! loading alone is timed.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use serde_json::{json, Value};
use wan_kernels::Exec;

use super::job::Job;
use super::{keep, random_files, weights};
use crate::cli::BenchOptions;
use crate::config::Typed;
use crate::error::UserError;
use crate::loader::Source;
use crate::plan::host_peak;

const GIB: f64 = (1u64 << 30) as f64;
/// The rank of the Lightning LoRAs.
const LIGHTNING_RANK: usize = 64;

pub fn run(mut typed: Typed, options: &BenchOptions) -> anyhow::Result<ExitCode> {
    let path = options.file.clone().ok_or_else(|| {
        UserError::usage("bench start needs a file")
            .hint("add --file FILE; random weights (28 GB for 14B) are written there when it is missing")
    })?;
    let lightning = options.lightning.then(|| beside(&path));
    if let Some(lora) = &lightning {
        typed.flags.insert("base_weights", vec![lora.display().to_string()]);
    }
    typed.flags.insert("max_train_steps", vec!["2".into()]);
    let job = Job::new(&typed)?;
    if !path.exists() {
        eprintln!("writing random fp16 weights to {}", path.display());
        random_files::write(&job.model.arch, &path)?;
    }
    if let Some(lora) = lightning.filter(|lora| !lora.exists()) {
        eprintln!("writing a random LoRA of rank {LIGHTNING_RANK} to {}", lora.display());
        random_files::write_lora(&job.model.arch, LIGHTNING_RANK, &lora)?;
    }
    let clock = Instant::now();
    let exec = job.exec()?;
    weights::check_fast(&job.config, &exec)?;
    let device_s = clock.elapsed().as_secs_f64();
    forget_peak();
    let before = host_peak();
    let started = start(&job, &exec, options, &path)?;
    let mut row = json!({
        "bench": "start", "case": options.case, "task": job.config.task,
        "lightning": options.lightning, "kept": keep::dir(&job.config).is_some(), "device_s": device_s,
        "host_gib_before": before.map(gib), "host_gib_loaded": started.peak.map(gib), "host_gib_end": host_peak().map(gib),
    });
    if let (Value::Object(row), Value::Object(more)) = (&mut row, started.row) {
        row.extend(more);
    }
    if options.json {
        println!("{row}");
        return Ok(ExitCode::SUCCESS);
    }
    println!("opened {:.2} s, loaded {:.2} s after that", number(&row, "open_s"), number(&row, "load_s"));
    if let Some(start) = row["start_s"].as_f64() {
        println!("ready {:.2} s, first step done {start:.2} s after the start", number(&row, "ready_s"));
    }
    if let Some(written) = row["kept_s"].as_f64() {
        println!("the weights in fp8 were on disk {written:.2} s after the last step");
    }
    if let (Some(before), Some(loaded)) = (before, started.peak) {
        println!("host memory: {:.2} GiB at most while loading, {:.2} before", gib(loaded), gib(before));
    }
    Ok(ExitCode::SUCCESS)
}

fn beside(path: &Path) -> PathBuf {
    path.with_extension("lightning.safetensors")
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / GIB
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or(f64::NAN)
}

/// The process' peak starts again from what it holds now: what was written before is not loading. Where the system has no
/// such file, the peak is that of the whole process.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

struct Started {
    row: Value,
    /// Of host memory, behind loading.
    peak: Option<u64>,
}

fn start(job: &Job, exec: &Exec, options: &BenchOptions, path: &Path) -> anyhow::Result<Started> {
    #[cfg(feature = "cuda")]
    if let Exec::Cuda { gpu, .. } = exec {
        return on_card(job, exec, gpu, options, path);
    }
    let _ = options;
    let clock = Instant::now();
    let source = Source::open_by(path, job.config.reading())?;
    let opened = clock.elapsed();
    let loaded = weights::load(job, &job.config, (&job.dits()[0], &source), exec.device(), &[])?;
    let (done, peak) = (clock.elapsed(), host_peak());
    let clock = Instant::now();
    let written = loaded.keeping.map(|keeping| keeping.finish(job)).map(|()| clock.elapsed().as_secs_f64());
    let row = json!({
        "card": "cpu", "file_gib": gib(source.total_bytes()), "open_s": opened.as_secs_f64(),
        "load_s": (done - opened).as_secs_f64(), "kept_s": written,
    });
    Ok(Started { row, peak })
}

#[cfg(feature = "cuda")]
fn on_card(
    job: &Job,
    exec: &Exec,
    gpu: &wan_kernels::gpu::Gpu,
    options: &BenchOptions,
    path: &Path,
) -> anyhow::Result<Started> {
    use super::bench::on_card::{plan_for, residency, steps_of};
    use super::plan::explain;

    let clock = Instant::now();
    let (planned, _, settings) = plan_for(job, exec, options)?;
    let streamed = residency(&planned).streamed(job.model.arch.num_layers);
    let source = Source::open_by(path, job.config.reading())?;
    let opened = clock.elapsed();
    let loaded = weights::load(job, &job.config, (&job.dits()[0], &source), exec.device(), &streamed);
    let loaded = loaded.map_err(|e| explain(exec, &planned.memory, e))?;
    gpu.synchronize()?;
    let (done, peak) = (clock.elapsed(), host_peak());
    let weights = (loaded.rest, loaded.blocks);
    let (watch, ready) = steps_of(gpu, job, exec, options, (&planned, settings), weights, 2)?;
    let (ready, first) = ((ready - clock).as_secs_f64(), watch.seconds[0]);
    let clock = Instant::now();
    let written = loaded.keeping.map(|keeping| keeping.finish(job)).map(|()| clock.elapsed().as_secs_f64());
    let row = json!({
        "card": gpu.card().name, "commit": env!("WAN_COMMIT"), "file_gib": gib(source.total_bytes()), "open_s": opened.as_secs_f64(),
        "load_s": (done - opened).as_secs_f64(), "ready_s": ready, "first_step_s": first, "start_s": ready + first,
        "second_step_s": watch.seconds.get(1), "losses": watch.losses, "kept_s": written,
        "device_peak_gib": watch.most_gib(|m| m.peak),
    });
    Ok(Started { row, peak })
}
