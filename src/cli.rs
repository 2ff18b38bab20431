//! What was typed. Flags are made from the option table, so names, aliases and help exist once; hyphens and
//! underscores in flag names are the same.

pub mod lora;
pub mod musubi;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Command};
use wan_kernels::CHECK_GROUPS;

use crate::config::{find, Kind, Opt, Typed, OPTIONS};

/// A verb with what was typed for it.
#[derive(Debug)]
pub enum Invocation {
    /// No verb: check, cache, train.
    Run(Typed),
    Cache {
        typed: Typed,
        what: CacheWhat,
    },
    Train(Typed),
    Plan(Typed),
    Show {
        name: Option<String>,
        typed: Typed,
        json: bool,
    },
    Bench {
        typed: Typed,
        options: BenchOptions,
    },
    Lora(lora::LoraJob),
    /// A command line of musubi-tuner, word by word.
    Musubi(Vec<String>),
    Verify {
        golden: Option<PathBuf>,
        device: String,
    },
    Setup(SetupOptions),
    Check {
        typed: Typed,
        fix: bool,
    },
    Templates {
        base_dir: PathBuf,
        files: Vec<PathBuf>,
    },
    InitDataset {
        dir: PathBuf,
        output: Option<PathBuf>,
        force: bool,
    },
}

/// What `setup` gets, and from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetupOptions {
    pub base_dir: PathBuf,
    /// Wan 2.2 image-to-video too.
    pub include_i2v: bool,
    /// Wan 2.1 models; with any, Wan 2.2 text-to-video is left out.
    pub wan21: Vec<String>,
    pub comfyui_dir: Option<PathBuf>,
    pub hf_token: Option<String>,
    pub dry_run: bool,
}

/// What `bench` measures, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchOptions {
    pub what: BenchWhat,
    pub case: String,
    pub steps: u64,
    pub json: bool,
    /// Predict for a card of this name instead of measuring.
    pub project: Option<String>,
    /// `start` only: the checkpoint; made when it is missing.
    pub file: Option<PathBuf>,
    /// `start` only: with a LoRA of the Lightning form merged, which lies beside the checkpoint.
    pub lightning: bool,
    /// `ops` only: hold every kernel against its definition instead of timing it.
    pub check: bool,
    /// Of these only one group, see `wan_kernels::CHECK_GROUPS`.
    pub group: Option<String>,
    /// Leave alone the kernels that only cards of this one's kind have.
    pub portable: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BenchWhat {
    /// Training steps.
    Steps,
    /// Single operations.
    Ops,
    /// From a checkpoint file to the first step.
    Start,
    /// Loss and gradients with 8-bit products against those without.
    Fast,
    /// The models that caches are made with.
    Cache,
}

/// Which caches `cache` makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheWhat {
    Both,
    Latents,
    Text,
}

