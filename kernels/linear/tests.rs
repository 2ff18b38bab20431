use candle_core::{DType, Tensor};

use super::*;
use crate::fp8::{Granularity, Weight};
use crate::testing::{assert_bits, assert_close, dot, normal, refused, relative_error, slope, tape_grads, values, var};
use crate::Exec;

/// Leading axes, i, o.
fn cases() -> Vec<(Vec<usize>, usize, usize)> {
    vec![(vec![2, 97], 64, 9), (vec![1], 128, 1), (vec![1, 1, 3], 1, 5), (vec![1025], 3, 2)]
}

fn with(lead: &[usize], last: usize) -> Vec<usize> {
    [lead, &[last]].concat()
}

fn linear(x: &Tensor, weight_oi: &Tensor, bias_o: Option<&Tensor>) -> Tensor {
    Exec::cpu().run::<Linear>(&LinearArgs { x, weight_oi, bias_o, base: None, out: DType::F32 }).unwrap()
}

#[test]
fn forward_is_rows_times_columns_plus_bias() {
    let (x, weight, bias) = (normal(1, &[2, 3, 5]), normal(2, &[4, 5]), normal(3, &[4]));
    let got = linear(&x, &weight, Some(&bias));
    assert_eq!(got.dims(), [2, 3, 4]);
    let (x, weight, bias) = (values(&x), values(&weight), values(&bias));
    for (at, got) in values(&got).into_iter().enumerate() {
        let (row, o) = (at / 4, at % 4);
        let want: f32 = (0..5).map(|i| x[row * 5 + i] * weight[o * 5 + i]).sum::<f32>() + bias[o];
        assert!((got - want).abs() < 1e-5);
    }
}

#[test]
fn gradients_equal_the_tape() {
    for (lead, i, o) in cases() {
        let (x, weight, bias) = (normal(1, &with(&lead, i)), normal(2, &[o, i]), normal(3, &[o]));
        let (x_var, weight_var) = (var(&x), var(&weight));
        let dy = normal(4, &with(&lead, o));
        let want = tape_grads(&linear(&x_var, &weight_var, Some(&bias)), &dy, &[&x_var, &weight_var]);
        let args = LinearBackwardArgs { dy: &dy, weight_oi: &weight, base: None, out: DType::F32 };
        assert_close(&Exec::cpu().run::<LinearBackward>(&args).unwrap(), &want[0], 1e-5);
        let args = LinearWeightGradArgs { x: &x, dy: &dy };
        assert_close(&Exec::cpu().run::<LinearWeightGrad>(&args).unwrap(), &want[1], 1e-5);
    }
}

#[test]
fn backward_agrees_with_finite_differences() {
    let (x, weight) = (normal(1, &[7, 12]), normal(2, &[5, 12]));
    let (dy, u) = (normal(4, &[7, 5]), normal(5, &[7, 12]));
    let args = LinearBackwardArgs { dy: &dy, weight_oi: &weight, base: None, out: DType::F32 };
    let dx = Exec::cpu().run::<LinearBackward>(&args).unwrap();
    let want = slope(|x| linear(x, &weight, None), &x, &u, &dy);
    assert!((dot(&dx, &u) / want - 1.0).abs() < 1e-3, "{} {want}", dot(&dx, &u));
}

#[test]
fn fp8_weights_act_as_the_matrix_they_expand_to() {
    for (lead, i, o) in cases() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let weight = Weight::quantize(&normal(2, &[o, i]).to_dtype(dtype).unwrap(), Granularity::Block).unwrap();
            let (x, bias, dy) = (normal(1, &with(&lead, i)), normal(3, &[o]), normal(4, &with(&lead, o)));
            let dense = weight.dequantize().unwrap();
            let args = LinearFp8Args { x: &x, weight: &weight, bias_o: Some(&bias), base: None, out: DType::F32 };
            assert_bits(&Exec::cpu().run::<LinearFp8>(&args).unwrap(), &linear(&x, &dense, Some(&bias)));
            let args = LinearBackwardArgs { dy: &dy, weight_oi: &dense, base: None, out: DType::F32 };
            let want = Exec::cpu().run::<LinearBackward>(&args).unwrap();
            let args = LinearFp8BackwardArgs { dy: &dy, weight: &weight, base: None, out: DType::F32 };
            assert_bits(&Exec::cpu().run::<LinearFp8Backward>(&args).unwrap(), &want);
        }
    }
}

