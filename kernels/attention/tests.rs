use candle_core::{DType, Tensor};

use super::*;
use crate::testing::{assert_bits, assert_close, normal, refused, relative_error, tape_grads, values, var};
use crate::Exec;

struct Qkv {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do_: Tensor,
}

fn qkv([b, l, m, n, h]: [usize; 5]) -> Qkv {
    Qkv {
        q: normal(1, &[b, l, n, h]),
        k: normal(2, &[b, m, n, h]),
        v: normal(3, &[b, m, n, h]),
        do_: normal(4, &[b, l, n, h]),
    }
}

fn args(t: &Qkv) -> AttentionArgs<'_> {
    AttentionArgs { q_blnh: &t.q, k_bmnh: &t.k, v_bmnh: &t.v, last_stands_for: 1 }
}

fn backward_args<'a>(t: &'a Qkv, out: &'a AttentionOut) -> AttentionBackwardArgs<'a> {
    AttentionBackwardArgs {
        q_blnh: &t.q,
        k_bmnh: &t.k,
        v_bmnh: &t.v,
        o_blnh: &out.o_blnh,
        lse_bnl: &out.lse_bnl,
        do_blnh: &t.do_,
        last_stands_for: 1,
    }
}

/// [b, l, m, n, h]: odd counts, one token, one key, many more keys than queries and the reverse, the real head width.
const SIZES: [[usize; 5]; 6] = [
    [2, 97, 97, 9, 32],
    [1, 1, 1, 1, 32],
    [2, 1, 33, 3, 64],
    [1, 33, 1, 2, 48],
    [1, 40, 70, 2, 128],
    [1, 1025, 7, 1, 32],
];

#[test]
fn forward_is_softmax_times_v() {
    let [b, l, m, n, h] = [2, 5, 7, 3, 32];
    let t = qkv([b, l, m, n, h]);
    let out = Exec::cpu().run::<Attention>(&args(&t)).unwrap();
    let (q, k, v) = (values(&t.q), values(&t.k), values(&t.v));
    let (mut want_o, mut want_lse) = (vec![0f32; b * l * n * h], vec![0f32; b * n * l]);
    for b_ in 0..b {
        for n_ in 0..n {
            for l_ in 0..l {
                let q_at = ((b_ * l + l_) * n + n_) * h;
                let kv_at = |m_: usize| ((b_ * m + m_) * n + n_) * h;
                let score = |m_: usize| -> f64 {
                    (0..h).map(|i| f64::from(q[q_at + i]) * f64::from(k[kv_at(m_) + i])).sum::<f64>()
                        / (h as f64).sqrt()
                };
                let sum: f64 = (0..m).map(|m_| score(m_).exp()).sum();
                want_lse[(b_ * n + n_) * l + l_] = sum.ln() as f32;
                for i in 0..h {
                    let o: f64 = (0..m).map(|m_| score(m_).exp() / sum * f64::from(v[kv_at(m_) + i])).sum();
                    want_o[q_at + i] = o as f32;
                }
            }
        }
    }
    let device = t.q.device();
    assert_close(&out.o_blnh, &Tensor::from_vec(want_o, (b, l, n, h), device).unwrap(), 1e-6);
    assert_close(&out.lse_bnl, &Tensor::from_vec(want_lse, (b, n, l), device).unwrap(), 1e-6);
}

#[test]
fn backward_equals_the_tape() {
    for size in SIZES {
        let t = qkv(size);
        let (q, k, v) = (var(&t.q), var(&t.k), var(&t.v));
        let taped = AttentionArgs { q_blnh: &q, k_bmnh: &k, v_bmnh: &v, last_stands_for: 1 };
        let y = Attention::reference(&taped, DType::F32).unwrap().o_blnh;
        let want = tape_grads(&y, &t.do_, &[&q, &k, &v]);
        let out = Exec::cpu().run::<Attention>(&args(&t)).unwrap();
        let got = Exec::cpu().run::<AttentionBackward>(&backward_args(&t, &out)).unwrap();
        if size[2] > 1 {
            assert_close(&got.dq_blnh, &want[0], 1e-5);
            assert_close(&got.dk_bmnh, &want[1], 1e-5);
        } else {
            // With one key the softmax is constant: what is left is rounding.
            assert!(values(&got.dq_blnh).iter().chain(&values(&got.dk_bmnh)).all(|g| g.abs() < 1e-4), "{size:?}");
        }
        assert_close(&got.dv_bmnh, &want[2], 1e-5);
    }
}

