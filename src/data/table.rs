//! The findings of a scan as a table.

use std::fmt::Write as _;

use super::{dataset_name, DatasetConfig, Finding, Verdict};
use crate::report::Table;

/// One line a finding, grouped by dataset, and a count of each verdict.
///
/// Paths are shown relative to the source of their dataset where they lie in it.
pub fn table(config: &DatasetConfig, findings: &[Finding]) -> String {
    let mut out = String::new();
    for entry in &config.entries {
        let source = entry.source.path();
        let mut table = Table::new(["file", "verdict", "what"]);
        for finding in findings.iter().filter(|f| f.dataset == entry.index) {
            let path = finding.path.strip_prefix(source).unwrap_or(&finding.path);
            table.row([path.display().to_string(), finding.verdict.to_string(), finding.why.clone()]);
        }
        let _ = writeln!(out, "{}: {}\n{}", dataset_name(entry.index), source.display(), table.render());
    }
    let count = |v: Verdict| findings.iter().filter(|f| f.verdict == v).count();
    let (used, dropped, errors) = (count(Verdict::Used), count(Verdict::Dropped), count(Verdict::Error));
    let _ = writeln!(out, "{used} used, {dropped} dropped, {errors} in error");
    out
}
