use candle_core::{DType, Device, Tensor};

use super::*;
use crate::fp8;
use crate::linear::{Linear, LinearArgs, LinearBackward, LinearBackwardArgs};
use crate::testing::{assert_close, dot, normal, refused, relative_error, values};
use crate::Exec;

/// |got − want| over |want|, in the L2 norm.
fn l2_error(got: &Tensor, want: &Tensor) -> f64 {
    let difference = (got - want).unwrap();
    (dot(&difference, &difference) / dot(want, want)).sqrt()
}

fn cpu(values: Vec<f32>, shape: (usize, usize)) -> Tensor {
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn forward(x: &Tensor, weight: &Weight, bias_o: Option<&Tensor>) -> Tensor {
    Exec::cpu()
        .run::<LinearInt8>(&LinearInt8Args { x, rounded: None, weight, bias_o, base: None, out: DType::F32 })
        .unwrap()
}

fn backward(dy: &Tensor, weight: &Weight) -> Tensor {
    Exec::cpu().run::<LinearInt8Backward>(&LinearInt8BackwardArgs { dy, weight, base: None, out: DType::F32 }).unwrap()
}

/// The products in full.
fn exact(x: &Tensor, dy: &Tensor, weight_oi: &Tensor) -> [Tensor; 2] {
    let out = DType::F32;
    let y = Exec::cpu().run::<Linear>(&LinearArgs { x, weight_oi, bias_o: None, base: None, out }).unwrap();
    [y, Exec::cpu().run::<LinearBackward>(&LinearBackwardArgs { dy, weight_oi, base: None, out }).unwrap()]
}

#[test]
fn the_rotation_is_orthonormal_and_its_own_inverse() {
    // Row by row and across rows it is the same matrix.
    let mut unit = vec![0f32; 64 * 64];
    (0..64).for_each(|i| unit[i * 65] = 1.0);
    let (mut rows, mut columns) = (unit.clone(), unit.clone());
    rows.chunks_mut(64).for_each(rotate_row);
    rotate_columns(&mut columns, 64);
    assert_eq!(rows, columns);
    assert!(rows.iter().all(|v| v.abs() == 0.125));
    rows.chunks_mut(64).for_each(rotate_row);
    assert_eq!(rows, unit);
    let mut twice = values(&normal(1, &[3, 192]));
    let before = twice.clone();
    twice.chunks_mut(192).for_each(|row| {
        let size = |row: &[f32]| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let was = size(row);
        rotate_row(row);
        assert!((size(row) / was - 1.0).abs() < 1e-5);
        rotate_row(row);
    });
    assert!(twice.iter().zip(&before).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn codes_stand_for_the_weight() {
    for (o, i) in [(64, 64), (128, 320), (320, 128)] {
        // Rows of very different sizes keep their own precision.
        let sizes = cpu((0..o).map(|row| 10f32.powi(row as i32 % 7 - 3)).collect(), (o, 1));
        let weight_oi = normal(2, &[o, i]).broadcast_mul(&sizes).unwrap();
        let weight = Weight::quantize(&weight_oi).unwrap();
        assert_eq!((weight.shape(), weight.bytes()), ([o, i], (o * i + 8 * o) as f64));
        let back = weight.dequantize().unwrap();
        for row in 0..o {
            let error = l2_error(&back.get(row).unwrap(), &weight_oi.get(row).unwrap());
            assert!(error > 1e-4 && error < 0.02, "row {row}: {error}");
        }
        let codes = weight.codes_oi().to_vec2::<u8>().unwrap();
        assert!(codes.iter().flatten().all(|code| *code as i8 != -128));
        assert!(codes.iter().all(|row| row.iter().any(|code| (*code as i8).abs() == 127)));
    }
}

#[test]
fn products_stay_near_those_in_full_and_match_the_codes() {
    for (l, i, o) in [(97, 128, 64), (1, 64, 192), (5, 320, 128)] {
        let weight_oi = (normal(2, &[o, i]) * 0.02).unwrap();
        let weight = Weight::quantize(&weight_oi).unwrap();
        let (x, dy, bias) = (normal(1, &[l, i]), normal(4, &[l, o]), normal(3, &[o]));
        let [y, dx] = exact(&x, &dy, &weight_oi);
        let got = forward(&x, &weight, Some(&bias)).broadcast_sub(&bias).unwrap();
        for error in [l2_error(&got, &y), l2_error(&backward(&dy, &weight), &dx)] {
            assert!(error > 1e-4 && error < 0.02, "{error}");
        }
        // Against the weight that the codes stand for only activations are rounded.
        let [y, dx] = exact(&x, &dy, &weight.dequantize().unwrap());
        for error in [l2_error(&got, &y), l2_error(&backward(&dy, &weight), &dx)] {
            assert!(error > 1e-4 && error < 0.012, "{error}");
        }
    }
}

#[test]
fn outlying_channels_cost_less_than_without_the_rotation() {
    let (l, i, o) = (33, 256, 128);
    // A few channels of the input and of the gradient are fifty times the others.
    let outlying = |seed, columns: usize| {
        let factors = (0..columns).map(|c| if c % 61 == 7 { 50.0 } else { 1.0 }).collect();
        normal(seed, &[l, columns]).broadcast_mul(&cpu(factors, (1, columns))).unwrap()
    };
    let (x, dy, weight_oi) = (outlying(1, i), outlying(4, o), normal(2, &[o, i]));
    // What matters of a product is seldom in the outlying channels: their weights are small.
    let damped = |t: &Tensor, columns: usize| {
        let factors = (0..columns).map(|c| if c % 61 == 7 { 0.02 } else { 1.0 }).collect();
        t.broadcast_mul(&cpu(factors, (1, columns))).unwrap()
    };
    let weight_oi = damped(&damped(&weight_oi, i).t().unwrap(), o).t().unwrap().contiguous().unwrap();
    let weight = Weight::quantize(&weight_oi).unwrap();
    let [y, dx] = exact(&x, &dy, &weight_oi);
    let plain = |t: &Tensor| {
        let rows = t.to_vec2::<f32>().unwrap();
        let round = |row: &Vec<f32>| {
            let scale = scale_of(row);
            row.iter().map(|v| f32::from(rounded(*v, 1.0 / scale)) * scale).collect::<Vec<_>>()
        };
        let all: Vec<f32> = rows.iter().flat_map(round).collect();
        cpu(all, t.dims2().unwrap())
    };
    let weight_unrotated = plain(&weight_oi);
    let [y_plain, dx_plain] = exact(&plain(&x), &plain(&dy), &weight_unrotated);
    let (rotated, unrotated) = (l2_error(&forward(&x, &weight, None), &y), l2_error(&y_plain, &y));
    assert!(rotated < 0.6 * unrotated, "forward: {rotated} rotated, {unrotated} not");
    let (rotated, unrotated) = (l2_error(&backward(&dy, &weight), &dx), l2_error(&dx_plain, &dx));
    assert!(rotated < 0.6 * unrotated, "backward: {rotated} rotated, {unrotated} not");
}

#[test]
fn the_error_is_below_that_of_fp8() {
    let (l, i, o) = (65, 512, 256);
    let weight_oi = (normal(2, &[o, i]) * 0.02).unwrap();
    let (x, dy) = (normal(1, &[l, i]), normal(4, &[l, o]));
    let [y, dx] = exact(&x, &dy, &weight_oi);
    let (int8, out) = (Weight::quantize(&weight_oi).unwrap(), DType::F32);
    let fp8 = fp8::Weight::quantize(&weight_oi, fp8::Granularity::Block).unwrap();
    let fp8 = crate::linear::eight::by_rows(&fp8).unwrap();
    let args = crate::linear::LinearEightArgs { x: &x, rounded: None, weight: &fp8, bias_o: None, base: None, out };
    let y8 = Exec::cpu().run::<crate::linear::LinearEight>(&args).unwrap();
    let args = crate::linear::LinearEightBackwardArgs { dy: &dy, rounded: None, weight: &fp8, base: None, out };
    let dx8 = Exec::cpu().run::<crate::linear::LinearEightBackward>(&args).unwrap();
    assert!(l2_error(&forward(&x, &int8, None), &y) < 0.5 * l2_error(&y8, &y));
    assert!(l2_error(&backward(&dy, &int8), &dx) < 0.5 * l2_error(&dx8, &dx));
}

#[test]
fn a_row_that_is_not_finite_shows_and_a_row_of_zeros_is_zero() {
    let weight = Weight::quantize(&normal(2, &[64, 64])).unwrap();
    let mut values = values(&normal(1, &[3, 64]));
    values[5] = f32::NAN;
    values[64..128].fill(0.0);
    for y in [forward(&cpu(values.clone(), (3, 64)), &weight, None), backward(&cpu(values, (3, 64)), &weight)] {
        let y = y.to_vec2::<f32>().unwrap();
        assert!(y[0].iter().all(|v| v.is_nan()));
        assert!(y[1].iter().all(|v| *v == 0.0));
        assert!(y[2].iter().all(|v| v.is_finite()));
    }
    let mut values = crate::testing::values(&normal(1, &[64, 64]));
    values[64..128].fill(0.0);
    // A weight's row of zeros is rotated with others and stays as small as sizes can be.
    let weight = Weight::quantize(&cpu(values, (64, 64))).unwrap().dequantize().unwrap();
    assert!(weight.get(1).unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.abs() < 1e-29));
}

#[test]
fn leading_axes_and_dtypes_are_kept() {
    let weight = Weight::quantize(&normal(2, &[64, 128])).unwrap();
    let x = normal(1, &[2, 3, 128]).to_dtype(DType::BF16).unwrap();
    let args = LinearInt8Args { x: &x, rounded: None, weight: &weight, bias_o: None, base: None, out: DType::BF16 };
    let y = Exec::cpu().run::<LinearInt8>(&args).unwrap();
    assert_eq!((y.dims(), y.dtype()), (&[2, 3, 64][..], DType::BF16));
    let flat = forward(&x.reshape((6, 128)).unwrap(), &weight, None);
    assert!(relative_error(&y.reshape((6, 64)).unwrap(), &flat) < 0.01);
    let dense = weight.dequantize().unwrap();
    assert_close(
        &Weight::new(weight.codes_oi().clone(), weight.scales_2o().clone()).unwrap().dequantize().unwrap(),
        &dense,
        0.0,
    );
}

#[test]
fn the_gates_name_what_is_wrong() {
    assert!(refused(Weight::quantize(&normal(1, &[64, 96]))).contains("[64, 96] is not in blocks of 64"));
    assert!(!takes([64, 0]) && !takes([WIDEST + 64, 64]) && takes([WIDEST, 64]));
    let weight = Weight::quantize(&normal(2, &[64, 128])).unwrap();
    let scales = weight.scales_2o().narrow(0, 0, 1).unwrap();
    assert!(refused(Weight::new(weight.codes_oi().clone(), scales)).contains("scales_2o has shape [1, 64]"));
    let exec = Exec::cpu();
    let args = LinearInt8Args {
        x: &normal(1, &[3, 64]),
        rounded: None,
        weight: &weight,
        bias_o: None,
        base: None,
        out: DType::F32,
    };
    assert!(refused(exec.run::<LinearInt8>(&args)).contains("linear_int8: x"));
    let args = LinearInt8BackwardArgs { dy: &normal(1, &[3, 128]), weight: &weight, base: None, out: DType::F32 };
    assert!(refused(exec.run::<LinearInt8Backward>(&args)).contains("linear_int8_backward: dy"));
}
