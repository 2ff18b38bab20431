//! `wan-train musubi COMMAND LINE`: a command line of musubi-tuner, as it stands in people's scripts. What starts the
//! program (`python`, `accelerate launch` with its options, paths in front of the name) is passed over, every option is
//! mapped, named as idle with its reason, or refused: none is ignored in silence.

mod options;

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::lora::{LoraJob, Out};
use super::{CacheWhat, Invocation};
use crate::config::{find, Kind, Typed, OPTIONS};
use crate::error::{nearest, UserError};
use options::{Fate, Row, Words, LAUNCHER};

/// A command line understood.
#[derive(Debug)]
pub struct Translation {
    pub invocation: Invocation,
    /// What to tell, one line each.
    pub notes: Vec<String>,
}

/// The programs that have a counterpart here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    Train,
    Latents,
    Text,
    Convert,
    Ema,
}

const PROGRAMS: [(&str, Program); 5] = [
    ("wan_train_network", Program::Train),
    ("wan_cache_latents", Program::Latents),
    ("wan_cache_text_encoder_outputs", Program::Text),
    ("convert_lora", Program::Convert),
    ("lora_post_hoc_ema", Program::Ema),
];

impl Program {
    fn table(self) -> &'static [Row] {
        match self {
            Program::Train => options::TRAIN,
            Program::Latents => options::LATENTS,
            Program::Text => options::TEXT,
            Program::Convert => options::CONVERT,
            Program::Ema => options::EMA,
        }
    }

    /// Whether options of ours are taken beside the program's own.
    fn is_run(self) -> bool {
        matches!(self, Program::Train | Program::Latents | Program::Text)
    }

    fn name(self) -> &'static str {
        PROGRAMS.iter().find(|(_, p)| *p == self).map_or("", |(name, _)| name)
    }

    fn fate(self, name: &str) -> Option<(&'static str, Words, Fate)> {
        if let Some(row) = self.table().iter().find(|(n, ..)| *n == name) {
            return Some(*row);
        }
        let own = find(name).filter(|_| self.is_run())?;
        let words = match own.kind {
            Kind::Flag => Words::None,
            Kind::List => Words::Many,
            _ => Words::One,
        };
        Some((own.name, words, Fate::Ours(own.name)))
    }
}

/// The words of each option that was given, the last time it was given.
type Given = BTreeMap<&'static str, Vec<String>>;

/// Understands a command line.
///
/// Errors: no known program, an unknown option, one that cannot be done here, a word too many or too few.
pub fn translate(words: &[String]) -> Result<Translation, UserError> {
    let (program, launcher, rest) = split(words)?;
    let mut notes = Vec::new();
    let mut given = Given::new();
    let (on_line, loose) = collect(program, rest)?;
    if let Some(file) = on_line.get("config_file").filter(|_| program == Program::Train) {
        let words = from_toml(&PathBuf::from(&file[0]))?;
        given.extend(collect(program, &words)?.0);
    }
    given.extend(on_line);
    if let Some(word) = loose.first().filter(|_| program != Program::Ema) {
        return Err(usage(format!("`{word}` belongs to no option of {}.py", program.name()))
            .hint("values with blanks need quotes, and an option takes as many words as there"));
    }
    let mut idle: Vec<String> = Vec::new();
    let mut typed = Typed::default();
    for (name, words) in &given {
        match program.fate(name).map(|(.., fate)| fate) {
            Some(Fate::Ours(ours)) => drop(typed.flags.insert(ours, words.clone())),
            Some(Fate::Idle(why)) => idle.push(format!("--{name} ({why})")),
            Some(Fate::Refused(instead)) => {
                return Err(usage(format!("--{name} cannot be done here")).hint(instead));
            }
            Some(Fate::Read) | None => {}
        }
    }
    if let (Some(precision), false) = (&launcher.mixed_precision, typed.flags.contains_key("mixed_precision")) {
        if program == Program::Train {
            typed.flags.insert("mixed_precision", vec![precision.clone()]);
        }
    }
    idle.extend(launcher.idle);
    let invocation = match program {
        Program::Train => train(&given, typed, &mut idle, &mut notes),
        Program::Latents => caches(&given, typed, CacheWhat::Latents, &mut notes)?,
        Program::Text => caches(&given, typed, CacheWhat::Text, &mut notes)?,
        Program::Convert => Invocation::Lora(convert(&given)?),
        Program::Ema => Invocation::Lora(ema(&given, loose)?),
    };
    if !idle.is_empty() {
        notes.push(format!("not used here: {}", idle.join(", ")));
    }
    Ok(Translation { invocation, notes })
}

