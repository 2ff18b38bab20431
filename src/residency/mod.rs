//! Who has a block's weights, and when: all of them in the memory of the computing device, or some of them streamed
//! through a ring of slots from a permanent master copy in host memory. The base is frozen, so nothing is copied back.
//!
//! Both lend through [`WeightProvider`]; which one a run uses changes memory and time, never a bit of the result.

#[cfg(feature = "cuda")]
mod cuda;
mod ring;

use std::sync::Arc;

use wan_kernels::Exec;
use wan_models::wan::{BlockWeights, Lease, Pass, ResidentWeights, WeightProvider};
use wan_models::Result;

use crate::error::UserError;

pub use ring::{CpuCopy, Ring, Upload};

/// How the blocks' weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidencySpec {
    /// `--blocks_to_swap`: blocks that stream; 0 keeps every block in place.
    pub blocks_to_swap: usize,
    /// `--block_swap_ring_size`: slots that streamed blocks share.
    pub ring_size: usize,
}

impl ResidencySpec {
    pub fn check(&self, num_layers: usize) -> std::result::Result<(), UserError> {
        if self.blocks_to_swap > num_layers {
            return Err(UserError::usage(format!(
                "--blocks_to_swap {} is more than the model's {num_layers} blocks",
                self.blocks_to_swap
            )));
        }
        if self.ring_size == 0 {
            return Err(UserError::usage("--block_swap_ring_size must be at least 1"));
        }
        Ok(())
    }

    /// The blocks that stream, spread evenly: the time to hide a copy behind is the same everywhere.
    pub fn streamed(&self, num_layers: usize) -> Vec<usize> {
        let swap = self.blocks_to_swap.min(num_layers);
        (0..swap).map(|i| (2 * i + 1) * num_layers / (2 * swap)).collect()
    }
}

/// Weights held either way.
pub enum Residency {
    Resident(ResidentWeights),
    Ring(Ring),
}

impl Residency {
    /// Takes over the blocks. With streaming, `blocks` are the masters of the streamed ones and `upload` fills slots.
    pub fn new(blocks: Vec<Arc<BlockWeights>>, spec: ResidencySpec, upload: Arc<dyn Upload>) -> Self {
        let streamed = spec.streamed(blocks.len());
        match streamed.is_empty() {
            true => Self::Resident(ResidentWeights(blocks)),
            false => Self::Ring(Ring::new(blocks, streamed, spec.ring_size, upload)),
        }
    }
}

impl Residency {
    /// The same for the device that `exec` computes on, from blocks in host memory: resident ones move there, streamed
    /// ones are pinned where they are. Also a sentence for the user, where pinning was refused.
    pub fn on(exec: &Exec, blocks: Vec<BlockWeights>, spec: ResidencySpec) -> anyhow::Result<(Self, Option<String>)> {
        #[cfg(feature = "cuda")]
        if let Exec::Cuda { gpu, .. } = exec {
            return cuda::residency(gpu, blocks, spec);
        }
        let _ = exec;
        Ok((Self::new(blocks.into_iter().map(Arc::new).collect(), spec, Arc::new(CpuCopy)), None))
    }
}

impl WeightProvider for Residency {
    fn acquire(&self, block: usize, pass: Pass) -> Result<Lease<'_>> {
        match self {
            Self::Resident(r) => r.acquire(block, pass),
            Self::Ring(r) => r.acquire(block, pass),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streamed_blocks_are_spread_evenly() {
        let spec = |swap| ResidencySpec { blocks_to_swap: swap, ring_size: 2 };
        assert_eq!(spec(0).streamed(40), Vec::<usize>::new());
        assert_eq!(spec(4).streamed(40), [5, 15, 25, 35]);
        assert_eq!(spec(40).streamed(40), (0..40).collect::<Vec<_>>());
        for swap in 1..=40 {
            let blocks = spec(swap).streamed(40);
            assert!(blocks.windows(2).all(|w| w[0] < w[1]) && blocks.len() == swap && blocks[swap - 1] < 40);
        }
        assert!(spec(41).check(40).is_err());
        assert!(ResidencySpec { blocks_to_swap: 1, ring_size: 0 }.check(40).is_err());
    }
}
