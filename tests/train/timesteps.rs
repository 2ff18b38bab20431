//! Timestep sampling and loss weights against recorded draws, and the properties of the default modes.

use serde_json::Value;
use wan_train::train::quantile::normal_quantile;
use wan_train::train::timesteps::{shift, Draws, Sampling, Timestep, TimestepSpec, Weighting};

use crate::golden_support::golden_dir;

/// Recorded draws, handed out in order.
struct Recorded {
    uniforms: Vec<f32>,
    normals: Vec<f32>,
}

impl Draws for Recorded {
    fn uniform(&mut self, n: usize) -> Vec<f32> {
        self.uniforms.drain(..n).collect()
    }
    fn normal(&mut self, n: usize) -> Vec<f32> {
        self.normals.drain(..n).collect()
    }
}

/// Evenly spread draws in a scrambled order: quantiles, so that distributions can be compared without noise.
struct Grid {
    at: u64,
    n: u64,
}

impl Grid {
    fn new(n: u64) -> Self {
        Self { at: 0, n }
    }
    fn next(&mut self) -> f64 {
        let v = (self.at * 618_033 % self.n) as f64;
        self.at += 1;
        (v + 0.5) / self.n as f64
    }
}

impl Draws for Grid {
    fn uniform(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as f32).collect()
    }
    fn normal(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| normal_quantile(self.next()) as f32).collect()
    }
}