/// Parses a command line (first word is the program). Errors carry their own text and exit code (2; 0 for `--help`).
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, clap::Error> {
    let matches = command().try_get_matches_from(args.into_iter().map(underscored))?;
    Ok(match matches.subcommand() {
        None => Invocation::Run(typed(&matches)),
        Some(("train", m)) => Invocation::Train(typed(m)),
        Some(("plan", m)) => Invocation::Plan(typed(m)),
        Some(("cache", m)) => {
            let what = match (m.get_flag("only_latents"), m.get_flag("only_text")) {
                (true, _) => CacheWhat::Latents,
                (_, true) => CacheWhat::Text,
                _ => CacheWhat::Both,
            };
            Invocation::Cache { typed: typed(m), what }
        }
        Some(("show", m)) => {
            Invocation::Show { name: m.get_one::<String>("name").cloned(), typed: typed(m), json: m.get_flag("json") }
        }
        Some(("bench", m)) => {
            let mut typed = typed(m);
            if let Some(rank) = m.get_one::<u64>("rank") {
                for name in ["network_dim", "network_alpha"] {
                    typed.flags.insert(name, vec![rank.to_string()]);
                }
            }
            let options = BenchOptions {
                what: match m.get_one::<String>("what").map(String::as_str) {
                    Some("ops") => BenchWhat::Ops,
                    Some("start") => BenchWhat::Start,
                    Some("fast") => BenchWhat::Fast,
                    Some("cache") => BenchWhat::Cache,
                    _ => BenchWhat::Steps,
                },
                case: m.get_one::<String>("case").cloned().unwrap_or_default(),
                steps: m.get_one::<u64>("steps").copied().unwrap_or(5),
                json: m.get_flag("json"),
                check: m.get_flag("check"),
                group: m.get_one::<String>("group").cloned(),
                lightning: m.get_flag("lightning"),
                file: m.get_one::<PathBuf>("file").cloned(),
                project: m.get_one::<String>("project").cloned(),
                portable: m.get_flag("portable"),
            };
            Invocation::Bench { typed, options }
        }
        Some(("musubi", m)) => {
            Invocation::Musubi(m.get_many::<String>("words").into_iter().flatten().cloned().collect())
        }
        Some(("lora", m)) => Invocation::Lora(lora::parse(m)),
        Some(("verify", m)) => Invocation::Verify {
            golden: m.get_one::<PathBuf>("golden").cloned(),
            device: m.get_one::<String>("device").cloned().unwrap_or_default(),
        },
        Some(("check", m)) => Invocation::Check { typed: typed(m), fix: m.get_flag("fix") },
        Some(("templates", m)) => Invocation::Templates {
            base_dir: m.get_one::<PathBuf>("base_dir").cloned().unwrap_or_default(),
            files: m.get_many::<PathBuf>("files").into_iter().flatten().cloned().collect(),
        },
        Some(("init-dataset", m)) => Invocation::InitDataset {
            dir: m.get_one::<PathBuf>("dir").cloned().unwrap_or_default(),
            output: m.get_one::<PathBuf>("output").cloned(),
            force: m.get_flag("force"),
        },
        Some(("setup", m)) => {
            let path = |name: &str| m.get_one::<PathBuf>(name).cloned();
            let mut wan21: Vec<String> = m.get_many::<String>("wan21").into_iter().flatten().cloned().collect();
            wan21.sort();
            wan21.dedup();
            Invocation::Setup(SetupOptions {
                base_dir: path("base_dir").unwrap_or_default(),
                include_i2v: m.get_flag("include_i2v"),
                wan21,
                comfyui_dir: path("comfyui_dir"),
                hf_token: m.get_one::<String>("hf_token").cloned(),
                dry_run: m.get_flag("dry_run"),
            })
        }
        Some((verb, _)) => unreachable!("clap knows no verb `{verb}`"),
    })
}

