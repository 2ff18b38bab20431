//! The driver's pools of device memory, from which all tensors come: the device's own for small ones and one for large
//! ones. In a common pool small tensors that live long lie scattered between large ones and keep freed pieces apart: on an
//! H200 it held 1.4 GiB more than was in tensors at 22 GiB and 3.6 GiB at 134, with two pools 0.9 and 2.2.

use candle_core::cuda_backend::cudarc::driver::sys::{self, CUmemPool_attribute};
use candle_core::cuda_backend::cudarc::driver::{result, CudaContext, CudaSlice, CudaStream, DeviceRepr};
use std::sync::Arc;

type Done<T> = std::result::Result<T, result::DriverError>;

/// Tensors of as many bytes and more are large.
const LARGE: usize = 16 << 20;

/// Both pools of a card.
pub(super) struct Pools {
    small: sys::CUmemoryPool,
    large: sys::CUmemoryPool,
}

// SAFETY: pools are handles that the driver lets any thread use.
unsafe impl Send for Pools {}
unsafe impl Sync for Pools {}

impl Pools {
    /// They keep what is freed: nothing goes back to the driver within a run, so nothing is asked for twice.
    pub fn new(context: &CudaContext) -> Done<Self> {
        // SAFETY: a C structure of numbers and pointers; the driver asks that what is not set is zero.
        let mut wanted: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
        wanted.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        wanted.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        wanted.location.id = context.cu_device();
        // SAFETY: the device is open, and the properties say which it is.
        let pools = unsafe {
            let small = result::device::get_mem_pool(context.cu_device())?;
            Pools { small, large: result::mem_pool::create(&wanted)? }
        };
        pools.set(CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)?;
        Ok(pools)
    }

    /// `n` values in the order of `stream`, whatever was there before.
    ///
    /// # Safety
    /// They are written before they are read.
    pub unsafe fn take<T: DeviceRepr>(&self, stream: &Arc<CudaStream>, n: usize) -> Done<CudaSlice<T>> {
        let bytes = n * size_of::<T>();
        if bytes < LARGE {
            return stream.alloc(n);
        }
        stream.context().bind_to_thread()?;
        let start = result::mem_pool::alloc_async(self.large, bytes, stream.cu_stream())?;
        // Freed by the slice as any other: the driver knows which pool an address is of.
        Ok(stream.upgrade_device_ptr(start, n))
    }

    /// Hands back to the driver what the pools (small, large) hold beyond `keep` bytes each and nobody uses.
    pub fn trim(&self, keep: [u64; 2]) -> Done<()> {
        let both = [self.small, self.large].into_iter().zip(keep);
        // SAFETY: the pools live as long as `self`; memory in use is not touched.
        both.into_iter().try_for_each(|(pool, keep)| unsafe { result::mem_pool::trim_to(pool, keep as usize) })
    }

    /// Of the pool for small tensors and of the one for large. Sums of peaks are a little more than was ever in use at
    /// once.
    pub fn values(&self, attribute: CUmemPool_attribute) -> Done<[u64; 2]> {
        let mut values = [0u64; 2];
        for (pool, value) in [self.small, self.large].into_iter().zip(&mut values) {
            // SAFETY: the pools live as long as `self`; the attributes asked for are 64-bit values.
            unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (value as *mut u64).cast()).result()? };
        }
        Ok(values)
    }

    pub fn set(&self, attribute: CUmemPool_attribute, value: u64) -> Done<()> {
        let set = |pool| {
            let mut value = value;
            // SAFETY: as in `value`.
            unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&mut value as *mut u64).cast()).result() }
        };
        [self.small, self.large].into_iter().try_for_each(set)
    }
}

impl Drop for Pools {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; what still lies in it keeps the driver's part of it alive. A failure here
        // has no one to hear it.
        let _ = unsafe { result::mem_pool::destroy(self.large) };
    }
}
