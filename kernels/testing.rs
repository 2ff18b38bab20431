//! What the ops' tests share: seeded tensors, comparison relative to the largest value, and two oracles for a backward:
//! candle's tape and finite differences.

use candle_core::{DType, Device, Tensor, Var};

use crate::philox::{stream, Philox};

/// Standard normals, a different set for each seed.
pub fn normal(seed: u64, shape: &[usize]) -> Tensor {
    Philox::new(seed, stream::INIT, 0, 0).normal(shape, &Device::Cpu).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest |got − want| over the largest |want|.
pub fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (values(got), values(want));
    let largest = |v: &mut dyn Iterator<Item = f32>| v.fold(0f32, |a, b| if b.is_nan() { b } else { a.max(b.abs()) });
    let error = largest(&mut got.iter().zip(&want).map(|(g, w)| g - w));
    f64::from(error) / f64::from(largest(&mut want.iter().copied())).max(1e-30)
}

#[track_caller]
pub fn assert_close(got: &Tensor, want: &Tensor, tolerance: f64) {
    let error = relative_error(got, want);
    assert!(error <= tolerance, "relative error {error:.2e} exceeds {tolerance:.0e}");
}

#[track_caller]
pub fn assert_bits(got: &Tensor, want: &Tensor) {
    assert_eq!((got.dims(), got.dtype()), (want.dims(), want.dtype()));
    let bits = |t: &Tensor| values(t).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(got), bits(want));
}

pub fn var(t: &Tensor) -> Var {
    Var::from_tensor(t).unwrap()
}

/// The tape's gradient of `Σ y∘dy` with respect to each of `vars`.
pub fn tape_grads(y: &Tensor, dy: &Tensor, vars: &[&Var]) -> Vec<Tensor> {
    let grads = (y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|v| grads.get(v).expect("y depends on every var").clone()).collect()
}

/// `Σ a∘b` in f64.
pub fn dot(a: &Tensor, b: &Tensor) -> f64 {
    values(a).iter().zip(values(b)).map(|(&a, b)| f64::from(a) * f64::from(b)).sum()
}

/// Central difference of `Σ f(x)∘dy` along `u`, to be compared with `Σ dx∘u`. With fp32 inside `f` about three digits
/// can be had.
pub fn slope(f: impl Fn(&Tensor) -> Tensor, x: &Tensor, u: &Tensor, dy: &Tensor) -> f64 {
    let h = 1e-2;
    let at = |h: f64| dot(&f(&(x + (u * h).unwrap()).unwrap()), dy);
    (at(h) - at(-h)) / (2.0 * h)
}

/// The message of the error that the gate must raise.
#[track_caller]
pub fn refused<T>(result: crate::Result<T>) -> String {
    match result {
        Ok(_) => panic!("bad arguments were accepted"),
        Err(error) => error.to_string(),
    }
}
