//! Shows activations on the way to whoever compares them with the reference. Costs nothing when nobody looks.

use candle_core::Tensor;

use super::Tap;
use crate::Result;

pub(super) struct Probe<'a> {
    tap: Option<Tap<'a>>,
}

impl<'a> Probe<'a> {
    pub fn new(tap: Option<Tap<'a>>) -> Self {
        Self { tap }
    }

    pub fn off() -> Self {
        Self { tap: None }
    }

    /// Whether values that only the probe needs are worth computing.
    pub fn is_on(&self) -> bool {
        self.tap.is_some()
    }

    pub fn see(&mut self, name: &str, value: &Tensor) -> Result<()> {
        match &mut self.tap {
            Some(tap) => tap(name, value),
            None => Ok(()),
        }
    }

    /// Under the name `block{i}.{name}`.
    pub fn see_in_block(&mut self, block: usize, name: &str, value: &Tensor) -> Result<()> {
        match &mut self.tap {
            Some(tap) => tap(&format!("block{block}.{name}"), value),
            None => Ok(()),
        }
    }
}
