//! The one error type whose text a user reads: a fact, and what to do about it.

use std::fmt;

/// A mistake or obstacle that the user can do something about: one clear sentence naming the file, key or option,
/// and the remedy. Anything else travels as `anyhow::Error` with context.
#[derive(Debug)]
pub struct UserError {
    /// One sentence with the facts (path, key, number found, number wanted).
    pub what: String,
    /// What to do, printed as `hint: ...`.
    pub hint: Option<String>,
    /// Process exit code: 1 for work that failed, 2 for a command line or configuration that cannot be understood.
    pub exit: u8,
}

impl UserError {
    /// A failure of the work itself (exit 1).
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), hint: None, exit: 1 }
    }

    /// A command line, template or configuration that cannot be understood (exit 2).
    pub fn usage(what: impl Into<String>) -> Self {
        Self { what: what.into(), hint: None, exit: 2 }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for UserError {}

/// The head of a list of faults.
pub fn wrong(count: usize) -> String {
    match count {
        1 => "one thing is wrong".into(),
        n => format!("{n} things are wrong"),
    }
}

/// The known name nearest to a mistyped one, if it is near enough to be worth saying.
pub fn nearest<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let typed = typed.replace('-', "_").to_lowercase();
    known
        .into_iter()
        .map(|k| (strsim::jaro_winkler(&typed, &k.replace('-', "_").to_lowercase()), k))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}
