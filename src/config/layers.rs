//! template < file < flags: three layers of `name = value`, laid over the defaults once. Nothing below this module
//! looks at a flag, an environment variable or a template again.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Map, Value};

use super::options::{find, Kind, Opt, RunConfig, OPTIONS};
use super::validate::validate;
use super::{experts, registry};
use crate::error::{nearest, UserError};

/// Which layer gave an option its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layer {
    Default,
    Template(String),
    File(PathBuf),
    Flag,
    /// Worked out from other options (paths under the run directory, time stamps).
    Derived,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Layer::Default => f.write_str("default"),
            Layer::Template(name) => write!(f, "template {name}"),
            Layer::File(path) => write!(f, "{}", path.display()),
            Layer::Flag => f.write_str("flag"),
            Layer::Derived => f.write_str("derived"),
        }
    }
}

/// What was typed, before it means anything.
#[derive(Debug, Clone, Default)]
pub struct Typed {
    /// `--config_file`.
    pub config_file: Option<PathBuf>,
    /// Flags by option name (aliases already replaced), each with its words; a bare flag has none.
    pub flags: BTreeMap<&'static str, Vec<String>>,
}

/// The resolved run, and where each value came from.
#[derive(Debug, Clone)]
pub struct Resolved {
    pub config: RunConfig,
    pub origin: BTreeMap<&'static str, Layer>,
    /// `output_name` before noise level and time stamp were added to it.
    pub base_name: String,
}

/// `--noise_level both`: two runs, one for each expert.
const BOTH: &str = "both";

/// Lays the layers over each other and works out the derived values. `stamp` is the `YYYYmmdd_HHMM` of the run.
/// For verbs that deal with one run: `--noise_level both` is refused.
pub fn resolve(typed: &Typed, stamp: &str) -> anyhow::Result<Resolved> {
    let asked = Asked::read(typed)?;
    let level = asked.level()?;
    if level.as_deref() == Some(BOTH) {
        return Err(UserError::usage("this verb looks at one expert at a time, not at --noise_level both")
            .hint("give --noise_level high, low or shared")
            .into());
    }
    asked.run(level.as_deref(), false, stamp)
}

/// The runs that were asked for: one, or with `--noise_level both` that of the high and that of the low expert.
pub fn resolve_runs(typed: &Typed, stamp: &str) -> anyhow::Result<Vec<Resolved>> {
    let asked = Asked::read(typed)?;
    let level = asked.level()?;
    if level.as_deref() != Some(BOTH) {
        return Ok(vec![asked.run(level.as_deref(), false, stamp)?]);
    }
    for (key, hint) in [
        ("resume", "the same command without --resume goes on where it was interrupted; a state of one expert goes with --noise_level high or low"),
        ("network_weights", "the weights of one LoRA cannot start two: train the experts one after the other, each with its own --resume_from"),
    ] {
        if asked.text(key).is_some() {
            let name = if key == "resume" { "--resume" } else { "--resume_from" };
            return Err(UserError::usage(format!("{name} and --noise_level both exclude each other")).hint(hint).into());
        }
    }
    ["high", "low"].into_iter().map(|level| asked.run(Some(level), true, stamp)).collect()
}

/// Whether a template has two experts and does not say itself which of them to train.
pub fn needs_level(template: &str) -> anyhow::Result<bool> {
    let (layer, has_levels) = template_chain(template, None, 0)?;
    Ok(has_levels && !layer.contains_key("noise_level"))
}

/// File and flags as they were given, checked but not laid over anything yet.
struct Asked {
    file: Option<(PathBuf, Map<String, Value>)>,
    flags: Map<String, Value>,
}

impl Asked {
    fn read(typed: &Typed) -> anyhow::Result<Self> {
        let file = match &typed.config_file {
            Some(path) => Some((path.clone(), file_layer(path)?)),
            None => None,
        };
        let mut flags = Map::new();
        for (name, words) in &typed.flags {
            let opt = find(name).expect("flags are made from the table");
            flags.insert(opt.name.into(), from_words(opt, words)?);
        }
        Ok(Self { file, flags })
    }

    fn text(&self, key: &str) -> Option<String> {
        let value = self.flags.get(key).or_else(|| self.file.as_ref().and_then(|(_, f)| f.get(key)));
        value.and_then(Value::as_str).map(str::to_owned)
    }

    /// Which of two experts are asked for: as typed, else as the template has it, else what `--dit_high_noise` means alone.
    fn level(&self) -> anyhow::Result<Option<String>> {
        if let Some(level) = self.text("noise_level") {
            return Ok(Some(level));
        }
        let template = match self.text("template") {
            Some(name) => template_chain(&name, None, 0)?.0,
            None => Map::new(),
        };
        let fixed = template.get("noise_level").and_then(Value::as_str).map(str::to_owned);
        Ok(fixed.or_else(|| self.text("dit_high_noise").map(|_| experts::SHARED.into())))
    }

