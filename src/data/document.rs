//! TOML or JSON text -> one tree that remembers lines, so that every complaint can say where.

use std::borrow::Cow;
use std::path::Path;

use anyhow::Result;
use toml::de::{DeTable, DeValue};

use crate::error::UserError;

/// A value and the line it stands on (from 1; 0 where that is not known).
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub line: usize,
    pub value: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Text(String),
    Int(i64),
    Float(f64),
    Bool(bool),
    List(Vec<Node>),
    Table(Table),
    /// Something no key takes: a date, null, a number beyond 64 bits.
    Other(&'static str),
}

impl Value {
    /// What a user would call it.
    pub fn name(&self) -> &'static str {
        match self {
            Value::Text(_) => "a text",
            Value::Int(_) => "a whole number",
            Value::Float(_) => "a number",
            Value::Bool(_) => "true or false",
            Value::List(_) => "a list",
            Value::Table(_) => "a table",
            Value::Other(what) => what,
        }
    }
}

/// Keys in the order of the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table(pub Vec<Field>);

#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    pub key: String,
    pub line: usize,
    pub node: Node,
}

impl Table {
    pub fn get(&self, key: &str) -> Option<&Field> {
        self.0.iter().find(|f| f.key == key)
    }
}

/// Reads `path` as UTF-8 text, without a byte order mark.
pub fn read_text(path: &Path, what: &str) -> Result<String> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(UserError::usage(format!("{what} {} does not exist", path.display())).into());
        }
        Err(e) => return Err(UserError::usage(format!("{what} {} cannot be read: {e}", path.display())).into()),
    };
    let text = String::from_utf8(bytes).map_err(|e| {
        UserError::usage(format!(
            "{what} {} is not UTF-8 text (byte {} is wrong)",
            path.display(),
            e.utf8_error().valid_up_to()
        ))
        .hint("save it as UTF-8")
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

/// Parses JSON where the name ends in `.json`, else TOML.
pub fn parse(text: &str, path: &Path) -> Result<Table> {
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json")) {
        return parse_json(text, path);
    }
    match DeTable::parse(text) {
        Ok(table) => Ok(from_toml(table.get_ref(), text)),
        Err(e) => {
            let offset = e.span().map_or(0, |s| s.start);
            let message = e.message().replace('\n', ", ");
            Err(syntax_error(path, line_of(text, offset), column_of(text, offset), &message))
        }
    }
}

fn parse_json(text: &str, path: &Path) -> Result<Table> {
    match serde_json::from_str(text) {
        Ok(serde_json::Value::Object(map)) => Ok(from_json_object(&map, text)),
        Ok(_) => Err(syntax_error(path, 1, 1, "expected an object with `general` and `datasets`")),
        Err(e) => {
            let message = e.to_string();
            let message = message.split(" at line ").next().unwrap_or(&message);
            Err(syntax_error(path, e.line(), e.column(), message))
        }
    }
}

fn syntax_error(path: &Path, line: usize, column: usize, message: &str) -> anyhow::Error {
    UserError::usage(format!("{}, line {line}, column {column}: {message}", path.display())).into()
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1
}

fn column_of(text: &str, offset: usize) -> usize {
    let before = text.get(..offset.min(text.len())).unwrap_or(text);
    before.chars().rev().take_while(|c| *c != '\n').count() + 1
}

fn from_toml(table: &DeTable<'_>, text: &str) -> Table {
    let mut fields: Vec<_> = table.iter().map(|(key, value)| (key.span().start, key, value)).collect();
    fields.sort_by_key(|(at, ..)| *at);
    let field = |(at, key, value): (usize, &toml::Spanned<Cow<'_, str>>, &toml::Spanned<DeValue<'_>>)| Field {
        key: key.get_ref().to_string(),
        line: line_of(text, at),
        node: toml_node(value, text),
    };
    Table(fields.into_iter().map(field).collect())
}

fn toml_node(value: &toml::Spanned<DeValue<'_>>, text: &str) -> Node {
    let line = line_of(text, value.span().start);
    let value = match value.get_ref() {
        DeValue::String(s) => Value::Text(s.to_string()),
        DeValue::Integer(i) => {
            i64::from_str_radix(i.as_str(), i.radix()).map_or(Value::Other("a number beyond 64 bits"), Value::Int)
        }
        DeValue::Float(f) => f.as_str().parse().map_or(Value::Other("no number"), Value::Float),
        DeValue::Boolean(b) => Value::Bool(*b),
        DeValue::Datetime(_) => Value::Other("a date"),
        DeValue::Array(items) => Value::List(items.iter().map(|n| toml_node(n, text)).collect()),
        DeValue::Table(table) => Value::Table(from_toml(table, text)),
    };
    Node { line, value }
}

fn from_json_object(map: &serde_json::Map<String, serde_json::Value>, text: &str) -> Table {
    // JSON values carry no position: a key that occurs once is found by its text.
    let line = |key: &str| {
        let quoted = serde_json::Value::from(key).to_string();
        let mut found = text.match_indices(&quoted);
        match (found.next(), found.next()) {
            (Some((at, _)), None) => line_of(text, at),
            _ => 0,
        }
    };
    let field = |(key, value): (&String, &serde_json::Value)| {
        let line = line(key);
        Field { key: key.clone(), line, node: json_node(value, line, text) }
    };
    Table(map.iter().map(field).collect())
}

fn json_node(value: &serde_json::Value, line: usize, text: &str) -> Node {
    use serde_json::Value as Json;
    let value = match value {
        Json::Null => Value::Other("null"),
        Json::Bool(b) => Value::Bool(*b),
        Json::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(i), _) => Value::Int(i),
            (None, Some(f)) => Value::Float(f),
            _ => Value::Other("a number beyond 64 bits"),
        },
        Json::String(s) => Value::Text(s.clone()),
        Json::Array(items) => Value::List(items.iter().map(|v| json_node(v, line, text)).collect()),
        Json::Object(map) => Value::Table(from_json_object(map, text)),
    };
    Node { line, value }
}
