//! `wan-train lora …`: work on finished LoRA files.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{value_parser, Arg, ArgAction, ArgMatches, Command};

/// What to do with LoRA files.
#[derive(Debug, Clone, PartialEq)]
pub enum LoraJob {
    Info { file: PathBuf, modules: bool, json: bool },
    Convert { input: PathBuf, out: Out, to: String, fold_alpha: bool },
    Merge { files: Vec<PathBuf>, weights: Vec<f64>, dit: Option<PathBuf>, cut: Option<CutArgs>, out: Out },
    Extract { base: PathBuf, tuned: PathBuf, cut: CutArgs, out: Out },
    Resize { input: PathBuf, cut: CutArgs, out: Out },
    Ema { files: Vec<PathBuf>, beta: f64, beta2: Option<f64>, sigma_rel: Option<f64>, no_sort: bool, out: Out },
}

/// Where a result goes, and how it is written.
#[derive(Debug, Clone, PartialEq)]
pub struct Out {
    pub path: PathBuf,
    pub overwrite: bool,
    /// `--save_precision`; the inputs' own where it is not given.
    pub precision: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct CutArgs {
    pub dim: u64,
    pub dynamic: Option<String>,
}

const FORMS: [&str; 3] = ["comfyui", "kohya", "diffusers"];

pub fn command() -> Command {
    let verb = |name: &'static str, about: &'static str| Command::new(name).about(about);
    Command::new("lora")
        .about("Show, convert, merge, extract, resize or average LoRA files")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            verb("info", "Show keys, rank, alpha and metadata")
                .arg(file("file", "LoRA"))
                .arg(flag("modules", "List every module with rank, alpha and the size of its update"))
                .arg(flag("json", "One JSON object")),
        )
        .subcommand(
            output(verb("convert", "Rename the keys for another program, without loss"))
                .arg(file("input", "LoRA in any form"))
                .arg(
                    Arg::new("to")
                        .long("to")
                        .value_parser(PossibleValuesParser::new(FORMS))
                        .required(true)
                        .help("Form of the keys to write"),
                )
                .arg(flag("fold_alpha", "Multiply alpha / rank into the factors and leave alpha out")),
        )
        .subcommand(
            output(verb("merge", "Add LoRAs up into one, or into a DiT"))
                .arg(
                    save_precision().help(
                        "Dtype of what is written (default: that of the inputs; an fp8 DiT becomes bf16 or fp16)",
                    ),
                )
                .arg(file("files", "LoRAs").num_args(1..))
                .arg(
                    Arg::new("weights")
                        .long("weights")
                        .value_name("W")
                        .num_args(1..)
                        .allow_negative_numbers(true)
                        .value_parser(value_parser!(f64))
                        .help("Strength of each LoRA, or one for all [1.0]"),
                )
                .arg(path("dit", "Merge into this DiT instead of into one LoRA"))
                .arg(dim("Rank of the result; without it the sum is exact and its rank that of all together"))
                .arg(dynamic()),
        )
        .subcommand(
            precision(output(verb("extract", "The difference of two DiTs as a LoRA")))
                .arg(path("base", "DiT before").required(true))
                .arg(path("tuned", "DiT after").required(true))
                .arg(dim("Highest rank of a module").required(true))
                .arg(dynamic()),
        )
        .subcommand(
            precision(output(verb("resize", "Lower the rank of a LoRA; a LoHa or LoKr becomes a LoRA")))
                .arg(file("input", "LoRA"))
                .arg(dim("Highest rank of a module").required(true))
                .arg(dynamic()),
        )
        .subcommand(
            precision(output(verb("ema", "Average the checkpoints of one run")))
                .arg(file("files", "Checkpoints, in the order of their training or of their file times").num_args(2..))
                .arg(number("beta", "Weight of the past [0.95]"))
                .arg(number("beta2", "Weight of the past at the last file (default: beta)"))
                .arg(
                    number("sigma_rel", "Relative width of the average, in place of beta: 0.05 narrow, 0.2 wide")
                        .conflicts_with_all(["beta", "beta2"]),
                )
                .arg(flag("no_sort", "Take the files in the order given, not by their time")),
        )
}

