//! A card's memory: tensors and scratch made, what is in use, and what is handed back.

use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute;
use candle_core::cuda_backend::cudarc::driver::{result, CudaSlice, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Shape, Storage, Tensor};
use half::{bf16, f16};

use super::{address, error, lock, Gpu, NAME};
use crate::held::GiveBack;
use crate::{Error, Result};

/// Bytes of device memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// In tensors now.
    pub used: u64,
    /// In tensors at most, since the last [`Gpu::reset_peak`].
    pub peak: u64,
    /// Held by the pools now, and at most.
    pub reserved: u64,
    pub reserved_peak: u64,
    /// The part of the pool for large tensors in the most.
    pub large_peak: u64,
    /// Free on the card, for anybody.
    pub free: u64,
    pub total: u64,
}

impl Gpu {
    /// A tensor whose values are whatever was there: for outputs that a kernel writes whole.
    pub fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        let (n, device) = (shape.elem_count(), &self.0.device);
        // SAFETY: the callers' kernels write every element before anything reads it, in stream order.
        let storage = self.with_room(&|| unsafe {
            Ok(match dtype {
                DType::F32 => CudaStorage::wrap_cuda_slice(self.take::<f32>(n)?, device.clone()),
                DType::BF16 => CudaStorage::wrap_cuda_slice(self.take::<bf16>(n)?, device.clone()),
                DType::F16 => CudaStorage::wrap_cuda_slice(self.take::<f16>(n)?, device.clone()),
                DType::U8 => CudaStorage::wrap_cuda_slice(self.take::<u8>(n)?, device.clone()),
                DType::U32 => CudaStorage::wrap_cuda_slice(self.take::<u32>(n)?, device.clone()),
                DType::F64 => CudaStorage::wrap_cuda_slice(self.take::<f64>(n)?, device.clone()),
                got => return Err(Error::Dtype { op: NAME, tensor: "empty", got, want: "a dtype that kernels write" }),
            })
        })?;
        Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
    }

    /// See [`Pools::take`].
    unsafe fn take<T: DeviceRepr>(&self, n: usize) -> Result<CudaSlice<T>> {
        let taken = self.0.pools.take(&self.0.stream, n);
        taken.map_err(|e| error(NAME, format!("{} bytes: {e}", n * size_of::<T>())))
    }

    /// What `alloc` gives; where the card has no room, once more after everything issued is done and the pool has handed
    /// back what nobody uses. The pool reuses freed memory only piece by piece, so a card can be full of pieces too small
    /// while there is room enough in all of them.
    fn with_room<T>(&self, alloc: &dyn Fn() -> Result<T>) -> Result<T> {
        match alloc() {
            Err(e) if e.to_string().contains("OUT_OF_MEMORY") => {
                self.tidy()?;
                alloc()
            }
            done => done,
        }
    }

    /// Waits for everything issued, and hands back what the pools hold and nobody uses.
    pub fn tidy(&self) -> Result<()> {
        self.give_back([0; 2])
    }

    /// As [`Gpu::tidy`], of what the pools of small and large tensors hold beyond so many bytes.
    fn give_back(&self, beyond: [u64; 2]) -> Result<()> {
        let streams = [&self.0.stream, &self.0.copies, &self.0.leaving];
        let idle = streams.into_iter().try_for_each(|stream| stream.synchronize());
        idle.and_then(|()| self.0.pools.trim(beyond)).map_err(|e| error(NAME, e.to_string()))
    }

    /// A buffer of at least `bytes`, the same for every call with this name: valid until the next such call, whose work
    /// comes later on the stream.
    pub(crate) fn scratch(&self, name: &'static str, bytes: usize) -> Result<u64> {
        let mut all = lock(&self.0.scratch);
        let fits = all.get(name).is_some_and(|s| s.len() >= bytes);
        if !fits {
            all.remove(name);
            let fresh = self.with_room(&|| {
                // SAFETY: scratch is written before it is read, by contract.
                unsafe { self.take::<u8>(bytes) }
            })?;
            all.insert(name, fresh);
        }
        Ok(address(&all[name], &self.0.stream))
    }

    /// Memory in use; asks the driver, so not for inner loops.
    pub fn memory(&self) -> Result<Memory> {
        let context = self.0.stream.context();
        let read = || -> std::result::Result<Memory, result::DriverError> {
            let (free, total) = context.mem_get_info()?;
            let at = |attribute| self.0.pools.values(attribute).map(|[small, large]| small + large);
            let [small_peak, large_peak] =
                self.0.pools.values(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?;
            Ok(Memory {
                used: at(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
                peak: at(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
                reserved: at(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
                reserved_peak: small_peak + large_peak,
                large_peak,
                free: free as u64,
                total: total as u64,
            })
        };
        read().map_err(|e| error(NAME, e.to_string()))
    }

    /// See [`crate::Exec::plan_held`].
    pub(crate) fn plan_held(&self, bytes: u64) {
        lock(&self.0.held).plan(bytes);
    }

    /// See [`crate::Exec::end_of_step`].
    pub(crate) fn end_of_step(&self) -> Result<()> {
        let held = self.0.pools.values(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
        let held = held.map_err(|e| error(NAME, e.to_string()))?;
        let what = lock(&self.0.held).after_step(held);
        match what {
            GiveBack::Nothing => Ok(()),
            GiveBack::Beyond(keep) => self.give_back(keep),
            GiveBack::Everything => self.tidy(),
        }
    }

    /// The peaks start again from what is in use now.
    pub fn reset_peak(&self) -> Result<()> {
        let set = |attribute| self.0.pools.set(attribute, 0);
        set(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
            .and_then(|()| set(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH))
            .map_err(|e| error(NAME, e.to_string()))
    }
}
