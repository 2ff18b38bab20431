//! Copies from host memory beside the computing: pinning, and uploads on the copy stream.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{CpuStorage, Storage, Tensor};

use super::gpu::{error, tensor_address, Gpu};
use crate::{Error, Result};

const NAME: &str = "copy";

/// Tensors in host memory that the card may read by itself; unpinned when dropped.
pub struct Pinned {
    gpu: Gpu,
    ranges: Vec<(*mut c_void, usize)>,
    /// Keeps the memory where it is.
    _tensors: Vec<Tensor>,
}

// SAFETY: the addresses are handed to the driver alone, which takes them from any thread.
unsafe impl Send for Pinned {}
unsafe impl Sync for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Whatever is still being read must be read to its end. Failures have no one to hear them.
        let _ = self.gpu.finish_copies();
        for (start, _) in &self.ranges {
            // SAFETY: registered by `pin`, once.
            let _ = unsafe { sys::cuMemHostUnregister(*start) };
        }
    }
}

/// Address and bytes of a contiguous CPU tensor.
fn host_bytes(t: &Tensor) -> Result<(*const u8, usize)> {
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cpu(cpu) = &*storage else {
        return Err(error(NAME, format!("a tensor {:?} is not in host memory", t.shape())));
    };
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(error(NAME, format!("a tensor {:?} is not contiguous", t.shape())));
    };
    let size = t.dtype().size_in_bytes();
    let base: *const u8 = match cpu {
        CpuStorage::U8(v) => v.as_ptr(),
        CpuStorage::F32(v) => v.as_ptr().cast(),
        CpuStorage::BF16(v) => v.as_ptr().cast(),
        CpuStorage::F16(v) => v.as_ptr().cast(),
        _ => return Err(Error::Dtype { op: NAME, tensor: "source", got: t.dtype(), want: "U8, F32, BF16 or F16" }),
    };
    // `wrapping_add`: within the storage, by the layout.
    Ok((base.wrapping_add(start * size), (end - start) * size))
}

impl Gpu {
    /// Pins tensors in place (small ones are left out: they cost a call and bring nothing).
    pub fn pin(&self, tensors: Vec<Tensor>) -> Result<Pinned> {
        const SMALL: usize = 1 << 16;
        let mut pinned = Pinned { gpu: self.clone(), ranges: Vec::new(), _tensors: Vec::new() };
        self.stream().context().bind_to_thread().map_err(|e| error(NAME, e.to_string()))?;
        for t in &tensors {
            let (start, bytes) = host_bytes(t)?;
            if bytes < SMALL {
                continue;
            }
            let start = start as *mut c_void;
            // SAFETY: the range is live memory of a tensor that `Pinned` keeps.
            unsafe { sys::cuMemHostRegister_v2(start, bytes, 0) }.result().map_err(|e| error(NAME, e.to_string()))?;
            pinned.ranges.push((start, bytes));
        }
        pinned._tensors = tensors;
        Ok(pinned)
    }

    /// Copies CPU tensors to the card on the copy stream, and returns when they are there. Memory that computing still
    /// uses is not written before it is done with it.
    pub fn upload(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        let there = self.start_upload(tensors)?;
        self.finish_copies()?;
        Ok(there)
    }

    /// [`Gpu::upload`] without waiting. What is computed with the copies must be issued behind [`Gpu::after_uploads`], and
    /// the sources must live until then and be pinned or be left alone: the driver reads them while it computes.
    pub fn start_upload(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        self.stream().context().bind_to_thread().map_err(|e| error(NAME, e.to_string()))?;
        let mut there = Vec::with_capacity(tensors.len());
        for t in tensors {
            there.push(self.empty(t.shape(), t.dtype())?);
        }
        self.copy_waits()?;
        for (from, to) in tensors.iter().zip(&there) {
            let ((source, bytes), target) = (host_bytes(from)?, tensor_address(NAME, to)?);
            let stream = self.copies().cu_stream();
            // SAFETY: both ends are live and of this size until the copies are done: the caller keeps the sources, and
            // the targets are freed, if at all, in the order of the compute stream, which waits for the copies.
            unsafe { sys::cuMemcpyHtoDAsync_v2(target, source.cast(), bytes, stream) }
                .result()
                .map_err(|e| error(NAME, e.to_string()))?;
        }
        Ok(there)
    }

    /// What is issued to the compute stream from now on waits for all copies issued until now; the CPU does not.
    pub fn after_uploads(&self) -> Result<()> {
        self.stream().join(self.copies()).map_err(|e| error(NAME, e.to_string()))
    }
}