pub fn parse(matches: &ArgMatches) -> LoraJob {
    let one = |m: &ArgMatches, name: &str| m.get_one::<PathBuf>(name).cloned().unwrap_or_default();
    let all = |m: &ArgMatches, name: &str| m.get_many::<PathBuf>(name).into_iter().flatten().cloned().collect();
    let number = |m: &ArgMatches, name: &str| m.get_one::<f64>(name).copied();
    let out = |m: &ArgMatches| Out {
        path: one(m, "out"),
        overwrite: m.get_flag("overwrite"),
        precision: m.try_get_one::<String>("save_precision").ok().flatten().cloned(),
    };
    let cut = |m: &ArgMatches| {
        let dynamic = m.get_one::<String>("dynamic").cloned();
        m.get_one::<u64>("dim").map(|dim| CutArgs { dim: *dim, dynamic })
    };
    match matches.subcommand() {
        Some(("info", m)) => {
            LoraJob::Info { file: one(m, "file"), modules: m.get_flag("modules"), json: m.get_flag("json") }
        }
        Some(("convert", m)) => LoraJob::Convert {
            input: one(m, "input"),
            out: out(m),
            to: m.get_one::<String>("to").cloned().unwrap_or_default(),
            fold_alpha: m.get_flag("fold_alpha"),
        },
        Some(("merge", m)) => LoraJob::Merge {
            files: all(m, "files"),
            weights: m.get_many::<f64>("weights").into_iter().flatten().copied().collect(),
            dit: m.get_one::<PathBuf>("dit").cloned(),
            cut: cut(m),
            out: out(m),
        },
        Some(("extract", m)) => LoraJob::Extract {
            base: one(m, "base"),
            tuned: one(m, "tuned"),
            cut: cut(m).expect("clap demands --dim"),
            out: out(m),
        },
        Some(("resize", m)) => {
            LoraJob::Resize { input: one(m, "input"), cut: cut(m).expect("clap demands --dim"), out: out(m) }
        }
        Some(("ema", m)) => LoraJob::Ema {
            files: all(m, "files"),
            beta: number(m, "beta").unwrap_or(0.95),
            beta2: number(m, "beta2"),
            sigma_rel: number(m, "sigma_rel"),
            no_sort: m.get_flag("no_sort"),
            out: out(m),
        },
        other => unreachable!("clap knows no lora verb {:?}", other.map(|o| o.0)),
    }
}

fn file(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).value_name("FILE").value_parser(value_parser!(PathBuf)).required(true).help(help)
}

fn path(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name("FILE").value_parser(value_parser!(PathBuf)).help(help)
}

fn number(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name("X").value_parser(value_parser!(f64)).help(help)
}

fn flag(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

fn dim(help: &'static str) -> Arg {
    Arg::new("dim").long("dim").value_name("N").value_parser(value_parser!(u64).range(1..=4096)).help(help)
}

fn dynamic() -> Arg {
    Arg::new("dynamic")
        .long("dynamic")
        .value_name("METHOD=X")
        .requires("dim")
        .help("Rank of each module by its singular values: sv_ratio=X, sv_cumulative=X or sv_fro=X")
}

fn output(command: Command) -> Command {
    command
        .arg(path("out", "Where to write").short('o').required(true))
        .arg(flag("overwrite", "Replace the file if it exists"))
}

fn precision(command: Command) -> Command {
    command.arg(save_precision().help("Dtype of what is written (default: that of the inputs)"))
}

fn save_precision() -> Arg {
    Arg::new("save_precision").long("save_precision").value_parser(PossibleValuesParser::new(["fp32", "fp16", "bf16"]))
}
