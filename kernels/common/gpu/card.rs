//! What a card is, and whose kernels run on it.

use std::sync::atomic::Ordering;

use candle_core::cuda_backend::cudarc::driver::sys::{cuDriverGetVersion, CUdevice_attribute};
use candle_core::cuda_backend::cudarc::driver::{result, CudaContext};

use super::Gpu;

/// What a card is.
#[derive(Debug, Clone, PartialEq)]
pub struct Card {
    pub name: String,
    /// Compute capability: (8, 6) is sm_86.
    pub capability: (i32, i32),
    /// Shared memory that one block may use.
    pub shared_bytes: usize,
    pub processors: usize,
}

impl Card {
    pub(super) fn of(context: &CudaContext) -> std::result::Result<Self, result::DriverError> {
        let attribute = |a| context.attribute(a);
        Ok(Card {
            name: context.name()?,
            capability: (
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            shared_bytes: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as usize,
            processors: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        })
    }
}

/// Whose kernels run: this card's own, or those that an earlier one would take, for holding them against each other and for
/// timing what cannot be had here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum KernelsOf {
    ThisCard,
    /// A100: no instructions of later cards, 163 KB of shared memory a block.
    Sm80,
    /// RTX 30 and 40 series, A6000: 99 KB.
    Sm86,
}

impl Gpu {
    /// Whose kernels run from now on.
    pub fn use_kernels_of(&self, card: KernelsOf) {
        self.0.kernels_of.store(card as u8, Ordering::Relaxed);
    }

    fn kernels_of(&self) -> KernelsOf {
        let stored = self.0.kernels_of.load(Ordering::Relaxed);
        [KernelsOf::Sm80, KernelsOf::Sm86].into_iter().find(|k| *k as u8 == stored).unwrap_or(KernelsOf::ThisCard)
    }

    /// Whether only what every card can do is to be used.
    pub(crate) fn portable(&self) -> bool {
        self.kernels_of() != KernelsOf::ThisCard
    }

    /// Shared memory that a block of the kernels in use may take.
    pub(crate) fn shared_bytes(&self) -> usize {
        let limit = match self.kernels_of() {
            KernelsOf::ThisCard => usize::MAX,
            KernelsOf::Sm80 => 163 << 10,
            KernelsOf::Sm86 => 99 << 10,
        };
        self.card().shared_bytes.min(limit)
    }

    /// Whether this card's own kernels may run: those of files `*_sm90a.cu`.
    pub(crate) fn hopper(&self) -> bool {
        self.card().capability == (9, 0) && !self.portable()
    }
}

/// The CUDA whose compiler and libraries this build has, such as "13.0"; empty where the compiler did not say.
pub(super) const BUILT_WITH: &str = env!("WAN_CUDA");

/// The newest CUDA that the driver knows: (12, 8). `None` where it does not say.
pub(super) fn driver_cuda() -> Option<(i32, i32)> {
    let mut version = 0;
    // SAFETY: writes one number, and needs nothing before it.
    unsafe { cuDriverGetVersion(&mut version) }.result().ok()?;
    (version > 0).then_some((version / 1000, version % 1000 / 10))
}