#[test]
fn scores_far_from_zero_do_not_overflow() {
    let mut t = qkv([1, 9, 9, 2, 32]);
    t.q = (t.q * 60.0).unwrap();
    let out = Exec::cpu().run::<Attention>(&args(&t)).unwrap();
    let grads = Exec::cpu().run::<AttentionBackward>(&backward_args(&t, &out)).unwrap();
    for t in [&out.o_blnh, &out.lse_bnl, &grads.dq_blnh, &grads.dk_bmnh, &grads.dv_bmnh] {
        assert!(values(t).iter().all(|x| x.is_finite()));
    }
    assert!(values(&out.lse_bnl).iter().any(|&lse| lse > 89.0), "the case must exceed exp's range to mean anything");
}

#[test]
fn tiles_over_heads_change_no_bit_and_tiles_over_rows_only_rounding() {
    let [b, l, m, n, h] = [2, 13, 11, 3, 32];
    let t = qkv([b, l, m, n, h]);
    let whole = forward(&args(&t), DType::F32, TILE_BYTES).unwrap();
    let whole_grads = backward(&backward_args(&t, &whole), DType::F32, TILE_BYTES).unwrap();
    let of = |tile: usize| {
        let out = forward(&args(&t), DType::F32, tile).unwrap();
        let grads = backward(&backward_args(&t, &out), DType::F32, tile).unwrap();
        (out, grads)
    };
    // Two heads, then one head a tile.
    for tile in [2 * l * m * 4, l * m * 4] {
        let (out, grads) = of(tile);
        assert_bits(&out.o_blnh, &whole.o_blnh);
        assert_bits(&out.lse_bnl, &whole.lse_bnl);
        assert_bits(&grads.dq_blnh, &whole_grads.dq_blnh);
        assert_bits(&grads.dk_bmnh, &whole_grads.dk_bmnh);
        assert_bits(&grads.dv_bmnh, &whole_grads.dv_bmnh);
    }
    // Five rows, then one row a tile.
    for tile in [5 * m * 4, 1] {
        let (out, grads) = of(tile);
        assert_close(&out.o_blnh, &whole.o_blnh, 1e-6);
        assert_close(&grads.dq_blnh, &whole_grads.dq_blnh, 2e-6);
        assert_close(&grads.dk_bmnh, &whole_grads.dk_bmnh, 2e-6);
        assert_close(&grads.dv_bmnh, &whole_grads.dv_bmnh, 2e-6);
    }
}

#[test]
fn tiles_cover_every_row_of_every_head_once() {
    for (heads, l, m, limit) in [(5, 7, 3, 1 << 20), (5, 7, 3, 2 * 7 * 3 * 4), (5, 7, 3, 2 * 3 * 4), (1, 1, 1, 0)] {
        let mut seen = vec![0; heads * l];
        for group in groups(heads, l, m, limit) {
            for head in group.head..group.head + group.heads {
                for &(row, rows) in &group.rows {
                    seen[head * l + row..head * l + row + rows].iter_mut().for_each(|n| *n += 1);
                }
            }
        }
        assert!(seen.iter().all(|&n| n == 1), "{heads} {l} {m} {limit}");
    }
}

#[test]
fn sixteen_bit_is_near_and_keeps_its_dtype() {
    let t = qkv([1, 97, 65, 2, 64]);
    let exact = Exec::cpu().run::<Attention>(&args(&t)).unwrap();
    // Relative to the largest value: a few units in the last place of each format.
    for (dtype, tolerance) in [(DType::BF16, 1.5e-2), (DType::F16, 2e-3)] {
        let cast = |t: &Tensor| t.to_dtype(dtype).unwrap();
        let low = Qkv { q: cast(&t.q), k: cast(&t.k), v: cast(&t.v), do_: cast(&t.do_) };
        let out = Attention::reference(&args(&low), dtype).unwrap();
        assert_eq!((out.o_blnh.dtype(), out.lse_bnl.dtype()), (dtype, DType::F32));
        let error = relative_error(&out.o_blnh, &exact.o_blnh);
        assert!(error > 1e-6 && error < tolerance, "{dtype:?}: {error:.2e}");
        let grads = AttentionBackward::reference(&backward_args(&low, &out), dtype).unwrap();
        let want = Exec::cpu().run::<AttentionBackward>(&backward_args(&t, &exact)).unwrap();
        for (got, want) in [(grads.dq_blnh, want.dq_blnh), (grads.dk_bmnh, want.dk_bmnh), (grads.dv_bmnh, want.dv_bmnh)]
        {
            assert_eq!(got.dtype(), dtype);
            assert_close(&got, &want, 2.0 * tolerance);
        }
    }
}

