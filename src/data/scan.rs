//! Files -> items, with one finding for every file: used, dropped or in error, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rayon::prelude::*;

use super::clips::{self, Planned};
use super::config::{dataset_name, plain};
use super::listing::{candidates, Candidate, Caption};
use super::{bucket, folder, frames, picture, video};
use super::{Cut, DataOptions, DatasetConfig, Entry, Finding, Item, Kind, Probe, ScanReport, Verdict};
use crate::error::UserError;

const MISSING_CAPTION: &str = "write the captions, or pass --allow_missing_captions to train on empty ones";
const BAD_MEDIA: &str = "repair or remove the files, or pass --allow_bad_media to leave them out";
const BAD_CAPTION: &str = "save the captions as UTF-8";
const COLLISION: &str = "rename files of the same name: their cache files would overwrite each other";
const CONTROL: &str = "add the missing controls";

/// Lists every file of every dataset, probes the media, pairs captions and controls.
///
/// Faults of single files become findings with [`Verdict::Error`]; call [`ScanReport::check`] to turn them into one
/// error that lists all of them, after the table has been shown. A dataset without any medium is an error at once.
pub fn scan(config: &DatasetConfig, options: &DataOptions) -> Result<ScanReport> {
    let mut report = ScanReport::default();
    let mut remedies = BTreeSet::new();
    let mut short = BTreeSet::new();
    for entry in &config.entries {
        let (found, others) = candidates(config, entry)?;
        if found.is_empty() {
            return Err(empty(entry, &others).into());
        }
        let collisions = collisions(&found);
        let probes: Vec<Result<Probed, String>> =
            found.par_iter().map(|c| probe(c, entry).map_err(|e| format!("{e:#}"))).collect();
        let mut findings = others;
        for (candidate, probed) in found.into_iter().zip(probes) {
            let mut row = Row::default();
            let stem = folder::stem(&candidate.path);
            if let Some(same) = collisions.get(&stem.to_string()) {
                let also: Vec<_> = same.iter().map(|p| p.display().to_string()).collect();
                row.error(format!("{} files are called `{stem}`: {}", same.len(), also.join(", ")), COLLISION);
            }
            let caption = row.caption(candidate.caption, options);
            let probed = row.probed(probed, options);
            let controls = match candidate.controls {
                Ok(controls) => controls,
                Err(why) => {
                    row.error(why, CONTROL);
                    Vec::new()
                }
            };
            if let (Some(probed), false) = (&probed, row.failed()) {
                if probed.clips.is_empty() {
                    row.dropped.push(too_short(probed.resampled, entry));
                    short.insert((entry.index, candidate.path.clone()));
                }
                row.used = describe(probed, entry);
            }
            if let (Some(probed), Verdict::Used) = (probed, row.verdict()) {
                report.items.push(Item {
                    dataset: entry.index,
                    kind: entry.kind,
                    path: candidate.path.clone(),
                    stem,
                    caption,
                    controls,
                    probe: probed.probe,
                });
            }
            remedies.extend(row.remedies.iter().copied());
            findings.push(Finding::new(entry.index, candidate.path, row.verdict(), row.why()));
        }
        findings.sort_by(|a, b| a.path.cmp(&b.path));
        report.findings.append(&mut findings);
    }
    if !options.allow_bad_media && escalate_unused(&mut report, &short) {
        remedies.insert("lower target_frames, or pass --allow_bad_media to leave them out");
    }
    report.remedies = remedies.into_iter().map(str::to_string).collect();
    Ok(report)
}

/// Reads the items through (pictures are decoded; of videos the first frame is decoded and all packets are read) and
/// returns an error finding for each that is damaged, so that a caching run can list them all before it loads a model.
pub fn check_media(config: &DatasetConfig, items: &[&Item]) -> Vec<Finding> {
    let check = |item: &&Item| -> Option<Finding> {
        let entry = &config.entries[item.dataset];
        let own = read_through(&item.path, entry).map_err(|e| format!("{e:#}"));
        let all = item.controls.iter().fold(own, |so_far, control| {
            so_far.and_then(|()| {
                read_through(control, entry).map_err(|e| format!("its control {}: {e:#}", control.display()))
            })
        });
        all.err().map(|why| Finding::new(item.dataset, item.path.clone(), Verdict::Error, why))
    };
    items.par_iter().filter_map(check).collect()
}

