//! Every operation of the Wan trainer. An op is a definition in plain candle (`reference`) that may also have a fast
//! path (`cuda`); both sit in the op's own folder, forward and backward side by side, with its tests and its kernel.
//!
//! Axes used in tensor names: `b` batch, `l` query tokens, `m` key tokens, `d` model width, `n` heads, `h` head width,
//! `i`/`o` in/out features of a linear, `r` adapter rank, `c` channels, `f`/`y`/`x` frames, rows, columns.

use candle_core::{DType, Device};

pub mod adamw;
pub mod adamw8bit;
pub mod attention;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod bench;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod check;
pub mod conv3d;
pub mod dense_attention;
mod driver;
pub mod error;
pub mod fast_attention;
pub mod flow;
pub mod fp8;
pub mod gate_residual;
pub mod gelu;
pub mod heap;
mod held;
pub mod int8;
pub mod linear;
pub mod lora_delta;
pub mod norm;
pub mod offload;
pub mod patchify;
pub mod philox;

#[cfg(feature = "cuda")]
mod common;
mod gate;
mod num;
/// The parts of the check of all kernels (`check::all`), for tools that take long over each kernel, as a race checker does.
pub const CHECK_GROUPS: &[&str] = &[
    "norms",
    "elementwise",
    "linears",
    "attention",
    "fast_attention",
    "portable",
    "flow",
    "caching",
    "exact",
    "optimizers",
];

#[cfg(test)]
mod testing;

#[cfg(feature = "cuda")]
pub use common::gpu;
#[cfg(feature = "cuda")]
use common::gpu::Gpu;
pub use error::{Error, Result};

/// Where ops run; chosen once in `main` and passed down.
#[derive(Clone)]
pub enum Exec {
    /// Plain candle ops on the given device, computing in `compute`: F32 is the definition.
    Reference { device: Device, compute: DType },
    /// The kernels of this crate on a card, linears and attention in `compute`.
    #[cfg(feature = "cuda")]
    Cuda { gpu: Gpu, device: Device, compute: DType },
}

impl Exec {
    /// The definition of every op: plain candle in fp32 on the CPU.
    pub fn cpu() -> Self {
        Exec::Reference { device: Device::Cpu, compute: DType::F32 }
    }

    /// The kernels of this crate on card `ordinal`.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize, compute: DType) -> Result<Self> {
        let gpu = Gpu::new(ordinal)?;
        Ok(Exec::Cuda { device: gpu.device(), gpu, compute })
    }

    pub fn device(&self) -> &Device {
        match self {
            Exec::Reference { device, .. } => device,
            #[cfg(feature = "cuda")]
            Exec::Cuda { device, .. } => device,
        }
    }

    /// The dtype in which linears and attention compute.
    pub fn compute(&self) -> DType {
        match self {
            Exec::Reference { compute, .. } => *compute,
            #[cfg(feature = "cuda")]
            Exec::Cuda { compute, .. } => *compute,
        }
    }

    /// The same place, computing in another dtype: for the parts of a model that are never rounded.
    pub fn with_compute(&self, compute: DType) -> Self {
        match self {
            Exec::Reference { device, .. } => Exec::Reference { device: device.clone(), compute },
            #[cfg(feature = "cuda")]
            Exec::Cuda { gpu, device, .. } => Exec::Cuda { gpu: gpu.clone(), device: device.clone(), compute },
        }
    }

    /// Checks the arguments at the op's one gate, then runs the path of this executor.
    pub fn run<O: Op>(&self, args: &O::Args<'_>) -> Result<O::Out> {
        O::check(args)?;
        match self {
            Exec::Reference { compute, .. } => O::reference(args, *compute),
            #[cfg(feature = "cuda")]
            Exec::Cuda { gpu, compute, .. } => gpu.timed(O::NAME, || O::cuda(args, gpu, *compute)),
        }
    }
}

/// What an op must do at least: benches divide by time and print percent of peak.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations (a multiply-add counts two).
    pub flops: f64,
    /// Bytes read and written if every tensor is touched once.
    pub bytes: f64,
}

/// One operation: its arguments, its gate, its cost, its definition.
pub trait Op {
    /// Named borrows of everything the op reads.
    type Args<'a>;
    type Out;
    /// Bench row, profiler range, error prefix.
    const NAME: &'static str;
    /// The only gate for shapes, dtypes and strides; below it the op trusts.
    fn check(args: &Self::Args<'_>) -> Result<()>;
    fn cost(args: &Self::Args<'_>) -> Cost;
    /// Plain, tape-safe candle ops on any device. `compute` F32 is the definition of the op, BF16/F16 the naive
    /// low-precision answer that a fast kernel's error is measured against.
    fn reference(args: &Self::Args<'_>, compute: DType) -> Result<Self::Out>;
    /// The same on a card. Without an own path the definition runs there in candle's kernels: that is meant for what is
    /// done once in a step or on a few rows, and for shapes and dtypes that no kernel takes.
    #[cfg(feature = "cuda")]
    fn cuda(args: &Self::Args<'_>, _gpu: &Gpu, compute: DType) -> Result<Self::Out> {
        Self::reference(args, compute)
    }
}
