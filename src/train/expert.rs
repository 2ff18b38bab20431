//! Which of the two experts of Wan 2.2 a timestep belongs to, and the timesteps of a batch that one of them computes.

use super::timesteps::{Draws, Sampling, Timestep, TimestepSpec};
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

/// What to tell the user about limits that leave one of two experts nothing to do.
pub fn idle_note(boundary: f64, spec: &TimestepSpec) -> Option<String> {
    // The limits of the old `sigma` mode mean the other end.
    let (min, max) = match spec.compat && spec.sampling == Sampling::Sigma {
        true => (1000.0 - spec.max, 1000.0 - spec.min),
        false => (spec.min, spec.max),
    };
    let [first, last] = [min, max].map(|t| Expert::at(t, boundary));
    (first == last).then(|| {
        format!(
            "timesteps {min}..{max} are trained, which only the {}-noise expert sees (boundary {boundary}): the other one is loaded in vain",
            first.name()
        )
    })
}

/// What decides the timestep of one sample of a batch.
pub struct Chance<D> {
    /// The sample's own random numbers.
    pub draws: D,
    /// Its first draw, where the epoch's draws are stratified.
    pub stratum: Option<f32>,
}

/// Timesteps of a batch whose samples are all computed by one expert, and by which: the first sample's draw decides, and
/// the others fall on its side of the boundary (0..1). Every sample keeps the draw it would have alone if that lies on
/// the right side; if not, it gets a new one from that part of the distribution, from its own numbers. So a timestep is
/// distributed as without the boundary, whatever the batch size, and depends on nothing but the batch's own samples.
pub fn draw_batch<D: Draws>(
    spec: &TimestepSpec,
    boundary: f64,
    latent_hw: (usize, usize),
    samples: &mut [Chance<D>],
) -> (Vec<Timestep>, Expert) {
    if spec.compat {
        return draw_like_musubi(spec, boundary, latent_hw, samples);
    }
    let mut drawn: Vec<Timestep> = samples.iter_mut().map(|s| one(spec, latent_hw, s, true)).collect();
    let expert = drawn.first().map_or(Expert::Low, |first| Expert::at(first.t.into(), boundary));
    let range = shares(expert, boundary);
    for (sample, at) in samples.iter_mut().zip(&mut drawn) {
        if Expert::at(at.t.into(), boundary) != expert {
            *at = spec.sample_between(&mut sample.draws, latent_hw, range);
        }
    }
    (drawn, expert)
}

/// The old tool's rule: the first sample's draw decides and is thrown away; every sample is drawn until it falls on that
/// side; if one does not in a hundred draws, the whole batch is drawn anew without the condition. Draws beyond a sample's
/// first one are not stratified.
fn draw_like_musubi<D: Draws>(
    spec: &TimestepSpec,
    boundary: f64,
    latent_hw: (usize, usize),
    samples: &mut [Chance<D>],
) -> (Vec<Timestep>, Expert) {
    const TRIES: usize = 100;
    let Some(first) = samples.first_mut() else { return (Vec::new(), Expert::Low) };
    let expert = Expert::at(one(spec, latent_hw, first, true).t.into(), boundary);
    let on_side = samples.iter_mut().enumerate().map(|(i, sample)| {
        let mut tries = (0..TRIES).map(|n| one(spec, latent_hw, sample, n == 0 && i > 0));
        tries.find(|at| Expert::at(at.t.into(), boundary) == expert)
    });
    let drawn: Option<Vec<Timestep>> = on_side.collect();
    let drawn = drawn.unwrap_or_else(|| samples.iter_mut().map(|s| one(spec, latent_hw, s, false)).collect());
    (drawn, expert)
}

/// One draw of a sample; by its stratum, if it has one and `first`.
fn one<D: Draws>(spec: &TimestepSpec, latent_hw: (usize, usize), sample: &mut Chance<D>, first: bool) -> Timestep {
    let stratum = sample.stratum.as_ref().filter(|_| first).map(std::slice::from_ref);
    spec.sample(&mut sample.draws, latent_hw, stratum, 1)[0]
}

/// The shares of noise that are an expert's, ends included: those whose timestep, as the model is told it, is.
fn shares(expert: Expert, boundary: f64) -> (f32, f32) {
    let of = |s: f32| Expert::at(f64::from(s * 1000.0), boundary);
    // Rounding can put the edge a step or two beside the boundary.
    let mut edge = boundary as f32;
    while of(edge) == Expert::Low {
        edge = edge.next_up();
    }
    while edge > 0.0 && of(edge.next_down()) == Expert::High {
        edge = edge.next_down();
    }
    match expert {
        Expert::High => (edge, edge.max(1.0)),
        Expert::Low => (0.0, edge.next_down().max(0.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_the_experts_meet_at_the_boundary() {
        for boundary in [0.0, 0.1, 1.0 / 3.0, 0.417, 0.5, 0.875, 0.9, 0.95, 0.999, 1.0] {
            let (low, high) = (shares(Expert::Low, boundary), shares(Expert::High, boundary));
            assert_eq!((low.0, high.1), (0.0, 1.0), "{boundary}");
            assert!(boundary == 0.0 || low.1.next_up() == high.0, "{boundary}: {low:?} {high:?}");
            let at = |s: f32| Expert::at(f64::from(s * 1000.0), boundary);
            assert_eq!(at(high.0), Expert::High, "{boundary}");
            assert!(boundary == 0.0 || at(low.1) == Expert::Low, "{boundary}");
            assert!((f64::from(high.0) - boundary).abs() < 1e-6, "{boundary}");
        }
    }

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
