//! What every working verb starts from: the resolved configuration, the model it names, where to compute, how to report.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use candle_core::{DType, Device};
use wan_kernels::Exec;
use wan_models::arch::{ModelConfig, Role};

use super::{demo, interrupt};
use crate::config::{merged_name, registry, Resolved, RunConfig, SHARED};
use crate::data::{self, DataOptions, DatasetConfig, ScanReport};
use crate::error::UserError;
use crate::hub;
use crate::report::{self, Progress};
use crate::residency::ResidencySpec;
use crate::train::Expert;

/// A frozen DiT that a run trains on, before it is opened.
#[derive(Debug, Clone)]
pub struct Dit {
    /// Whose it is, where one LoRA is trained over both experts.
    pub expert: Option<Expert>,
    /// The option that names its file.
    pub option: &'static str,
    pub role: Role,
    pub path: Option<PathBuf>,
    /// LoRAs that are merged into it, and the option that names those.
    pub merges: Vec<String>,
    pub merges_option: &'static str,
    /// The Lightning LoRA that belongs to it.
    pub lightning: Option<Role>,
    /// Where it goes with its LoRAs merged.
    pub save_merged: Option<PathBuf>,
}

impl Dit {
    /// How messages call it.
    pub fn name(&self) -> String {
        self.expert.map_or_else(|| "DiT".into(), |expert| format!("{}-noise DiT", expert.name()))
    }
}

/// A resolved run and the services its stages share.
pub struct Job {
    pub config: RunConfig,
    pub resolved: Resolved,
    pub model: ModelConfig,
    pub progress: Arc<dyn Progress>,
    /// Raised by Ctrl-C: every stage looks at it at its next safe point.
    pub stop: Arc<AtomicBool>,
    /// One of the two runs of `--noise_level both`.
    pub of_pair: bool,
}

impl Job {
    /// Resolves what was typed.
    pub fn new(typed: &crate::config::Typed) -> anyhow::Result<Self> {
        Self::of(super::resolve(typed)?, report::for_stderr(), Arc::default(), false)
    }

    /// The jobs of several runs: they share the progress display and the wish to stop.
    pub fn several(runs: Vec<Resolved>) -> anyhow::Result<Vec<Self>> {
        let (progress, stop, pair) = (report::for_stderr(), Arc::<AtomicBool>::default(), runs.len() > 1);
        runs.into_iter().map(|run| Self::of(run, progress.clone(), stop.clone(), pair)).collect()
    }

    /// The demo's models and dataset are made on the fly, here.
    fn of(
        resolved: Resolved,
        progress: Arc<dyn Progress>,
        stop: Arc<AtomicBool>,
        of_pair: bool,
    ) -> anyhow::Result<Self> {
        let config = resolved.config.clone();
        let text = registry::text(&format!("models/{}.toml", config.task))
            .ok_or_else(|| UserError::usage(format!("task {} has no architecture file", config.task)))?;
        let model = ModelConfig::from_toml(text)?;
        let job = Self { config, resolved, model, progress, stop, of_pair };
        job.typed_residency().check(job.model.arch.num_layers)?;
        if job.config.task == demo::TASK {
            demo::prepare(&job)?;
        }
        Ok(job)
    }

    /// How blocks are to be held as far as the settings say; the plan decides the rest.
    pub fn typed_residency(&self) -> ResidencySpec {
        ResidencySpec {
            blocks_to_swap: self.config.blocks_to_swap as usize,
            ring_size: self.config.block_swap_ring_size as usize,
        }
    }

