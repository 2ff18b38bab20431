//! Where checkpoints lie: their names, which old ones go, and which one is the newest.

use super::state;
use crate::error::UserError;
use crate::fsio;
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Lies in the state of a run that was asked to stop, where no checkpoint was due.
const INTERRUPTED: &str = "INTERRUPTED";

/// The names of a run's files. They are the old tool's, so that scripts and people find them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    pub output_dir: PathBuf,
    pub output_name: String,
}

impl Names {
    pub fn new(output_dir: impl Into<PathBuf>, output_name: impl Into<String>) -> Self {
        Self { output_dir: output_dir.into(), output_name: output_name.into() }
    }

    fn at(&self, suffix: String) -> PathBuf {
        self.output_dir.join(format!("{}{suffix}", self.output_name))
    }

    /// `{name}-{epoch:06}.safetensors`
    pub fn epoch_file(&self, epoch: u64) -> PathBuf {
        self.at(format!("-{epoch:06}.safetensors"))
    }

    /// `{name}-step{step:08}.safetensors`
    pub fn step_file(&self, step: u64) -> PathBuf {
        self.at(format!("-step{step:08}.safetensors"))
    }

    /// `{name}.safetensors`
    pub fn final_file(&self) -> PathBuf {
        self.at(".safetensors".into())
    }

    /// `{name}-{epoch:06}-state`
    pub fn epoch_state(&self, epoch: u64) -> PathBuf {
        self.at(format!("-{epoch:06}-state"))
    }

    /// `{name}-step{step:08}-state`
    pub fn step_state(&self, step: u64) -> PathBuf {
        self.at(format!("-step{step:08}-state"))
    }

    /// `{name}-state`
    pub fn final_state(&self) -> PathBuf {
        self.at("-state".into())
    }

    /// Whether files of a run of this name are there: a LoRA, a state, a report.
    pub fn taken(&self) -> bool {
        let numbered = |rest: &str| {
            let number = rest.strip_prefix("-step").or_else(|| rest.strip_prefix('-')).unwrap_or_default();
            let after = number.trim_start_matches(|c: char| c.is_ascii_digit());
            after.len() < number.len() && (after.starts_with('.') || after == "-state")
        };
        let ours = |name: &str| {
            let rest = name.strip_prefix(&self.output_name);
            rest.is_some_and(|rest| rest.starts_with('.') || rest.starts_with("-state") || numbered(rest))
        };
        let mut entries = std::fs::read_dir(&self.output_dir).into_iter().flatten().flatten();
        entries.any(|e| ours(&e.file_name().to_string_lossy()))
    }

    /// The finished state of this run that got furthest.
    pub fn latest_state(&self) -> Option<PathBuf> {
        self.states().max().map(|(_, _, path)| path)
    }

    /// Removes every state of this run but `keep`; returns those that were there.
    pub fn remove_states(&self, keep: Option<&Path>) -> Result<Vec<PathBuf>> {
        let states: Vec<PathBuf> =
            self.states().map(|(_, _, path)| path).filter(|p| Some(p.as_path()) != keep).collect();
        states.iter().try_for_each(|dir| fsio::remove_dir(dir))?;
        Ok(states)
    }

    /// Remembers that the state of `step` was written only because the run was asked to stop.
    pub fn mark_interrupt(&self, step: u64) -> Result<()> {
        fsio::write_bytes(&self.step_state(step).join(INTERRUPTED), b"")
    }

    /// The checkpoint of `step` is wanted after all.
    pub fn unmark_interrupt(&self, step: u64) {
        // Absent, nearly always.
        let _ = std::fs::remove_file(self.step_state(step).join(INTERRUPTED));
    }

    /// Removes what interruptions saved, LoRA and state, and nothing else: for a run that has finished. Returns what is
    /// gone; what cannot be removed stays.
    pub fn remove_interrupts(&self) -> Vec<PathBuf> {
        let ours = |(step, _, dir): (u64, u64, PathBuf)| {
            (dir == self.step_state(step) && dir.join(INTERRUPTED).is_file()).then_some((self.step_file(step), dir))
        };
        let found: Vec<(PathBuf, PathBuf)> = self.states().filter_map(ours).collect();
        let mut gone = Vec::new();
        for (file, dir) in found {
            // The state goes last: it knows whose the file is.
            let removed = [std::fs::remove_file(&file).is_ok(), fsio::remove_dir(&dir).is_ok()];
            gone.extend([file, dir].into_iter().zip(removed).filter_map(|(path, removed)| removed.then_some(path)));
        }
        gone
    }

