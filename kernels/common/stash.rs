//! Activations in pinned host memory: out on one stream, back on another, both beside the computing.
//!
//! ```text
//! compute  … block i ………… block i+1 ……… | … backward of j+1 …… backward of j …
//! out               copy i ─ free i                                             (freed when block i+1 is stashed)
//! in                                                   copy j ──────┘ awaited    (issued by `prefetch`)
//! ```
//! A tensor's device memory is given back in the order of the compute stream, which first waits for the copy. Host
//! memory is kept in slabs and used again: a step takes what the step before took, and pinning (a second for a few GiB)
//! happens once. A slab carries the event of its last copy; whoever uses it next waits for that on its own stream.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use candle_core::{DType, Shape, Tensor};

use super::gpu::{error, tensor_address, Gpu};
use crate::Result;

const NAME: &str = "offload";
/// Tensors in a slab begin at multiples of this.
const ALIGN: usize = 256;
/// Stashes whose device memory may still be waiting for its copy. One: the copy has a whole block's computing to hide
/// behind.
const LEAVING: usize = 1;

/// All slabs of a card, and what is on its way out.
#[derive(Default)]
pub(super) struct Stash(Mutex<State>);

#[derive(Default)]
struct State {
    free: Vec<Slab>,
    leaving: VecDeque<Leaving>,
    next: u64,
    /// Bytes in slabs, pinned or not.
    bytes: usize,
    unpinned: Option<String>,
}

/// Device memory that a copy still reads.
struct Leaving {
    id: u64,
    tensors: Vec<Tensor>,
    done: CudaEvent,
}

/// A piece of host memory.
struct Slab {
    start: u64,
    bytes: usize,
    pinned: bool,
    /// The last copy from or to it.
    last: Option<CudaEvent>,
}

/// Tensors in a slab.
pub(crate) struct Stashed {
    gpu: Gpu,
    id: u64,
    slab: Option<Slab>,
    parts: Vec<(Shape, DType, usize)>,
    /// On the way back, and when they are there.
    back: Option<(Vec<Tensor>, CudaEvent)>,
}

impl Stash {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is a push or a pop: a panic elsewhere leaves nothing half-done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if let Some(last) = &self.last {
            // Whatever still uses the memory must be done with it. Failures here have no one to hear them.
            let _ = last.synchronize();
        }
        let start = self.start as *mut c_void;
        // SAFETY: allocated by `Slab::new` in this way and with this size, and freed once.
        unsafe {
            match self.pinned {
                true => drop(sys::cuMemFreeHost(start).result()),
                false => std::alloc::dealloc(start.cast(), layout(self.bytes)),
            }
        }
    }
}

fn layout(bytes: usize) -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(bytes, 4096).expect("a size of tensors that exist fits")
}

impl Slab {
    /// Pinned where the system allows it; else plain memory (slower: the driver then copies in pieces through its own),
    /// and why.
    fn new(bytes: usize) -> Result<(Self, Option<String>)> {
        let mut start: *mut c_void = std::ptr::null_mut();
        // SAFETY: on success `start` is memory of this size that belongs to the slab.
        let refused = match unsafe { sys::cuMemHostAlloc(&mut start, bytes, 0) }.result() {
            Ok(()) => return Ok((Slab { start: start as u64, bytes, pinned: true, last: None }, None)),
            Err(e) => e.to_string(),
        };
        // SAFETY: the size is not zero; null is looked at.
        let start = unsafe { std::alloc::alloc_zeroed(layout(bytes)) };
        if start.is_null() {
            return Err(error(NAME, format!("{bytes} bytes of host memory for saved activations: {refused}")));
        }
        Ok((Slab { start: start as u64, bytes, pinned: false, last: None }, Some(refused)))
    }
}

/// Pinned memory through which files are read to a card.
pub struct Staging {
    gpu: Gpu,
    slab: Slab,
}