fn usage(what: String) -> UserError {
    UserError::usage(what)
}

/// What `accelerate launch` was told.
#[derive(Default)]
struct Launcher {
    mixed_precision: Option<String>,
    idle: Vec<String>,
}

/// The program's name without directories, module path and ending.
fn program_of(word: &str) -> Option<&'static str> {
    let name = word.rsplit(['/', '\\']).next().unwrap_or(word);
    let name = name.strip_suffix(".py").unwrap_or(name);
    let name = name.rsplit('.').next().unwrap_or(name);
    PROGRAMS.iter().find(|(n, _)| *n == name).map(|(n, _)| *n)
}

fn split(words: &[String]) -> Result<(Program, Launcher, &[String]), UserError> {
    let known: Vec<String> = PROGRAMS.iter().map(|(n, _)| format!("{n}.py")).collect();
    let at = words.iter().position(|w| program_of(w).is_some()).ok_or_else(|| {
        let script = words.iter().find(|w| w.ends_with(".py") || w.ends_with(".py\""));
        let what = match script {
            Some(script) => format!("{script} has no counterpart here"),
            None => "no program of musubi-tuner is named".to_string(),
        };
        usage(what).hint(format!("known programs: {}", known.join(", ")))
    })?;
    let mut launcher = Launcher::default();
    let mut before = words[..at].iter();
    while let Some(word) = before.next() {
        let Some(option) = word.strip_prefix("--") else {
            let base = word.rsplit(['/', '\\']).next().unwrap_or(word).to_lowercase();
            let base = base.strip_suffix(".exe").unwrap_or(&base);
            let starts =
                base.starts_with("python") || ["py", "accelerate", "launch", "uv", "run", "-m", "-u"].contains(&base);
            if starts || base == "accelerate.commands.accelerate_cli" || base == "accelerate.commands.launch" {
                continue;
            }
            return Err(usage(format!("`{word}` before the program's name is not understood"))
                .hint("give the command line from `python` or `accelerate launch` on, or from the program's name"));
        };
        let (name, value) = option.split_once('=').map_or((option, None), |(n, v)| (n, Some(v.to_string())));
        let name = name.replace('-', "_");
        let value = match value {
            None if LAUNCHER.contains(&name.as_str()) => before.next().cloned(),
            value => value,
        };
        match (name.as_str(), value) {
            ("mixed_precision", Some(value)) => launcher.mixed_precision = Some(value),
            ("multi_gpu", _) => return Err(one_card("--multi_gpu")),
            ("num_processes" | "num_machines", Some(n)) if n != "1" => return Err(one_card(&format!("--{name} {n}"))),
            (name, _) => launcher.idle.push(format!("accelerate's --{name}")),
        }
    }
    let name = program_of(&words[at]).unwrap_or_default();
    let program = PROGRAMS.iter().find(|(n, _)| *n == name).map(|(_, p)| *p).expect("found above");
    Ok((program, launcher, &words[at + 1..]))
}

fn one_card(what: &str) -> UserError {
    usage(format!("{what}: a run uses one card")).hint("leave it out")
}