    /// The finished states of this run: step, epoch, directory.
    fn states(&self) -> impl Iterator<Item = (u64, u64, PathBuf)> + '_ {
        let ours = |name: &str| {
            name.strip_prefix(&self.output_name).and_then(|n| n.strip_suffix("-state")).is_some_and(|middle| {
                let digits = middle.strip_prefix("-step").or_else(|| middle.strip_prefix('-'));
                // What goes on with digits alone is another name, with seconds in its time.
                middle.is_empty() || digits.is_some_and(|d| !d.is_empty() && d.chars().all(|c| c.is_ascii_digit()))
            })
        };
        let entries = std::fs::read_dir(&self.output_dir).into_iter().flatten().flatten();
        entries
            .filter(move |e| ours(&e.file_name().to_string_lossy()))
            .filter_map(|e| state::peek(&e.path()).map(|(step, epoch)| (step, epoch, e.path())))
    }
}

/// Which old checkpoints are removed. The rules are the old tool's: `save_last_n_epochs` counts epoch checkpoints,
/// `save_last_n_steps` counts steps (not files); states follow unless they have their own number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    pub save_every_n_epochs: Option<u64>,
    pub save_last_n_epochs: Option<u64>,
    pub save_last_n_epochs_state: Option<u64>,
    pub save_every_n_steps: Option<u64>,
    pub save_last_n_steps: Option<u64>,
    pub save_last_n_steps_state: Option<u64>,
}

impl Retention {
    fn old_epoch(&self, epoch: u64, last: Option<u64>) -> Option<u64> {
        epoch.checked_sub(self.save_every_n_epochs? * last?)
    }

    fn old_step(&self, step: u64, last: Option<u64>) -> Option<u64> {
        let every = self.save_every_n_steps.filter(|n| *n > 0)?;
        let reached = step.checked_sub(last? + 1)?;
        Some(reached - reached % every)
    }

    /// Removes what the checkpoint just written at `epoch` makes superfluous. Files already gone are no error.
    pub fn after_epoch(&self, names: &Names, epoch: u64) -> Result<Vec<PathBuf>> {
        let file = self.old_epoch(epoch, self.save_last_n_epochs).map(|e| names.epoch_file(e));
        let last = self.save_last_n_epochs_state.or(self.save_last_n_epochs);
        let state = self.old_epoch(epoch, last).map(|e| names.epoch_state(e));
        remove(file, state)
    }

    /// The same after the checkpoint of `step`.
    pub fn after_step(&self, names: &Names, step: u64) -> Result<Vec<PathBuf>> {
        let file = self.old_step(step, self.save_last_n_steps).map(|s| names.step_file(s));
        let last = self.save_last_n_steps_state.or(self.save_last_n_steps);
        let state = self.old_step(step, last).map(|s| names.step_state(s));
        remove(file, state)
    }
}

fn remove(file: Option<PathBuf>, state_dir: Option<PathBuf>) -> Result<Vec<PathBuf>> {
    let mut gone = Vec::new();
    if let Some(file) = file.filter(|f| f.is_file()) {
        std::fs::remove_file(&file).map_err(|e| fsio::explain(e, &file))?;
        gone.push(file);
    }
    // Only what is a state of ours is removed: a directory of that name without the marker is somebody's.
    if let Some(dir) = state_dir.filter(|d| state::peek(d).is_some()) {
        fsio::remove_dir(&dir)?;
        gone.push(dir);
    }
    Ok(gone)
}

/// The newest `.safetensors` file of `resume_checkpoints/` that `fits` (by modification time, then by name); `None` where
/// the directory is absent or holds none.
pub fn newest_checkpoint(dir: &Path, fits: impl Fn(&Path) -> bool) -> Result<Option<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fsio::explain(e, dir)),
    };
    let newest = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.is_file() && p.extension().is_some_and(|x| x.eq_ignore_ascii_case("safetensors")))
        .filter(|p| !p.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')))
        .filter(|p| fits(p))
        .filter_map(|p| Some((p.metadata().and_then(|m| m.modified()).ok()?, p)))
        .max();
    Ok(newest.map(|(_, path)| path))
}

/// A path given by the user for weights to start from: must exist and be a file.
pub fn require_file(option: &str, path: &Path) -> Result<()> {
    if path.is_file() {
        return Ok(());
    }
    let what = if path.is_dir() { "is a directory, not a file" } else { "does not exist" };
    Err(UserError::new(format!("{option}: {} {what}", path.display()))
        .hint("check the path; nothing was started from scratch in its place")
        .into())
}
