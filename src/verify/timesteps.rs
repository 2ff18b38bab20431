//! Noise levels from recorded draws, and loss weights, as the old tool computes them.

use anyhow::{bail, Result};
use serde_json::Value;

use wan_kernels::philox::Philox;

use super::json::{flag, integer, list, number, numbers, text};
use super::{Case, Tolerance};
use crate::train::timesteps::{Draws, Timestep, TimestepSpec, Weighting};

/// Recorded draws, handed out in order; too few of them read as NaN.
struct Recorded {
    uniforms: Vec<f32>,
    normals: Vec<f32>,
}

fn take(from: &mut Vec<f32>, n: usize) -> Vec<f32> {
    let mut taken: Vec<f32> = from.drain(..n.min(from.len())).collect();
    taken.resize(n, f32::NAN);
    taken
}

impl Draws for Recorded {
    fn uniform(&mut self, n: usize) -> Vec<f32> {
        take(&mut self.uniforms, n)
    }
    fn normal(&mut self, n: usize) -> Vec<f32> {
        take(&mut self.normals, n)
    }
}

pub fn run(case: &Case<'_>) -> Result<()> {
    let cases = list(&case.json, "cases")?;
    let mut by_mode: Vec<(&str, Vec<&Value>)> = Vec::new();
    for entry in cases {
        let mode = text(&entry["args"], "timestep_sampling")?;
        match by_mode.iter_mut().find(|(known, _)| *known == mode) {
            Some((_, entries)) => entries.push(entry),
            None => by_mode.push((mode, vec![entry])),
        }
    }
    for (mode, entries) in by_mode {
        // Timesteps are fp32 numbers up to 1001: their last place is 6e-5.
        case.check(&format!("{mode} ({} cases)", entries.len()), Tolerance::Abs(1e-3), |line| {
            for entry in entries {
                let [t, sigma] = sample(entry)?;
                line.values(&format!("timesteps of {}", entry["args"]), &t, &numbers(entry, "timesteps")?);
                // Compared in the timesteps' unit, so that one tolerance serves both.
                let thousand = |v: Vec<f64>| v.into_iter().map(|s| 1000.0 * s).collect::<Vec<_>>();
                let want = thousand(numbers(entry, "sigma_applied")?);
                line.values(&format!("noise of {}", entry["args"]), &thousand(sigma), &want);
            }
            Ok(())
        });
    }
    if let Some(weights) = case.json["loss_weighting"].as_array() {
        case.check(&format!("loss weights ({} cases)", weights.len()), Tolerance::Rel(1e-5), |line| {
            weights.iter().try_for_each(|entry| {
                let weighting: Weighting = text(entry, "scheme")?.parse()?;
                let spec = TimestepSpec { weighting, compat: true, ..TimestepSpec::default() };
                let at: Vec<Timestep> = numbers(entry, "timesteps")?
                    .into_iter()
                    .map(|t| Timestep { t: t as f32, sigma: f32::NAN })
                    .collect();
                let got = spec.loss_weights(&at);
                line.equal("absence of weights", &got.is_none(), &entry["weighting"].is_null());
                let got: Vec<f64> = got.unwrap_or_default().into_iter().map(f64::from).collect();
                for (got, want) in got.iter().zip(numbers(entry, "weighting")?) {
                    line.error(text(entry, "scheme")?, (got - want).abs(), (got / want - 1.0).abs());
                }
                Ok(())
            })
        });
    }
    if let Some(pools) = case.json["bucket_pool"].as_array() {
        // Which value falls where is up to the generator; that every run of n values hits each of n strata once is not.
        case.check("strata", Tolerance::Exact, |line| {
            for pool in pools {
                let n = integer(pool, "num_timestep_buckets")?;
                let mut draws = Philox::new(7, 1, 2, 3).draws();
                let ours: Vec<f64> = crate::train::order::stratified(n, &mut draws).take(n).map(f64::from).collect();
                for values in [numbers(pool, "values")?, ours] {
                    for run in values.chunks_exact(n) {
                        let mut hit: Vec<usize> = run.iter().map(|v| (v * n as f64) as usize).collect();
                        hit.sort_unstable();
                        line.equal("the strata of one run", &hit, &(0..n).collect());
                    }
                }
            }
            Ok(())
        });
    }
    Ok(())
}

/// Timesteps and noise levels of one recorded batch.
fn sample(entry: &Value) -> Result<[Vec<f64>; 2]> {
    let args = &entry["args"];
    let or = |key: &str, default: f64| args[key].as_f64().unwrap_or(default);
    let spec = TimestepSpec {
        sampling: text(args, "timestep_sampling")?.parse()?,
        flow_shift: number(args, "discrete_flow_shift")?,
        sigmoid_scale: number(args, "sigmoid_scale")?,
        weighting: text(args, "weighting_scheme")?.parse()?,
        logit_mean: number(args, "logit_mean")?,
        logit_std: number(args, "logit_std")?,
        mode_scale: number(args, "mode_scale")?,
        min: or("min_timestep", 0.0),
        max: or("max_timestep", 1000.0),
        preserve_shape: flag(args, "preserve_distribution_shape")?,
        buckets: 0,
        compat: true,
    };
    spec.check()?;
    let floats = |key: &str| -> Result<Vec<f32>> { Ok(numbers(entry, key)?.into_iter().map(|v| v as f32).collect()) };
    let mut draws = Recorded { uniforms: floats("uniforms")?, normals: floats("normals")? };
    let strata = floats("bucketed_t")?;
    let hw = &numbers(entry, "latent_hw")?[..];
    let [h, w] = hw else { bail!("latent_hw is not a pair") };
    let strata = (!strata.is_empty()).then_some(&strata[..]);
    let got = spec.sample(&mut draws, (*h as usize, *w as usize), strata, integer(entry, "batch")?);
    if !(draws.uniforms.is_empty() && draws.normals.is_empty()) {
        bail!("{} draws were left over", draws.uniforms.len() + draws.normals.len());
    }
    let column = |f: fn(&Timestep) -> f32| got.iter().map(|s| f64::from(f(s))).collect();
    Ok([column(|s| s.t), column(|s| s.sigma)])
}
