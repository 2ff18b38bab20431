use candle_core::{DType, Tensor};

use super::*;
use crate::testing::{assert_bits, assert_close, normal, refused, tape_grads, values, var};
use crate::Exec;

#[test]
fn backward_equals_the_tape_and_dx_is_dout() {
    for [b, l, d] in [[2, 97, 18], [1, 1, 7], [1, 1025, 3]] {
        let (x, y, dout) = (normal(1, &[b, l, d]), normal(2, &[b, l, d]), normal(3, &[b, l, d]));
        for gate in [normal(4, &[b, d]), normal(4, &[b, l, d])] {
            let (x_var, y_var) = (var(&x), var(&y));
            let args = GateResidualArgs { x_bld: &x_var, y_bld: &y_var, gate: &gate, out: DType::F32 };
            let want = tape_grads(&Exec::cpu().run::<GateResidual>(&args).unwrap(), &dout, &[&x_var, &y_var]);
            let args = GateResidualBackwardArgs { dout_bld: &dout, gate: &gate, out: DType::F32 };
            assert_close(&dout, &want[0], 0.0);
            assert_close(&Exec::cpu().run::<GateResidualBackward>(&args).unwrap(), &want[1], 1e-7);
        }
    }
}

#[test]
fn each_sample_has_its_gate() {
    let [b, l, d] = [2, 3, 4];
    let (x, y, gate) = (normal(1, &[b, l, d]), normal(2, &[b, l, d]), normal(4, &[b, d]));
    let args = GateResidualArgs { x_bld: &x, y_bld: &y, gate: &gate, out: DType::F32 };
    let got = values(&Exec::cpu().run::<GateResidual>(&args).unwrap());
    let (x, y, gate) = (values(&x), values(&y), values(&gate));
    for at in 0..b * l * d {
        let want = x[at] + y[at] * gate[at / (l * d) * d + at % d];
        assert!((got[at] - want).abs() < 1e-6);
    }
}

#[test]
fn an_fp32_stream_keeps_what_a_16_bit_branch_adds() {
    // 256 + 1/128 rounds to 256 in bf16: an fp32 result must still hold the branch.
    let x = (normal(1, &[1, 4, 8]).zeros_like().unwrap() + 256.0).unwrap();
    let y = (x.zeros_like().unwrap() + 1.0 / 128.0).unwrap().to_dtype(DType::BF16).unwrap();
    let sum = |out| Residual::reference(&ResidualArgs { x: &x, y: &y, out }, DType::BF16).unwrap();
    assert!(values(&sum(DType::F32)).iter().all(|&s| s == 256.0 + 1.0 / 128.0));
    assert_bits(&sum(DType::BF16), &x.to_dtype(DType::BF16).unwrap());
}

#[test]
fn the_gates_name_what_is_wrong() {
    let (x, gate) = (normal(1, &[2, 3, 4]), normal(2, &[2, 4]));
    let exec = Exec::cpu();
    let run = |y_bld: &Tensor, gate: &Tensor| {
        refused(exec.run::<GateResidual>(&GateResidualArgs { x_bld: &x, y_bld, gate, out: DType::F32 }))
    };
    assert!(run(&normal(1, &[2, 4, 3]), &gate).contains("y_bld has shape [2, 4, 3]"));
    assert!(run(&x, &normal(1, &[3, 4])).contains("gate_residual: gate has shape [3, 4]"));
    let args = ResidualArgs { x: &x, y: &gate, out: DType::F32 };
    assert!(refused(exec.run::<Residual>(&args)).contains("residual: y"));
}
