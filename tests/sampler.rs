//! The samplers against recorded runs, with the made-up models those were recorded with.

use crate::golden_support::golden_dir;
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::collections::HashMap;
use wan_train::sampler::{Sampler, Solver};

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) -> f32 {
    assert_eq!(got.len(), want.len(), "{what}");
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: {worst} > {tolerance}");
    worst
}

/// The recorded models: velocities as simple functions of sample and timestep.
struct Models {
    a: f64,
    b: f64,
    w1: Tensor,
    w2: Tensor,
}

impl Models {
    fn velocity(&self, model: &str, x: &Tensor, t: f64) -> Tensor {
        let v = match model {
            "linear" => ((x * self.a).unwrap() + (&self.w1 * (self.b * t / 1000.0)).unwrap()).unwrap() + &self.w2,
            "denoise" => (x - &self.w2).unwrap() / (t / 1000.0).max(0.02),
            "nonlinear" => {
                let mean = f64::from(values(&x.mean_all().unwrap())[0]);
                x.affine(self.a, self.b * t / 1000.0).unwrap().tanh().unwrap() + (&self.w1 * mean).unwrap()
            }
            other => panic!("the reference numbers use a model {other} that this test does not know"),
        };
        v.unwrap()
    }
}

fn recorded() -> Vec<(Value, HashMap<String, Tensor>)> {
    let mut names: Vec<_> = std::fs::read_dir(golden_dir())
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("12_") && p.extension().unwrap() == "json")
        .collect();
    names.sort();
    assert!(!names.is_empty());
    let load = |json: std::path::PathBuf| {
        let tensors = candle_core::safetensors::load(json.with_extension("safetensors"), &Device::Cpu).unwrap();
        (serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap(), tensors)
    };
    names.into_iter().map(load).collect()
}

#[test]
fn every_recorded_run_is_repeated() {
    for (json, tensors) in recorded() {
        let models = Models {
            a: json["a"].as_f64().unwrap(),
            b: json["b"].as_f64().unwrap(),
            w1: tensors["w1"].clone(),
            w2: tensors["w2"].clone(),
        };
        let mut worst = 0f32;
        for case in json["cases"].as_array().unwrap() {
            let text = |k: &str| case[k].as_str().unwrap();
            let (key, model) = (text("key"), text("model"));
            let solver = match text("solver") {
                "lightning_euler" => Solver::Euler,
                other => other.parse().unwrap(),
            };
            let steps = case["steps"].as_u64().unwrap() as usize;
            let mut sampler = Sampler::new(solver, steps, case["shift"].as_f64().unwrap()).unwrap();
            close(&format!("{key} sigmas"), sampler.sigmas(), &values(&tensors[&format!("{key}.sigmas")]), 1e-6);
            // One recorded implementation lists the end (0) too; whole timesteps must be exact.
            let want = values(&tensors[&format!("{key}.timesteps")]);
            let whole = case["timesteps_dtype"] == "torch.int64";
            close(&format!("{key} timesteps"), sampler.timesteps(), &want[..steps], if whole { 0.0 } else { 2e-4 });

            let mut x = tensors["noise"].clone();
            let mut all = vec![x.clone()];
            for (i, t) in sampler.timesteps().to_vec().into_iter().enumerate() {
                let v = models.velocity(model, &x, f64::from(t));
                x = sampler.step(&v, i, &x).unwrap();
                all.push(x.clone());
            }
            let end = &tensors[&format!("{key}.{model}.final")];
            worst = worst.max(close(&format!("{key} {model}"), &values(&x), &values(end), 2e-5));
            if let Some(want) = tensors.get(&format!("{key}.{model}.all")) {
                close(&format!("{key} {model} all"), &values(&Tensor::stack(&all, 0).unwrap()), &values(want), 2e-5);
            }
        }
        println!("worst final difference {worst:.2e}");
    }
}

#[test]
fn one_step_of_any_solver_lands_on_the_clean_sample() {
    let x = Tensor::new(&[1f32, -2.0, 0.5], &Device::Cpu).unwrap();
    let v = Tensor::new(&[0.5f32, 0.25, -1.0], &Device::Cpu).unwrap();
    for solver in [Solver::UniPc, Solver::DpmPp, Solver::Euler] {
        let mut sampler = Sampler::new(solver, 1, 5.0).unwrap();
        let sigma = f64::from(sampler.sigmas()[0]);
        let want = (&x - (&v * sigma).unwrap()).unwrap();
        close("clean", &values(&sampler.step(&v, 0, &x).unwrap()), &values(&want), 1e-6);
    }
}

#[test]
fn sixteen_bit_velocities_are_stepped_in_fp32() {
    let x = Tensor::new(&[1.0f32 + 1.0 / 256.0, 2.0], &Device::Cpu).unwrap();
    let v = Tensor::new(&[0.5f32, 1.0], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    let mut sampler = Sampler::new(Solver::Euler, 2, 1.0).unwrap();
    let y = sampler.step(&v, 0, &x).unwrap();
    assert_eq!(y.dtype(), DType::F32);
    assert_eq!(values(&y), [0.75 + 1.0 / 256.0, 1.5]);
}

#[test]
fn wrong_use_is_said() {
    let e = "dpm".parse::<Solver>().unwrap_err().to_string();
    assert!(e.contains("unipc, dpm++ and vanilla"), "{e}");
    assert!(Sampler::new(Solver::Euler, 0, 1.0).is_err());
    assert!(Sampler::new(Solver::Euler, 4, 0.0).is_err());
    assert!(Sampler::new(Solver::Euler, 4, f64::NAN).is_err());
    let x = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let mut sampler = Sampler::new(Solver::UniPc, 4, 1.0).unwrap();
    assert!(sampler.step(&x, 1, &x).unwrap_err().to_string().contains("step 0 of 4 is next"));
    let short = Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
    assert!(sampler.step(&short, 0, &x).is_err());
    sampler.step(&x, 0, &x).unwrap();
}