    /// One run: of the expert `level` where there are two; `pair` where the other one is trained too.
    fn run(&self, level: Option<&str>, pair: bool, stamp: &str) -> anyhow::Result<Resolved> {
        let mut stack = Stack::default();
        if let Some(name) = self.text("template") {
            let (short, layer) = template_layer(&name, level)?;
            stack.lay(layer, &Layer::Template(short));
        }
        let template_dit = stack.values.get("dit").cloned().map(|dit| (dit, stack.origin["dit"].clone()));
        if let Some((path, layer)) = &self.file {
            stack.lay(layer.clone(), &Layer::File(path.clone()));
        }
        stack.lay(self.flags.clone(), &Layer::Flag);
        experts::choose_dit(&mut stack.values, &mut stack.origin, level, pair, template_dit)?;
        stack.finish(stamp, pair)
    }
}

#[derive(Default)]
struct Stack {
    values: Map<String, Value>,
    origin: BTreeMap<&'static str, Layer>,
}

impl Stack {
    fn lay(&mut self, layer: Map<String, Value>, name: &Layer) {
        for key in layer.keys() {
            self.origin.insert(find(key).expect("layers hold known options only").name, name.clone());
        }
        lay_over(&mut self.values, layer);
        self.origin.retain(|key, _| self.values.contains_key(*key));
    }

    fn finish(self, stamp: &str, pair: bool) -> anyhow::Result<Resolved> {
        let mut all = match serde_json::to_value(RunConfig::default())? {
            Value::Object(map) => map,
            _ => unreachable!("a struct serialises to an object"),
        };
        all.extend(self.values);
        let config: RunConfig = serde_json::from_value(Value::Object(all)).context("resolving the options")?;
        let base_name = config.output_name.clone().unwrap_or_else(|| "wan-lora".into());
        let mut resolved = Resolved { config, origin: self.origin, base_name };
        if pair {
            experts::derive_pair(&mut resolved)?;
        }
        experts::derive_shared(&mut resolved)?;
        derive(&mut resolved, stamp);
        validate(&resolved.config)?;
        Ok(resolved)
    }
}

/// Lays `layer` over `below`. Epochs count before steps where one layer has both; a layer that has steps alone means them.
pub(super) fn lay_over(below: &mut Map<String, Value>, layer: Map<String, Value>) {
    if layer.contains_key("max_train_steps") {
        below.remove("max_train_epochs");
    }
    below.extend(layer);
}

/// Values that follow from others. Order matters: the run directory is named before the name gets its time stamp.
fn derive(r: &mut Resolved, stamp: &str) {
    let c = &mut r.config;
    let mut derived = Vec::new();
    let base = c.base_dir.to_string_lossy().into_owned();
    let in_base = |p: &Path| PathBuf::from(p.to_string_lossy().replace("{base_dir}", &base));
    let models = [&mut c.dit, &mut c.dit_high_noise, &mut c.vae, &mut c.t5, &mut c.clip];
    for path in models.into_iter().chain([&mut c.dataset_config, &mut c.sample_prompts]).flatten() {
        *path = in_base(path);
    }
    let merged = c.base_weights.iter_mut().chain(c.base_weights_high_noise.iter_mut().flatten());
    merged.for_each(|p| *p = p.replace("{base_dir}", &base));
    let of_template = |name: &str| matches!(r.origin.get(name), Some(Layer::Template(_)));
    if c.skip_lightning && of_template("base_weights_high_noise") {
        c.base_weights_high_noise = None;
        derived.push("base_weights_high_noise");
    }
    if c.skip_lightning && of_template("base_weights") {
        c.base_weights.clear();
        c.base_weights_multiplier.clear();
        derived.extend(["base_weights", "base_weights_multiplier"]);
    }
    if c.template.is_some() {
        let name = c.output_name.clone().unwrap_or_else(|| "wan-lora".into());
        if c.run_dir.is_none() {
            c.run_dir = Some(c.base_dir.join("outputs").join(&name));
            derived.push("run_dir");
        }
        let stamped = !matches!(r.origin.get("output_name"), Some(Layer::Flag)) || c.resume.is_none();
        if stamped {
            let level = c.noise_level.as_ref().map(|l| format!("{l}-")).unwrap_or_default();
            c.output_name = Some(format!("{name}-{level}{stamp}"));
            derived.push("output_name");
        }
        if c.logging_dir.is_none() {
            c.logging_dir = c.run_dir.as_ref().map(|d| d.join("logs"));
            derived.push("logging_dir");
        }
    }
    if c.output_dir.is_none() {
        c.output_dir = c.run_dir.clone();
        derived.push("output_dir");
    }
    if let Some(boundary) = c.timestep_boundary.as_mut().filter(|b| **b > 1.0) {
        *boundary /= 1000.0;
    }
    r.origin.extend(derived.into_iter().map(|name| (name, Layer::Derived)));
}