/// The whole command line, for parsing and for `--help`.
pub fn command() -> Command {
    let verb = |name: &'static str, about: &'static str| run_args(Command::new(name).about(about));
    run_args(Command::new("wan-train"))
        .about("Trains LoRA adapters for the Wan 2.1/2.2 video models on one GPU")
        .after_help("Without a verb: check the dataset, cache what is missing, train.")
        .version(env!("CARGO_PKG_VERSION"))
        .args_conflicts_with_subcommands(true)
        .arg_required_else_help(true)
        .infer_long_args(false)
        .subcommand(
            verb("cache", "Encode the dataset: VAE latents, text, image conditions")
                .arg(flag("only_latents", "Latents and image conditions only").conflicts_with("only_text"))
                .arg(flag("only_text", "Text only")),
        )
        .subcommand(verb("train", "Train on caches that are already there"))
        .subcommand(verb("plan", "Print what will be where in memory, and whether it fits"))
        .subcommand(
            verb("show", "Print the resolved configuration of a template, or list what is built in")
                .arg(Arg::new("name").help("Template, an embedded file such as datasets/NAME.toml, or `options`: every option as a table"))
                .arg(flag("json", "One flat JSON object")),
        )
        .subcommand(
            verb("bench", "Time training steps on random weights, or single operations; needs a card, no files")
                .arg(
                    Arg::new("what")
                        .value_parser(PossibleValuesParser::new(["steps", "ops", "start", "fast", "cache"]))
                        .default_value("steps")
                        .help("Training steps; every kernel by itself; the start from a 28 GB file (made at --file when missing); how far --fp8_fast and --int8_fast depart from 16 bit; or VAE and text encoder"),
                )
                .arg(
                    Arg::new("case")
                        .long("case")
                        .default_value("v21")
                        .help("img720, v21, v45, or WIDTHxHEIGHTxFRAMES in pixels"),
                )
                .arg(
                    Arg::new("steps")
                        .long("steps")
                        .value_name("N")
                        .value_parser(clap::value_parser!(u64).range(2..))
                        .default_value("5")
                        .help("Steps to time, after one that warms up; the one behind them is profiled"),
                )
                .arg(
                    Arg::new("rank")
                        .long("rank")
                        .value_name("N")
                        .value_parser(clap::value_parser!(u64).range(1..))
                        .help("Rank and alpha of the LoRA [42]"),
                )
                .arg(flag("json", "One JSON object a line"))
                .arg(
                    Arg::new("project")
                        .long("project")
                        .value_name("CARD")
                        .help("Predict s/step on a card by its data sheet: rtx3090, a6000, rtx4090, a100, h100, h200, all"),
                )
                .arg(
                    Arg::new("file")
                        .long("file")
                        .value_name("FILE")
                        .value_parser(clap::value_parser!(PathBuf))
                        .help("With `start`: the fp16 checkpoint; random weights are written there when it is missing"),
                )
                .arg(flag("lightning", "With `start`: merge a random LoRA of rank 64 for every linear, made beside the checkpoint"))
                .arg(flag("check", "With `ops`: hold every kernel against its definition"))
                .arg(
                    Arg::new("group")
                        .long("group")
                        .value_name("GROUP")
                        .requires("check")
                        .value_parser(PossibleValuesParser::new(CHECK_GROUPS))
                        .help("With `--check`: only these kernels"),
                )
                .arg(flag("portable", "With `steps`: the kernels of RTX 30 and 40 cards (mma.sync, 99 KB)")),
        )
        .subcommand(lora::command())
        .subcommand(
            verb("check", "Check settings, files, media and captions; show every bucket, the time and the memory")
                .arg(flag("fix", "Put right in the dataset file what has one right answer (comments stay)")),
        )
        .subcommand(
            Command::new("templates")
                .about("List the templates, with what they need and whether it is there")
                .arg(base_dir())
                .arg(
                    Arg::new("files")
                        .value_name("FILE")
                        .num_args(0..)
                        .value_parser(clap::value_parser!(PathBuf))
                        .help("Templates of your own, beside those in the base directory"),
                ),
        )
        .subcommand(
            Command::new("init-dataset")
                .visible_alias("init_dataset")
                .about("Write a dataset file for a folder of pictures and clips")
                .arg(
                    Arg::new("dir")
                        .value_name("DIR")
                        .required(true)
                        .value_parser(clap::value_parser!(PathBuf))
                        .help("Folder with the media, or with subfolders of them"),
                )
                .arg(path("output", "FILE", "Where to write it (default: DIR/dataset.toml)").short('o'))
                .arg(flag("force", "Replace a file that is there")),
        )
        .subcommand(
            Command::new("setup")
                .about("Look at the machine, make the directories, get the model files")
                .arg(base_dir())
                .arg(flag("include_i2v", "Wan 2.2 image-to-video too, not text-to-video alone"))
                .arg(
                    Arg::new("wan21")
                        .long("wan21")
                        .value_name("MODEL")
                        .num_args(1..)
                        .action(ArgAction::Append)
                        .value_parser(PossibleValuesParser::new(["t2v-14b", "t2v-1.3b", "i2v-480p", "i2v-720p"]))
                        .help("Wan 2.1 models, in place of Wan 2.2 text-to-video"),
                )
                .arg(path(
                    "comfyui_dir",
                    "DIR",
                    "ComfyUI installation whose model files are linked instead of downloaded",
                ))
                .arg(
                    Arg::new("hf_token")
                        .long("hf_token")
                        .value_name("TOKEN")
                        .help("Token for the hub (default: HF_TOKEN)"),
                )
                .arg(flag("dry_run", "Show what would be done, and change nothing")),
        )
        .subcommand(
            Command::new("musubi")
                .about("Run a command line of musubi-tuner: wan_train_network.py, wan_cache_latents.py and their like")
                .arg(
                    Arg::new("words")
                        .value_name("COMMAND LINE")
                        .num_args(1..)
                        .required(true)
                        .trailing_var_arg(true)
                        .allow_hyphen_values(true)
                        .help("From `python` or `accelerate launch` on, or from the program's name"),
                ),
        )
        .subcommand(
            Command::new("verify")
                .about("Check every model and formula against reference numbers")
                .arg(
                    Arg::new("golden")
                        .long("golden")
                        .value_name("DIR")
                        .value_parser(clap::value_parser!(PathBuf))
                        .help("Directory of reference cases (default: the embedded set)"),
                )
                .arg(
                    Arg::new("device")
                        .long("device")
                        .value_parser(PossibleValuesParser::new(["cpu", "cuda"]))
                        .default_value("cpu")
                        .help("Where to compute"),
                ),
        )
}

