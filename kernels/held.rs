//! How much device memory the pools may hold between two steps.
//!
//! Within a step freed pieces are used again, and what fits nowhere makes the pools grow: on an H200 by 9 GiB over 105 steps
//! of 127 GiB, and by 0.3 over 400 of 36. Between steps nearly all of it is free, so what was not held before goes back to the
//! driver. Should a single step grow by more than a fiftieth all the same, everything goes back, and the next starts from an
//! ordered state. That costs the mapping of as much memory (0.25 s of a step were seen at 127 GiB, 0.4 within one), so it is
//! done when the pools hold clearly more than planned, and than a step after the last time.

#[cfg(any(test, feature = "cuda"))]
use std::cmp::max;

/// What goes back to the driver between two steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg(any(test, feature = "cuda"))]
pub(crate) enum GiveBack {
    Nothing,
    /// What both pools (small tensors, large ones) hold beyond so many bytes each, as far as nobody uses it.
    Beyond([u64; 2]),
    Everything,
}

/// When pools hand memory back. Sizes in bytes.
#[derive(Debug, Default)]
#[cfg(any(test, feature = "cuda"))]
pub(crate) struct Held {
    planned: u64,
    /// Held after the first step since the pools were emptied.
    usual: u64,
    emptied: bool,
    /// What each pool held after the last step that stayed within the larger of both.
    settled: [u64; 2],
}

#[cfg(any(test, feature = "cuda"))]
impl Held {
    const SLACK: u64 = 256 << 20;

    /// What steps are planned to hold; before that is said, nothing goes back.
    pub fn plan(&mut self, bytes: u64) {
        *self = Held { planned: bytes, ..Held::default() };
    }

    /// What is to go back now, after a step behind which the pools hold so much.
    pub fn after_step(&mut self, held: [u64; 2]) -> GiveBack {
        let sum = held[0] + held[1];
        if std::mem::take(&mut self.emptied) {
            self.usual = sum;
        }
        let most = max(self.planned, self.usual);
        if sum <= most {
            self.settled = held;
        }
        if self.planned == 0 || sum <= most + Self::SLACK {
            return GiveBack::Nothing;
        }
        self.emptied = sum > most + most / 50 + Self::SLACK;
        match self.emptied {
            true => GiveBack::Everything,
            false => GiveBack::Beyond(self.without(sum - most, held)),
        }
    }

    /// `held` less `excess`, which each pool bears in proportion to what it grew.
    fn without(&self, excess: u64, held: [u64; 2]) -> [u64; 2] {
        let [small, large] = [0, 1].map(|pool| held[pool].saturating_sub(self.settled[pool]));
        let of_small = (u128::from(excess) * u128::from(small) / u128::from(max(small + large, 1))) as u64;
        [held[0] - of_small, held[1] - (excess - of_small)]
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

    /// Between two steps: what the card's pools hold beyond the plan, and nobody uses, goes back to the driver.
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
    use super::GiveBack::{Beyond, Everything, Nothing};
    use super::Held;

    const GIB: u64 = 1 << 30;

    const MIB: u64 = 1 << 20;

    /// 4 GiB in the pool for small tensors, the rest in the other.
    fn of(sum: u64) -> [u64; 2] {
        [4 * GIB, sum - 4 * GIB]
    }

    #[test]
    fn what_pools_grew_beyond_the_plan_goes_back() {
        let mut held = Held::default();
        assert_eq!(held.after_step(of(200 * GIB)), Nothing, "nothing is planned");
        held.plan(100 * GIB);
        assert_eq!(held.after_step(of(90 * GIB)), Nothing);
        assert_eq!(held.after_step(of(100 * GIB + 256 * MIB)), Nothing);
        // From 4 and 86 GiB the small pool grew by 3.5 and the large one by 7; half a GiB is too much.
        assert_eq!(
            held.after_step([7 * GIB + 512 * MIB, 93 * GIB]),
            Beyond([7 * GIB + 512 * MIB - 512 * MIB / 3, 93 * GIB - (512 * MIB - 512 * MIB / 3)])
        );
        // Only the large pool grew since the last step within the plan.
        assert_eq!(held.after_step(of(100 * GIB)), Nothing);
        assert_eq!(held.after_step(of(101 * GIB)), Beyond(of(100 * GIB)));
        assert_eq!(held.after_step(of(101 * GIB)), Beyond(of(100 * GIB)), "as often as it happens");
    }

    #[test]
    fn what_is_kept_is_what_is_planned_however_the_pools_grew() {
        let mut held = Held::default();
        held.plan(100 * GIB);
        // No step yet that stayed within the plan; one pool that shrank; sums of the greatest numbers.
        for pools in [[3 * GIB, 98 * GIB], [GIB, 100 * GIB], [100 * GIB, GIB], [101 * GIB, 0], [0, 101 * GIB]] {
            let Beyond([small, large]) = held.after_step(pools) else { panic!("{pools:?}") };
            assert_eq!(small + large, 100 * GIB, "{pools:?}");
            assert!(small <= pools[0] && large <= pools[1], "{pools:?}");
            held.after_step([50 * GIB, 50 * GIB]);
        }
    }

    #[test]
    fn pools_are_emptied_when_they_hold_much_more_than_planned_and_than_usual() {
        let mut held = Held::default();
        held.plan(100 * GIB);
        assert!(!matches!(held.after_step(of(102 * GIB)), Everything));
        assert_eq!(held.after_step(of(103 * GIB)), Everything);
        // A step needs as much as planned: all is well until it grows again.
        assert_eq!(held.after_step(of(103 * GIB)), Nothing);
        assert_eq!(held.after_step(of(104 * GIB)), Beyond(of(103 * GIB)));
        assert_eq!(held.after_step(of(106 * GIB)), Everything);
    }

    #[test]
    fn steps_that_need_more_than_planned_are_let_be() {
        let mut held = Held::default();
        held.plan(100 * GIB);
        assert_eq!(held.after_step(of(110 * GIB)), Everything);
        (0..10).for_each(|_| assert_eq!(held.after_step(of(110 * GIB)), Nothing));
        assert_eq!(held.after_step(of(112 * GIB)), Beyond(of(110 * GIB)));
        assert_eq!(held.after_step(of(113 * GIB)), Everything);
    }
}