/// Reads a template with its ancestors and its part for the noise level into one flat layer.
fn template_layer(name: &str, noise_level: Option<&str>) -> anyhow::Result<(String, Map<String, Value>)> {
    let short = match name.strip_suffix(".toml") {
        Some(path) => Path::new(path).file_name().map_or(name.into(), |s| s.to_string_lossy().into_owned()),
        None => name.to_owned(),
    };
    let (layer, has_levels) = template_chain(name, noise_level, 0)?;
    match (has_levels, noise_level) {
        (true, None) => Err(UserError::usage(format!(
            "template {short} trains one of the two Wan 2.2 experts and needs to know which"
        ))
        .hint("add --noise_level high, --noise_level low, --noise_level both for a LoRA each, or --noise_level shared for one LoRA over both")
        .into()),
        // A template of one's own may name both files without a part for either.
        (false, Some(level)) if level != experts::SHARED => Err(UserError::usage(format!(
            "template {short} has a single model: --noise_level is for Wan 2.2 templates"
        ))
        .hint("leave --noise_level out")
        .into()),
        _ => Ok((short, layer)),
    }
}

/// A template laid over the one it extends; the flag tells whether any of them has parts per noise level.
fn template_chain(name: &str, noise_level: Option<&str>, depth: usize) -> anyhow::Result<(Map<String, Value>, bool)> {
    const DEEPEST: usize = 8;
    if depth > DEEPEST {
        return Err(UserError::usage(format!("template {name} extends itself")).into());
    }
    let text = match name.ends_with(".toml") {
        true => read_file(Path::new(name), "template")?,
        false => registry::template(name)?.to_owned(),
    };
    let mut table = parse_toml(&text, name)?;
    table.remove("description");
    let (mut map, inherited) = match table.remove("extends") {
        Some(toml::Value::String(parent)) => template_chain(&parent, noise_level, depth + 1)?,
        Some(other) => {
            return Err(UserError::usage(format!("{name}: `extends` names another template, not {other}")).into())
        }
        None => (Map::new(), false),
    };
    let levels = split_levels(table, name, &text, noise_level, &mut map)?;
    Ok((map, inherited || levels))
}

/// Lays a template's own options, then those of its part for the noise level; tells whether it has such parts.
fn split_levels(
    mut table: toml::Table,
    name: &str,
    text: &str,
    noise_level: Option<&str>,
    into: &mut Map<String, Value>,
) -> anyhow::Result<bool> {
    let mut parts = BTreeMap::new();
    for level in ["high", "low", experts::SHARED] {
        match table.remove(level) {
            Some(toml::Value::Table(part)) => drop(parts.insert(level, check_table(part, name, text)?)),
            Some(other) => {
                return Err(UserError::usage(format!("{name}: [{level}] is a table of options, not {other}")).into())
            }
            None => {}
        }
    }
    let has = !parts.is_empty();
    let own = check_table(table, name, text)?;
    if own.contains_key("base_weights") {
        // They take the place of the inherited ones in both experts.
        into.remove("base_weights_high_noise");
    }
    lay_over(into, own);
    match noise_level {
        Some(experts::SHARED) => experts::lay_shared(parts, into),
        Some(level) => lay_over(into, parts.remove(level).unwrap_or_default()),
        None => {}
    }
    Ok(has)
}

fn file_layer(path: &Path) -> anyhow::Result<Map<String, Value>> {
    let with_suffix = path.with_extension("toml");
    let path = if path.exists() { path } else { &with_suffix };
    let text = read_file(path, "configuration file")?;
    check_table(parse_toml(&text, &path.display().to_string())?, &path.display().to_string(), &text)
}

fn read_file(path: &Path, what: &str) -> Result<String, UserError> {
    std::fs::read_to_string(path)
        .map_err(|e| UserError::usage(format!("{what} {} cannot be read: {e}", path.display())).hint("check the path"))
}

fn parse_toml(text: &str, name: &str) -> Result<toml::Table, UserError> {
    text.parse::<toml::Table>().map_err(|e| {
        let (line, column) = e.span().map_or((1, 1), |s| line_column(text, s.start));
        UserError::usage(format!("{name}, line {line}, column {column}: {}", e.message().replace('\n', " ")))
    })
}

/// 1-based line and column of a byte offset.
pub fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..offset.min(text.len())];
    let line = before.matches('\n').count() + 1;
    (line, before.chars().rev().take_while(|c| *c != '\n').count() + 1)
}

