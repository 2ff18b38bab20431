use candle_core::{DType, Device, Tensor};

use super::*;
use crate::testing::{assert_bits, assert_close, dot, normal, refused, slope, tape_grads, values, var};
use crate::{Exec, Op};

const EPS: f64 = 1e-6;
/// [b, l, d].
const SIZES: [[usize; 3]; 4] = [[2, 97, 54], [1, 1, 64], [3, 5, 1], [1, 1025, 18]];

/// Rows that are neither centred nor of unit variance, as a residual stream's are not.
fn stream(shape: &[usize]) -> Tensor {
    ((normal(1, shape) * 3.0).unwrap() + 1.5).unwrap()
}

/// Modulation [b, d], and [b, l, d].
fn modulations(seed: u64, [b, l, d]: [usize; 3]) -> [Tensor; 2] {
    [(normal(seed, &[b, d]) * 0.3).unwrap(), (normal(seed, &[b, l, d]) * 0.3).unwrap()]
}

fn layer_norm_modulate(x_bld: &Tensor, shift: &Tensor, scale: &Tensor) -> Tensor {
    let args = LayerNormModulateArgs { x_bld, shift, scale, eps: EPS, out: DType::F32 };
    Exec::cpu().run::<LayerNormModulate>(&args).unwrap()
}

fn layer_norm(x: &Tensor, weight_d: &Tensor, bias_d: &Tensor) -> Tensor {
    Exec::cpu().run::<LayerNorm>(&LayerNormArgs { x, weight_d, bias_d, eps: EPS, out: DType::F32 }).unwrap()
}

fn rms_norm(x: &Tensor, weight_d: &Tensor) -> Tensor {
    Exec::cpu().run::<RmsNorm>(&RmsNormArgs { x, weight_d, eps: EPS, out: DType::F32 }).unwrap()
}

fn rms_norm_rope(x_bld: &Tensor, weight_d: &Tensor, (cos_lk, sin_lk): (&Tensor, &Tensor)) -> Tensor {
    let args = RmsNormRopeArgs { x_bld, weight_d, cos_lk, sin_lk, eps: EPS, out: DType::F32 };
    Exec::cpu().run::<RmsNormRope>(&args).unwrap()
}

fn tables(l: usize, k: usize) -> (Tensor, Tensor) {
    let angles = (normal(9, &[l, k]) * 4.0).unwrap();
    (angles.cos().unwrap(), angles.sin().unwrap())
}

#[test]
fn forwards_match_the_formulas_in_f64() {
    let [b, l, d] = [2, 3, 12];
    let x = stream(&[b, l, d]);
    let ([shift, _], [scale, _]) = (modulations(2, [b, l, d]), modulations(3, [b, l, d]));
    let (weight, bias) = (normal(4, &[d]), normal(5, &[d]));
    let got = [layer_norm_modulate(&x, &shift, &scale), layer_norm(&x, &weight, &bias), rms_norm(&x, &weight)];
    let got = got.map(|t| values(&t));
    let (shift, scale, weight, bias) = (values(&shift), values(&scale), values(&weight), values(&bias));
    for (row, x) in values(&x).chunks(d).enumerate() {
        let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let mean = x.iter().sum::<f64>() / d as f64;
        let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
        let square = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
        for i in 0..d {
            let (sample, at) = (row / l * d + i, row * d + i);
            let xhat = (x[i] - mean) / (var + EPS).sqrt();
            let want = [
                xhat * (1.0 + f64::from(scale[sample])) + f64::from(shift[sample]),
                xhat * f64::from(weight[i]) + f64::from(bias[i]),
                x[i] / (square + EPS).sqrt() * f64::from(weight[i]),
            ];
            for (got, want) in got.iter().zip(want) {
                assert!((f64::from(got[at]) - want).abs() < 2e-6, "{} {want}", got[at]);
            }
        }
    }
}

#[test]
fn layer_norm_backwards_equal_the_tape() {
    for size in SIZES {
        let [_, _, d] = size;
        let (x, dy, dres) = (stream(&size), normal(6, &size), normal(7, &size));
        let x_var = var(&x);
        for (shift, scale) in modulations(2, size).iter().zip(&modulations(3, size)) {
            let want = &tape_grads(&layer_norm_modulate(&x_var, shift, scale), &dy, &[&x_var])[0];
            let dx = |dres_bld| {
                let args = LayerNormModulateBackwardArgs {
                    x_bld: &x,
                    scale,
                    dy_bld: &dy,
                    dres_bld,
                    eps: EPS,
                    out: DType::F32,
                };
                Exec::cpu().run::<LayerNormModulateBackward>(&args).unwrap()
            };
            if d > 1 {
                assert_close(&dx(None), want, 1e-5);
            }
            assert_close(&dx(Some(&dres)), &(want + &dres).unwrap(), 1e-5);
        }
        let (weight, bias) = (normal(4, &[d]), normal(5, &[d]));
        let want = &tape_grads(&layer_norm(&x_var, &weight, &bias), &dy, &[&x_var])[0];
        let dx = |dres| {
            let args = LayerNormBackwardArgs { x: &x, weight_d: &weight, dy: &dy, dres, eps: EPS, out: DType::F32 };
            Exec::cpu().run::<LayerNormBackward>(&args).unwrap()
        };
        if d > 1 {
            assert_close(&dx(None), want, 1e-5);
        }
        assert_close(&dx(Some(&dres)), &(want + &dres).unwrap(), 1e-5);
    }
}

