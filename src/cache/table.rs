//! What became of every file of a data set: the table at the end of every caching run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::recipe::Freshness;
use super::survey::{ItemEntry, Outcome, Survey};
use crate::data::{dataset_name, ScanReport, Verdict};
use crate::report::Table;

/// What became of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileReport {
    pub dataset: usize,
    pub path: PathBuf,
    pub fate: Fate,
    /// Latent files and caption file, by what was done.
    pub latents: String,
    pub caption: String,
    /// Why, where there is something to say.
    pub why: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// Everything it needs is cached: it will be trained on.
    Used,
    /// Something is still to be made.
    Waiting,
    /// Left out, and allowed to be.
    Dropped,
    /// Left out, and that stops the run.
    Error,
    /// A cache file that no item calls for: neither trained on nor deleted.
    Unused,
}

impl Fate {
    fn name(self) -> &'static str {
        match self {
            Fate::Used => "used",
            Fate::Waiting => "not ready",
            Fate::Dropped => "dropped",
            Fate::Error => "error",
            Fate::Unused => "unused cache file",
        }
    }
}

/// The files of all data sets, in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheReport {
    /// Where each data set comes from.
    pub roots: Vec<PathBuf>,
    pub files: Vec<FileReport>,
}

impl CacheReport {
    /// Joins what the scan found with what caching did.
    pub fn of(scan: &ScanReport, survey: &Survey) -> Self {
        let mut notes: BTreeMap<(usize, &Path), Vec<&str>> = BTreeMap::new();
        let mut files = Vec::new();
        for finding in &scan.findings {
            match finding.verdict {
                Verdict::Used => notes.entry((finding.dataset, &finding.path)).or_default().push(&finding.why),
                verdict => files.push(FileReport {
                    dataset: finding.dataset,
                    path: finding.path.clone(),
                    fate: if verdict == Verdict::Error { Fate::Error } else { Fate::Dropped },
                    latents: String::new(),
                    caption: String::new(),
                    why: finding.why.clone(),
                }),
            }
        }
        for entry in &survey.entries {
            let item = &survey.items[entry.item];
            let notes = notes.get(&(item.dataset, item.path.as_path())).cloned().unwrap_or_default();
            files.push(item_report(survey, entry, &notes));
        }
        for (dataset, path) in survey.unused() {
            files.push(FileReport {
                dataset,
                path,
                fate: Fate::Unused,
                latents: String::new(),
                caption: String::new(),
                why: "no item of the data set calls for it; left alone".to_string(),
            });
        }
        files.sort_by(|a, b| {
            (a.dataset, a.fate == Fate::Unused, &a.path).cmp(&(b.dataset, b.fate == Fate::Unused, &b.path))
        });
        let roots = survey.config.entries.iter().map(|e| e.source.path().to_path_buf()).collect();
        Self { roots, files }
    }

    /// A table for each data set, paths as seen from there, and a line of totals.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for (dataset, root) in self.roots.iter().enumerate() {
            let mut table = Table::new(["file", "result", "latents", "caption", "why"]);
            for file in self.files.iter().filter(|f| f.dataset == dataset) {
                let path = file.path.strip_prefix(root).unwrap_or(&file.path).display().to_string();
                table.row([path.as_str(), file.fate.name(), &file.latents, &file.caption, &file.why]);
            }
            text.push_str(&format!("{}: {}\n{}\n", dataset_name(dataset), root.display(), table.render()));
        }
        text + &self.totals() + "\n"
    }

    /// "12 files: 10 used, 1 dropped, 1 error; 2 unused cache files".
    pub fn totals(&self) -> String {
        let count = |fate| self.files.iter().filter(|f| f.fate == fate).count();
        let media = self.files.len() - count(Fate::Unused);
        let mut parts = vec![format!("{} used", count(Fate::Used))];
        for fate in [Fate::Waiting, Fate::Dropped, Fate::Error] {
            if count(fate) > 0 {
                parts.push(format!("{} {}", count(fate), fate.name()));
            }
        }
        let mut text = format!("{media} {}: {}", if media == 1 { "file" } else { "files" }, parts.join(", "));
        match count(Fate::Unused) {
            0 => {}
            1 => text.push_str("; 1 unused cache file"),
            n => text.push_str(&format!("; {n} unused cache files")),
        }
        text
    }
}

fn item_report(survey: &Survey, entry: &ItemEntry, notes: &[&str]) -> FileReport {
    let item = &survey.items[entry.item];
    let mut why: Vec<String> = notes.iter().filter(|n| !n.is_empty()).map(|n| n.to_string()).collect();
    let (mut latents, mut caption) = (String::new(), String::new());
    let fate = match &entry.fault {
        Some(fault) => {
            why.push(fault.clone());
            if survey.options.allow_bad_media {
                Fate::Dropped
            } else {
                Fate::Error
            }
        }
        None => {
            latents = tally(entry);
            caption = describe(&entry.text.state, entry.text.outcome).to_string();
            let states = entry.clips.iter().map(|c| &c.state).chain([&entry.text.state]);
            let remade = entry.clips.iter().map(|c| &c.remade).chain([&entry.text.remade]).flatten();
            let reasons = states.clone().map(Freshness::why).filter(|w| !w.is_empty());
            why.extend(reasons.chain(remade.map(|w| format!("made again ({w})"))).collect::<BTreeSet<String>>());
            if let Some(tokens) = entry.text.cut_from {
                why.push(format!("the caption has {tokens} tokens; the model reads its first part only"));
            }
            if states.clone().any(|s| *s == Freshness::Foreign) {
                why.push("cached by another program, used as it is".to_string());
            }
            match states.clone().all(Freshness::is_usable) && !entry.clips.is_empty() {
                true => Fate::Used,
                false => Fate::Waiting,
            }
        }
    };
    FileReport { dataset: item.dataset, path: item.path.clone(), fate, latents, caption, why: why.join("; ") }
}

fn describe(state: &Freshness, outcome: Outcome) -> &'static str {
    match (state, outcome) {
        (_, Outcome::Cached) => "cached",
        (Freshness::Foreign, _) => "foreign",
        (Freshness::Fresh, _) => "reused",
        (Freshness::Stale(_), _) => "stale",
        (Freshness::Torn(_), _) => "torn",
        (Freshness::Missing, _) => "missing",
    }
}

/// "cached" for a picture; "3 clips: 1 cached, 2 reused" for a video; the frames where there is one clip.
fn tally(entry: &ItemEntry) -> String {
    let kind_is_video = entry.clips.iter().any(|c| c.span.frames > 1) || entry.clips.len() > 1;
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for clip in &entry.clips {
        *counts.entry(describe(&clip.state, clip.outcome)).or_default() += 1;
    }
    match (&entry.clips[..], kind_is_video) {
        ([], _) => "no clip".to_string(),
        ([one], false) => describe(&one.state, one.outcome).to_string(),
        ([one], true) => format!("{} frames {}", one.span.frames, describe(&one.state, one.outcome)),
        (clips, _) => {
            let parts: Vec<String> = counts.iter().map(|(what, n)| format!("{n} {what}")).collect();
            format!("{} clips: {}", clips.len(), parts.join(", "))
        }
    }
}
