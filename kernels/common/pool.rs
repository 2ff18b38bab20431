//! The driver's pool of device memory, from which all tensors come.

use candle_core::cuda_backend::cudarc::driver::sys::{self, CUmemPool_attribute};
use candle_core::cuda_backend::cudarc::driver::{result, CudaContext};

type Done<T> = std::result::Result<T, result::DriverError>;

/// The pool keeps what is freed: nothing goes back to the driver within a run, so nothing is asked for twice.
pub(super) fn keep(context: &CudaContext) -> Done<()> {
    set(context, CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)
}

/// Hands what nobody uses back to the driver.
pub(super) fn trim(context: &CudaContext) -> Done<()> {
    // SAFETY: the device is open; memory in use is not touched.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device())?;
        sys::cuMemPoolTrimTo(pool, 0).result()
    }
}

pub(super) fn value(context: &CudaContext, attribute: CUmemPool_attribute) -> Done<u64> {
    let mut value = 0u64;
    // SAFETY: the device is open; these attributes are 64-bit values.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device())?;
        sys::cuMemPoolGetAttribute(pool, attribute, (&mut value as *mut u64).cast()).result()?;
    }
    Ok(value)
}

pub(super) fn set(context: &CudaContext, attribute: CUmemPool_attribute, mut value: u64) -> Done<()> {
    // SAFETY: as in `value`.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device())?;
        sys::cuMemPoolSetAttribute(pool, attribute, (&mut value as *mut u64).cast()).result()
    }
}
