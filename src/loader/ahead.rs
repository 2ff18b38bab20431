//! Reading checkpoints ahead of their use, straight into pinned memory and on to a card: several threads read pieces in
//! the order of use (a weight of the model, then what LoRAs add to it) while the card gets, merges and quantises those
//! before.
//!
//! A thread takes a buffer first and the next piece then, so the piece that is needed next always has a buffer; one that
//! nobody has taken is read by whoever asks for it. No order of asking can therefore get stuck.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{anyhow, Context, Result};
use candle_core::{DType, Tensor};
use safetensors::Dtype;
use wan_kernels::gpu::{Gpu, Staging};

use super::source::Source;

/// Bytes of a piece: large enough to copy at the bus' rate, small enough that a few of them are no memory.
const PIECE: usize = 16 << 20;
/// Copying from the page cache is what limits one thread (3 to 5 GB/s).
const READERS: usize = 8;
/// Pieces read or being read beyond those that threads hold.
const SPARE: usize = 4;

/// A part of a tensor.
#[derive(Debug)]
struct Piece<'a> {
    source: &'a Source,
    key: String,
    offset: usize,
    len: usize,
}

/// Tensors of several files on their way to a card.
pub struct Ahead<'a> {
    gpu: &'a Gpu,
    pieces: Vec<Piece<'a>>,
    ranges: HashMap<(FileOf, String), Range<usize>>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The first piece that may be unclaimed.
    next: usize,
    claimed: Vec<bool>,
    read: HashMap<usize, Result<Staging>>,
    free: Vec<Staging>,
    ended: bool,
}

/// Which open file: sources are borrowed as long as they are read from, so they stay where they are.
type FileOf = usize;

fn file_of(source: &Source) -> FileOf {
    std::ptr::from_ref(source).addr()
}

impl<'a> Ahead<'a> {
    /// Keys of files in the order in which they will be asked for, each once; those that are no plain fp32, fp16, bf16 or
    /// e4m3 tensors are passed over. All of them must be asked for: one that is not keeps its buffers.
    pub fn new(gpu: &'a Gpu, wanted: impl IntoIterator<Item = (&'a Source, String)>) -> Result<Self> {
        let (mut pieces, mut ranges) = (Vec::new(), HashMap::new());
        for (source, key) in wanted {
            let Some(bytes) = source.plain(&key).and_then(|dtype| of_candle(dtype).and(source.byte_len(&key))) else {
                continue;
            };
            let first = pieces.len();
            let starts = (0..bytes).step_by(PIECE);
            let piece = |offset| Piece { source, key: key.clone(), offset, len: PIECE.min(bytes - offset) };
            pieces.extend(starts.map(piece));
            ranges.insert((file_of(source), key), first..pieces.len());
        }
        let free = (0..READERS + SPARE).map(|_| Ok(Staging::new(gpu, PIECE)?)).collect::<Result<Vec<_>>>()?;
        let claimed = vec![false; pieces.len()];
        let state = Mutex::new(State { next: 0, claimed, read: HashMap::new(), free, ended: false });
        Ok(Self { gpu, pieces, ranges, state, changed: Condvar::new() })
    }

    /// Runs `body` while threads read ahead.
    pub fn during<T>(&self, body: impl FnOnce() -> T) -> T {
        std::thread::scope(|scope| {
            for _ in 0..READERS.min(self.pieces.len()) {
                scope.spawn(|| self.read_all());
            }
            let ended = Ended(self);
            let out = body();
            drop(ended);
            out
        })
    }

    /// The tensor on the card, in the file's dtype (e4m3 as its codes); `None` where the file's form does not allow it.
    pub fn fetch(&self, source: &Source, key: &str) -> Result<Option<Tensor>> {
        let Some(range) = self.ranges.get(&(file_of(source), key.to_owned())) else { return Ok(None) };
        let shape = source.shape(key).unwrap_or_default();
        let dtype = source.plain(key).and_then(of_candle).context("a plain tensor changed its dtype")?;
        let tensor = self.gpu.empty(shape, dtype)?;
        for index in range.clone() {
            let mut staging = self.obtain(index)?;
            let piece = &self.pieces[index];
            let sent = staging.send(&tensor, piece.offset, piece.len);
            self.lock().free.push(staging);
            self.changed.notify_all();
            sent?;
        }
        Ok(Some(tensor))
    }

    fn obtain(&self, index: usize) -> Result<Staging> {
        let mut state = self.lock();
        loop {
            if let Some(read) = state.read.remove(&index) {
                return read;
            }
            if !state.claimed[index] {
                state.claimed[index] = true;
                drop(state);
                return self.read(index, Staging::new(self.gpu, PIECE)?);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn read_all(&self) {
        loop {
            let mut state = self.lock();
            let (index, staging) = loop {
                while state.next < self.pieces.len() && state.claimed[state.next] {
                    state.next += 1;
                }
                if state.ended || state.next == self.pieces.len() {
                    return;
                }
                if let Some(staging) = state.free.pop() {
                    let index = state.next;
                    state.claimed[index] = true;
                    break (index, staging);
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            let read = self.read(index, staging);
            self.lock().read.insert(index, read);
            self.changed.notify_all();
        }
    }

    fn read(&self, index: usize, mut staging: Staging) -> Result<Staging> {
        let piece = &self.pieces[index];
        let room = staging.bytes_mut()?.get_mut(..piece.len).ok_or_else(|| anyhow!("a piece outgrew its buffer"))?;
        piece.source.read_part(&piece.key, piece.offset, room)?;
        Ok(staging)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing is half-done when a lock is given back: single inserts and pops.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends the readers home, also when the body fails.
struct Ended<'a, 'b>(&'a Ahead<'b>);

impl Drop for Ended<'_, '_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

fn of_candle(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F8_E4M3 => Some(DType::U8),
        _ => None,
    }
}
