//! A thread that writes latent files while the next clip is encoded.

use std::path::PathBuf;
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};

use anyhow::{Context, Result};

use super::survey::{LatentEntry, Survey};
use crate::fsio;

/// Writes files beside the encoding, one at a time.
pub(super) struct Writer {
    jobs: SyncSender<(PathBuf, Vec<u8>)>,
    done: Receiver<Result<()>>,
    /// What the survey said of the file that is being written.
    writing: Option<(usize, LatentEntry)>,
}

impl Writer {
    pub fn spawn<'scope>(scope: &'scope std::thread::Scope<'scope, '_>) -> Self {
        let (jobs, todo) = sync_channel::<(PathBuf, Vec<u8>)>(0);
        let (report, done) = sync_channel(1);
        scope.spawn(move || {
            for (path, bytes) in todo {
                if report.send(fsio::write_bytes(&path, &bytes)).is_err() {
                    return;
                }
            }
        });
        Writer { jobs, done, writing: None }
    }

    /// Begins to write; `before` is what the survey knew of the file.
    pub fn write(&mut self, survey: &mut Survey, entry: usize, before: LatentEntry, bytes: Vec<u8>) -> Result<()> {
        self.settle(survey)?;
        let path = before.path.clone();
        self.jobs.send((path, bytes)).map_err(|_| anyhow::anyhow!("the thread that writes files has ended"))?;
        self.writing = Some((entry, before));
        Ok(())
    }

    /// Waits for the file that is being written; where that failed the survey is told that it is not there.
    pub fn settle(&mut self, survey: &mut Survey) -> Result<()> {
        let Some((entry, before)) = self.writing.take() else { return Ok(()) };
        let result = self.done.recv().context("the thread that writes files has ended")?;
        if result.is_err() {
            let clips = &mut survey.entries[entry].clips;
            if let Some(clip) = clips.iter_mut().find(|c| c.path == before.path) {
                *clip = before;
            }
        }
        result
    }
}