#[test]
fn views_act_as_their_copies() {
    let (wide, weight) = (normal(1, &[2, 7, 24]), normal(2, &[5, 8]));
    let x = wide.narrow(2, 8, 8).unwrap();
    assert_bits(&linear(&x, &weight, None), &linear(&x.contiguous().unwrap(), &weight, None));
    let x = normal(1, &[8, 7]).t().unwrap();
    assert_close(&linear(&x, &weight, None), &linear(&x.contiguous().unwrap(), &weight, None), 1e-6);
    let dy = normal(3, &[5, 7]).t().unwrap();
    let got = Exec::cpu().run::<LinearWeightGrad>(&LinearWeightGradArgs { x: &x, dy: &dy }).unwrap();
    let (x, dy) = (x.contiguous().unwrap(), dy.contiguous().unwrap());
    let want = Exec::cpu().run::<LinearWeightGrad>(&LinearWeightGradArgs { x: &x, dy: &dy }).unwrap();
    assert_close(&got, &want, 1e-6);
}

#[test]
fn sixteen_bit_compute_rounds_operands_and_sums_in_fp32() {
    let (x, weight, bias) = (normal(1, &[33, 256]), normal(2, &[17, 256]), normal(3, &[17]));
    let rounded = |t: &Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    let args = LinearArgs { x: &x, weight_oi: &weight, bias_o: Some(&bias), base: None, out: DType::F32 };
    let got = Linear::reference(&args, DType::BF16).unwrap();
    assert_bits(&got, &linear(&rounded(&x), &rounded(&weight), Some(&bias)));
    let error = relative_error(&got, &linear(&x, &weight, Some(&bias)));
    assert!(error > 1e-6 && error < 1e-2, "{error:.2e}");
    let args = LinearArgs { out: DType::BF16, ..args };
    assert_bits(&Linear::reference(&args, DType::BF16).unwrap(), &got.to_dtype(DType::BF16).unwrap());
}

#[test]
fn the_gates_name_what_is_wrong() {
    let (x, weight) = (normal(1, &[3, 6]), normal(2, &[4, 6]));
    let exec = Exec::cpu();
    let run = |x: &Tensor, weight_oi: &Tensor, bias_o: Option<&Tensor>| {
        refused(exec.run::<Linear>(&LinearArgs { x, weight_oi, bias_o, base: None, out: DType::F32 }))
    };
    let message = run(&normal(1, &[3, 5]), &weight, None);
    assert_eq!(message, "linear: x has shape [3, 5], expected [.., i] with 6 columns");
    assert!(run(&x, &normal(2, &[4, 6, 1]), None).contains("weight_oi"));
    assert!(run(&x, &weight, Some(&normal(2, &[6]))).contains("bias_o has shape [6]"));
    let args = LinearBackwardArgs { dy: &x, weight_oi: &weight, base: None, out: DType::F32 };
    assert!(refused(exec.run::<LinearBackward>(&args)).contains("linear_backward: dy"));
    let args = LinearWeightGradArgs { x: &x, dy: &normal(1, &[2, 4]) };
    assert!(refused(exec.run::<LinearWeightGrad>(&args)).contains("dy has shape [2, 4]"));
    let fp8 = Weight::quantize(&weight, Granularity::Block).unwrap();
    let args = LinearFp8Args { x: &normal(1, &[3, 7]), weight: &fp8, bias_o: None, base: None, out: DType::F32 };
    assert!(refused(exec.run::<LinearFp8>(&args)).contains("linear_fp8: x"));
}

/// |got − want| over |want|, in the L2 norm.
fn l2_error(got: &Tensor, want: &Tensor) -> f64 {
    let difference = (got - want).unwrap();
    (dot(&difference, &difference) / dot(want, want)).sqrt()
}