impl Staging {
    /// Errors (`Gpu`): no memory. Where pinning is refused it is plain memory, which is slower.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        gpu.bind()?;
        Ok(Self { gpu: gpu.clone(), slab: Slab::new(bytes.max(1))?.0 })
    }

    /// The memory, once the last [`Staging::send`] from it is done.
    pub fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        if let Some(last) = self.slab.last.take() {
            last.synchronize().map_err(failed)?;
        }
        // SAFETY: the slab owns this memory, zeroed or written, and nothing else refers to it now.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.slab.start as *mut u8, self.slab.bytes) })
    }

    /// Issues the copy of the first `len` bytes to a contiguous tensor on the card, from its byte `offset` on, in the
    /// order of computing.
    pub fn send(&mut self, to: &Tensor, offset: usize, len: usize) -> Result<()> {
        let whole = to.elem_count() * to.dtype().size_in_bytes();
        if len > self.slab.bytes || offset + len > whole {
            return Err(error(NAME, format!("{len} bytes at {offset} do not fit a tensor of {whole}")));
        }
        self.gpu.bind()?;
        let (target, stream) = (tensor_address(NAME, to)? + offset as u64, self.gpu.stream());
        // SAFETY: both ranges were checked; the source is not written before `last` has passed, and the tensor's memory
        // is freed, if at all, later on the same stream.
        unsafe { sys::cuMemcpyHtoDAsync_v2(target, self.slab.start as *const c_void, len, stream.cu_stream()) }
            .result()
            .map_err(failed)?;
        self.slab.last = Some(record(stream)?);
        Ok(())
    }
}

/// Reads tensors of a card that no longer change back to host memory, on a stream of its own: from any thread, beside
/// whatever the card computes.
pub struct Unloading {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    slab: Slab,
}

impl Unloading {
    /// Sees what was issued to the compute stream before. Tensors go through `bytes` of pinned memory.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        gpu.bind()?;
        let stream = gpu.stream().context().new_stream().map_err(failed)?;
        stream.join(gpu.stream()).map_err(failed)?;
        Ok(Self { gpu: gpu.clone(), stream, slab: Slab::new(bytes.max(1))?.0 })
    }

    /// The bytes of a contiguous tensor.
    pub fn read(&mut self, from: &Tensor) -> Result<Vec<u8>> {
        self.gpu.bind()?;
        let (start, whole) = (tensor_address(NAME, from)?, from.elem_count() * from.dtype().size_in_bytes());
        let mut out = Vec::with_capacity(whole);
        while out.len() < whole {
            let len = self.slab.bytes.min(whole - out.len());
            let (source, target) = (start + out.len() as u64, self.slab.start as *mut c_void);
            // SAFETY: the range is within the tensor, which the caller holds and nobody writes; the slab has room and is
            // used by this copy alone, which is awaited before the slab is read.
            let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(target, source, len, self.stream.cu_stream()) }.result();
            copied.map_err(failed)?;
            self.stream.synchronize().map_err(failed)?;
            // SAFETY: the slab owns this memory, and the copy has filled the first `len` bytes.
            out.extend_from_slice(unsafe { std::slice::from_raw_parts(self.slab.start as *const u8, len) });
        }
        Ok(out)
    }
}

impl State {
    /// The smallest free slab of at least `bytes`; a new one in place of a free one that is too small.
    fn take(&mut self, bytes: usize) -> Result<Slab> {
        let fitting = (0..self.free.len()).filter(|i| self.free[*i].bytes >= bytes).min_by_key(|i| self.free[*i].bytes);
        if let Some(i) = fitting {
            return Ok(self.free.swap_remove(i));
        }
        // With buckets of several sizes all slabs grow to the largest in time.
        if let Some(small) = self.free.pop() {
            self.bytes -= small.bytes;
        }
        let (slab, refused) = Slab::new(bytes)?;
        self.bytes += bytes;
        if self.unpinned.is_none() {
            self.unpinned = refused;
        }
        Ok(slab)
    }
}

fn failed(e: impl std::fmt::Display) -> crate::Error {
    error(NAME, e.to_string())
}

fn record(stream: &Arc<CudaStream>) -> Result<CudaEvent> {
    stream.record_event(None).map_err(failed)
}

