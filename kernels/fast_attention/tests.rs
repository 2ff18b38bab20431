use super::*;
use crate::testing::{assert_bits, dot, normal, refused, values};
use crate::Exec;

fn run(q: &Tensor, k: &Tensor, v: &Tensor) -> [AttentionOut; 2] {
    let args = AttentionArgs { q_blnh: q, k_bmnh: k, v_bmnh: v, last_stands_for: 1 };
    let exec = Exec::cpu();
    [exec.run::<FastAttention>(&args).unwrap(), exec.run::<Attention>(&args).unwrap()]
}

/// |got - want| over |want|, in the L2 norm.
fn l2_error(got: &Tensor, want: &Tensor) -> f64 {
    let difference = (got - want).unwrap();
    (dot(&difference, &difference) / dot(want, want)).sqrt()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn it_is_attention_up_to_roundings() {
    // [l, m], standard deviation of the scores, bounds on the errors of o and of lse.
    for ([l, m], spread, of_o, of_lse) in
        [([33, 300], 1.0, 0.04, 0.02), ([130, 129], 3.0, 0.06, 0.15), ([5, 1], 1.0, 0.04, 1e-5)]
    {
        let q = (normal(1, &[2, l, 3, 128]) * spread).unwrap();
        let [got, want] = run(&q, &normal(2, &[2, m, 3, 128]), &normal(3, &[2, m, 3, 128]));
        let error = l2_error(&got.o_blnh, &want.o_blnh);
        assert!(error > 1e-4 && error < of_o, "[{l}, {m}]: {error}");
        let error = largest_difference(&got.lse_bnl, &want.lse_bnl);
        assert!(error < of_lse, "[{l}, {m}]: lse is off by {error}");
    }
}

#[test]
fn what_keys_share_costs_no_precision() {
    let (q, k, v) = (normal(1, &[1, 40, 2, 128]), normal(2, &[1, 200, 2, 128]), normal(3, &[1, 200, 2, 128]));
    let shared = (normal(4, &[1, 1, 2, 128]) * 5.0).unwrap();
    let [alone, _] = run(&q, &k, &v);
    let [got, want] = run(&q, &k.broadcast_add(&shared).unwrap(), &v);
    let alone = l2_error(&alone.o_blnh, &want.o_blnh);
    let error = l2_error(&got.o_blnh, &want.o_blnh);
    assert!(error < 1.2 * alone, "{error} beside {alone}");
    let lse = largest_difference(&got.lse_bnl, &want.lse_bnl);
    assert!(lse < 0.05, "{lse}");
}

#[test]
fn a_few_large_channels_cost_little() {
    let mut outlying = vec![1f32; 128];
    outlying[7] = 30.0;
    outlying[70] = 30.0;
    let outlying = Tensor::new(outlying, &Device::Cpu).unwrap();
    let wide = |seed| normal(seed, &[1, 128, 1, 128]).broadcast_mul(&outlying).unwrap();
    let (mut got, want) = (wide(1), wide(1));
    let mut rows = values(&got);
    rows.chunks_mut(128).for_each(rotate);
    round_int8(&mut rows);
    rows.chunks_mut(128).for_each(|row| {
        // Back: H is its own inverse up to 128, then the signs.
        let signs: Vec<f32> = (0..128).map(|i| if SIGNS[i / 32] >> (i % 32) & 1 == 1 { -1.0 } else { 1.0 }).collect();
        row.iter_mut().zip(&signs).for_each(|(v, s)| *v *= s);
        rotate(row);
        row.iter_mut().zip(&signs).for_each(|(v, s)| *v *= s / 128.0);
    });
    got = Tensor::from_vec(rows, got.dims(), &Device::Cpu).unwrap();
    // Without the rotation, rounded beside 30 times larger channels, most others would have codes of 3 at most.
    let small = |t: &Tensor| t.narrow(3, 8, 60).unwrap();
    let mut plain = values(&want);
    round_int8(&mut plain);
    let plain = Tensor::from_vec(plain, want.dims(), &Device::Cpu).unwrap();
    let (turned, unturned) = (l2_error(&small(&got), &small(&want)), l2_error(&small(&plain), &small(&want)));
    assert!(turned < 0.35 * unturned, "{turned} against {unturned}");
}

#[test]
fn other_heads_are_computed_in_full() {
    let (q, k, v) = (normal(1, &[1, 9, 2, 64]), normal(2, &[1, 11, 2, 64]), normal(3, &[1, 11, 2, 64]));
    let [got, want] = run(&q, &k, &v);
    assert_bits(&got.o_blnh, &want.o_blnh);
    assert_bits(&got.lse_bnl, &want.lse_bnl);
}

#[test]
fn what_is_no_number_is_seen_in_the_result() {
    for which in 0..3 {
        let mut tensors: Vec<Tensor> = (1..4).map(|seed| normal(seed, &[1, 20, 1, 128])).collect();
        let mut broken = values(&tensors[which]);
        broken[5 * 128 + 3] = f32::NAN;
        tensors[which] = Tensor::from_vec(broken, (1, 20, 1, 128), &Device::Cpu).unwrap();
        let [got, _] = run(&tensors[0], &tensors[1], &tensors[2]);
        assert!(values(&got.o_blnh).iter().any(|v| v.is_nan()), "tensor {which}");
    }
}

#[test]
fn it_is_worth_it_for_many_tokens() {
    assert!(!pays(&Exec::cpu(), 1024) && pays(&Exec::cpu(), 2048));
    assert!(FROM_TOKENS[0] > FROM_TOKENS[1]);
}

#[test]
fn a_last_key_that_stands_for_several_is_refused() {
    let x = normal(1, &[1, 4, 1, 128]);
    let args = AttentionArgs { q_blnh: &x, k_bmnh: &x, v_bmnh: &x, last_stands_for: 3 };
    let message = refused(Exec::cpu().run::<FastAttention>(&args));
    assert!(message.contains("the last key stands for 3; it takes one"), "{message}");
}
