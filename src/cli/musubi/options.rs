//! The options of musubi-tuner's programs for the Wan family, and what each becomes. Options of ours that a program does
//! not list are taken under their own names too, so that a command line can be extended.

/// How many words follow an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Words {
    None,
    One,
    Many,
}

/// What becomes of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Ours under this name.
    Ours(&'static str),
    /// Read by the translation itself.
    Read,
    /// Nothing to do here; the reason is said.
    Idle(&'static str),
    /// Cannot be done; what to do instead.
    Refused(&'static str),
}

/// One row of a table.
pub type Row = (&'static str, Words, Fate);

const UPLOADS: Fate = Fate::Idle("nothing is uploaded");
const COMPILER: Fate = Fate::Idle("nothing is compiled at run time");
const ATTENTION: Fate = Fate::Idle("attention has its own kernels");
const DISTRIBUTED: Fate = Fate::Idle("one card");
const TRACKER: Fate = Fate::Idle("logs go to TensorBoard and JSON lines");

/// `wan_train_network.py`. What is not in the table has the same name and meaning here.
pub const TRAIN: &[Row] = &[
    ("config_file", Words::One, Fate::Read),
    ("sdpa", Words::None, ATTENTION),
    ("flash_attn", Words::None, ATTENTION),
    ("flash3", Words::None, ATTENTION),
    ("xformers", Words::None, ATTENTION),
    ("split_attn", Words::None, ATTENTION),
    ("sage_attn", Words::None, Fate::Refused("it is not for training; leave it out")),
    ("compile", Words::None, COMPILER),
    ("compile_backend", Words::One, COMPILER),
    ("compile_mode", Words::One, COMPILER),
    ("compile_dynamic", Words::One, COMPILER),
    ("compile_fullgraph", Words::None, COMPILER),
    ("compile_cache_size_limit", Words::One, COMPILER),
    ("dynamo_backend", Words::One, COMPILER),
    ("dynamo_mode", Words::One, COMPILER),
    ("dynamo_fullgraph", Words::None, COMPILER),
    ("dynamo_dynamic", Words::None, COMPILER),
    ("cuda_allow_tf32", Words::None, Fate::Idle("precision is set by --mixed_precision")),
    ("cuda_cudnn_benchmark", Words::None, Fate::Idle("no cuDNN")),
    ("offload_inactive_dit", Words::None, Fate::Idle("both experts stay at hand; blocks that do not fit are streamed")),
    ("use_pinned_memory_for_block_swap", Words::None, Fate::Idle("always so")),
    ("block_swap_h2d_only", Words::None, Fate::Idle("always so")),
    ("img_in_txt_in_offloading", Words::None, Fate::Idle("not for Wan")),
    ("guidance_scale", Words::One, Fate::Idle("not for Wan")),
    (
        "show_timesteps",
        Words::One,
        Fate::Refused("the distribution is in the report beside each checkpoint; leave it out"),
    ),
    ("dim_from_weights", Words::None, Fate::Refused("give --network_dim; `wan-train lora info FILE` shows the rank")),
    ("wandb_run_name", Words::One, TRACKER),
    ("wandb_api_key", Words::One, TRACKER),
    ("log_tracker_config", Words::One, TRACKER),
    ("log_with", Words::One, Fate::Read),
    ("log_config", Words::None, Fate::Idle("always logged")),
    ("ddp_timeout", Words::One, DISTRIBUTED),
    ("ddp_gradient_as_bucket_view", Words::None, DISTRIBUTED),
    ("ddp_static_graph", Words::None, DISTRIBUTED),
    ("huggingface_repo_id", Words::One, UPLOADS),
    ("huggingface_repo_type", Words::One, UPLOADS),
    ("huggingface_path_in_repo", Words::One, UPLOADS),
    ("huggingface_token", Words::One, UPLOADS),
    ("huggingface_repo_visibility", Words::One, UPLOADS),
    ("save_state_to_huggingface", Words::None, UPLOADS),
    ("async_upload", Words::None, UPLOADS),
    (
        "resume_from_huggingface",
        Words::None,
        Fate::Refused(
            "download the state and give its directory with --resume; states of musubi-tuner cannot be resumed",
        ),
    ),
];

/// What both caching programs share.
const CACHING: [Row; 6] = [
    ("config_file", Words::One, Fate::Refused("the caching programs take none")),
    ("device", Words::One, Fate::Read),
    ("batch_size", Words::One, Fate::Idle("how many are encoded together changes nothing")),
    ("num_workers", Words::One, Fate::Ours("max_data_loader_n_workers")),
    ("skip_existing", Words::None, Fate::Idle("caches are reused where their recipe fits")),
    ("keep_cache", Words::None, Fate::Idle("nothing is deleted")),
];

/// `wan_cache_latents.py`.
pub const LATENTS: &[Row] = &[
    CACHING[0],
    CACHING[1],
    CACHING[2],
    CACHING[3],
    CACHING[4],
    CACHING[5],
    ("i2v", Words::None, Fate::Read),
    ("debug_mode", Words::One, Fate::Refused("`wan-train cache` ends in a table of every file; leave it out")),
    ("console_width", Words::One, Fate::Idle("no preview of the data")),
    ("console_back", Words::One, Fate::Idle("no preview of the data")),
    ("console_num_images", Words::One, Fate::Idle("no preview of the data")),
    ("disable_cudnn_backend", Words::None, Fate::Idle("no cuDNN")),
];

/// `wan_cache_text_encoder_outputs.py`.
pub const TEXT: &[Row] = &[CACHING[0], CACHING[1], CACHING[2], CACHING[3], CACHING[4], CACHING[5]];

/// `convert_lora.py`.
pub const CONVERT: &[Row] = &[
    ("input", Words::One, Fate::Read),
    ("output", Words::One, Fate::Read),
    ("target", Words::One, Fate::Read),
    ("diffusers_prefix", Words::One, Fate::Read),
];

/// `lora_post_hoc_ema.py`; its files have no option.
pub const EMA: &[Row] = &[
    ("no_sort", Words::None, Fate::Read),
    ("beta", Words::One, Fate::Read),
    ("beta2", Words::One, Fate::Read),
    ("sigma_rel", Words::One, Fate::Read),
    ("output_file", Words::One, Fate::Read),
];

/// Options of `accelerate launch`, before the program's name, that take a word. Others are switches.
pub const LAUNCHER: &[&str] = &[
    "config_file",
    "num_cpu_threads_per_process",
    "mixed_precision",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "gpu_ids",
    "dynamo_backend",
    "dynamo_mode",
    "rdzv_backend",
    "deepspeed_config_file",
];