/// One key instead of several equal ones: the same result, and gradients that are the sums of theirs.
#[test]
fn a_last_key_stands_for_its_copies() {
    let exec = Exec::cpu();
    for ([b, l, m, n, h], copies) in [([2, 9, 5, 3, 32], 7), ([1, 40, 2, 2, 64], 511), ([1, 33, 121, 2, 128], 392)] {
        let t = qkv([b, l, m, n, h]);
        let repeated = |t: &Tensor| {
            let last = t.narrow(1, m - 1, 1).unwrap();
            Tensor::cat(&[vec![t.clone()], vec![last; copies - 1]].concat(), 1).unwrap()
        };
        let long = Qkv { q: t.q.clone(), k: repeated(&t.k), v: repeated(&t.v), do_: t.do_.clone() };
        let want = exec.run::<Attention>(&args(&long)).unwrap();
        let got = exec.run::<Attention>(&AttentionArgs { last_stands_for: copies, ..args(&t) }).unwrap();
        assert_close(&got.o_blnh, &want.o_blnh, 2e-6);
        assert_close(&got.lse_bnl, &want.lse_bnl, 1e-6);

        let want = exec.run::<AttentionBackward>(&backward_args(&long, &want)).unwrap();
        let args = AttentionBackwardArgs { last_stands_for: copies, ..backward_args(&t, &got) };
        let got = exec.run::<AttentionBackward>(&args).unwrap();
        let folded = |t: &Tensor| {
            let last = t.narrow(1, m - 1, copies).unwrap().sum_keepdim(1).unwrap();
            Tensor::cat(&[t.narrow(1, 0, m - 1).unwrap(), last], 1).unwrap()
        };
        // Most of the probability is on one key, where dP and delta cancel.
        assert_close(&got.dq_blnh, &want.dq_blnh, 1e-4);
        assert_close(&got.dk_bmnh, &folded(&want.dk_bmnh), 1e-4);
        assert_close(&got.dv_bmnh, &folded(&want.dv_bmnh), 1e-5);
    }
}

#[test]
fn the_gate_names_what_is_wrong() {
    let t = qkv([1, 4, 6, 2, 32]);
    let exec = Exec::cpu();
    let refused_args = |q: &Tensor, k: &Tensor, v: &Tensor| {
        refused(exec.run::<Attention>(&AttentionArgs { q_blnh: q, k_bmnh: k, v_bmnh: v, last_stands_for: 1 }))
    };
    let message = refused_args(&t.q, &normal(2, &[1, 6, 3, 32]), &t.v);
    assert!(message.starts_with("attention: k_bmnh has shape [1, 6, 3, 32]"), "{message}");
    let message = refused_args(&t.q, &t.k, &normal(2, &[1, 5, 2, 32]));
    assert!(message.contains("v_bmnh"), "{message}");
    let message = refused_args(&t.q, &t.k.to_dtype(DType::BF16).unwrap(), &t.v);
    assert!(message.contains("k_bmnh is BF16"), "{message}");
    let message = refused_args(&t.q, &normal(2, &[1, 0, 2, 32]), &normal(2, &[1, 0, 2, 32]));
    assert!(message.contains("nothing empty"), "{message}");
    let message = refused_args(&normal(1, &[4, 64]), &t.k, &t.v);
    assert!(message.contains("q_blnh"), "{message}");
    let out = exec.run::<Attention>(&args(&t)).unwrap();
    let wrong_lse = AttentionOut { lse_bnl: out.lse_bnl.transpose(1, 2).unwrap(), ..out };
    let message = refused(exec.run::<AttentionBackward>(&backward_args(&t, &wrong_lse)));
    assert!(message.contains("lse_bnl"), "{message}");
    let message = refused(exec.run::<Attention>(&AttentionArgs { last_stands_for: 0, ..args(&t) }));
    assert!(message.contains("the last key stands for none"), "{message}");
}

#[test]
fn cost_counts_both_products() {
    let t = qkv([2, 3, 5, 4, 32]);
    let out = Exec::cpu().run::<Attention>(&args(&t)).unwrap();
    let scores = (2 * 4 * 3 * 5 * 32) as f64;
    assert_eq!(Attention::cost(&args(&t)).flops, 4.0 * scores);
    assert_eq!(AttentionBackward::cost(&backward_args(&t, &out)).flops, 10.0 * scores);
}
