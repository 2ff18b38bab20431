//! Dynamic loss scaling for fp16 compute: gradients that would vanish in fp16 are lifted by a factor that shrinks when
//! they overflow and grows while they do not.

/// The factor on the loss. Off (always 1) unless the compute dtype is fp16.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScale {
    factor: f64,
    /// Steps without overflow since the factor last changed.
    good: u32,
    on: bool,
}

const START: f64 = 65536.0;
const GROW_AFTER: u32 = 2000;

impl LossScale {
    pub fn new(on: bool) -> Self {
        Self { factor: if on { START } else { 1.0 }, good: 0, on }
    }

    /// What the loss is multiplied by, and gradients divided by.
    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// Learns whether a step's gradients were finite. Returns whether they were not because the factor is too high.
    pub fn update(&mut self, finite: bool) -> bool {
        if !self.on {
            return false;
        }
        if !finite {
            let excused = self.factor > 1.0;
            *self = Self { factor: (self.factor * 0.5).max(1.0), good: 0, ..*self };
            return excused;
        }
        self.good += 1;
        if self.good == GROW_AFTER {
            *self = Self { factor: self.factor * 2.0, good: 0, ..*self };
        }
        false
    }

    /// The factor's bits and the count of good steps, for a checkpoint.
    pub fn export(&self) -> (u64, u32) {
        (self.factor.to_bits(), self.good)
    }

    /// Continues from what [`Self::export`] gave; a run without scaling stays without.
    pub fn import(&mut self, bits: u64, good: u32) {
        if self.on {
            *self = Self { factor: f64::from_bits(bits), good, on: true };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_halves_on_overflow_and_doubles_after_two_thousand_good_steps() {
        let mut scale = LossScale::new(true);
        assert!(scale.update(false));
        assert_eq!(scale.factor(), 32768.0);
        (0..1999).for_each(|_| assert!(!scale.update(true)));
        assert_eq!(scale.factor(), 32768.0);
        scale.update(true);
        assert_eq!(scale.factor(), 65536.0);
        let mut other = LossScale::new(true);
        let (bits, good) = scale.export();
        other.import(bits, good);
        assert_eq!(other, scale);
        (0..16).for_each(|_| assert!(scale.update(false)));
        assert_eq!(scale.factor(), 1.0);
        assert!(!scale.update(false), "at factor 1 the overflow is real");
        let mut off = LossScale::new(false);
        assert!(!off.update(false));
        assert_eq!(off.factor(), 1.0);
    }
}
