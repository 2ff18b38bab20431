//! Which linears of the model get an adapter: every one inside the blocks, less what is excluded and not included again.

use fancy_regex::Regex;
use wan_models::arch::{Site, WanArch};

use crate::error::UserError;

/// `exclude_patterns` and `include_patterns` of `--network_args`: regular expressions in Python's dialect, each of which
/// must match a module's whole name.
///
/// An include pattern restricts nothing by itself: it takes back an exclusion. "Only these" is
/// `exclude_patterns=['.*']` with an include pattern.
#[derive(Debug, Clone, Default)]
pub struct Patterns {
    exclude: Vec<Regex>,
    include: Vec<Regex>,
}

impl Patterns {
    /// Compiles both lists; an invalid pattern is an error, not a skipped one.
    pub fn new(exclude: &[String], include: &[String]) -> Result<Self, UserError> {
        let compile = |key: &str, list: &[String]| -> Result<Vec<Regex>, UserError> {
            list.iter()
                .map(|pattern| {
                    Regex::new(&format!("^(?:{pattern})$")).map_err(|e| {
                        UserError::usage(format!("--network_args {key}: `{pattern}` is no regular expression"))
                            .hint(e.to_string().lines().last().unwrap_or_default().trim().to_string())
                    })
                })
                .collect()
        };
        Ok(Self { exclude: compile("exclude_patterns", exclude)?, include: compile("include_patterns", include)? })
    }

    /// Whether the module of this name (`blocks.0.self_attn.q`) gets an adapter.
    pub fn selects(&self, name: &str) -> bool {
        // A pattern that gives up on a name (runaway backtracking) does not match it.
        let hit = |list: &[Regex]| list.iter().any(|r| r.is_match(name).unwrap_or(false));
        !hit(&self.exclude) || hit(&self.include)
    }
}

/// The sites of a model that get an adapter, in creation order. None at all is an error.
pub fn select(arch: &WanArch, patterns: &Patterns) -> Result<Vec<Site>, UserError> {
    let sites: Vec<Site> = arch.sites().into_iter().filter(|s| patterns.selects(&s.name)).collect();
    match sites.is_empty() {
        false => Ok(sites),
        true => Err(UserError::usage("--network_args exclude_patterns leaves no module to train")
            .hint("names look like blocks.0.self_attn.q; include_patterns takes exclusions back")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(exclude: &[&str], include: &[&str]) -> Patterns {
        let owned = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        Patterns::new(&owned(exclude), &owned(include)).unwrap()
    }

    #[test]
    fn patterns_match_whole_names_and_include_only_takes_back() {
        let all = patterns(&[], &[".*ffn.*"]);
        assert!(all.selects("blocks.0.self_attn.q"));
        let none = patterns(&["self_attn"], &[]);
        assert!(none.selects("blocks.0.self_attn.q"), "a part of the name is no match");
        let only = patterns(&[".*"], &[r"blocks\.\d+\.ffn\.0", r"a|.*\.o"]);
        assert!(only.selects("blocks.12.ffn.0"));
        assert!(only.selects("blocks.1.self_attn.o"));
        assert!(!only.selects("blocks.1.self_attn.q"));
        assert!(!only.selects("blocks.1.ffn.00"));
        let lookaround = patterns(&[r"(?!.*cross_attn).*"], &[]);
        assert!(lookaround.selects("blocks.0.cross_attn.k"));
        assert!(!lookaround.selects("blocks.0.ffn.2"));
    }
}
