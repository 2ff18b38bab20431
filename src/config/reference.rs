//! The option table as a document: `wan-train show options`, kept in `docs/options.md`.

use std::fmt::Write;

use serde_json::Value;

use super::options::{Kind, RunConfig, OPTIONS};

/// Every option with its kind, default, choices and help, as Markdown.
pub fn options_markdown() -> String {
    let defaults = serde_json::to_value(RunConfig::default()).unwrap_or_default();
    let mut text = String::from(
        "# Options\n\n\
         Printed by `wan-train show options`. Every option is a flag (`--name value`; hyphens and underscores are the same)\n\
         and a key of a `--config_file` or template. A switch alone means true; `--name=false` undoes it.\n",
    );
    let mut group = "";
    for opt in OPTIONS {
        if opt.group != group {
            group = opt.group;
            let _ = write!(text, "\n## {group}\n\n| option | value | default | |\n|---|---|---|---|\n");
        }
        let kind = match opt.kind {
            _ if !opt.choices.is_empty() => opt.choices.iter().map(|c| format!("`{c}`")).collect::<Vec<_>>().join(" "),
            Kind::Flag => "switch".into(),
            Kind::Int => "whole number".into(),
            Kind::Float => "number".into(),
            Kind::Text => "text".into(),
            Kind::Path => "path".into(),
            Kind::List => "words".into(),
        };
        let default = match &defaults[opt.name] {
            Value::Null => String::new(),
            Value::Array(all) if all.is_empty() => String::new(),
            Value::Bool(false) => String::new(),
            Value::Bool(true) => "on".into(),
            Value::String(s) => format!("`{s}`"),
            other => format!("`{other}`"),
        };
        let aliases: String = opt.aliases.iter().map(|a| format!(", `--{a}`")).collect();
        let _ = writeln!(text, "| `--{}`{aliases} | {kind} | {default} | {} |", opt.name, opt.help.replace('|', "\\|"));
    }
    text
}