fn golden() -> Value {
    let text = std::fs::read_to_string(golden_dir().join("09_timestep_sampling.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn floats(v: &Value) -> Vec<f32> {
    v.as_array().map(|a| a.iter().map(|v| v.as_f64().unwrap() as f32).collect()).unwrap_or_default()
}

fn spec_of(args: &Value) -> TimestepSpec {
    let number = |key: &str, default: f64| args[key].as_f64().unwrap_or(default);
    TimestepSpec {
        sampling: args["timestep_sampling"].as_str().unwrap().parse().unwrap(),
        flow_shift: number("discrete_flow_shift", 1.0),
        sigmoid_scale: number("sigmoid_scale", 1.0),
        weighting: args["weighting_scheme"].as_str().unwrap().parse().unwrap(),
        logit_mean: number("logit_mean", 0.0),
        logit_std: number("logit_std", 1.0),
        mode_scale: number("mode_scale", 1.29),
        min: number("min_timestep", 0.0),
        max: number("max_timestep", 1000.0),
        preserve_shape: args["preserve_distribution_shape"].as_bool().unwrap(),
        buckets: 0,
        compat: true,
    }
}

#[test]
fn recorded_draws_give_the_recorded_timesteps() {
    let (mut worst_t, mut worst_sigma) = (0f32, 0f32);
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    for case in cases {
        let spec = spec_of(&case["args"]);
        spec.check().unwrap();
        let mut draws = Recorded { uniforms: floats(&case["uniforms"]), normals: floats(&case["normals"]) };
        let strata = floats(&case["bucketed_t"]);
        let hw = (case["latent_hw"][0].as_u64().unwrap() as usize, case["latent_hw"][1].as_u64().unwrap() as usize);
        let batch = case["batch"].as_u64().unwrap() as usize;
        let got = spec.sample(&mut draws, hw, (!strata.is_empty()).then_some(&strata[..]), batch);
        assert!(draws.uniforms.is_empty() && draws.normals.is_empty(), "draws left over: {}", case["args"]);
        let (t, sigma) = (floats(&case["timesteps"]), floats(&case["sigma_applied"]));
        assert_eq!(got.len(), t.len());
        for (i, Timestep { t: got_t, sigma: got_sigma }) in got.into_iter().enumerate() {
            worst_t = worst_t.max((got_t - t[i]).abs());
            worst_sigma = worst_sigma.max((got_sigma - sigma[i]).abs());
            assert!((got_t - t[i]).abs() < 1e-3, "{} item {i}: {got_t} against {}", case["args"], t[i]);
            assert!((got_sigma - sigma[i]).abs() < 1e-6, "{} item {i}: {got_sigma}", case["args"]);
        }
    }
    assert_eq!(cases.len(), 46);
    println!("worst difference: t {worst_t:e}, sigma {worst_sigma:e}");
}

#[test]
fn recorded_loss_weights_are_reproduced() {
    let mut checked = 0;
    for case in golden()["loss_weighting"].as_array().unwrap() {
        let weighting: Weighting = case["scheme"].as_str().unwrap().parse().unwrap();
        let spec = TimestepSpec { weighting, compat: true, ..Default::default() };
        let at: Vec<Timestep> =
            floats(&case["timesteps"]).into_iter().map(|t| Timestep { t, sigma: f32::NAN }).collect();
        let want = floats(&case["weighting"]);
        let got = spec.loss_weights(&at);
        assert_eq!(got.is_none(), case["weighting"].is_null(), "{}", case["scheme"]);
        for (got, want) in got.unwrap_or_default().into_iter().zip(want) {
            assert!((got / want - 1.0).abs() < 1e-5, "{}: {got} against {want}", case["scheme"]);
            checked += 1;
        }
    }
    assert!(checked >= 48);
}

#[test]
fn the_default_tells_the_model_a_thousand_sigma_and_compat_adds_one() {
    for (name, sampling) in Sampling::ALL.iter().filter(|(name, _)| *name != "sigma") {
        let ours = TimestepSpec { sampling: *sampling, ..Default::default() };
        let old = TimestepSpec { compat: true, ..ours.clone() };
        let a = ours.sample(&mut Grid::new(64), (60, 104), None, 64);
        let b = old.sample(&mut Grid::new(64), (60, 104), None, 64);
        for (a, b) in a.iter().zip(&b) {
            assert_eq!(a.sigma, b.sigma, "{name}");
            assert_eq!(a.t, a.sigma * 1000.0, "{name}");
            assert!((b.t - a.t - 1.0).abs() < 1e-3, "{name}");
        }
    }
}

#[test]
fn limits_hold_in_every_mode() {
    for (name, sampling) in Sampling::ALL {
        for preserve_shape in [false, true] {
            for stratified in [false, true] {
                let spec = TimestepSpec {
                    sampling,
                    flow_shift: 5.0,
                    min: 300.0,
                    max: 700.0,
                    preserve_shape,
                    ..spec_default()
                };
                let strata: Vec<f32> = (0..500).map(|i| i as f32 / 500.0).collect();
                let strata = stratified.then_some(&strata[..]);
                for at in spec.sample(&mut Grid::new(9973), (60, 104), strata, 500) {
                    assert!((0.3..=0.7).contains(&at.sigma), "{name} preserve {preserve_shape}: {at:?}");
                }
            }
        }
    }
}

fn spec_default() -> TimestepSpec {
    TimestepSpec::default()
}

#[test]
fn sigma_mode_honours_shift_and_limits_unlike_the_old_one() {
    let high = TimestepSpec { min: 900.0, ..Default::default() };
    assert!(high.sample(&mut Grid::new(101), (8, 8), None, 101).iter().all(|s| s.t >= 900.0));
    let old = TimestepSpec { compat: true, ..high };
    assert!(old.sample(&mut Grid::new(101), (8, 8), None, 101).iter().all(|s| s.t <= 100.0));

    let mean = |spec: &TimestepSpec| {
        spec.sample(&mut Grid::new(1009), (8, 8), None, 1009).iter().map(|s| s.sigma as f64).sum::<f64>() / 1009.0
    };
    let flat = TimestepSpec::default();
    let shifted = TimestepSpec { flow_shift: 3.0, ..Default::default() };
    // The mean of the shifted uniform distribution: by (by - 1 - ln by) / (by - 1)^2.
    let want = 3.0 * (2.0 - 3f64.ln()) / 4.0;
    assert!((mean(&flat) - 0.5).abs() < 1e-3);
    assert!((mean(&shifted) - want).abs() < 1e-3, "{} against {want}", mean(&shifted));
    let old_shifted = TimestepSpec { compat: true, ..shifted };
    assert!((mean(&old_shifted) - 0.5).abs() < 1e-3);
}

#[test]
fn preserving_the_shape_is_rejection_and_strata_keep_it() {
    let spec = TimestepSpec {
        sampling: Sampling::Shift,
        flow_shift: 3.0,
        min: 875.0,
        preserve_shape: true,
        ..Default::default()
    };
    let n = 4001;
    let quantiles = |mut v: Vec<f32>| {
        v.sort_by(f32::total_cmp);
        [0.1, 0.5, 0.9].map(|q| v[(q * (n - 1) as f64) as usize])
    };
    let sigmas = |s: Vec<Timestep>| s.into_iter().map(|s| s.sigma).collect::<Vec<_>>();
    let rejected = quantiles(sigmas(spec.sample(&mut Grid::new(100_003), (60, 104), None, n)));
    let strata: Vec<f32> = (0..n).map(|i| (i as f32 + 0.5) / n as f32).collect();
    let stratified = quantiles(sigmas(spec.sample(&mut Grid::new(7), (60, 104), Some(&strata), n)));
    for (a, b) in rejected.iter().zip(stratified) {
        assert!((a - b).abs() < 2e-3, "{rejected:?} against {stratified:?}");
    }
    // Squeezing gives another distribution: its median is that of the full one, compressed.
    let squeezed = TimestepSpec { preserve_shape: false, ..spec };
    let squeezed = quantiles(sigmas(squeezed.sample(&mut Grid::new(100_003), (60, 104), None, n)));
    assert!((squeezed[1] - (0.875 + 0.125 * shift(0.5, 3.0))).abs() < 2e-3);
    assert!((squeezed[1] - rejected[1]).abs() > 0.01);
}

#[test]
fn an_unreachable_range_is_squeezed_not_left_unbounded() {
    let spec = TimestepSpec {
        sampling: Sampling::LogSnr,
        logit_mean: 20.0,
        logit_std: 0.1,
        min: 900.0,
        preserve_shape: true,
        ..Default::default()
    };
    let got = spec.sample(&mut Grid::new(97), (8, 8), None, 3);
    assert!(got.iter().all(|s| s.t >= 900.0), "{got:?}");
    let old = TimestepSpec { compat: true, ..spec };
    assert!(old.sample(&mut Grid::new(97), (8, 8), None, 3).iter().all(|s| s.t < 900.0));
}

#[test]
fn wrong_settings_are_refused() {
    assert!("shfit".parse::<Sampling>().unwrap_err().to_string().contains("did you mean `shift`"));
    assert!("x".parse::<Weighting>().unwrap_err().to_string().contains("cosmap"));
    for (min, max) in [(900.0, 900.0), (-1.0, 10.0), (0.0, 1001.0), (500.0, 100.0)] {
        assert!(TimestepSpec { min, max, ..Default::default() }.check().is_err());
    }
    assert!(TimestepSpec { flow_shift: 0.0, ..Default::default() }.check().is_err());
}
