//! Weights in fp8 kept on disk for the next start (`--fp8_cache`): looked for before loading, written beside the training.
//!
//! Nothing here ends a run: what cannot be kept is said in one line.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{bail, Context, Result};
use candle_core::{Device, Tensor};
use wan_models::wan::BlockWeights;

use super::job::Job;
use crate::config::RunConfig;
use crate::fsio::{self, TensorOut};
use crate::loader::{kept_bytes, Found, KeptFp8, LoadOptions, Source};

/// The directory that is asked for.
pub fn dir(config: &RunConfig) -> Option<&PathBuf> {
    config.fp8_cache.as_ref().filter(|dir| dir.as_os_str() != "off")
}

/// What is there from an earlier start goes into `options`; else the place to write to afterwards.
pub fn find(job: &Job, config: &RunConfig, source: &Source, options: &mut LoadOptions<'_>) -> Option<KeptFp8> {
    let dir = dir(config)?;
    let say = |line: String| job.progress.say(&line);
    let place = match KeptFp8::place(dir, source, options) {
        Ok(Some(place)) => place,
        Ok(None) => {
            say("note: --fp8_cache has nothing to keep: no weight becomes fp8 while loading".into());
            return None;
        }
        Err(e) => {
            say(format!("note: the weights in fp8 are not kept: {e:#}"));
            return None;
        }
    };
    let shown = place.path().display();
    match place.open() {
        Found::Whole(kept) => {
            say(format!("blocks in fp8 from {shown} ({}), kept by an earlier start", fsio::human(kept.total_bytes())));
            options.kept = Some(kept);
            return None;
        }
        Found::Absent => {}
        Found::Stale(why) => {
            say(format!("note: {shown} is made again: {why}"));
            // Its room is needed for what replaces it.
            let _ = std::fs::remove_file(place.path());
        }
    }
    let bytes = kept_bytes(options.arch);
    // A quarter stays free: a full disk would stop the run at its next checkpoint.
    let room = fsio::ensure_writable_dir(dir).and_then(|()| {
        fsio::require_space(
            dir,
            bytes + bytes / 4,
            "keeping the weights in fp8, with a quarter to spare for checkpoints,",
        )
    });
    if let Err(e) = room {
        say(format!("note: the weights in fp8 are not kept: {e:#}"));
        return None;
    }
    say(format!(
        "keeping the blocks in fp8 for the next start: {shown}, about {}, written while training",
        fsio::human(bytes)
    ));
    Some(place)
}

/// Weights on their way to disk. Dropped before they are there, nothing remains.
pub struct Keeping {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Keeping {
    /// Begins to write the blocks; the tensors are shared, not copied.
    pub fn start(job: &Job, place: KeptFp8, blocks: &[BlockWeights]) -> Option<Self> {
        let begun = Self::begin(job, place, blocks);
        begun.map_err(|e| job.progress.say(&format!("note: the weights in fp8 are not kept: {e:#}"))).ok()
    }

    fn begin(job: &Job, place: KeptFp8, blocks: &[BlockWeights]) -> Result<Self> {
        let tensors = place.tensors(blocks)?;
        let stop = Arc::<AtomicBool>::default();
        let (progress, stopped) = (job.progress.clone(), stop.clone());
        let body = move || match write(&place, &tensors, &stopped) {
            Ok(()) => tracing::debug!("kept the blocks in fp8 in {}", place.path().display()),
            Err(_) if stopped.load(Ordering::Relaxed) => {}
            Err(e) => progress.say(&format!("note: the weights in fp8 are not kept: {e:#}")),
        };
        let thread =
            std::thread::Builder::new().name("keep fp8".into()).spawn(body).context("a thread to write with")?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Waits until they are there.
    pub fn finish(mut self, job: &Job) {
        if self.thread.as_ref().is_some_and(|t| !t.is_finished()) {
            job.progress.say("the weights in fp8 are still being written (Ctrl-C: leave it)");
        }
        while self.thread.as_ref().is_some_and(|t| !t.is_finished()) && !job.stopped() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        self.end();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in there has been printed; it takes nothing from the run.
            let _ = thread.join();
        }
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        self.end();
    }
}

fn write(place: &KeptFp8, tensors: &BTreeMap<String, Tensor>, stop: &AtomicBool) -> Result<()> {
    let mut unload = unloading(tensors)?;
    place.write(tensors, &mut |t| {
        if stop.load(Ordering::Relaxed) {
            bail!("the run has ended");
        }
        unload(t)
    })
}

type Unload = Box<dyn FnMut(&Tensor) -> Result<Vec<u8>>>;

/// How to read a tensor where it lies: on a card beside its computing.
fn unloading(tensors: &BTreeMap<String, Tensor>) -> Result<Unload> {
    let in_memory = |t: &Tensor| Ok(TensorOut::of("kept", t)?.data.into_owned());
    #[cfg(feature = "cuda")]
    if let Some(gpu) = tensors.values().find_map(|t| wan_kernels::gpu::Gpu::of(t.device())) {
        let mut unloading = wan_kernels::gpu::Unloading::new(&gpu, 16 << 20)?;
        return Ok(Box::new(move |t| match t.device() {
            Device::Cpu => in_memory(t),
            _ => Ok(unloading.read(t)?),
        }));
    }
    anyhow::ensure!(
        tensors.values().all(|t| matches!(t.device(), Device::Cpu)),
        "weights lie on a device unknown here"
    );
    Ok(Box::new(in_memory))
}
