//! `key=value` options (`--network_args`, `--optimizer_args`, `--lr_scheduler_args`): values are Python literals,
//! as people have them in their scripts, or bare words. Every key must be taken by somebody: what is left is an error.

use std::collections::BTreeMap;

use crate::error::{nearest, UserError};

/// A Python literal, or a bare word (kept as a string).
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
    List(Vec<Value>),
}

/// The pairs of one option. `take_*` removes a pair; [`KwArgs::finish`] refuses what nobody took.
#[derive(Debug, Clone)]
pub struct KwArgs {
    option: &'static str,
    pairs: BTreeMap<String, Value>,
    known: Vec<&'static str>,
}

impl KwArgs {
    /// Parses `key=value` items of `option` (named in errors). The first `=` separates; the value may hold more.
    pub fn parse<S: AsRef<str>>(option: &'static str, items: &[S]) -> Result<Self, UserError> {
        let mut pairs = BTreeMap::new();
        for item in items {
            let item = item.as_ref().trim();
            let Some((key, value)) = item.split_once('=') else {
                return Err(UserError::usage(format!("--{option}: `{item}` is not of the form key=value")));
            };
            let (key, value) = (key.trim().to_string(), value.trim());
            let value = parse_literal(value)
                .map_err(|e| UserError::usage(format!("--{option}: the value of `{key}` cannot be read: {e}")))?;
            if pairs.insert(key.clone(), value).is_some() {
                return Err(UserError::usage(format!("--{option}: `{key}` is given twice")));
            }
        }
        Ok(Self { option, pairs, known: Vec::new() })
    }

    /// The value of `key`, if given; `None` as a Python literal counts as not given.
    pub fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.pairs.remove(key).filter(|v| *v != Value::None)
    }

    pub fn take_f64(&mut self, key: &'static str) -> Result<Option<f64>, UserError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Int(v)) => Ok(Some(v as f64)),
            Some(Value::Float(v)) if v.is_finite() => Ok(Some(v)),
            Some(v) => Err(self.wrong(key, "a number", &v)),
        }
    }

    pub fn take_usize(&mut self, key: &'static str) -> Result<Option<usize>, UserError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Int(v)) if v >= 0 => Ok(Some(v as usize)),
            Some(v) => Err(self.wrong(key, "a whole number", &v)),
        }
    }

    pub fn take_bool(&mut self, key: &'static str) -> Result<Option<bool>, UserError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(v)),
            Some(Value::Int(v @ 0..=1)) => Ok(Some(v == 1)),
            Some(Value::Str(s)) if s.eq_ignore_ascii_case("true") => Ok(Some(true)),
            Some(Value::Str(s)) if s.eq_ignore_ascii_case("false") => Ok(Some(false)),
            Some(v) => Err(self.wrong(key, "True or False", &v)),
        }
    }

    pub fn take_str(&mut self, key: &'static str) -> Result<Option<String>, UserError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Str(s)) => Ok(Some(s)),
            Some(v) => Err(self.wrong(key, "a string", &v)),
        }
    }

    /// A list of strings; a single string counts as a list of one.
    pub fn take_strings(&mut self, key: &'static str) -> Result<Vec<String>, UserError> {
        let list = match self.take(key) {
            None => return Ok(Vec::new()),
            Some(Value::List(list)) => list,
            Some(one) => vec![one],
        };
        list.into_iter()
            .map(|v| match v {
                Value::Str(s) => Ok(s),
                v => Err(self.wrong(key, "a list of strings such as ['.*ffn.*']", &v)),
            })
            .collect()
    }

    /// A list of numbers; a single number counts as a list of one.
    pub fn take_numbers(&mut self, key: &'static str) -> Result<Option<Vec<f64>>, UserError> {
        let list = match self.take(key) {
            None => return Ok(None),
            Some(Value::List(list)) => list,
            Some(one) => vec![one],
        };
        list.into_iter()
            .map(|v| match v {
                Value::Int(v) => Ok(v as f64),
                Value::Float(v) => Ok(v),
                v => Err(self.wrong(key, "a list of numbers such as (0.9, 0.999)", &v)),
            })
            .collect::<Result<Vec<_>, _>>()
            .map(Some)
    }

    /// Every key must have been taken: an unknown one is an error that names the nearest known key.
    pub fn finish(self) -> Result<(), UserError> {
        let Some(key) = self.pairs.keys().next() else { return Ok(()) };
        let error = UserError::usage(format!("--{}: unknown key `{key}`", self.option));
        Err(match nearest(key, self.known.iter().copied()) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint(format!("known keys: {}", self.known.join(", "))),
        })
    }

    /// An error about the value of one key of this option.
    pub fn error(&self, key: &str, what: impl std::fmt::Display) -> UserError {
        UserError::usage(format!("--{}: `{key}` {what}", self.option))
    }

    fn wrong(&self, key: &str, want: &str, got: &Value) -> UserError {
        self.error(key, format!("must be {want}, not {got:?}"))
    }
}

/// Reads one value: a Python literal where the text is one, otherwise the text itself.
pub fn parse_literal(text: &str) -> Result<Value, String> {
    let text = text.trim();
    let looks_quoted = matches!(text.trim_start_matches(['r', 'R', 'u', 'U']).chars().next(), Some('\'' | '"'));
    if !looks_quoted && !text.starts_with(['[', '(']) {
        return Ok(parse_word(text));
    }
    let mut reader = Reader { rest: text };
    let value = reader.value()?;
    reader.space();
    match reader.rest {
        "" => Ok(value),
        rest => Err(format!("unexpected `{rest}` after the value")),
    }
}

