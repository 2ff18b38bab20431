//! Reading numbers out of a case's JSON, with the key in every error.

use anyhow::{anyhow, Result};
use serde_json::Value;

pub fn number(v: &Value, key: &str) -> Result<f64> {
    v[key].as_f64().ok_or_else(|| anyhow!("{key} is not a number: {}", v[key]))
}

pub fn integer(v: &Value, key: &str) -> Result<usize> {
    v[key].as_u64().map(|n| n as usize).ok_or_else(|| anyhow!("{key} is not a whole number: {}", v[key]))
}

pub fn flag(v: &Value, key: &str) -> Result<bool> {
    v[key].as_bool().ok_or_else(|| anyhow!("{key} is neither true nor false: {}", v[key]))
}

pub fn text<'a>(v: &'a Value, key: &str) -> Result<&'a str> {
    v[key].as_str().ok_or_else(|| anyhow!("{key} is not a text: {}", v[key]))
}

pub fn list<'a>(v: &'a Value, key: &str) -> Result<&'a [Value]> {
    v[key].as_array().map(Vec::as_slice).ok_or_else(|| anyhow!("{key} is not a list: {}", v[key]))
}

/// A list of numbers; null is an empty one.
pub fn numbers(v: &Value, key: &str) -> Result<Vec<f64>> {
    if v[key].is_null() {
        return Ok(Vec::new());
    }
    let each = |n: &Value| n.as_f64().ok_or_else(|| anyhow!("{key} holds {n}, which is not a number"));
    list(v, key)?.iter().map(each).collect()
}

pub fn integers(v: &Value, key: &str) -> Result<Vec<usize>> {
    let each = |n: &Value| n.as_u64().map(|n| n as usize).ok_or_else(|| anyhow!("{key} holds {n}"));
    list(v, key)?.iter().map(each).collect()
}

pub fn pair(v: &Value, key: &str) -> Result<(u32, u32)> {
    match integers(v, key)?[..] {
        [a, b] => Ok((a as u32, b as u32)),
        _ => Err(anyhow!("{key} is not a pair: {}", v[key])),
    }
}
