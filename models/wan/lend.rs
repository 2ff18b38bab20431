//! Whoever has a block's weights lends them for the time of one pass over the block.

use std::ops::Deref;
use std::sync::Arc;

use super::{BlockWeights, Pass};
use crate::{Error, Result};

/// Lends the weights of one block. Streaming implementations make the compute stream wait for the copy, never the
/// CPU, and start the next prefetch when the lease is dropped.
pub trait WeightProvider {
    /// Blocks are asked for in order 0, 1, … in `Pass::Forward` and in reverse order in `Pass::Backward`.
    fn acquire(&self, block: usize, pass: Pass) -> Result<Lease<'_>>;
}

/// The weights of one block until it is dropped.
pub struct Lease<'a> {
    weights: Arc<BlockWeights>,
    on_drop: Option<Box<dyn FnOnce() + 'a>>,
}

impl<'a> Lease<'a> {
    pub fn new(weights: Arc<BlockWeights>) -> Self {
        Self { weights, on_drop: None }
    }

    /// `on_drop` runs when the block has been computed (as far as the host is concerned).
    pub fn with_release(weights: Arc<BlockWeights>, on_drop: impl FnOnce() + 'a) -> Self {
        Self { weights, on_drop: Some(Box::new(on_drop)) }
    }
}

impl Deref for Lease<'_> {
    type Target = BlockWeights;

    fn deref(&self) -> &BlockWeights {
        &self.weights
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if let Some(release) = self.on_drop.take() {
            release();
        }
    }
}

/// All blocks in the memory of the computing device.
#[derive(Clone)]
pub struct ResidentWeights(pub Vec<Arc<BlockWeights>>);

impl ResidentWeights {
    pub fn new(blocks: impl IntoIterator<Item = BlockWeights>) -> Self {
        Self(blocks.into_iter().map(Arc::new).collect())
    }
}

impl WeightProvider for ResidentWeights {
    fn acquire(&self, block: usize, _pass: Pass) -> Result<Lease<'_>> {
        let weights = self.0.get(block).ok_or_else(|| Error::Invalid {
            model: "wan",
            what: format!("block {block} was asked for, {} are resident", self.0.len()),
        })?;
        Ok(Lease::new(weights.clone()))
    }
}
