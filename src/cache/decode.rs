//! Threads that decode files ahead of the encoding, each holding one clip until it is taken.

use std::collections::{HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;

use super::fingerprint::SourceId;
use super::survey::latent_path;
use crate::data::{self, Clip, Entry, Item, Kind, Planned};
use crate::fsio;

/// An item with something to make, for the decoder.
pub(super) struct WorkItem {
    /// Position in `Survey::entries`.
    pub entry: usize,
    pub item: Item,
    pub dataset: Entry,
    /// Files that need not be made again.
    pub ready: HashSet<PathBuf>,
}

/// What a file is made from, taken before it is decoded.
pub(super) struct Sources {
    pub source: SourceId,
    pub controls: Vec<SourceId>,
}

pub(super) enum Message {
    Clip {
        entry: usize,
        clip: Clip,
        sources: Arc<Sources>,
    },
    /// The item is read through: all its clips, or why it cannot be read.
    End {
        entry: usize,
        result: Result<Vec<Planned>>,
    },
}

/// The decoder is told to stop by the other side hanging up.
#[derive(Debug, thiserror::Error)]
#[error("nobody takes the clips any more")]
struct HungUp;

/// The files that nobody decodes yet, in their order, each with the way its messages go.
pub(super) struct Lanes(Mutex<VecDeque<(usize, SyncSender<Message>)>>);

impl Lanes {
    /// For so many files, with where their messages come out. No buffers: what is decoded ahead waits in its decoder's
    /// hands.
    pub fn new(files: usize) -> (Self, Vec<Receiver<Message>>) {
        let (lanes, receivers): (Vec<_>, Vec<_>) = (0..files).map(|_| sync_channel(0)).unzip();
        (Lanes(Mutex::new(lanes.into_iter().enumerate().collect())), receivers)
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<(usize, SyncSender<Message>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<(usize, SyncSender<Message>)> {
        self.waiting().pop_front()
    }

    /// No file is begun any more; whoever waits for one learns it.
    fn close(&self) {
        self.waiting().clear();
    }
}

/// Decodes one file after the other until none is left, `stop` is raised, or nobody takes the clips.
pub(super) fn decode_all(work: &[WorkItem], lanes: &Lanes, stop: &AtomicBool) {
    while let (false, Some((i, send))) = (stop.load(Ordering::Relaxed), lanes.take()) {
        let w = &work[i];
        let result = decode(w, &send);
        if result.as_ref().is_err_and(|e| e.is::<HungUp>()) {
            break;
        }
        if send.send(Message::End { entry: w.entry, result }).is_err() {
            break;
        }
    }
    lanes.close();
}

fn decode(w: &WorkItem, send: &SyncSender<Message>) -> Result<Vec<Planned>> {
    let identity = |path: &PathBuf| SourceId::of(path).map_err(|e| fsio::explain(e, path));
    let controls = w.item.controls.iter().map(identity).collect::<Result<_>>()?;
    let sources = Arc::new(Sources { source: identity(&w.item.path)?, controls });
    let mut found = Vec::new();
    let mut hand_over = |clip: Clip| {
        let span = Planned { start: clip.start, frames: clip.frames.len(), size: clip.size };
        found.push(span);
        if w.ready.contains(&latent_path(&w.dataset, &w.item, span)) {
            return Ok(());
        }
        let message = Message::Clip { entry: w.entry, clip, sources: sources.clone() };
        send.send(message).map_err(|_| HungUp.into())
    };
    match w.item.kind {
        Kind::Image => data::decode_image(&w.item, &w.dataset).and_then(&mut hand_over)?,
        Kind::Video => {
            data::decode_video(&w.item, &w.dataset, &mut hand_over)?;
        }
    }
    Ok(found)
}