#[test]
fn rms_norm_backwards_equal_the_tape() {
    // d = n·h: 9 heads of 6, 2 of 32, 1025 tokens of 3 heads of 6.
    for ([b, l, d], k) in [([2, 97, 54], 3), ([1, 1, 64], 16), ([1, 1025, 18], 3)] {
        let (x, weight) = (stream(&[b, l, d]), normal(4, &[d]));
        let (x_var, dy) = (var(&x), normal(6, &[b, l, d]));
        let want = &tape_grads(&rms_norm(&x_var, &weight), &dy, &[&x_var])[0];
        let args = RmsNormBackwardArgs { x: &x, weight_d: &weight, dy: &dy, eps: EPS, out: DType::F32 };
        assert_close(&Exec::cpu().run::<RmsNormBackward>(&args).unwrap(), want, 1e-5);

        let (cos, sin) = tables(l, k);
        let dy = dy.reshape((b, l, d / (2 * k), 2 * k)).unwrap();
        let want = &tape_grads(&rms_norm_rope(&x_var, &weight, (&cos, &sin)), &dy, &[&x_var])[0];
        let args = RmsNormRopeBackwardArgs {
            x_bld: &x,
            weight_d: &weight,
            cos_lk: &cos,
            sin_lk: &sin,
            dy_blnh: &dy,
            eps: EPS,
            out: DType::F32,
        };
        assert_close(&Exec::cpu().run::<RmsNormRopeBackward>(&args).unwrap(), want, 1e-5);
    }
}

#[test]
fn layer_norm_backward_agrees_with_finite_differences() {
    let size = [2, 7, 16];
    let (x, dy, u) = (stream(&size), normal(6, &size), normal(8, &size));
    let ([shift, _], [scale, _]) = (modulations(2, size), modulations(3, size));
    let args = LayerNormModulateBackwardArgs {
        x_bld: &x,
        scale: &scale,
        dy_bld: &dy,
        dres_bld: None,
        eps: EPS,
        out: DType::F32,
    };
    let dx = Exec::cpu().run::<LayerNormModulateBackward>(&args).unwrap();
    let want = slope(|x| layer_norm_modulate(x, &shift, &scale), &x, &u, &dy);
    assert!((dot(&dx, &u) / want - 1.0).abs() < 2e-3, "{} {want}", dot(&dx, &u));
}

#[test]
fn rope_turns_adjacent_pairs() {
    let [b, l, n, k] = [2, 5, 3, 4];
    let d = n * 2 * k;
    let x = stream(&[b, l, d]);
    let weight = Tensor::ones(d, DType::F32, &Device::Cpu).unwrap();
    let (cos, sin) = tables(l, k);
    let turned = values(&rms_norm_rope(&x, &weight, (&cos, &sin)));
    let (cos, sin) = (values(&cos), values(&sin));
    for (at, pair) in values(&rms_norm(&x, &weight)).chunks(2).enumerate() {
        let token = at / (n * k) % l;
        let (c, s) = (cos[token * k + at % k], sin[token * k + at % k]);
        let want = [pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c];
        for (got, want) in turned[2 * at..].iter().zip(want) {
            assert!((got - want).abs() < 1e-6);
        }
    }
}

#[test]
fn sixteen_bit_input_is_widened_and_the_result_rounded_once() {
    let size = [1, 9, 32];
    let x = stream(&size).to_dtype(DType::BF16).unwrap();
    let wide = x.to_dtype(DType::F32).unwrap();
    let ([shift, _], [scale, _]) = (modulations(2, size), modulations(3, size));
    let args = LayerNormModulateArgs { x_bld: &x, shift: &shift, scale: &scale, eps: EPS, out: DType::BF16 };
    let got = LayerNormModulate::reference(&args, DType::BF16).unwrap();
    assert_bits(&got, &layer_norm_modulate(&wide, &shift, &scale).to_dtype(DType::BF16).unwrap());
}

#[test]
fn modulation_may_be_a_view_of_the_six_chunks() {
    let [b, l, d] = [3, 5, 16];
    let (x, six) = (stream(&[b, l, d]), normal(2, &[b, 6, d]));
    let chunk = |i| six.narrow(1, i, 1).unwrap().squeeze(1).unwrap();
    let (shift, scale) = (chunk(3), chunk(4));
    assert!(!shift.is_contiguous());
    let want = layer_norm_modulate(&x, &shift.contiguous().unwrap(), &scale.contiguous().unwrap());
    assert_bits(&layer_norm_modulate(&x, &shift, &scale), &want);
}

