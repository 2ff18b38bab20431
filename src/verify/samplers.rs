//! Samplers: noise levels, timesteps and every sample, with models that are formulas.

use anyhow::{bail, Result};
use candle_core::{DType, Tensor};

use super::golden::Tensors;
use super::json::{integer, list, number, text};
use super::{Case, Tolerance};
use crate::sampler::{Sampler, Solver};

pub fn run(case: &Case<'_>) -> Result<()> {
    let io = case.tensors("")?;
    for entry in list(&case.json, "cases")? {
        let (recorded, model) = (text(entry, "solver")?, text(entry, "model")?);
        let (steps, shift) = (integer(entry, "steps")?, number(entry, "shift")?);
        case.check(&format!("{recorded} {steps} steps shift {shift} {model}"), Tolerance::Rel(1e-5), |line| {
            let (solver, stem): (Solver, String) = match recorded {
                // The distilled models' own Euler is the same thing.
                "lightning_euler" => (Solver::Euler, text(entry, "key")?.to_string()),
                other => (other.parse()?, text(entry, "key")?.replace("dpm++", "dpmpp")),
            };
            let mut sampler = Sampler::new(solver, steps, shift)?;
            let as_f64 = |v: &[f32]| v.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            if let Some(sigmas) = io.find(&format!("{stem}.sigmas")) {
                line.values("noise levels", &as_f64(sampler.sigmas()), &super::line::numbers(sigmas)?);
            }
            let mut want = super::line::numbers(io.get(&format!("{stem}.timesteps"))?)?;
            if want.len() == steps + 1 && want[steps] == 0.0 {
                // Some record the end as well, at which no model is asked.
                want.pop();
            }
            line.values("timesteps", &as_f64(sampler.timesteps()), &want);

            let mut x = io.f32("noise", case.exec.device())?;
            let mut all = vec![x.clone()];
            for (i, t) in sampler.timesteps().to_vec().into_iter().enumerate() {
                let v = velocity(case, &io, model, &x, f64::from(t))?;
                x = sampler.step(&v, i, &x)?;
                all.push(x.clone());
            }
            let name = |what: &str| format!("{stem}.{model}.{what}");
            if let Some(want) = io.f32_if_any(&name("all"), case.exec.device())? {
                line.tensor("every sample", &Tensor::stack(&all, 0)?, &want)?;
            }
            line.tensor("the final sample", &x, &io.f32(&name("final"), case.exec.device())?)
        });
    }
    Ok(())
}

/// The model's answer by its formula.
fn velocity(case: &Case<'_>, io: &Tensors, model: &str, x: &Tensor, t: f64) -> Result<Tensor> {
    let (a, b) = (number(&case.json, "a")?, number(&case.json, "b")?);
    let (w1, w2) = (io.f32("w1", x.device())?, io.f32("w2", x.device())?);
    let t = t / 1000.0;
    Ok(match model {
        "linear" => ((x * a)? + ((w1 * (b * t))? + w2)?)?,
        "denoise" => ((x - w2)? / t.max(0.02))?,
        "nonlinear" => {
            let mean = f64::from(x.mean_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?);
            (x.affine(a, b * t)?.tanh()? + (w1 * mean)?)?
        }
        other => bail!("no formula is called {other}"),
    })
}