    /// From here on Ctrl-C, a termination signal or a hangup asks for an orderly end.
    pub fn catch_interrupts(&self) {
        interrupt::catch(&self.stop);
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Where the DiT computes, and in which dtype its linears and attention do.
    pub fn exec(&self) -> anyhow::Result<Exec> {
        let compute = match self.config.mixed_precision.as_str() {
            "fp16" => DType::F16,
            "bf16" => DType::BF16,
            _ => DType::F32,
        };
        exec(&self.config.device, compute)
    }

    /// The dataset file as it is found: as typed, else in the base directory, where `setup` puts it.
    pub fn dataset_path(&self) -> anyhow::Result<PathBuf> {
        let Some(path) = &self.config.dataset_config else {
            return Err(UserError::usage("no dataset is given")
                .hint("add --dataset_config FILE; `wan-train show datasets/wan22-dataset-config-local.toml` is an example")
                .into());
        };
        let in_base = self.config.base_dir.join(path);
        match (path.exists(), path.is_relative() && in_base.exists()) {
            (true, _) => Ok(path.clone()),
            (_, true) => Ok(in_base),
            _ => Err(UserError::new(format!("the dataset file {} does not exist", path.display()))
                .hint(format!(
                    "`wan-train init-dataset FOLDER -o {}` writes one for a folder of pictures and clips; --dataset_config gives another",
                    path.display()
                ))
                .into()),
        }
    }

    pub fn data_options(&self) -> DataOptions {
        DataOptions {
            musubi_compat: self.config.musubi_compat,
            allow_missing_captions: self.config.allow_missing_captions,
            allow_bad_media: self.config.allow_bad_media,
        }
    }

    /// Reads the dataset file and lists every medium it names.
    pub fn dataset(&self) -> anyhow::Result<(DatasetConfig, ScanReport)> {
        let options = self.data_options();
        let dataset = DatasetConfig::load(&self.dataset_path()?, &options)?;
        for note in &dataset.notes {
            self.progress.say(&format!("note: {note}"));
        }
        let scan = data::scan(&dataset, &options)?;
        Ok((dataset, scan))
    }

    /// The path of a model file that a stage needs, checked to exist. The error names what to download.
    pub fn model_file(&self, option: &str, role: Role, path: Option<&PathBuf>) -> anyhow::Result<PathBuf> {
        let Some(path) = path else {
            return Err(UserError::usage(format!("--{option} is not given, and task {} needs it", self.config.task))
                .hint(hub::where_to_get(&self.model, role))
                .into());
        };
        if path.is_file() {
            return Ok(path.clone());
        }
        if let Some(other) = hub::other_form(path) {
            return Ok(other);
        }
        let what = match path.is_dir() {
            true => format!("--{option} {} is a directory, not a model file", path.display()),
            false => format!("the model file {} (--{option}) does not exist", path.display()),
        };
        Err(UserError::new(what).hint(hub::where_to_get(&self.model, role)).into())
    }

    /// The frozen models of the run: the only one, or where one LoRA is trained over both, the low expert and then the
    /// high one.
    pub fn dits(&self) -> Vec<Dit> {
        let c = &self.config;
        let (role, lightning) = match c.noise_level.as_deref() {
            Some("high") => (Role::DitHigh, Some(Role::LightningHigh)),
            Some("low" | SHARED) => (Role::DitLow, Some(Role::LightningLow)),
            _ if self.model.experts.is_some() => (Role::DitLow, None),
            _ => (Role::Dit, None),
        };
        let shared = c.is_shared();
        let merged = |level: &str| {
            c.save_merged.as_deref().map(|path| if shared { merged_name(path, level) } else { path.to_path_buf() })
        };
        let low = Dit {
            expert: shared.then_some(Expert::Low),
            option: "dit",
            role,
            path: c.dit.clone(),
            merges: c.base_weights.clone(),
            merges_option: "base_weights",
            lightning,
            save_merged: merged("low"),
        };
        if !shared {
            return vec![low];
        }
        let own = c.base_weights_high_noise.clone();
        let high = Dit {
            expert: Some(Expert::High),
            option: "dit_high_noise",
            role: Role::DitHigh,
            path: c.dit_high_noise.clone(),
            merges_option: if own.is_some() { "base_weights_high_noise" } else { "base_weights" },
            // The old tool merges into the low expert alone.
            merges: own.unwrap_or_else(|| if c.musubi_compat { Vec::new() } else { c.base_weights.clone() }),
            lightning: Some(Role::LightningHigh),
            save_merged: merged("high"),
        };
        vec![low, high]
    }

    /// Whether latents need a first-frame condition, and CLIP features.
    pub fn conditions(&self) -> (bool, bool) {
        use wan_models::arch::Conditioning::{ControlFirstFrame, FirstFrame, FirstLastFrame};
        let first = matches!(self.model.conditioning, FirstFrame | FirstLastFrame | ControlFirstFrame);
        (first, first && self.model.arch.clip.is_some())
    }
}

/// Where to compute, by name; `auto` takes CUDA when build and machine have it.
pub fn exec(device: &str, compute: DType) -> anyhow::Result<Exec> {
    match device {
        #[cfg(feature = "cuda")]
        "cuda" => cuda(compute),
        // Where there is no card, everything still runs.
        #[cfg(feature = "cuda")]
        "auto" => cuda(compute).or_else(|e| {
            static SAID: std::sync::Once = std::sync::Once::new();
            SAID.call_once(|| eprintln!("note: computing on the CPU: {e:#}"));
            Ok(Exec::Reference { device: Device::Cpu, compute })
        }),
        #[cfg(not(feature = "cuda"))]
        "cuda" => Err(UserError::new("this build computes on the CPU only")
            .hint("build with `make cuda`, or leave --device out")
            .into()),
        _ => Ok(Exec::Reference { device: Device::Cpu, compute }),
    }
}

#[cfg(feature = "cuda")]
fn cuda(compute: DType) -> anyhow::Result<Exec> {
    Exec::cuda(0, compute).map_err(|e| {
        UserError::new(e.to_string())
            .hint(
                "`nvidia-smi` shows card and driver; the driver's CUDA must be no older than the toolkit that this program was \
                 built with; --device cpu computes without",
            )
            .into()
    })
}

/// Dtype by the names the old trainer takes.
pub fn dtype(name: &str) -> DType {
    match name {
        "fp16" | "float16" => DType::F16,
        "bf16" | "bfloat16" => DType::BF16,
        _ => DType::F32,
    }
}