#[test]
fn eight_bit_products_stay_near_those_of_the_same_weight() {
    let exec = Exec::cpu();
    for (l, i, o) in [(97, 128, 48), (1, 64, 16), (5, 192, 64)] {
        let stored = Weight::quantize(&(normal(2, &[o, i]) * 0.02).unwrap(), Granularity::Block).unwrap();
        let weight = eight::by_rows(&stored).unwrap();
        let off = l2_error(&weight.dequantize().unwrap(), &stored.dequantize().unwrap());
        // One group of 64 inputs is a row already.
        assert!(off < 0.04 && (off > 1e-4) == (i > 64), "{off}");
        let (x, dy, bias) = (normal(1, &[l, i]), normal(4, &[l, o]), normal(3, &[o]));
        assert!(eight::takes(weight.shape()));
        let (weight, out) = (&weight, DType::F32);
        let want =
            exec.run::<LinearFp8>(&LinearFp8Args { x: &x, weight, bias_o: Some(&bias), base: None, out }).unwrap();
        let got = exec
            .run::<LinearEight>(&LinearEightArgs { x: &x, rounded: None, weight, bias_o: Some(&bias), base: None, out })
            .unwrap();
        // Two roundings to four bits: 2.6 % each of a product, less of a sum with its bias.
        let error = l2_error(&got, &want);
        assert!(error > 1e-4 && error < 0.05, "{error}");
        let want = exec.run::<LinearFp8Backward>(&LinearFp8BackwardArgs { dy: &dy, weight, base: None, out }).unwrap();
        let got = exec
            .run::<LinearEightBackward>(&LinearEightBackwardArgs { dy: &dy, rounded: None, weight, base: None, out })
            .unwrap();
        let error = l2_error(&got, &want);
        assert!(error > 1e-4 && error < 0.06, "{error}");
    }
}

#[test]
fn eight_bit_products_of_codes_are_exact() {
    // Values that are codes already, with the largest one in every row: nothing is rounded.
    let codes = |seed: u64, rows: usize, columns: usize| {
        let mut values: Vec<f32> = values(&normal(seed, &[rows, columns]))
            .into_iter()
            .map(|v| crate::fp8::codec::decode(crate::fp8::codec::encode(v * 100.0)).clamp(-448.0, 448.0))
            .collect();
        values.chunks_mut(columns).for_each(|row| row[0] = 448.0);
        Tensor::from_vec(values, (rows, columns), &candle_core::Device::Cpu).unwrap()
    };
    let (x, w) = (codes(1, 7, 64), codes(2, 16, 64));
    let weight = eight::by_rows(&Weight::quantize(&w, Granularity::Channel).unwrap()).unwrap();
    let args = LinearEightArgs { x: &x, rounded: None, weight: &weight, bias_o: None, base: None, out: DType::F32 };
    assert_close(&Exec::cpu().run::<LinearEight>(&args).unwrap(), &linear(&x, &w, None), 1e-6);
}

#[test]
fn a_row_that_is_not_finite_shows_and_a_row_of_zeros_is_zero() {
    let weight = Weight::quantize(&normal(2, &[16, 64]), Granularity::Block).unwrap();
    let args = LinearEightArgs {
        x: &normal(1, &[3, 64]),
        rounded: None,
        weight: &weight,
        bias_o: None,
        base: None,
        out: DType::F32,
    };
    assert!(refused(Exec::cpu().run::<LinearEight>(&args)).contains("one fp32 scale an output"));
    let weight = eight::by_rows(&weight).unwrap();
    let mut values = values(&normal(1, &[3, 64]));
    values[5] = f32::NAN;
    values[64..128].fill(0.0);
    let x = Tensor::from_vec(values, (3, 64), &candle_core::Device::Cpu).unwrap();
    let args = LinearEightArgs { x: &x, rounded: None, weight: &weight, bias_o: None, base: None, out: DType::F32 };
    let y = Exec::cpu().run::<LinearEight>(&args).unwrap().to_vec2::<f32>().unwrap();
    assert!(y[0].iter().all(|v| v.is_nan()));
    assert!(y[1].iter().all(|v| *v == 0.0));
    assert!(y[2].iter().all(|v| v.is_finite()));
}

/// Whether a product onto a base is the sum of both, to the bit.
fn adds(base: &Tensor, product: &dyn Fn(Option<Tensor>) -> Tensor) {
    assert_bits(&product(Some(base.copy().unwrap())), &(base + product(None)).unwrap());
}

