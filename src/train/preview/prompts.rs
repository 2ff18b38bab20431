//! Prompt files: what previews are made of. Three forms, told by the ending: `.txt` (a prompt a line, options behind it),
//! `.toml` (`[prompt]` with defaults, `[[prompt.subset]]` for each) and `.json` (a list of tables or lines).
//!
//! Everything that is wrong in a file is told at once, each with its place.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Map, Value};

use crate::config::line_column;
use crate::error::{nearest, wrong, UserError};

/// One preview as the file asks for it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Prompt {
    /// Where it stands, for messages: `prompts.txt, line 3`.
    pub place: String,
    pub text: String,
    pub negative: Option<String>,
    /// Pixels.
    pub width: usize,
    pub height: usize,
    pub frames: usize,
    pub seed: Option<u64>,
    /// Sampling steps.
    pub steps: usize,
    /// Classifier-free guidance; the task's without.
    pub guidance: Option<f64>,
    /// Flow shift; the task's without.
    pub shift: Option<f64>,
    pub image: Option<PathBuf>,
    pub end_image: Option<PathBuf>,
    pub control_video: Option<PathBuf>,
    /// Worth a line before the run.
    pub notes: Vec<String>,
}

/// What a prompt may say: on a line behind `--`, as a key in the other two forms, and what its value is.
const OPTIONS: [(&str, &str, Takes); 14] = [
    ("w", "width", Takes::Whole),
    ("h", "height", Takes::Whole),
    ("f", "frame_count", Takes::Whole),
    ("d", "seed", Takes::Whole),
    ("s", "sample_steps", Takes::Whole),
    ("g", "guidance_scale", Takes::Number),
    ("l", "cfg_scale", Takes::Number),
    ("fs", "discrete_flow_shift", Takes::Number),
    ("n", "negative_prompt", Takes::Text),
    ("i", "image_path", Takes::Text),
    ("ei", "end_image_path", Takes::Text),
    ("cn", "control_video_path", Takes::Text),
    ("ci", "control_image_path", Takes::Text),
    ("of", "one_frame", Takes::Text),
];
const MOST_STEPS: u64 = 1000;
/// More pixels than this in either direction are a slip of the keyboard.
const MOST_SIDE: u64 = 8192;
/// 1024 latent frames: the model has angles for no more.
const MOST_FRAMES: u64 = 4093;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Whole,
    Number,
    Text,
}

impl Takes {
    fn name(self) -> &'static str {
        match self {
            Takes::Whole => "a whole number that is not negative",
            Takes::Number => "a number",
            Takes::Text => "text",
        }
    }
}

/// Faults of a file, gathered.
struct Faults(Vec<String>);

impl Faults {
    fn add(&mut self, place: &str, what: impl std::fmt::Display) {
        self.0.push(format!("{place}: {what}"));
    }
}

/// Reads a prompt file. Errors: a file that cannot be read or is of no known form; otherwise everything that is wrong in
/// it, in one list.
pub fn read(path: &Path) -> Result<Vec<Prompt>> {
    let shown = path.display();
    let bytes = std::fs::read(path).map_err(|e| {
        UserError::new(format!("the prompt file {shown} (--sample_prompts) cannot be read: {e}")).hint("check the path")
    })?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        UserError::new(format!("the prompt file {shown} is not UTF-8 (line {line})")).hint("save it as UTF-8")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut faults = Faults(Vec::new());
    let prompts = match path.extension().and_then(|e| e.to_str()).map(str::to_lowercase).as_deref() {
        Some("txt") => lines(text, &name, &mut faults),
        Some("toml") => toml_file(text, &name, &mut faults)?,
        Some("json") => json_file(text, &name, &mut faults)?,
        _ => {
            return Err(UserError::usage(format!(
                "{shown} is no prompt file: its name ends in none of .txt, .toml, .json"
            ))
            .hint("a text file holds one prompt a line, with options behind it: a cat --w 832 --h 480 --f 21")
            .into())
        }
    };
    if !faults.0.is_empty() {
        return Err(
            UserError::usage(format!("{} in {shown}:\n  {}", wrong(faults.0.len()), faults.0.join("\n  "))).into()
        );
    }
    if prompts.is_empty() {
        return Err(UserError::usage(format!("{shown} holds no prompt"))
            .hint("write one a line, or in [[prompt.subset]]")
            .into());
    }
    Ok(prompts)
}

fn lines(text: &str, name: &str, faults: &mut Faults) -> Vec<Prompt> {
    let mut prompts = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        let place = format!("{name}, line {}", number + 1);
        let table = line_table(line, &place, faults);
        prompts.extend(prompt(table, place, faults));
    }
    prompts
}

