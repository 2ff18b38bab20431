use candle_core::{Device, Tensor};

use super::*;
use crate::testing::{assert_close, dot, normal, refused, slope, tape_grads, values, var};
use crate::Exec;

const SHAPE: [usize; 5] = [3, 16, 2, 5, 3];

fn per_sample_values(list: &[f32]) -> Tensor {
    Tensor::new(list, &Device::Cpu).unwrap()
}

#[test]
fn mix_runs_from_latents_to_noise() {
    let (latents, noise) = (normal(1, &SHAPE), normal(2, &SHAPE));
    let sigma = per_sample_values(&[0.0, 1.0, 0.25]);
    let args = FlowMixArgs { latents: &latents, noise: &noise, sigma_b: &sigma };
    let got = values(&Exec::cpu().run::<FlowMix>(&args).unwrap());
    let sample = got.len() / 3;
    let (latents, noise) = (values(&latents), values(&noise));
    assert_eq!(got[..sample], latents[..sample]);
    assert_eq!(got[sample..2 * sample], noise[sample..2 * sample]);
    for at in 2 * sample..3 * sample {
        assert!((got[at] - (0.75 * latents[at] + 0.25 * noise[at])).abs() < 1e-6);
    }
}

#[test]
fn loss_is_the_weighted_mean_square_of_the_velocity_error() {
    let (pred, latents, noise) = (normal(1, &SHAPE), normal(2, &SHAPE), normal(3, &SHAPE));
    let weights = per_sample_values(&[1.0, 0.5, 2.0]);
    let square: Vec<f64> = values(&pred)
        .iter()
        .zip(values(&velocity(&latents, &noise).unwrap()))
        .map(|(&p, v)| (f64::from(p) - f64::from(v)).powi(2))
        .collect();
    for (weight_b, list) in [(None, [1.0, 1.0, 1.0]), (Some(&weights), [1.0, 0.5, 2.0])] {
        let args = FlowLossArgs { pred: &pred, latents: &latents, noise: &noise, weight_b };
        let got = Exec::cpu().run::<FlowLoss>(&args).unwrap();
        let sample = square.len() / 3;
        let want: Vec<f64> =
            square.chunks(sample).zip(list).map(|(s, w)| w * s.iter().sum::<f64>() / sample as f64).collect();
        for (got, want) in values(&got.loss_b).into_iter().zip(&want) {
            assert!((f64::from(got) / want - 1.0).abs() < 1e-6);
        }
        let loss = f64::from(got.read().unwrap().0);
        assert!((loss / (want.iter().sum::<f64>() / 3.0) - 1.0).abs() < 1e-6);
    }
}

#[test]
fn backward_equals_the_tape_and_finite_differences() {
    let (pred, latents, noise) = (normal(1, &SHAPE), normal(2, &SHAPE), normal(3, &SHAPE));
    let weights = per_sample_values(&[1.0, 0.5, 2.0]);
    for weight_b in [None, Some(&weights)] {
        let loss = |pred: &Tensor| {
            let args = FlowLossArgs { pred, latents: &latents, noise: &noise, weight_b };
            Exec::cpu().run::<FlowLoss>(&args).unwrap().loss_b.mean_all().unwrap()
        };
        let args = FlowLossBackwardArgs { pred: &pred, latents: &latents, noise: &noise, weight_b, dloss: 0.25 };
        let dpred = Exec::cpu().run::<FlowLossBackward>(&args).unwrap();
        let (pred_var, dloss) = (var(&pred), Tensor::new(0.25f32, &Device::Cpu).unwrap());
        assert_close(&dpred, &tape_grads(&loss(&pred_var), &dloss, &[&pred_var])[0], 1e-6);
        let u = normal(4, &SHAPE);
        let want = slope(loss, &pred, &u, &dloss);
        assert!((dot(&dpred, &u) - want).abs() < 1e-3 * want.abs().max(0.1), "{} {want}", dot(&dpred, &u));
    }
}

#[test]
fn the_gates_name_what_is_wrong() {
    let (latents, noise) = (normal(1, &[2, 3]), normal(2, &[3, 2]));
    let sigma = per_sample_values(&[0.5, 0.5, 0.5]);
    let mix = |noise: &Tensor, sigma_b: &Tensor| {
        refused(Exec::cpu().run::<FlowMix>(&FlowMixArgs { latents: &latents, noise, sigma_b }))
    };
    assert!(mix(&noise, &sigma).contains("flow_mix: noise has shape [3, 2]"));
    assert!(mix(&latents, &sigma).contains("sigma_b has shape [3]"));
    let args = FlowLossArgs { pred: &noise, latents: &latents, noise: &latents, weight_b: None };
    assert!(refused(Exec::cpu().run::<FlowLoss>(&args)).contains("latents has shape [2, 3]"));
    let args = FlowLossArgs { pred: &latents, latents: &latents, noise: &latents, weight_b: Some(&sigma) };
    assert!(refused(Exec::cpu().run::<FlowLoss>(&args)).contains("weight_b"));
}