fn parse_word(word: &str) -> Value {
    match word {
        "None" => return Value::None,
        "True" => return Value::Bool(true),
        "False" => return Value::Bool(false),
        _ => {}
    }
    let digits = word.replace('_', "");
    if let Ok(v) = digits.parse::<i64>() {
        return Value::Int(v);
    }
    // "nan", "inf" and "infinity" parse as f64 in Rust but are names in Python.
    if digits.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.')) {
        if let Ok(v) = digits.parse::<f64>() {
            return Value::Float(v);
        }
    }
    Value::Str(word.to_string())
}

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn value(&mut self) -> Result<Value, String> {
        self.space();
        let first = self.rest.chars().next().ok_or("it ends too early")?;
        match first {
            '[' | '(' => self.list(if first == '[' { ']' } else { ')' }),
            '\'' | '"' => self.string(first, false),
            'r' | 'R' | 'u' | 'U' if self.rest[1..].starts_with(['\'', '"']) => {
                let quote = self.rest[1..].chars().next().unwrap_or('"');
                self.rest = &self.rest[1..];
                self.string(quote, matches!(first, 'r' | 'R'))
            }
            _ => {
                let end = self.rest.find([',', ']', ')']).unwrap_or(self.rest.len());
                let word = self.rest[..end].trim();
                if word.is_empty() {
                    return Err("a value is missing in the list".into());
                }
                self.rest = &self.rest[end..];
                match parse_word(word) {
                    Value::Str(_) => Err(format!("`{word}` needs quotes inside a list")),
                    value => Ok(value),
                }
            }
        }
    }

    fn list(&mut self, close: char) -> Result<Value, String> {
        self.rest = &self.rest[1..];
        let mut values = Vec::new();
        loop {
            self.space();
            if let Some(rest) = self.rest.strip_prefix(close) {
                self.rest = rest;
                return Ok(Value::List(values));
            }
            values.push(self.value()?);
            self.space();
            if let Some(rest) = self.rest.strip_prefix(',') {
                self.rest = rest;
            } else if !self.rest.starts_with(close) {
                return Err(format!("the list lacks a `,` or its `{close}`"));
            }
        }
    }

    fn string(&mut self, quote: char, raw: bool) -> Result<Value, String> {
        let mut out = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            if c == quote {
                self.rest = &self.rest[at + 1..];
                return Ok(Value::Str(out));
            }
            if c != '\\' {
                out.push(c);
                continue;
            }
            let (_, escaped) = chars.next().ok_or("the string has no closing quote")?;
            match escaped {
                _ if raw => out.extend(['\\', escaped]),
                'n' => out.push('\n'),
                't' => out.push('\t'),
                '\\' | '\'' | '"' => out.push(escaped),
                // Python keeps the backslash of an escape it does not know, which is what regexes rely on.
                other => out.extend(['\\', other]),
            }
        }
        Err("the string has no closing quote".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(v: &str) -> Value {
        Value::Str(v.into())
    }

    #[test]
    fn literals_read_as_python_reads_them() {
        for (text, want) in [
            ("4", Value::Int(4)),
            ("-1_000", Value::Int(-1000)),
            ("1e-6", Value::Float(1e-6)),
            ("True", Value::Bool(true)),
            ("None", Value::None),
            ("nan", s("nan")),
            ("cosine", s("cosine")),
            ("'a=b'", s("a=b")),
            (r#"r'.*\.ffn\.0'"#, s(r".*\.ffn\.0")),
            (r#"['.*\.q', "x,]"]"#, Value::List(vec![s(r".*\.q"), s("x,]")])),
            ("(0.9, 0.99,)", Value::List(vec![Value::Float(0.9), Value::Float(0.99)])),
            ("[]", Value::List(vec![])),
            ("[[1], 'a']", Value::List(vec![Value::List(vec![Value::Int(1)]), s("a")])),
        ] {
            assert_eq!(parse_literal(text), Ok(want), "{text}");
        }
        for text in ["['a", "[1 2]", "'a' b", "[1,", "[,]"] {
            assert!(parse_literal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_key_must_be_taken() {
        let items = ["loraplus_lr_ratio=4", "rank_dropuot=0.1"];
        let mut args = KwArgs::parse("network_args", &items).unwrap();
        assert_eq!(args.take_f64("loraplus_lr_ratio").unwrap(), Some(4.0));
        assert_eq!(args.take_f64("rank_dropout").unwrap(), None);
        let error = args.finish().unwrap_err();
        assert!(error.to_string().contains("rank_dropuot"), "{error}");
        assert!(error.to_string().contains("did you mean `rank_dropout`"), "{error}");
        assert_eq!(error.exit, 2);
    }

    #[test]
    fn malformed_pairs_are_refused() {
        assert!(KwArgs::parse("network_args", &["alone"]).is_err());
        assert!(KwArgs::parse("network_args", &["a=1", "a=2"]).is_err());
        let mut args = KwArgs::parse("network_args", &["a='x'"]).unwrap();
        assert!(args.take_f64("a").unwrap_err().to_string().contains("must be a number"));
    }
}