fn read_through(path: &Path, entry: &Entry) -> Result<()> {
    if path.is_dir() {
        for picture in folder::frames(path, entry.musubi_compat)?.pictures {
            picture::read(&picture, false).map_err(|e| anyhow::anyhow!("{}: {e:#}", folder::name(&picture)))?;
        }
        return Ok(());
    }
    match entry.kind {
        Kind::Image => picture::read(path, false).map(|_| ()),
        Kind::Video => video::read_through(path),
    }
}

/// A medium that could be opened.
struct Probed {
    probe: Probe,
    clips: Vec<Planned>,
    /// Frames after resampling, as far as known.
    resampled: usize,
    notes: Vec<String>,
}

fn probe(candidate: &Candidate, entry: &Entry) -> Result<Probed> {
    let (path, upright) = (&candidate.path, !entry.musubi_compat);
    if std::fs::symlink_metadata(path).is_err() || !path.exists() {
        anyhow::bail!("the file does not exist");
    }
    if folder::name(path).contains(char::REPLACEMENT_CHARACTER) {
        anyhow::bail!("its name is not UTF-8; rename it");
    }
    let mut notes = Vec::new();
    let probe = match (entry.kind, path.is_dir()) {
        (Kind::Image, true) => anyhow::bail!("it is a directory, not a picture"),
        (Kind::Image, false) => Probe { size: picture::probe(path, upright)?, frames: 1, fps: None, variable: None },
        (Kind::Video, true) => {
            let found = folder::frames(path, entry.musubi_compat)?;
            if found.by_number {
                notes.push("frames in the order of their numbers".into());
            }
            let size = picture::probe(&found.pictures[0], upright)
                .map_err(|e| anyhow::anyhow!("{}: {e:#}", folder::name(&found.pictures[0])))?;
            Probe { size, frames: found.pictures.len(), fps: None, variable: None }
        }
        (Kind::Video, false) => {
            let timing = entry.source_fps.is_some() && !entry.musubi_compat;
            let mut facts = video::probe(path, upright, timing)?;
            notes.append(&mut facts.notes);
            Probe { size: facts.size, frames: facts.frames, fps: facts.fps, variable: facts.variable }
        }
    };
    let bucket = entry.selector().choose(probe.size);
    if !bucket::is_usable(bucket) {
        return Err(clips::too_small(probe.size));
    }
    notes.extend(rate_note(&probe, entry));
    let mut resampled = entry.resampled(&probe);
    let mut clips = entry.clips_of(resampled, probe.size);
    if clips.is_empty() && !path.is_dir() {
        // The container's count may be an estimate: drop nothing on its word.
        resampled = clips::count_frames(path, entry)?;
        clips = entry.clips_of(resampled, probe.size);
    }
    Ok(Probed { probe, clips, resampled, notes })
}

/// What the frame rate means for the motion that is learnt.
fn rate_note(probe: &Probe, entry: &Entry) -> Option<String> {
    let target = frames::TARGET_FPS;
    match (probe.fps, entry.source_fps) {
        _ if probe.variable.is_some() => Some("its frame rate varies: its timestamps decide".into()),
        (Some(fps), None) if (fps / target - 1.0).abs() > 0.02 && Cut::of(entry).longest() > 1 => {
            let (factor, fps) = (target / fps, (fps * 1000.0).round() / 1000.0);
            Some(format!(
                "shown at 16 a second it moves {factor:.2} times as fast (source_fps = {fps:?} corrects that)"
            ))
        }
        (Some(fps), Some(said)) if (fps / said - 1.0).abs() > 0.02 => {
            Some(format!("source_fps says {said}, the file {fps:.3}"))
        }
        _ => None,
    }
}

fn too_short(resampled: usize, entry: &Entry) -> String {
    let need = Cut::of(entry).shortest();
    match entry.source_fps {
        Some(_) => format!("too short: {resampled} frames at 16 a second, the shortest target has {need}"),
        None => format!("too short: {resampled} frames, the shortest target has {need}"),
    }
}

