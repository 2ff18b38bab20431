//! Typed access to one table of a dataset file, with errors that name the file, the line, the key and the value.

use std::path::Path;

use anyhow::Result;

use super::document::{Field, Node, Table, Value};
use crate::error::{nearest, UserError};

/// One `[[datasets]]` table, with `[general]` behind it for the keys that both may hold.
pub struct Section<'a> {
    pub file: &'a Path,
    /// As the user would point at it: `[general]`, `dataset 2`.
    pub name: String,
    pub own: &'a Table,
    pub general: &'a Table,
    /// Keys that fall back to `[general]`.
    pub shared: &'a [&'a str],
}

impl Section<'_> {
    /// The field of the dataset, else of `[general]`. `null` counts as absent.
    pub fn field(&self, key: &str) -> Option<&Field> {
        let given = |f: &&Field| f.node.value != Value::Other("null");
        let own = self.own.get(key).filter(given);
        match self.shared.contains(&key) {
            true => own.or_else(|| self.general.get(key).filter(given)),
            false => own,
        }
    }

    pub fn has(&self, key: &str) -> bool {
        self.field(key).is_some()
    }

    /// An error at a line of this file.
    pub fn error(&self, line: usize, what: impl std::fmt::Display) -> UserError {
        match line {
            0 => UserError::usage(format!("{}: {what} ({})", self.file.display(), self.name)),
            n => UserError::usage(format!("{}, line {n}: {what}", self.file.display())),
        }
    }

    fn wrong(&self, field: &Field, want: &str) -> anyhow::Error {
        let got = match &field.node.value {
            Value::Text(s) => format!("\"{s}\""),
            Value::Int(i) => i.to_string(),
            Value::Float(f) => f.to_string(),
            Value::Bool(b) => b.to_string(),
            other => other.name().to_string(),
        };
        self.error(field.line, format!("`{}` must be {want}, not {got}", field.key)).into()
    }

    pub fn text(&self, key: &str) -> Result<Option<String>> {
        let Some(field) = self.field(key) else { return Ok(None) };
        match &field.node.value {
            Value::Text(s) => Ok(Some(s.clone())),
            _ => Err(self.wrong(field, "a text in quotes")),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(field) = self.field(key) else { return Ok(default) };
        match field.node.value {
            Value::Bool(b) => Ok(b),
            _ => Err(self.wrong(field, "true or false")),
        }
    }

    /// A whole number of at least 1.
    pub fn count(&self, key: &str, default: usize) -> Result<usize> {
        let Some(field) = self.field(key) else { return Ok(default) };
        positive(&field.node).ok_or_else(|| self.wrong(field, "a whole number of at least 1"))
    }

    pub fn integer(&self, key: &str) -> Result<Option<i64>> {
        let Some(field) = self.field(key) else { return Ok(None) };
        match field.node.value {
            Value::Int(i) => Ok(Some(i)),
            _ => Err(self.wrong(field, "a whole number")),
        }
    }

    /// A number above 0, written with or without a fraction.
    pub fn rate(&self, key: &str) -> Result<Option<f64>> {
        let Some(field) = self.field(key) else { return Ok(None) };
        let rate = match field.node.value {
            Value::Int(i) => i as f64,
            Value::Float(f) => f,
            _ => f64::NAN,
        };
        if !(rate.is_finite() && rate > 0.0) {
            return Err(self.wrong(field, "a number above 0"));
        }
        Ok(Some(rate))
    }

    /// `960` or `[960, 544]`: width, height.
    pub fn size(&self, key: &str) -> Result<Option<(u32, u32)>> {
        const LARGEST: usize = 16384;
        let Some(field) = self.field(key) else { return Ok(None) };
        let side = |n: &Node| positive(n).filter(|s| (16..=LARGEST).contains(s)).map(|s| s as u32);
        let size = match &field.node.value {
            Value::Int(_) => side(&field.node).map(|s| (s, s)),
            Value::List(sides) if sides.len() == 2 => side(&sides[0]).zip(side(&sides[1])),
            _ => None,
        };
        let want = "one side or [width, height], each from 16 to 16384";
        size.map(Some).ok_or_else(|| match &field.node.value {
            Value::List(sides) => {
                let shown: Vec<_> = sides.iter().map(|n| short(&n.value)).collect();
                let what = format!("`{key}` must be {want}, not [{}]", shown.join(", "));
                self.error(field.line, what).into()
            }
            _ => self.wrong(field, want),
        })
    }

    /// A list of whole numbers of at least `least`; a single number counts as a list of one.
    pub fn numbers(&self, key: &str, least: i64) -> Result<Option<Vec<i64>>> {
        let Some(field) = self.field(key) else { return Ok(None) };
        let nodes = match &field.node.value {
            Value::List(nodes) => nodes.as_slice(),
            _ => std::slice::from_ref(&field.node),
        };
        let mut out = Vec::with_capacity(nodes.len());
        for node in nodes {
            match node.value {
                Value::Int(i) if i >= least => out.push(i),
                _ => {
                    let what = format!("`{key}` takes whole numbers of at least {least}, not {}", short(&node.value));
                    return Err(self.error(node.line, what).into());
                }
            }
        }
        if out.is_empty() {
            return Err(self.error(field.line, format!("`{key}` is empty")).into());
        }
        Ok(Some(out))
    }

    /// One of a few words.
    pub fn choice<'c>(&self, key: &str, choices: &[&'c str]) -> Result<Option<&'c str>> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        if let Some(found) = choices.iter().find(|c| **c == text) {
            return Ok(Some(found));
        }
        let line = self.field(key).map_or(0, |f| f.line);
        let error = self.error(line, format!("`{key}` cannot be \"{text}\""));
        Err(match nearest(&text, choices.iter().copied()) {
            Some(near) => error.hint(format!("did you mean \"{near}\"? It is one of {}", choices.join(", "))),
            None => error.hint(format!("it is one of {}", choices.join(", "))),
        }
        .into())
    }
}

fn positive(node: &Node) -> Option<usize> {
    match node.value {
        Value::Int(i) if i >= 1 => usize::try_from(i).ok(),
        _ => None,
    }
}

fn short(value: &Value) -> String {
    match value {
        Value::Int(i) => i.to_string(),
        Value::Float(f) => f.to_string(),
        Value::Text(s) => format!("\"{s}\""),
        Value::Bool(b) => b.to_string(),
        other => other.name().to_string(),
    }
}