/// A line as the table that says the same. Only what stands behind ` --` and a letter is an option: the prompt's own words
/// never are.
fn line_table(line: &str, place: &str, faults: &mut Faults) -> Map<String, Value> {
    let mut table = Map::new();
    let line = line.trim();
    let starts: Vec<usize> = line
        .match_indices("--")
        .map(|(at, _)| at)
        .filter(|at| *at == 0 || line[..*at].ends_with(char::is_whitespace))
        .filter(|at| line[at + 2..].starts_with(|c: char| c.is_ascii_alphabetic()))
        .collect();
    let text = line[..starts.first().copied().unwrap_or(line.len())].trim();
    table.insert("prompt".into(), text.into());
    for (i, at) in starts.iter().enumerate() {
        let part = line[at + 2..starts.get(i + 1).copied().unwrap_or(line.len())].trim();
        let (option, value) = part.split_once(char::is_whitespace).unwrap_or((part, ""));
        let (lower, value) = (option.to_lowercase(), value.trim());
        let Some((short, key, takes)) = OPTIONS.iter().find(|(short, ..)| *short == lower) else {
            faults.add(place, unknown_option(option));
            continue;
        };
        if value.is_empty() && *takes != Takes::Text || value.is_empty() && *short != "n" {
            faults.add(place, format!("--{short} ({key}) has no value: it takes {}", takes.name()));
            continue;
        }
        if table.contains_key(*key) && *short != "ci" {
            faults.add(place, format!("--{short} ({key}) is given twice"));
            continue;
        }
        table.insert((*key).into(), typed(value, *takes));
    }
    table
}

fn unknown_option(option: &str) -> String {
    let long = nearest(option, OPTIONS.iter().map(|(_, key, _)| *key));
    let short = long.and_then(|long| OPTIONS.iter().find(|(_, key, _)| *key == long));
    match short {
        Some((short, key, _)) => format!("unknown option `--{option}`; did you mean `--{short}` ({key})?"),
        None => {
            let all: Vec<String> = OPTIONS.iter().map(|(short, ..)| format!("--{short}")).collect();
            format!("unknown option `--{option}`; there are {}", all.join(" "))
        }
    }
}

/// A word as a value of its kind, or as it stands, for the check to complain of.
fn typed(word: &str, takes: Takes) -> Value {
    match takes {
        Takes::Whole => word.parse::<u64>().map_or_else(|_| word.into(), Value::from),
        Takes::Number => word.parse::<f64>().map_or_else(|_| word.into(), Value::from),
        Takes::Text => word.into(),
    }
}

fn toml_file(text: &str, name: &str, faults: &mut Faults) -> Result<Vec<Prompt>> {
    let root: toml::Table = text.parse().map_err(|e: toml::de::Error| {
        let (line, column) = e.span().map_or((1, 1), |s| line_column(text, s.start));
        UserError::usage(format!("{name}, line {line}, column {column}: {}", e.message().replace('\n', " ")))
    })?;
    let line_of = |from: usize, key: &str| {
        let is_key = |l: &str| l.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='));
        text.lines().enumerate().skip(from).find(|(_, l)| is_key(l)).map(|(at, _)| at + 1)
    };
    for key in root.keys().filter(|key| *key != "prompt") {
        let line = text.lines().position(|l| l.trim_start().trim_start_matches('[').starts_with(key.as_str()));
        let place = line.map_or(name.to_string(), |line| format!("{name}, line {}", line + 1));
        faults.add(&place, format!("unknown key `{key}`; did you mean `prompt`?"));
    }
    let Some(toml::Value::Table(top)) = root.get("prompt") else {
        faults.add(name, "there is no [prompt]; prompts stand in [[prompt.subset]]");
        return Ok(Vec::new());
    };
    let plain = |v: &toml::Value| serde_json::to_value(v).unwrap_or_default();
    let subsets = match top.get("subset") {
        Some(toml::Value::Array(all)) => all.as_slice(),
        Some(_) => {
            faults.add(name, "`subset` is a list of tables: write [[prompt.subset]]");
            return Ok(Vec::new());
        }
        None => &[],
    };
    let headers: Vec<usize> = text
        .lines()
        .enumerate()
        .filter(|(_, l)| l.trim_start().starts_with("[[prompt.subset]]"))
        .map(|(i, _)| i)
        .collect();
    let defaults: Map<String, Value> =
        top.iter().filter(|(key, _)| *key != "subset").map(|(key, v)| (key.clone(), plain(v))).collect();
    let known = |table: &mut Map<String, Value>, from: usize, faults: &mut Faults| {
        table.retain(|key, _| {
            let fine = is_key(key);
            if !fine {
                let place = line_of(from, key).map_or(name.to_string(), |line| format!("{name}, line {line}"));
                faults.add(&place, unknown_key(key));
            }
            fine
        });
    };
    let mut defaults = defaults;
    known(&mut defaults, 0, faults);
    let mut prompts = Vec::new();
    for (number, subset) in subsets.iter().enumerate() {
        let from = headers.get(number).copied();
        let place = from.map_or(format!("{name}, prompt {}", number + 1), |line| format!("{name}, line {}", line + 1));
        let toml::Value::Table(own) = subset else {
            faults.add(&place, "a subset is a table");
            continue;
        };
        let mut own: Map<String, Value> = own.iter().map(|(key, v)| (key.clone(), plain(v))).collect();
        known(&mut own, from.unwrap_or(0), faults);
        let mut table = defaults.clone();
        table.extend(own);
        prompts.extend(prompt(table, place, faults));
    }
    Ok(prompts)
}

