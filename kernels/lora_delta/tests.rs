use super::*;
use crate::testing::{normal, refused, values};

/// The definition, number by number.
fn plain(up: &[f32], down: &[f32], [o, r, i]: [usize; 3]) -> Vec<u32> {
    let sum = |row: usize, column: usize| {
        (0..r).fold(0f32, |sum, rank| {
            let product = up[row * r + rank] * down[rank * i + column];
            sum + product
        })
    };
    (0..o * i).map(|at| sum(at / i, at % i).to_bits()).collect()
}

#[test]
fn sums_go_from_the_first_rank_to_the_last_at_any_size() {
    for [o, r, i] in [[1, 1, 1], [4, 3, 16], [5, 42, 17], [9, 64, 130], [64, 7, 33], [3, 128, 48]] {
        let (up, down) = (normal(1, &[o, r]), normal(2, &[r, i]));
        let got: Vec<u32> = values(&delta(&up, &down).unwrap()).iter().map(|v| v.to_bits()).collect();
        assert_eq!(got, plain(&values(&up), &values(&down), [o, r, i]), "[{o}, {r}] x [{r}, {i}]");
        // The tile that any processor can run has the same bits as the one of vectors.
        if (o, i) == (4, 16) {
            let portable = sums(&values(&up), &values(&down), [r, i, 0]);
            assert_eq!(portable.as_flattened().iter().map(|v| v.to_bits()).collect::<Vec<_>>(), got);
        }
    }
}

#[test]
fn rows_are_the_same_however_many_are_asked_for() {
    let (up, down) = (normal(1, &[23, 8]), normal(2, &[8, 40]));
    let whole = values(&delta(&up, &down).unwrap());
    for first in 0..23 {
        let rows = values(&delta(&up.narrow(0, first, 23 - first).unwrap(), &down).unwrap());
        assert_eq!(rows, whole[first * 40..]);
    }
}

#[test]
fn infinities_and_layouts_are_taken_as_they_are() {
    let up = Tensor::new(&[[f32::INFINITY, 1.0], [0.0, 2.0]], &Device::Cpu).unwrap();
    let down_ri = Tensor::new(&[[1f32, 0.0], [2.0, 3.0]], &Device::Cpu).unwrap();
    let got = values(&delta(&up, &down_ri).unwrap());
    assert!(got[0] == f32::INFINITY && got[1].is_nan() && got[2..] == [4.0, 6.0], "{got:?}");
    let across = values(&delta(&up, &down_ri.t().unwrap()).unwrap());
    assert_eq!(across, values(&delta(&up, &down_ri.t().unwrap().contiguous().unwrap()).unwrap()));
}

#[test]
fn what_does_not_fit_is_refused() {
    let up = normal(1, &[4, 3]);
    assert!(refused(delta(&up, &normal(2, &[2, 5]))).contains("down_ri"));
    assert!(refused(delta(&up, &normal(2, &[3]))).contains("down_ri"));
    assert!(refused(delta(&up, &normal(2, &[3, 5]).to_dtype(DType::BF16).unwrap())).contains("down_ri"));
}