/// Takes options and their words apart; words that belong to none come beside.
fn collect(program: Program, words: &[String]) -> Result<(Given, Vec<String>), UserError> {
    let (mut given, mut loose) = (Given::new(), Vec::new());
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix("--") else {
            loose.push(word.clone());
            continue;
        };
        let (typed, value) = option.split_once('=').map_or((option, None), |(n, v)| (n, Some(v.to_string())));
        let name = typed.replace('-', "_");
        let (name, arity, _) = program.fate(&name).ok_or_else(|| unknown(program, &name))?;
        let is_value = |w: &&&String| !w.starts_with("--");
        let values = match (arity, value) {
            (_, Some(value)) => vec![value],
            (Words::None, None) => Vec::new(),
            (Words::One, None) => match words.next_if(|w| is_value(&w)) {
                Some(value) => vec![value.clone()],
                None => return Err(usage(format!("--{name} needs a value")).hint("write it behind the option")),
            },
            (Words::Many, None) => std::iter::from_fn(|| words.next_if(|w| is_value(&w)).cloned()).collect(),
        };
        given.insert(name, values);
    }
    Ok((given, loose))
}

fn unknown(program: Program, name: &str) -> UserError {
    let own = program.table().iter().map(|(n, ..)| *n);
    let ours = OPTIONS.iter().filter(|_| program.is_run()).map(|o| o.name);
    let error = usage(format!("{}.py has no option --{name}", program.name()));
    match nearest(name, own.chain(ours)) {
        Some(near) => error.hint(format!("did you mean `--{near}`?")),
        None => error.hint("names cannot be shortened here; check the spelling"),
    }
}

/// A `--config_file` as words: tables are flattened, as the old program does; unlike there, unknown keys are errors.
fn from_toml(path: &std::path::Path) -> Result<Vec<String>, UserError> {
    let with_ending = path.with_extension("toml");
    let path = if path.exists() { path } else { &with_ending };
    let text = std::fs::read_to_string(path).map_err(|e| {
        usage(format!("configuration file {} cannot be read: {e}", path.display())).hint("check the path")
    })?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
        let (line, column) = e.span().map_or((1, 1), |s| crate::config::line_column(&text, s.start));
        usage(format!("{}, line {line}, column {column}: {}", path.display(), e.message().replace('\n', " ")))
    })?;
    let mut words = Vec::new();
    flatten(table, path, &mut words)?;
    Ok(words)
}

fn flatten(table: toml::Table, path: &std::path::Path, words: &mut Vec<String>) -> Result<(), UserError> {
    let plain = |key: &str, value: &toml::Value| match value {
        toml::Value::String(s) => Ok(s.clone()),
        toml::Value::Integer(i) => Ok(i.to_string()),
        toml::Value::Float(f) => Ok(f.to_string()),
        other => Err(usage(format!("{}: `{key}` cannot be {other}", path.display()))
            .hint("use a text, a number, true or false, or a list of these")),
    };
    for (key, value) in table {
        match value {
            toml::Value::Table(inner) => flatten(inner, path, words)?,
            toml::Value::Boolean(true) => words.push(format!("--{key}")),
            // An unset switch: the name is still checked.
            toml::Value::Boolean(false) => {
                let rows = Program::Train.fate(&key).ok_or_else(|| unknown(Program::Train, &key))?;
                if matches!(rows.2, Fate::Ours(_)) {
                    words.push(format!("--{key}=false"));
                }
            }
            toml::Value::Array(items) => {
                words.push(format!("--{key}"));
                for item in &items {
                    words.push(plain(&key, item)?);
                }
            }
            other => words.extend([format!("--{key}"), plain(&key, &other)?]),
        }
    }
    Ok(())
}

fn train(given: &Given, mut typed: Typed, idle: &mut Vec<String>, notes: &mut Vec<String>) -> Invocation {
    match given.get("log_with").map(|w| w[0].to_lowercase()).as_deref() {
        Some("tensorboard") => drop(typed.flags.insert("log_with", vec!["tensorboard".into()])),
        Some(other) => idle.push(format!("--log_with {other} (logs go to TensorBoard and JSON lines)")),
        None => {}
    }
    if !typed.flags.contains_key("lora_format") {
        typed.flags.insert("lora_format", vec!["kohya".into()]);
        notes.push(
            "as in musubi-tuner the LoRA gets keys of the form lora_unet_… (--lora_format comfyui for the other)"
                .into(),
        );
    }
    if typed.flags.contains_key("dit_high_noise") && !typed.flags.contains_key("noise_level") {
        notes.push(
            "as in musubi-tuner --dit_high_noise trains one LoRA over both experts; --noise_level both makes one for each"
                .into(),
        );
    }
    if !typed.flags.contains_key("musubi_compat") {
        notes.push("numbers are those of this program; --musubi_compat gives the old ones (docs/migration.md)".into());
    }
    Invocation::Train(typed)
}