fn json_file(text: &str, name: &str, faults: &mut Faults) -> Result<Vec<Prompt>> {
    let root: Value = serde_json::from_str(text)
        .map_err(|e| UserError::usage(format!("{name}, line {}, column {}: {e}", e.line(), e.column())))?;
    let Value::Array(all) = root else {
        faults.add(name, "the file is a list: [{\"prompt\": \"a cat\", \"width\": 832}, …]");
        return Ok(Vec::new());
    };
    let mut prompts = Vec::new();
    for (number, entry) in all.into_iter().enumerate() {
        let place = format!("{name}, prompt {}", number + 1);
        let table = match entry {
            Value::String(line) => line_table(&line, &place, faults),
            Value::Object(mut table) => {
                table.retain(|key, _| {
                    let fine = is_key(key);
                    if !fine {
                        faults.add(&place, unknown_key(key));
                    }
                    fine
                });
                table
            }
            _ => {
                faults.add(&place, "it is neither a table nor a line");
                continue;
            }
        };
        prompts.extend(prompt(table, place, faults));
    }
    Ok(prompts)
}

/// `enum` is the number that the old tool writes into its own tables.
fn is_key(key: &str) -> bool {
    key == "prompt" || key == "enum" || OPTIONS.iter().any(|(_, known, _)| *known == key)
}

fn unknown_key(key: &str) -> String {
    let short = OPTIONS.iter().find(|(short, ..)| *short == key).map(|(_, key, _)| *key);
    let all = OPTIONS.iter().map(|(_, key, _)| *key).chain(["prompt"]);
    match short.or_else(|| nearest(key, all)) {
        Some(near) => format!("unknown key `{key}`; did you mean `{near}`?"),
        None => format!("unknown key `{key}`"),
    }
}

/// A table of known keys as a prompt; `None` where that cannot be, with the faults.
fn prompt(table: Map<String, Value>, place: String, faults: &mut Faults) -> Option<Prompt> {
    let before = faults.0.len();
    let mut complain = |what: String| faults.add(&place, what);
    let mut notes = Vec::new();
    let mut whole = |key: &str, default: u64, least: u64, most: u64| -> u64 {
        match table.get(key) {
            None | Some(Value::Null) => default,
            Some(v) => match v.as_u64().filter(|n| (least..=most).contains(n)) {
                Some(n) => n,
                None => {
                    let range = if most == u64::MAX { String::new() } else { format!(" from {least} to {most}") };
                    complain(format!("{key} cannot be {v}: it takes a whole number{range}"));
                    default
                }
            },
        }
    };
    let width = whole("width", 256, 1, MOST_SIDE) as usize;
    let height = whole("height", 256, 1, MOST_SIDE) as usize;
    let frames = whole("frame_count", 1, 1, MOST_FRAMES) as usize;
    let steps = whole("sample_steps", 20, 1, MOST_STEPS) as usize;
    let seed = match table.get("seed") {
        None | Some(Value::Null) => None,
        Some(_) => Some(whole("seed", 0, 0, u64::MAX)),
    };
    let mut number = |key: &str, least: f64| -> Option<f64> {
        let v = table.get(key).filter(|v| !v.is_null())?;
        let x = v.as_f64().filter(|x| x.is_finite() && *x >= least);
        if x.is_none() {
            complain(format!("{key} cannot be {v}: it takes a number of at least {least}"));
        }
        x
    };
    let guidance = number("cfg_scale", 0.0);
    let shift = number("discrete_flow_shift", 0.01);
    if number("guidance_scale", 0.0).is_some() {
        notes.push("guidance_scale (--g) is not for Wan and changes nothing: cfg_scale (--l) is its guidance".into());
    }
    let mut word = |key: &str| -> Option<String> {
        match table.get(key) {
            None | Some(Value::Null) => None,
            Some(Value::String(s)) => Some(s.clone()),
            Some(v) => {
                complain(format!("{key} cannot be {v}: it takes text"));
                None
            }
        }
    };
    let text = word("prompt").unwrap_or_default();
    let negative = word("negative_prompt");
    let [image, end_image, control_video] =
        ["image_path", "end_image_path", "control_video_path"].map(|key| word(key).map(PathBuf::from));
    for key in ["control_image_path", "one_frame"] {
        if table.get(key).is_some_and(|v| !v.is_null()) {
            complain(format!("{key} is for one-frame previews, which are not made: leave it out"));
        }
    }
    if text.trim().is_empty() {
        complain("there is no prompt".into());
    }
    let made = Prompt {
        place: place.clone(),
        text: text.trim().into(),
        negative,
        width,
        height,
        frames,
        seed,
        steps,
        guidance,
        shift,
        image,
        end_image,
        control_video,
        notes,
    };
    (faults.0.len() == before).then_some(made)
}
