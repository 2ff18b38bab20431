//! Every option of a run, in one table: name, type, default, help. Flags, configuration files, `show` and the
//! documentation are all made from it, so an option cannot exist in one of them only.
//!
//! Names, defaults and meanings are those of the trainer that users come from, unless the help says otherwise.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use wan_models::linear::Products;
use wan_models::wan::Numerics;

use crate::loader::Reading;

/// How an option is written on the command line and in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `--name` alone means true; `--name=false` is accepted, so that a template's `true` can be undone.
    Flag,
    Int,
    Float,
    Text,
    Path,
    /// Several words: `--name a b c`.
    List,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Opt {
    pub name: &'static str,
    /// Shorter names that templates take (`--lr` for `--learning_rate`).
    pub aliases: &'static [&'static str],
    pub kind: Kind,
    /// Allowed words, empty when anything of the kind goes.
    pub choices: &'static [&'static str],
    pub help: &'static str,
    pub group: &'static str,
}

/// Rust types that an option can have, and how each is written.
trait OptType {
    const KIND: Kind;
}
impl OptType for bool {
    const KIND: Kind = Kind::Flag;
}
impl OptType for u64 {
    const KIND: Kind = Kind::Int;
}
impl OptType for f64 {
    const KIND: Kind = Kind::Float;
}
impl OptType for String {
    const KIND: Kind = Kind::Text;
}
impl OptType for PathBuf {
    const KIND: Kind = Kind::Path;
}
impl OptType for Vec<String> {
    const KIND: Kind = Kind::List;
}
impl<T: OptType> OptType for Option<T> {
    const KIND: Kind = T::KIND;
}