#[test]
fn the_gates_name_what_is_wrong() {
    let (x, vector) = (normal(1, &[2, 4, 12]), normal(2, &[2, 12]));
    let exec = Exec::cpu();
    let modulate = |shift: &Tensor, scale: &Tensor, out: DType| {
        refused(exec.run::<LayerNormModulate>(&LayerNormModulateArgs { x_bld: &x, shift, scale, eps: EPS, out }))
    };
    let message = modulate(&normal(2, &[1, 12]), &vector, DType::F32);
    assert!(message.starts_with("layer_norm_modulate: shift has shape [1, 12]"), "{message}");
    assert!(modulate(&vector, &normal(2, &[2, 3, 12]), DType::F32).contains("scale"));
    assert!(modulate(&vector, &vector, DType::U8).contains("out is U8"));

    let weight = normal(3, &[12]);
    let (cos, sin) = tables(4, 3);
    let rope = |cos_lk: &Tensor, sin_lk: &Tensor| {
        let args = RmsNormRopeArgs { x_bld: &x, weight_d: &weight, cos_lk, sin_lk, eps: EPS, out: DType::F32 };
        refused(exec.run::<RmsNormRope>(&args))
    };
    assert!(rope(&tables(5, 3).0, &sin).contains("cos_lk has shape [5, 3]"));
    assert!(rope(&cos, &tables(4, 2).1).contains("sin_lk"));
    let (cos, sin) = tables(4, 4);
    assert!(rope(&cos, &sin).contains("width 12 is not a multiple of the head width 8"));

    let args = RmsNormArgs { x: &x, weight_d: &vector, eps: EPS, out: DType::F32 };
    assert!(refused(exec.run::<RmsNorm>(&args)).contains("weight_d"));
    let args = LayerNormArgs { x: &x, weight_d: &weight, bias_d: &vector, eps: EPS, out: DType::F32 };
    assert!(refused(exec.run::<LayerNorm>(&args)).contains("bias_d"));
}

#[test]
fn a_norm_of_a_sum_equals_the_tape() {
    for size in SIZES {
        let [b, l, d] = size;
        let (x, branch) = (var(&stream(&size)), var(&normal(2, &size)));
        let (dy, dsum) = (normal(6, &size), normal(7, &size));
        let ([per_sample, per_token], shift) = (modulations(3, size), normal(4, &[b, d]));
        let (weight_d, bias_d) = (&normal(5, &[d]), &normal(8, &[d]));
        let (affine, modulated) =
            (After::Affine { weight_d, bias_d }, After::Modulation { shift: &shift, scale: &per_sample });
        for (gate, after) in [(Some(&per_token), affine), (Some(&per_sample), modulated), (None, modulated)] {
            let (exec, eps, stream, out) = (Exec::cpu(), EPS, DType::F32, DType::F32);
            let (x_bld, branch_bld) = (x.as_tensor(), branch.as_tensor());
            let args = ResidualNormArgs { x_bld, branch_bld, gate, after, eps, stream, out };
            let Normed { sum_bld, y_bld } = exec.run::<ResidualNorm>(&args).unwrap();
            let both = Tensor::cat(&[&sum_bld, &y_bld], 2).unwrap();
            let want = tape_grads(&both, &Tensor::cat(&[&dsum, &dy], 2).unwrap(), &[&x, &branch]);
            let (sum_bld, dy_bld, dsum_bld) = (&sum_bld.detach(), &dy, &dsum);
            let args = ResidualNormBackwardArgs { sum_bld, gate, after, dy_bld, dsum_bld, eps, stream, out };
            let got = exec.run::<ResidualNormBackward>(&args).unwrap();
            // As for the norms alone, but a width of 1 divides rounding errors by the root of epsilon.
            let tolerance = if d == 1 { 1e-4 } else { 1e-5 };
            assert_close(&got.dx_bld, &want[0], tolerance);
            assert_close(&got.dbranch_bld, &want[1], tolerance);
            assert_eq!(got.dx_bld.dims(), [b, l, d]);
        }
    }
}

#[test]
fn a_norm_of_a_sum_refuses_what_does_not_fit() {
    let (x, y, d4, d5) = (normal(1, &[2, 3, 4]), normal(2, &[2, 3, 5]), normal(3, &[4]), normal(4, &[5]));
    let run = |branch_bld, gate, weight_d| {
        let (after, stream, out) = (After::Affine { weight_d, bias_d: &d4 }, DType::F32, DType::F32);
        let args = ResidualNormArgs { x_bld: &x, branch_bld, gate, after, eps: EPS, stream, out };
        Exec::cpu().run::<ResidualNorm>(&args)
    };
    assert!(run(&x, None, &d4).is_ok());
    assert!(refused(run(&y, None, &d4)).contains("branch_bld"));
    assert!(refused(run(&x, Some(&d4), &d4)).contains("gate"));
    assert!(refused(run(&x, None, &d5)).contains("weight_d"));
}
