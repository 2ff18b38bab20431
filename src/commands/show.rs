//! `wan-train show`: the resolved configuration with the origin of every value, or what is built in.

use std::io::Write;
use std::process::ExitCode;

use serde_json::Value;

use super::resolve;
use crate::config::{options_markdown, registry, Layer, Typed, OPTIONS};
use crate::error::{nearest, UserError};

/// Prints a template's resolved configuration (`json`: one flat object), an embedded file as it is, or the list of both.
pub fn show(name: Option<&str>, mut typed: Typed, json: bool) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    if let Some(path) = name.filter(|n| n.contains('/')) {
        out.write_all(embedded(path)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if name == Some("options") {
        out.write_all(options_markdown().as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(name) = name {
        typed.flags.insert("template", vec![name.to_owned()]);
    }
    if !typed.flags.contains_key("template") && typed.config_file.is_none() && typed.flags.is_empty() {
        return list(&mut out);
    }
    let resolved = resolve(&typed)?;
    let values = serde_json::to_value(&resolved.config)?;
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&values)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut group = "";
    for opt in OPTIONS {
        if opt.group != group {
            group = opt.group;
            writeln!(out, "\n{group}")?;
        }
        let value = match &values[opt.name] {
            Value::Null => "-".to_owned(),
            Value::String(s) => s.clone(),
            other => other.to_string(),
        };
        let origin = resolved.origin.get(opt.name).unwrap_or(&Layer::Default);
        writeln!(out, "  {:<36} {:<44} {}", opt.name, value, origin)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn embedded(path: &str) -> Result<&'static [u8], UserError> {
    registry::bytes(path).ok_or_else(|| {
        let all: Vec<String> = registry::files_under("").into_iter().map(|(p, _)| p).collect();
        let error = UserError::usage(format!("there is no embedded file `{path}`"));
        match nearest(path, all.iter().map(String::as_str)) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint("`wan-train show` lists the embedded files"),
        }
    })
}

fn list(out: &mut impl Write) -> anyhow::Result<ExitCode> {
    writeln!(out, "templates (wan-train show NAME [--noise_level high|low|shared] [--json]):")?;
    for name in registry::template_names() {
        let table: toml::Table = registry::template(&name)?.parse()?;
        let about = table.get("description").and_then(toml::Value::as_str).unwrap_or_default();
        writeln!(out, "  {name:<18} {about}")?;
    }
    writeln!(out, "\nfiles (wan-train show PATH prints one as it is):")?;
    for (path, bytes) in ["models", "templates", "datasets"].into_iter().flat_map(registry::files_under) {
        writeln!(out, "  {path:<44} {:>7} bytes", bytes.len())?;
    }
    Ok(ExitCode::SUCCESS)
}