fn caches(given: &Given, mut typed: Typed, what: CacheWhat, notes: &mut Vec<String>) -> Result<Invocation, UserError> {
    if let Some(device) = given.get("device").map(|w| w[0].as_str()) {
        let device = match device {
            "cpu" => "cpu",
            "cuda" | "cuda:0" => "cuda",
            other => {
                return Err(usage(format!("--device {other} is not known"))
                    .hint("use cuda or cpu; CUDA_VISIBLE_DEVICES chooses the card"))
            }
        };
        typed.flags.insert("device", vec![device.into()]);
    }
    if what == CacheWhat::Latents && !typed.flags.contains_key("task") {
        // The old program knows no task: what is stored follows from these two.
        let task = match (typed.flags.contains_key("clip"), given.contains_key("i2v")) {
            (true, _) => "i2v-14B",
            (false, true) => "i2v-A14B",
            (false, false) => "t2v-14B",
        };
        typed.flags.insert("task", vec![task.into()]);
        notes.push(format!("caching for --task {task}, by --i2v and --clip; give --task for another"));
    }
    if !given.contains_key("skip_existing") && !typed.flags.contains_key("recache") {
        notes.push("caches that are still right are reused; --recache encodes them again".into());
    }
    Ok(Invocation::Cache { typed, what })
}

fn needed<'a>(given: &'a Given, name: &str) -> Result<&'a str, UserError> {
    given.get(name).map(|w| w[0].as_str()).ok_or_else(|| usage(format!("--{name} is not given")).hint("add it"))
}

fn convert(given: &Given) -> Result<LoraJob, UserError> {
    let out = Out { path: needed(given, "output")?.into(), overwrite: true, precision: None };
    let (to, fold_alpha) = match needed(given, "target")? {
        "default" => ("kohya", false),
        // As there: alpha / rank goes into the factors.
        "other" => ("comfyui", true),
        other => return Err(usage(format!("--target {other} is not known")).hint("use default or other")),
    };
    match given.get("diffusers_prefix").map(|w| w[0].as_str()) {
        None | Some("diffusion_model") => {}
        Some(prefix) => {
            return Err(usage(format!("keys that start with {prefix} are loaded by no program that is known"))
                .hint("leave --diffusers_prefix out for ComfyUI, or use `wan-train lora convert --to diffusers`"))
        }
    }
    Ok(LoraJob::Convert { input: needed(given, "input")?.into(), out, to: to.into(), fold_alpha })
}

fn ema(given: &Given, files: Vec<String>) -> Result<LoraJob, UserError> {
    let number = |name: &str| match given.get(name).map(|w| w[0].as_str()) {
        None => Ok(None),
        Some(word) => word
            .parse::<f64>()
            .map(Some)
            .map_err(|_| usage(format!("--{name} {word} is not a number")).hint("give a number such as 0.95")),
    };
    if files.len() < 2 {
        return Err(usage("an average takes two files or more".into()).hint("name the checkpoints of one run"));
    }
    Ok(LoraJob::Ema {
        files: files.into_iter().map(PathBuf::from).collect(),
        beta: number("beta")?.unwrap_or(0.95),
        beta2: number("beta2")?,
        sigma_rel: number("sigma_rel")?,
        no_sort: given.contains_key("no_sort"),
        out: Out { path: needed(given, "output_file")?.into(), overwrite: true, precision: None },
    })
}

#[cfg(test)]
mod tests;
