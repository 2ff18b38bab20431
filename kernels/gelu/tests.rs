use candle_core::{DType, Device, Tensor};

use super::*;
use crate::testing::{assert_close, normal, refused, tape_grads, values, var};
use crate::Exec;

/// −8 to 8, and odd in number.
fn ramp() -> Tensor {
    Tensor::from_vec((-400..=400).map(|i| i as f32 / 50.0).collect::<Vec<_>>(), (9, 89), &Device::Cpu).unwrap()
}

fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + (SQRT_2_OVER_PI * (x + CUBE * x * x * x)).tanh())
}

#[track_caller]
fn assert_function(got: &Tensor, x: &Tensor, f: impl Fn(f64) -> f64) {
    for (got, x) in values(got).into_iter().zip(values(x)) {
        let want = f(f64::from(x));
        assert!((f64::from(got) - want).abs() < 2e-6 * want.abs().max(1.0), "at {x}: {got} for {want}");
    }
}

#[test]
fn values_match_the_formulas_in_f64() {
    let x = ramp();
    let args = ActivationArgs { x: &x };
    let exec = Exec::cpu();
    assert_function(&exec.run::<GeluTanh>(&args).unwrap(), &x, gelu_tanh);
    assert_function(&exec.run::<Silu>(&args).unwrap(), &x, |x| x / (1.0 + (-x).exp()));
    // x·Φ(x), with Φ of the standard normal table.
    let x = Tensor::new(&[0f32, 1.0, -1.0, 2.0, -3.0], &Device::Cpu).unwrap();
    let want = Tensor::new(&[0f32, 0.841_344_8, -0.158_655_25, 1.954_499_7, -0.004_049_694], &Device::Cpu).unwrap();
    assert_close(&exec.run::<GeluErf>(&ActivationArgs { x: &x }).unwrap(), &want, 1e-6);
}

#[test]
fn backward_is_the_derivative() {
    let x = ramp();
    let dy = Tensor::ones(x.dims(), DType::F32, &Device::Cpu).unwrap();
    let got = Exec::cpu().run::<GeluTanhBackward>(&GeluTanhBackwardArgs { x: &x, dy: &dy }).unwrap();
    let h = 1e-5;
    assert_function(&got, &x, |x| (gelu_tanh(x + h) - gelu_tanh(x - h)) / (2.0 * h));
}

#[test]
fn far_from_zero_it_is_the_identity_or_nothing() {
    let x = Tensor::new(&[-1e30f32, -200.0, -30.0, 30.0, 200.0, 1e18], &Device::Cpu).unwrap();
    let exec = Exec::cpu();
    let y = exec.run::<GeluTanh>(&ActivationArgs { x: &x }).unwrap();
    assert_eq!(values(&y), [0.0, 0.0, 0.0, 30.0, 200.0, 1e18]);
    let dy = x.ones_like().unwrap();
    let dx = exec.run::<GeluTanhBackward>(&GeluTanhBackwardArgs { x: &x, dy: &dy }).unwrap();
    assert_eq!(values(&dx)[1..5], [0.0, 0.0, 1.0, 1.0]);
}

#[test]
fn backward_equals_the_tape() {
    let (x, dy) = (normal(1, &[97, 9]), normal(2, &[97, 9]));
    let x_var = var(&x);
    let y = GeluTanh::reference(&ActivationArgs { x: &x_var }, DType::F32).unwrap();
    let want = &tape_grads(&y, &dy, &[&x_var])[0];
    let got = Exec::cpu().run::<GeluTanhBackward>(&GeluTanhBackwardArgs { x: &x, dy: &dy }).unwrap();
    assert_close(&got, want, 1e-6);
}

#[test]
fn dtypes_are_kept_and_shapes_checked() {
    let x = normal(1, &[3, 5]).to_dtype(DType::BF16).unwrap();
    let args = ActivationArgs { x: &x };
    assert_eq!(GeluTanh::reference(&args, DType::BF16).unwrap().dtype(), DType::BF16);
    assert_eq!(GeluErf::reference(&args, DType::F32).unwrap().dtype(), DType::BF16);
    let dy = normal(2, &[3, 5]);
    let dx = GeluTanhBackward::reference(&GeluTanhBackwardArgs { x: &x, dy: &dy }, DType::F32).unwrap();
    assert_eq!(dx.dtype(), DType::F32);
    let message =
        refused(Exec::cpu().run::<GeluTanhBackward>(&GeluTanhBackwardArgs { x: &x, dy: &normal(2, &[5, 3]) }));
    assert!(message.contains("gelu_tanh_backward: dy has shape [5, 3]"), "{message}");
    let codes = Tensor::zeros(4, DType::U8, &Device::Cpu).unwrap();
    assert!(refused(Exec::cpu().run::<Silu>(&ActivationArgs { x: &codes })).contains("x is U8"));
}