#[test]
fn an_addition_in_the_product_is_the_sum_of_both() {
    let (exec, out) = (Exec::cpu(), DType::F32);
    let weight_oi = &normal(2, &[32, 64]);
    let weight = &Weight::quantize(weight_oi, Granularity::Block).unwrap();
    let (x, dy, bias) = (&normal(1, &[2, 5, 64]), &normal(3, &[2, 5, 32]), normal(4, &[32]));
    let (onto_o, onto_i, bias_o) = (&normal(5, &[2, 5, 32]), &normal(6, &[2, 5, 64]), Some(&bias));
    adds(onto_o, &|base| exec.run::<Linear>(&LinearArgs { x, weight_oi, bias_o, base, out }).unwrap());
    adds(onto_i, &|base| exec.run::<LinearBackward>(&LinearBackwardArgs { dy, weight_oi, base, out }).unwrap());
    adds(onto_o, &|base| exec.run::<LinearFp8>(&LinearFp8Args { x, weight, bias_o, base, out }).unwrap());
    adds(onto_i, &|base| exec.run::<LinearFp8Backward>(&LinearFp8BackwardArgs { dy, weight, base, out }).unwrap());
    let weight = &eight::by_rows(weight).unwrap();
    adds(onto_o, &|base| {
        exec.run::<LinearEight>(&LinearEightArgs { x, rounded: None, weight, bias_o, base, out }).unwrap()
    });
    adds(onto_i, &|base| {
        exec.run::<LinearEightBackward>(&LinearEightBackwardArgs { dy, rounded: None, weight, base, out }).unwrap()
    });

    let args = LinearFp8BackwardArgs { dy, weight, base: Some(normal(3, &[2, 5, 63])), out };
    assert!(refused(exec.run::<LinearFp8Backward>(&args)).contains("base has shape [2, 5, 63]"));
    let args = LinearArgs { x, weight_oi, bias_o, base: Some(normal(3, &[2, 4, 32])), out };
    assert!(refused(exec.run::<Linear>(&args)).contains("base has shape [2, 4, 32]"));
}

#[test]
fn loras_side_by_side_are_each_of_them() {
    let exec = Exec::cpu();
    let (downs, ups) = ([normal(1, &[3, 10]), normal(2, &[5, 10])], [normal(3, &[7, 3]), normal(4, &[6, 5])]);
    let stack = Stack::new(&exec, &[(&downs[0], &ups[0]), (&downs[1], &ups[1])]).unwrap();
    assert_eq!(stack.parts().collect::<Vec<_>>(), [(0, 3), (3, 5)]);
    let (x, dys) = (normal(5, &[2, 9, 10]), [normal(6, &[2, 9, 7]), normal(7, &[2, 9, 6])]);
    let h = linear(&x, &stack.down_ri, None);
    let dh = LinearStackBackwardArgs { dys: &dys.each_ref(), ups_or: &stack.ups_or };
    let dh = exec.run::<LinearStackBackward>(&dh).unwrap();
    assert_eq!((h.dims(), dh.dims()), ([2, 9, 8].as_slice(), [2, 9, 8].as_slice()));
    for (j, (at, r)) in stack.parts().enumerate() {
        assert_close(&h.narrow(2, at, r).unwrap(), &linear(&x, &downs[j], None), 1e-6);
        let args = LinearBackwardArgs { dy: &dys[j], weight_oi: &ups[j], base: None, out: DType::F32 };
        assert_close(&dh.narrow(2, at, r).unwrap(), &exec.run::<LinearBackward>(&args).unwrap(), 1e-6);
    }
    let args = LinearStackBackwardArgs { dys: &[&dys[0]], ups_or: &stack.ups_or };
    assert!(refused(exec.run::<LinearStackBackward>(&args)).contains("dys has shape [1]"));
    let args = LinearStackBackwardArgs { dys: &[&dys[0], &dys[0]], ups_or: &stack.ups_or };
    assert!(refused(exec.run::<LinearStackBackward>(&args)).contains("dys has shape [2, 9, 7]"));
}
