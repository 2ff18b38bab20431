//! Tensors that wait in host memory while the card computes something else. Copies run beside the computing, in both
//! directions; on the CPU nothing moves.

use candle_core::{Device, Tensor};

#[cfg(feature = "cuda")]
use crate::common::stash::Stashed;
use crate::{Exec, Result};

/// Tensors put away by [`Exec::offload`]. Dropping it gives their host memory back.
pub struct Offloaded(Place);

enum Place {
    Host {
        tensors: Vec<Tensor>,
        device: Device,
    },
    #[cfg(feature = "cuda")]
    Card(Stashed),
}

impl Exec {
    /// Puts tensors of any dtype and shape into host memory. On a card the copy is issued and not waited for; their
    /// device memory is free for computing that is issued after the next call of this function.
    /// Errors (`Gpu`): no host memory, a copy that is refused.
    pub fn offload(&self, tensors: Vec<Tensor>) -> Result<Offloaded> {
        Ok(Offloaded(match self {
            Exec::Reference { device, .. } => {
                let away = tensors.iter().map(|t| t.to_device(&Device::Cpu)).collect::<candle_core::Result<_>>()?;
                Place::Host { tensors: away, device: device.clone() }
            }
            #[cfg(feature = "cuda")]
            Exec::Cuda { gpu, .. } => Place::Card(gpu.stash(tensors)?),
        }))
    }
}

impl Exec {
    /// Lets go of the device memory that copies issued so far still read. The next [`Exec::offload`] does it too: this is
    /// for where none follows.
    pub fn settle_offloads(&self) -> Result<()> {
        match self {
            Exec::Reference { .. } => Ok(()),
            #[cfg(feature = "cuda")]
            Exec::Cuda { gpu, .. } => gpu.settle_stashes(0),
        }
    }
}

impl Offloaded {
    /// Starts bringing the tensors back, into memory that is taken now. [`Offloaded::restore`] does it where it was not
    /// done.
    pub fn prefetch(&mut self) -> Result<()> {
        match &mut self.0 {
            Place::Host { .. } => Ok(()),
            #[cfg(feature = "cuda")]
            Place::Card(stashed) => stashed.prefetch(),
        }
    }

    /// The tensors as they were, for computing that is issued from now on.
    pub fn restore(self) -> Result<Vec<Tensor>> {
        match self.0 {
            Place::Host { tensors, device } => {
                Ok(tensors.iter().map(|t| t.to_device(&device)).collect::<candle_core::Result<_>>()?)
            }
            #[cfg(feature = "cuda")]
            Place::Card(stashed) => stashed.restore(),
        }
    }
}