macro_rules! options {
    ($($group:literal { $( $name:ident : $ty:ty = $default:expr $(, aliases $aliases:expr)? $(, choices $choices:expr)? ; $help:literal )* })*) => {
        /// What a run is: every option resolved (template < file < flags). Printed by `show`, stored with every
        /// checkpoint, hashed to tell whether a resumed run is the same one.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct RunConfig {
            $($( #[doc = $help] pub $name: $ty, )*)*
        }

        impl Default for RunConfig {
            fn default() -> Self {
                Self { $($( $name: $default, )*)* }
            }
        }

        /// The table, in the order of the help text.
        pub const OPTIONS: &[Opt] = &[
            $($( Opt {
                name: stringify!($name),
                aliases: { #[allow(unused_mut, unused_assignments)] let mut a: &'static [&'static str] = &[]; $( a = $aliases; )? a },
                kind: <$ty as OptType>::KIND,
                choices: { #[allow(unused_mut, unused_assignments)] let mut c: &'static [&'static str] = &[]; $( c = $choices; )? c },
                help: $help,
                group: $group,
            }, )*)*
        ];
    };
}

/// Tasks with an entry in `configs/models/`.
pub const TASKS: &[&str] = &[
    "t2v-1.3B",
    "t2v-14B",
    "t2i-14B",
    "i2v-14B",
    "flf2v-14B",
    "t2v-1.3B-FC",
    "t2v-14B-FC",
    "i2v-14B-FC",
    "t2v-A14B",
    "i2v-A14B",
    "ti2v-5B",
    "demo",
];
/// Learning-rate schedules.
pub const SCHEDULES: &[&str] = &[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "cosine_with_min_lr",
    "inverse_sqrt",
    "warmup_stable_decay",
    "piecewise_constant",
    "rex",
];
/// Timestep sampling modes.
pub const TIMESTEP_MODES: &[&str] = &[
    "sigma",
    "uniform",
    "sigmoid",
    "shift",
    "flux_shift",
    "flux2_shift",
    "qwen_shift",
    "krea2_shift",
    "ideogram4_shift",
    "logsnr",
    "qinglong_flux",
    "qinglong_qwen",
];
const FLOAT_TYPES: &[&str] = &["fp32", "float32", "float", "fp16", "float16", "bf16", "bfloat16"];

options! {
    "Template" {
        template: Option<String> = None; "Recipe to start from: a name that `show` lists, or a TOML file of your own"
        noise_level: Option<String> = None, choices &["high", "low", "both", "shared"]; "Expert of Wan 2.2 to train: high or low noise; both: a LoRA for each, one after the other; shared: one LoRA over both"
        base_dir: PathBuf = "./local_training".into(); "Directory that holds models, datasets, outputs"
        run_dir: Option<PathBuf> = None; "Directory of this run (default: <base_dir>/outputs/<output_name>)"
        musubi_compat: bool = false; "Reproduce the numbers of musubi-tuner where this program departs from them (docs/migration.md)"
        device: String = "auto".into(), choices &["auto", "cpu", "cuda"]; "Where to compute: auto takes CUDA when this build and machine have it"
    }
    "Model files" {
        task: String = "t2v-14B".into(), choices TASKS; "Model family and task"
        dit: Option<PathBuf> = None; "DiT weights (safetensors, any shard of a set, or .pth)"
        dit_high_noise: Option<PathBuf> = None; "DiT weights of the high-noise expert, --dit being the low one's; without --noise_level it means shared"
        vae: Option<PathBuf> = None; "VAE weights"
        t5: Option<PathBuf> = None; "umT5 encoder weights"
        clip: Option<PathBuf> = None; "CLIP vision weights (Wan 2.1 image-to-video only)"
        vae_dtype: String = "bfloat16".into(), choices FLOAT_TYPES; "Dtype in which latents are stored"
        disable_numpy_memmap: bool = false, aliases &["disable_mmap"]; "Read model files by position instead of through a memory mapping (always so on network file systems, and where the system has no safe mapping)"
        fp8_t5: bool = false; "Hold the umT5 weights in fp8"
        vae_cache_cpu: bool = false; "Keep the VAE's causal feature cache in host memory"
        base_weights: Vec<String> = vec![]; "LoRA files merged into the DiT while it loads"
        base_weights_high_noise: Option<Vec<String>> = None; "LoRA files merged into the high-noise expert's DiT instead (default: --base_weights)"
        base_weights_multiplier: Vec<String> = vec![]; "Strength of each --base_weights file (default 1.0)"
        save_merged: Option<PathBuf> = None; "Write the DiT with all --base_weights merged to this file too, if it is not there (of two experts: FILE-high, FILE-low)"
        skip_lightning: bool = false; "Lightning templates: train on the plain weights, without the Lightning LoRA"
        force_v2_1_time_embedding: bool = true; "Compute the time embedding once a sample, not once a token (exact; always so here)"
    }
    "Dataset and caches" {
        dataset_config: Option<PathBuf> = None; "Dataset description (TOML or JSON)"
        allow_missing_captions: bool = false; "Train items without a caption file on an empty caption instead of stopping"
        allow_bad_media: bool = false; "Drop unreadable images and videos (they are listed) instead of stopping"
        recache: bool = false; "Encode everything again, even where the cache is fresh"
        i2v_images_as_t2v: bool = false; "Image-to-video tasks: give still images an empty first-frame condition instead of themselves"
        one_frame: bool = false; "Image-to-video tasks on image datasets with fp_1f_clean_indices and fp_1f_target_index: control pictures and target are frames of one sequence"
        max_data_loader_n_workers: u64 = 8; "Threads that decode media and read caches"
        persistent_data_loader_workers: bool = false; "Accepted for compatibility: workers always persist here"
    }
    "Training length and precision" {
        max_train_steps: u64 = 1600; "Optimizer steps"
        max_train_epochs: Option<u64> = None, aliases &["epochs"]; "Epochs; counts before max_train_steps where one command line or file has both"
        seed: Option<u64> = None; "Seed of noise, timesteps, order and initial weights (default: drawn and printed)"
        gradient_checkpointing: bool = false; "Recompute blocks in the backward pass instead of keeping their activations"
        gradient_checkpointing_cpu_offload: bool = false; "Keep what checkpointing saves in host memory"
        gradient_accumulation_steps: u64 = 1; "Batches whose gradients are summed before one optimizer step"
        mixed_precision: String = "no".into(), choices &["no", "fp16", "bf16"]; "Compute dtype of linears and attention"
        save_precision: Option<String> = None, choices FLOAT_TYPES; "Dtype of the saved LoRA (default fp32)"
    }
    "Optimizer and learning rate" {
        optimizer_type: String = "adamw".into(), aliases &["optimizer"]; "adamw, adamw8bit or adafactor"
        optimizer_args: Vec<String> = vec![]; "k=v pairs: weight_decay, betas, eps (adafactor: eps, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, relative_step, warmup_init)"
        learning_rate: f64 = 2e-6, aliases &["lr"]; "Peak learning rate"
        max_grad_norm: f64 = 1.0; "Clip the global gradient norm to this; 0 turns clipping off"
        lr_scheduler: String = "constant".into(), aliases &["scheduler"], choices SCHEDULES; "Shape of the learning rate over the run"
        lr_warmup_steps: String = "0".into(); "Warm-up: steps, a ratio below 1, or N%"
        lr_decay_steps: String = "0".into(); "Decay of warmup_stable_decay: steps, a ratio below 1, or N%"
        lr_scheduler_num_cycles: u64 = 1; "Cycles of cosine_with_restarts"
        lr_scheduler_power: f64 = 1.0, aliases &["power"]; "Power of polynomial"
        lr_scheduler_timescale: Option<u64> = None; "Time scale of inverse_sqrt"
        lr_scheduler_min_lr_ratio: Option<f64> = None, aliases &["min_lr"]; "Lowest learning rate as a fraction of the peak"
        lr_scheduler_type: Option<String> = None; "Torch schedule in place of --lr_scheduler: CosineAnnealingLR, ExponentialLR or StepLR, with --lr_scheduler_args"
        lr_scheduler_args: Vec<String> = vec![]; "k=v pairs for the schedule (lr_end, step_rules)"
    }
    "Timesteps and loss" {
        timestep_sampling: String = "sigma".into(), choices TIMESTEP_MODES; "Distribution of the noise level"
        discrete_flow_shift: f64 = 1.0, aliases &["flow_shift"]; "Shift of the noise distribution towards high noise"
        sigmoid_scale: f64 = 1.0; "Scale of the normal draw in sigmoid and shift modes"
        weighting_scheme: String = "none".into(), choices &["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"]; "Loss weight over the noise level"
        logit_mean: f64 = 0.0; "Mean of logit_normal and logsnr"
        logit_std: f64 = 1.0; "Standard deviation of logit_normal and logsnr"
        mode_scale: f64 = 1.29; "Scale of mode weighting"
        min_timestep: Option<u64> = None; "Lowest timestep trained (0..1000)"
        max_timestep: Option<u64> = None; "Highest timestep trained (0..1000)"
        preserve_distribution_shape: bool = false; "Draw again outside min/max timestep instead of squeezing the distribution"
        num_timestep_buckets: Option<u64> = None; "Stratify timesteps over this many buckets"
        timestep_boundary: Option<f64> = None; "Where the high-noise expert takes over (0..1 or 0..1000; default: the task's)"
    }
    "Network" {
        network_module: String = "networks.lora_wan".into(), choices &["networks.lora_wan", "networks.loha", "networks.lokr"]; "Adapter kind: LoRA, LoHa or LoKr"
        network_dim: u64 = 4, aliases &["dim"]; "Rank"
        network_alpha: f64 = 1.0, aliases &["alpha"]; "Scale of the adapter is alpha / rank"
        network_dropout: Option<f64> = None; "Dropout of the rank-sized activations"
        network_args: Vec<String> = vec![]; "k=v pairs: include_patterns, exclude_patterns, loraplus_lr_ratio, rank_dropout, module_dropout, factor"
        network_weights: Option<PathBuf> = None, aliases &["resume_from"]; "Start from these adapter weights, with a fresh optimizer and schedule"
        scale_weight_norms: Option<f64> = None; "Largest Frobenius norm of an adapter's update"
        training_comment: Option<String> = None; "Comment stored in the LoRA's metadata"
    }
    "Memory" {
        fast_attention: bool = false; "Self-attention of forward in 8 bits: scores on int8 tensor cores (RTX 30 series and later), on Hopper values in fp8 too: faster, less exact"
        fp8_base: bool = false; "Hold the block weights in fp8 (block-scaled; with --musubi_compat the unscaled cast of everything)"
        fp8_fast: bool = false; "Multiply with fp8 weights on 8-bit tensor cores (RTX 40 series, Hopper): faster, less exact"
        fp8_scaled: bool = false; "Hold the block weights in block-scaled fp8"
        fp8_cache: Option<PathBuf> = None; "Directory where the fp8 weights are kept for the next start: a file of 15 GB for each 14B model and merge (default, and `off`: none)"
        int8_fast: bool = false; "Hold the block weights in rotated int8 and multiply on int8 tensor cores (RTX 30 series and later): faster, less exact; replaces the other ways to hold them"
        blocks_to_swap: u64 = 0; "Transformer blocks (of two experts: of each) whose weights stay in host memory and stream in when needed"
        block_swap_ring_size: u64 = 2; "Device slots of the block ring"
        vram_budget: Option<f64> = None; "GiB that the plan may use (default: what is free)"
    }
    "Saving and resuming" {
        output_dir: Option<PathBuf> = None; "Where checkpoints go (default: the run directory)"
        output_name: Option<String> = None; "Base name of the files written"
        save_every_n_epochs: Option<u64> = None, aliases &["save_every"]; "Save a LoRA every N epochs"
        save_every_n_steps: Option<u64> = None; "Save a LoRA every N optimizer steps"
        save_last_n_epochs: Option<u64> = None; "Keep epoch checkpoints of the last N epochs only"
        save_last_n_epochs_state: Option<u64> = None; "The same for state directories"
        save_last_n_steps: Option<u64> = None; "Keep step checkpoints of the last N steps only"
        save_last_n_steps_state: Option<u64> = None; "The same for state directories"
        save_state: bool = false; "Save the full training state with every checkpoint, for --resume"
        save_state_on_train_end: bool = false; "Save the full training state at the end"
        resume: Option<PathBuf> = None; "Continue exactly from this state directory"
        lora_format: String = "comfyui".into(), choices &["comfyui", "kohya"]; "Key names of the saved LoRA"
        no_metadata: bool = false; "Leave out all but the essential metadata"
        metadata_title: Option<String> = None; "modelspec title"
        metadata_author: Option<String> = None; "modelspec author"
        metadata_description: Option<String> = None; "modelspec description"
        metadata_license: Option<String> = None; "modelspec license"
        metadata_tags: Option<String> = None; "modelspec tags, comma-separated"
        metadata_reso: Option<String> = None; "modelspec resolution"
        metadata_arch: Option<String> = None; "modelspec architecture"
    }
    "Previews" {
        sample_prompts: Option<PathBuf> = None; "Prompts of pictures and clips made during training: .txt, .toml or .json (docs/previews.md)"
        sample_every_n_steps: Option<u64> = None; "Make previews every N optimizer steps"
        sample_every_n_epochs: Option<u64> = None; "Make previews every N epochs"
        sample_at_first: bool = false; "Make previews before the first step too"
    }
    "Logs" {
        logging_dir: Option<PathBuf> = None; "Where TensorBoard files and the step log go (default with a template: <run_dir>/logs)"
        log_with: Option<String> = None, choices &["tensorboard"]; "Tracker"
        log_prefix: Option<String> = None; "Prefix of the time-stamped log directory"
        log_tracker_name: Option<String> = None; "Name of the log subdirectory (default network_train)"
    }
}

/// The row of an option by its name or alias; hyphens count as underscores.
pub fn find(name: &str) -> Option<&'static Opt> {
    let name = name.replace('-', "_");
    OPTIONS.iter().find(|o| o.name == name || o.aliases.contains(&name.as_str()))
}

impl RunConfig {
    /// How model files are read.
    pub fn reading(&self) -> Reading {
        if self.disable_numpy_memmap {
            Reading::Positional
        } else {
            Reading::Mapped
        }
    }

    /// How the DiT computes.
    pub fn numerics(&self) -> Numerics {
        let numerics = if self.musubi_compat { Numerics::musubi() } else { Numerics::default() };
        Numerics { fast_attention: self.fast_attention, ..numerics }
    }

    /// What the linears of the blocks are multiplied on. Both 8-bit ways at once are refused while resolving.
    pub fn products(&self) -> Products {
        match (self.fp8_fast, self.int8_fast) {
            (_, true) => Products::Int8,
            (true, false) => Products::Fp8,
            (false, false) => Products::Full,
        }
    }
}
