//! Which of the two experts of Wan 2.2 a timestep belongs to.

use crate::error::UserError;

/// The halves of a pair of models that share the denoising.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Expert {
    High,
    Low,
}

impl Expert {
    /// The expert that works at timestep `t` (0..=1000): the high-noise one from the boundary (0..1) on.
    pub fn at(t: f64, boundary: f64) -> Self {
        match t / 1000.0 >= boundary {
            true => Expert::High,
            false => Expert::Low,
        }
    }

    /// The timesteps (0..=1000) that this expert sees at inference.
    pub fn range(self, boundary: f64) -> (f64, f64) {
        match self {
            Expert::High => (boundary * 1000.0, 1000.0),
            Expert::Low => (0.0, boundary * 1000.0),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Expert::High => "high",
            Expert::Low => "low",
        }
    }
}

impl std::str::FromStr for Expert {
    type Err = UserError;

    fn from_str(text: &str) -> Result<Self, UserError> {
        match text {
            "high" => Ok(Expert::High),
            "low" => Ok(Expert::Low),
            _ => Err(UserError::usage(format!("--noise_level {text} is neither high nor low"))),
        }
    }
}

/// What to tell the user about timestep limits that leave the expert's own range, if anything.
pub fn range_note(expert: Expert, boundary: f64, min: f64, max: f64) -> Option<String> {
    let (lo, hi) = expert.range(boundary);
    (min < lo - 0.5 || max > hi + 0.5).then(|| {
        format!(
            "timesteps {min}..{max} are trained, but the {}-noise expert works at {lo}..{hi} only (boundary {boundary})",
            expert.name()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boundary_itself_belongs_to_the_high_expert() {
        assert_eq!(Expert::at(875.0, 0.875), Expert::High);
        assert_eq!(Expert::at(874.9, 0.875), Expert::Low);
        assert_eq!(Expert::at(1000.0, 0.9), Expert::High);
        assert_eq!(Expert::at(0.0, 0.9), Expert::Low);
    }

    #[test]
    fn limits_outside_the_experts_range_are_reported() {
        assert_eq!(range_note(Expert::High, 0.9, 900.0, 1000.0), None);
        assert_eq!(range_note(Expert::Low, 0.9, 0.0, 900.0), None);
        assert!(range_note(Expert::High, 0.9, 0.0, 1000.0).unwrap().contains("900..1000"));
    }
}
