//! How much device memory the pools may hold between two steps.
//!
//! Within a step freed pieces are used again, and what fits nowhere makes the pools grow: on an H200 by 9 GiB over 105 steps
//! of 127 GiB, and by 0.3 over 400 of 36. Between steps nearly all of it is free, so giving everything back to the driver
//! then starts from an ordered state again. That costs the mapping of as much memory in the next step (0.4 s were seen at
//! 137 GiB), so it is done when the pools hold clearly more than planned, and than a step after the last time.

#[cfg(any(test, feature = "cuda"))]
use std::cmp::max;

/// When pools are emptied. Sizes in bytes.
#[derive(Debug, Default)]
#[cfg(any(test, feature = "cuda"))]
pub(crate) struct Held {
    planned: u64,
    /// Held after the first step since the pools were emptied.
    usual: u64,
    emptied: bool,
}

#[cfg(any(test, feature = "cuda"))]
impl Held {
    const SLACK: u64 = 256 << 20;

    /// What steps are planned to hold; before that is said, nothing is emptied.
    pub fn plan(&mut self, bytes: u64) {
        *self = Held { planned: bytes, ..Held::default() };
    }

    /// Whether the pools, which hold so much after a step, are to be emptied now.
    pub fn grew(&mut self, bytes: u64) -> bool {
        if std::mem::take(&mut self.emptied) {
            self.usual = bytes;
        }
        let most = max(self.planned, self.usual);
        self.emptied = self.planned > 0 && bytes > most + most / 50 + Self::SLACK;
        self.emptied
    }
}

impl crate::Exec {
    /// Steps are planned to hold so many bytes of device memory.
    pub fn plan_held(&self, bytes: u64) {
        match self {
            crate::Exec::Reference { .. } => {}
            #[cfg(feature = "cuda")]
            crate::Exec::Cuda { gpu, .. } => gpu.plan_held(bytes),
        }
        let _ = bytes;
    }

    /// Between two steps: where the card's pools have grown beyond what is planned, what nobody uses goes back to the
    /// driver.
    pub fn end_of_step(&self) -> crate::Result<()> {
        match self {
            crate::Exec::Reference { .. } => Ok(()),
            #[cfg(feature = "cuda")]
            crate::Exec::Cuda { gpu, .. } => gpu.end_of_step(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Held;

    const GIB: u64 = 1 << 30;

    #[test]
    fn pools_are_emptied_when_they_hold_more_than_planned_and_than_usual() {
        let mut held = Held::default();
        assert!(!held.grew(200 * GIB), "nothing is planned");
        held.plan(100 * GIB);
        assert!(!held.grew(90 * GIB) && !held.grew(102 * GIB));
        assert!(held.grew(103 * GIB));
        // A step needs as much as planned: all is well until it grows again.
        assert!(!held.grew(101 * GIB) && !held.grew(103 * GIB));
        assert!(held.grew(104 * GIB));
    }

    #[test]
    fn steps_that_need_more_than_planned_are_let_be() {
        let mut held = Held::default();
        held.plan(100 * GIB);
        assert!(held.grew(110 * GIB));
        (0..10).for_each(|_| assert!(!held.grew(110 * GIB)));
        assert!(!held.grew(112 * GIB));
        assert!(held.grew(113 * GIB));
    }
}
