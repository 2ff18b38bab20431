//! The moving average of the loss: one slot per micro-batch of an epoch, overwritten in the next.

/// Losses of the last epoch's worth of micro-batches. A loss that is not finite leaves its slot empty (NaN).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    slots: Vec<f32>,
}

impl History {
    pub fn from_slots(slots: Vec<f32>) -> Self {
        Self { slots }
    }

    pub fn slots(&self) -> &[f32] {
        &self.slots
    }

    /// Records the loss of micro-batch `index` (from 0) of `epoch` (from 0).
    pub fn record(&mut self, epoch: u64, index: u64, loss: f32) {
        let index = index as usize;
        let loss = if loss.is_finite() { loss } else { f32::NAN };
        if index >= self.slots.len() {
            self.slots.resize(index + 1, f32::NAN);
        }
        // A later epoch's loss that is not finite keeps the one before: the average stays one of real losses.
        if epoch == 0 || !loss.is_nan() {
            self.slots[index] = loss;
        }
    }

    /// Mean of what is recorded; NaN before the first loss.
    pub fn average(&self) -> f64 {
        let known = self.slots.iter().filter(|l| !l.is_nan());
        let (sum, n) = known.fold((0.0, 0u32), |(s, n), l| (s + f64::from(*l), n + 1));
        sum / f64::from(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_moves_over_one_epoch() {
        let mut h = History::default();
        assert!(h.average().is_nan());
        h.record(0, 0, 1.0);
        h.record(0, 1, f32::INFINITY);
        h.record(0, 2, 3.0);
        assert_eq!(h.average(), 2.0);
        h.record(1, 0, 5.0);
        h.record(1, 2, f32::NAN);
        assert_eq!(h.average(), 4.0);
        assert_eq!(History::from_slots(h.slots().to_vec()).average(), 4.0);
    }
}