/// `1280x720, 132 frames at 25 fps -> 832x480: 25, 2x 81 frames, up to 32760 tokens`
fn describe(probed: &Probed, entry: &Entry) -> String {
    let (w, h) = probed.probe.size;
    let mut out = format!("{w}x{h}");
    if entry.kind == Kind::Video {
        let _ = write!(out, ", {} frames", probed.probe.frames);
        if let Some(fps) = probed.probe.fps {
            let _ = write!(out, " at {} fps", (fps * 1000.0).round() / 1000.0);
        }
    }
    if let Some(clip) = probed.clips.first() {
        let _ = write!(out, " -> {}x{}", clip.size.0, clip.size.1);
        if entry.kind == Kind::Video {
            let mut lengths: BTreeMap<usize, usize> = BTreeMap::new();
            probed.clips.iter().for_each(|c| *lengths.entry(c.frames).or_default() += 1);
            let shown: Vec<_> = lengths.iter().map(|(length, n)| format!("{n} of {length}")).collect();
            let _ = write!(out, ", clips: {} frames", shown.join(", "));
        }
        let tokens = probed.clips.iter().map(Planned::tokens).max().unwrap_or(0);
        let _ = write!(out, ", {tokens} tokens");
    }
    for note in &probed.notes {
        let _ = write!(out, "; {note}");
    }
    out
}

/// Stems that occur more than once.
fn collisions(found: &[Candidate]) -> BTreeMap<String, Vec<PathBuf>> {
    let mut by_stem: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for candidate in found {
        by_stem.entry(folder::stem(&candidate.path)).or_default().push(candidate.path.clone());
    }
    by_stem.retain(|_, same| same.len() > 1);
    by_stem
}

/// Videos too short for this dataset may be meant for another; those that no dataset takes become errors.
fn escalate_unused(report: &mut ScanReport, short: &BTreeSet<(usize, PathBuf)>) -> bool {
    let used: BTreeSet<PathBuf> = report.items.iter().map(|i| plain(&i.path)).collect();
    let mut any = false;
    for finding in &mut report.findings {
        let is_short = short.contains(&(finding.dataset, finding.path.clone()));
        if is_short && finding.verdict == Verdict::Dropped && !used.contains(&plain(&finding.path)) {
            finding.verdict = Verdict::Error;
            any = true;
        }
    }
    any
}

fn empty(entry: &Entry, others: &[Finding]) -> UserError {
    let kind = match entry.kind {
        Kind::Image => "picture",
        Kind::Video => "video",
    };
    let name = dataset_name(entry.index);
    let error = UserError::new(format!("{name} is empty: no {kind} in {}", entry.source.path().display()));
    match others.iter().find(|f| f.why.starts_with("a video:") || f.why.starts_with("a picture:")) {
        Some(other) => error.hint(format!("{} is {}", folder::name(&other.path), other.why)),
        None => error.hint(format!("put {kind}s there, or remove the dataset")),
    }
}

/// What one candidate's row is made of.
#[derive(Default)]
struct Row {
    used: String,
    notes: Vec<String>,
    dropped: Vec<String>,
    errors: Vec<String>,
    remedies: Vec<&'static str>,
}

impl Row {
    fn error(&mut self, why: String, remedy: &'static str) {
        self.errors.push(why);
        self.remedies.push(remedy);
    }

    fn failed(&self) -> bool {
        !self.errors.is_empty() || !self.dropped.is_empty()
    }

    fn caption(&mut self, caption: Caption, options: &DataOptions) -> Option<String> {
        match caption {
            Caption::Text(text) => {
                if text.trim().is_empty() {
                    self.notes.push("its caption is empty".into());
                }
                return Some(text);
            }
            Caption::Missing(why) if options.allow_missing_captions => {
                self.notes.push(format!("{why}: an empty one is used"));
            }
            Caption::Missing(why) => self.error(why, MISSING_CAPTION),
            Caption::Bad(why) => self.error(why, BAD_CAPTION),
        }
        None
    }

    fn probed(&mut self, probed: Result<Probed, String>, options: &DataOptions) -> Option<Probed> {
        match probed {
            Ok(probed) => return Some(probed),
            Err(why) if options.allow_bad_media => self.dropped.push(why),
            Err(why) => self.error(why, BAD_MEDIA),
        }
        None
    }

    fn verdict(&self) -> Verdict {
        match (self.errors.is_empty(), self.dropped.is_empty()) {
            // A file that is left out anyway cannot be in error.
            (_, false) => Verdict::Dropped,
            (false, true) => Verdict::Error,
            (true, true) => Verdict::Used,
        }
    }

    fn why(&self) -> String {
        match self.verdict() {
            Verdict::Dropped => self.dropped.join("; "),
            Verdict::Error => self.errors.join("; "),
            Verdict::Used => {
                let mut all = vec![self.used.clone()];
                all.extend(self.notes.iter().cloned());
                all.join("; ")
            }
        }
    }
}