impl Gpu {
    /// Issues the copies of tensors to host memory. What the stash before this one took of the device becomes free.
    pub(crate) fn stash(&self, tensors: Vec<Tensor>) -> Result<Stashed> {
        let tensors: Vec<Tensor> = tensors.iter().map(Tensor::contiguous).collect::<candle_core::Result<_>>()?;
        let mut parts = Vec::with_capacity(tensors.len());
        let mut total = 0;
        for t in &tensors {
            parts.push((t.shape().clone(), t.dtype(), total));
            total += (t.elem_count() * t.dtype().size_in_bytes()).next_multiple_of(ALIGN);
        }
        self.bind()?;
        let mut state = self.stash_of().lock();
        let mut slab = state.take(total.max(ALIGN))?;
        let out = self.leaving_stream();
        out.join(self.stream()).map_err(failed)?;
        if let Some(last) = &slab.last {
            out.wait(last).map_err(failed)?;
        }
        for (t, (_, dtype, offset)) in tensors.iter().zip(&parts) {
            let (source, bytes) = (tensor_address(NAME, t)?, t.elem_count() * dtype.size_in_bytes());
            let target = (slab.start + *offset as u64) as *mut c_void;
            // SAFETY: the slab has room for all parts; both ends live until `done` has passed (`leaving`, `Drop`).
            unsafe { sys::cuMemcpyDtoHAsync_v2(target, source, bytes, out.cu_stream()) }.result().map_err(failed)?;
        }
        let done = record(out)?;
        slab.last = Some(record(out)?);
        state.next += 1;
        let id = state.next;
        state.leaving.push_back(Leaving { id, tensors, done });
        drop(state);
        self.settle_stashes(LEAVING)?;
        Ok(Stashed { gpu: self.clone(), id, slab: Some(slab), parts, back: None })
    }

    /// Gives back the device memory of all but the last `keep` stashes, behind their copies.
    pub(crate) fn settle_stashes(&self, keep: usize) -> Result<()> {
        let mut state = self.stash_of().lock();
        while state.leaving.len() > keep {
            if let Some(gone) = state.leaving.pop_front() {
                self.stream().wait(&gone.done).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Bytes of host memory that stashes hold, in use or kept for the next ones.
    pub fn stash_bytes(&self) -> u64 {
        self.stash_of().lock().bytes as u64
    }

    /// Why host memory for stashes is not pinned, where it is not.
    pub fn stash_unpinned(&self) -> Option<String> {
        self.stash_of().lock().unpinned.clone()
    }

    fn bind(&self) -> Result<()> {
        self.stream().context().bind_to_thread().map_err(failed)
    }
}

impl Stashed {
    pub fn prefetch(&mut self) -> Result<()> {
        let (None, Some(slab)) = (&self.back, &mut self.slab) else { return Ok(()) };
        let gpu = &self.gpu;
        gpu.bind()?;
        let still_here = {
            let mut state = gpu.stash_of().lock();
            let at = state.leaving.iter().position(|l| l.id == self.id);
            at.and_then(|at| state.leaving.remove(at))
        };
        if let Some(Leaving { tensors, done, .. }) = still_here {
            // The copy out only reads; freeing must still wait for it.
            self.back = Some((tensors, done));
            return Ok(());
        }
        let mut tensors = Vec::with_capacity(self.parts.len());
        for (shape, dtype, _) in &self.parts {
            tensors.push(gpu.empty(shape, *dtype)?);
        }
        // The memory may be in use by computing issued before.
        gpu.copy_waits()?;
        let copies = gpu.copies();
        if let Some(last) = &slab.last {
            copies.wait(last).map_err(failed)?;
        }
        for (t, (_, dtype, offset)) in tensors.iter().zip(&self.parts) {
            let (target, bytes) = (tensor_address(NAME, t)?, t.elem_count() * dtype.size_in_bytes());
            let source = (slab.start + *offset as u64) as *const c_void;
            // SAFETY: written by `stash` with these sizes; both ends live until the event below has passed.
            unsafe { sys::cuMemcpyHtoDAsync_v2(target, source, bytes, copies.cu_stream()) }.result().map_err(failed)?;
        }
        let there = record(copies)?;
        slab.last = Some(record(copies)?);
        self.back = Some((tensors, there));
        Ok(())
    }

    pub fn restore(mut self) -> Result<Vec<Tensor>> {
        self.prefetch()?;
        match self.back.take() {
            Some((tensors, there)) => {
                self.gpu.stream().wait(&there).map_err(failed)?;
                Ok(tensors)
            }
            None => Err(error(NAME, "tensors were brought back twice".into())),
        }
    }
}

impl Drop for Stashed {
    fn drop(&mut self) {
        if let Some((tensors, there)) = self.back.take() {
            // Nobody came for them: their memory is free when the copy is done. Failures have no one to hear them.
            let _ = self.gpu.stream().wait(&there);
            drop(tensors);
        }
        if let Some(slab) = self.slab.take() {
            self.gpu.stash_of().lock().free.push(slab);
        }
    }
}
