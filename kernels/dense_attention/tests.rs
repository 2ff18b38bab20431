use super::*;
use crate::testing::{assert_close, normal, refused, values};
use crate::Exec;

fn args<'a>(q: &'a Tensor, k: &'a Tensor, v: &'a Tensor, heads: usize) -> DenseAttentionArgs<'a> {
    DenseAttentionArgs { q_bld: q, k_bmd: k, v_bmd: v, heads, scale: 0.3, bias_nr: None, out: DType::F32 }
}

/// The sum of the doc comment in f64.
fn naive(a: &DenseAttentionArgs<'_>) -> Tensor {
    let (b, l, d) = a.q_bld.dims3().unwrap();
    let (m, n) = (a.k_bmd.dim(1).unwrap(), a.heads);
    let h = d / n;
    let (q, k, v) = (values(a.q_bld), values(a.k_bmd), values(a.v_bmd));
    let bias = a.bias_nr.map(|t| (values(t), t.dim(1).unwrap()));
    let mut out = vec![0f32; b * l * d];
    for (bi, ni, li) in (0..b).flat_map(|b| (0..n).flat_map(move |n| (0..l).map(move |l| (b, n, l)))) {
        let score = |mi: usize| {
            let dot: f64 = (0..h)
                .map(|i| f64::from(q[(bi * l + li) * d + ni * h + i]) * f64::from(k[(bi * m + mi) * d + ni * h + i]))
                .sum();
            let bias = bias.as_ref().map_or(0.0, |(t, r)| f64::from(t[ni * r + r / 2 + mi - li]));
            (a.scale * dot + bias).exp()
        };
        let weights: Vec<f64> = (0..m).map(score).collect();
        let total: f64 = weights.iter().sum();
        for i in 0..h {
            let sum: f64 =
                weights.iter().enumerate().map(|(mi, w)| w * f64::from(v[(bi * m + mi) * d + ni * h + i])).sum();
            out[(bi * l + li) * d + ni * h + i] = (sum / total) as f32;
        }
    }
    Tensor::from_vec(out, (b, l, d), a.q_bld.device()).unwrap()
}

#[test]
fn it_is_the_softmax_it_claims_to_be() {
    for (b, l, m, n, h) in [(1, 1, 1, 1, 8), (2, 7, 7, 3, 5), (1, 5, 11, 2, 16)] {
        let (q, k, v) = (normal(1, &[b, l, n * h]), normal(2, &[b, m, n * h]), normal(3, &[b, m, n * h]));
        let bias = normal(4, &[n, 2 * l.max(m) + 3]);
        for bias_nr in [None, Some(&bias)] {
            let a = DenseAttentionArgs { bias_nr, ..args(&q, &k, &v, n) };
            assert_close(&Exec::cpu().run::<DenseAttention>(&a).unwrap(), &naive(&a), 2e-6);
        }
    }
}

#[test]
fn parts_of_wider_rows_are_taken_as_they_are() {
    let qkv = normal(1, &[2, 6, 3 * 8]);
    let part = |i: usize| qkv.narrow(2, 8 * i, 8).unwrap();
    let (q, k, v) = (part(0), part(1), part(2));
    let whole = |t: &Tensor| t.contiguous().unwrap();
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| Exec::cpu().run::<DenseAttention>(&args(q, k, v, 2)).unwrap();
    assert_eq!(values(&run(&q, &k, &v)), values(&run(&whole(&q), &whole(&k), &whole(&v))));
}

#[test]
fn wrong_arguments_are_named() {
    let (q, k) = (normal(1, &[1, 4, 6]), normal(2, &[1, 5, 6]));
    let run = |a: DenseAttentionArgs<'_>| refused(Exec::cpu().run::<DenseAttention>(&a));
    assert!(run(args(&q, &k, &q, 2)).contains("v_bmd"));
    assert!(run(args(&q, &k, &k, 4)).contains("4 heads"));
    for shape in [[2usize, 7], [1, 9], [2, 10]] {
        let bias = normal(3, &shape);
        assert!(
            run(DenseAttentionArgs { bias_nr: Some(&bias), ..args(&q, &k, &k, 2) }).contains("bias_nr"),
            "{shape:?}"
        );
    }
}