/// Known names and right types only. Table names mean nothing (as in the old trainer): tables are flattened.
fn check_table(table: toml::Table, name: &str, text: &str) -> anyhow::Result<Map<String, Value>> {
    let mut map = Map::new();
    for (key, value) in table {
        match (find(&key), value) {
            (Some(opt), value) => {
                map.insert(opt.name.into(), from_toml(opt, &value, name)?);
            }
            (None, toml::Value::Table(inner)) => map.extend(check_table(inner, name, text)?),
            (None, _) => {
                let line = text.lines().position(|l| l.trim_start().starts_with(&key)).map_or(0, |l| l + 1);
                return Err(unknown(&format!("{name}, line {line}: unknown key `{key}`"), &key).into());
            }
        }
    }
    Ok(map)
}

/// The error for a name that is in no row of the table.
pub fn unknown(what: &str, typed: &str) -> UserError {
    let names = OPTIONS.iter().flat_map(|o| std::iter::once(o.name).chain(o.aliases.iter().copied()));
    let error = UserError::usage(what);
    match nearest(typed, names) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint("`wan-train --help` lists every option"),
    }
}

fn wrong(opt: &Opt, where_: &str, got: &str) -> UserError {
    let wanted = match opt.kind {
        _ if !opt.choices.is_empty() => format!("one of {}", opt.choices.join(", ")),
        Kind::Flag => "true or false".into(),
        Kind::Int => "a whole number that is not negative".into(),
        Kind::Float => "a number".into(),
        Kind::Text | Kind::Path => "text".into(),
        Kind::List => "a list of words".into(),
    };
    // On the command line what stands before the name belongs to it.
    let name = if where_ == "--" { format!("`--{}`", opt.name) } else { format!("{where_}`{}`", opt.name) };
    let error = UserError::usage(format!("{name} cannot be `{got}`: it takes {wanted}"));
    match nearest(got, opt.choices.iter().copied()) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None if opt.choices.is_empty() => error.hint(format!("{}: {}", opt.name, opt.help)),
        None => error,
    }
}

fn choice(opt: &Opt, word: &str, where_: &str) -> Result<Value, UserError> {
    if opt.choices.is_empty() {
        return Ok(Value::String(word.into()));
    }
    let found = opt.choices.iter().find(|c| c.eq_ignore_ascii_case(word));
    found.map(|c| Value::String((*c).into())).ok_or_else(|| wrong(opt, where_, word))
}

fn from_words(opt: &Opt, words: &[String]) -> Result<Value, UserError> {
    let joined = words.join(" ");
    let word = words.first().map(String::as_str).unwrap_or_default();
    Ok(match opt.kind {
        Kind::Flag if words.is_empty() || word == "true" => Value::Bool(true),
        Kind::Flag if word == "false" => Value::Bool(false),
        Kind::Int => word.parse::<u64>().map_err(|_| wrong(opt, "--", word))?.into(),
        Kind::Float => match word.parse::<f64>() {
            Ok(x) if x.is_finite() => x.into(),
            _ => return Err(wrong(opt, "--", word)),
        },
        Kind::Text => choice(opt, word, "--")?,
        Kind::Path => Value::String(word.into()),
        Kind::List => Value::Array(words.iter().map(|w| Value::String(w.clone())).collect()),
        Kind::Flag => return Err(wrong(opt, "--", &joined)),
    })
}

fn from_toml(opt: &Opt, value: &toml::Value, name: &str) -> Result<Value, UserError> {
    let where_ = format!("{name}: ");
    let plain = |v: &toml::Value| match v {
        toml::Value::String(s) => Some(s.clone()),
        toml::Value::Integer(i) => Some(i.to_string()),
        toml::Value::Float(f) => Some(f.to_string()),
        _ => None,
    };
    let wrong = || wrong(opt, &where_, value.to_string().trim_matches('"'));
    Ok(match (opt.kind, value) {
        (Kind::Flag, toml::Value::Boolean(b)) => Value::Bool(*b),
        (Kind::Int, toml::Value::Integer(i)) => u64::try_from(*i).map_err(|_| wrong())?.into(),
        (Kind::Float, toml::Value::Integer(i)) => (*i as f64).into(),
        (Kind::Float, toml::Value::Float(f)) if f.is_finite() => (*f).into(),
        (Kind::Text, v) => choice(opt, &plain(v).ok_or_else(wrong)?, &where_)?,
        (Kind::Path, toml::Value::String(s)) => Value::String(s.clone()),
        (Kind::List, toml::Value::String(s)) => Value::Array(vec![Value::String(s.clone())]),
        (Kind::List, toml::Value::Array(items)) => Value::Array(
            items.iter().map(|v| plain(v).map(Value::String)).collect::<Option<Vec<_>>>().ok_or_else(wrong)?,
        ),
        _ => return Err(wrong()),
    })
}