fn flag(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).help(help).action(ArgAction::SetTrue)
}

fn path(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).value_parser(clap::value_parser!(PathBuf)).help(help)
}

fn base_dir() -> Arg {
    path("base_dir", "DIR", "Directory that holds models, datasets, outputs").default_value("./local_training")
}

fn run_args(command: Command) -> Command {
    let file = Arg::new("config_file")
        .long("config_file")
        .value_name("FILE")
        .value_parser(clap::value_parser!(PathBuf))
        .help("TOML file with options by name; flags win over it")
        .help_heading("Template");
    command.arg(file).args(OPTIONS.iter().map(arg))
}

fn arg(opt: &'static Opt) -> Arg {
    let mut help = opt.help.to_owned();
    if !opt.choices.is_empty() {
        help.push_str(&format!(" [{}]", opt.choices.join(", ")));
    }
    let arg = Arg::new(opt.name)
        .long(opt.name)
        .visible_aliases(opt.aliases.iter().copied())
        .help(help)
        .help_heading(opt.group)
        .hide_possible_values(true);
    match opt.kind {
        Kind::Flag => arg.num_args(0..=1).require_equals(true).action(ArgAction::Append).value_name("BOOL"),
        Kind::List => arg.num_args(1..).action(ArgAction::Append).value_name("WORD"),
        Kind::Int => arg.value_name("N").overrides_with(opt.name),
        Kind::Float => arg.value_name("X").overrides_with(opt.name).allow_negative_numbers(true),
        Kind::Text => arg.value_name("TEXT").overrides_with(opt.name),
        Kind::Path => arg.value_name("PATH").overrides_with(opt.name),
    }
}

fn typed(matches: &ArgMatches) -> Typed {
    let mut typed = Typed { config_file: matches.get_one::<PathBuf>("config_file").cloned(), ..Typed::default() };
    for opt in OPTIONS.iter().filter(|o| matches.value_source(o.name).is_some()) {
        let words = matches.get_many::<String>(opt.name).map(|w| w.cloned().collect()).unwrap_or_default();
        typed.flags.insert(find(opt.name).expect("from the table").name, words);
    }
    typed
}

/// `--noise-level=low` means `--noise_level=low`; values and single dashes stay as they are.
fn underscored(arg: OsString) -> OsString {
    let Some(text) = arg.to_str() else { return arg };
    match text.strip_prefix("--") {
        Some(rest) if !rest.is_empty() => {
            let (name, value) = rest.split_once('=').map_or((rest, None), |(n, v)| (n, Some(v)));
            let name = name.replace('-', "_");
            match value {
                Some(value) => format!("--{name}={value}").into(),
                None => format!("--{name}").into(),
            }
        }
        _ => arg,
    }
}
