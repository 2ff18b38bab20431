//! The little linear algebra that changing the rank of a LoRA takes, in fp64 on columns: QR by modified Gram-Schmidt done
//! twice, the SVD of a small square matrix by one-sided Jacobi rotations (Hestenes; slow for large matrices, and as
//! accurate as it gets), and a randomised SVD for large ones (Halko, Martinsson, Tropp 2011, arXiv 0909.4061).

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use wan_kernels::philox::Philox;

type Result<T> = candle_core::Result<T>;

/// A matrix by columns.
#[derive(Debug, Clone, PartialEq)]
pub struct Columns {
    pub rows: usize,
    pub columns: Vec<Vec<f64>>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

impl Columns {
    pub fn zeros(rows: usize, width: usize) -> Self {
        Self { rows, columns: vec![vec![0.0; rows]; width] }
    }

    /// A tensor `[rows, width]` of any float dtype.
    pub fn of(t: &Tensor) -> Result<Self> {
        let (rows, _) = t.dims2()?;
        let columns = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.t()?.contiguous()?.to_vec2::<f64>()?;
        Ok(Self { rows, columns })
    }

    /// As an fp32 tensor `[rows, width]`.
    pub fn tensor(&self) -> Result<Tensor> {
        let flat: Vec<f32> = self.columns.iter().flatten().map(|v| *v as f32).collect();
        Tensor::from_vec(flat, (self.columns.len(), self.rows), &Device::Cpu)?.t()?.contiguous()
    }

    pub fn width(&self) -> usize {
        self.columns.len()
    }

    /// `self · other`.
    pub fn matmul(&self, other: &Columns) -> Columns {
        let column = |weights: &Vec<f64>| {
            let mut out = vec![0.0; self.rows];
            for (own, w) in self.columns.iter().zip(weights) {
                out.iter_mut().zip(own).for_each(|(o, x)| *o += w * x);
            }
            out
        };
        Columns { rows: self.rows, columns: other.columns.par_iter().map(column).collect() }
    }

    pub fn transposed(&self) -> Columns {
        let columns = (0..self.rows).map(|r| self.columns.iter().map(|c| c[r]).collect()).collect();
        Columns { rows: self.width(), columns }
    }

    /// Column `k` times `factors[k]`; columns beyond the factors are dropped.
    pub fn scaled(mut self, factors: &[f64]) -> Columns {
        self.columns.truncate(factors.len());
        self.columns.iter_mut().zip(factors).for_each(|(c, f)| c.iter_mut().for_each(|v| *v *= f));
        self
    }
}

/// `a = q · r` with orthonormal columns in `q` and an upper triangular `r`. Columns that depend on those before them
/// become zero in `q`.
pub fn qr(a: Columns) -> (Columns, Columns) {
    let (q, r1) = gram_schmidt(a);
    // One pass leaves the columns orthogonal up to their condition number; a second one, up to rounding.
    let (q, r2) = gram_schmidt(q);
    let r = r2.matmul(&r1);
    (q, r)
}

fn gram_schmidt(mut a: Columns) -> (Columns, Columns) {
    let n = a.width();
    let mut r = Columns::zeros(n, n);
    let sizes: Vec<f64> = a.columns.iter().map(|c| norm(c)).collect();
    for k in 0..n {
        let (done, rest) = a.columns.split_at_mut(k + 1);
        let own = &mut done[k];
        let length = norm(own);
        // What is left of a dependent column is rounding.
        if length <= 1e-13 * sizes[k] || length == 0.0 {
            own.fill(0.0);
            continue;
        }
        own.iter_mut().for_each(|v| *v /= length);
        r.columns[k][k] = length;
        let own = &*own;
        rest.par_iter_mut().zip(&mut r.columns[k + 1..]).for_each(|(other, r)| {
            let along = dot(own, other);
            r[k] = along;
            other.iter_mut().zip(own).for_each(|(o, x)| *o -= along * x);
        });
    }
    (a, r)
}

/// `a = u · diag(s) · vᵀ`, `s` falling.
#[derive(Debug, Clone)]
pub struct Svd {
    pub u: Columns,
    pub s: Vec<f64>,
    pub v: Columns,
}

/// The SVD of a matrix with at least as many rows as columns; meant for small ones.
pub fn svd(a: &Columns) -> Svd {
    let n = a.width();
    let mut u = a.clone();
    let mut v = Columns::zeros(n, n);
    (0..n).for_each(|k| v.columns[k][k] = 1.0);
    const SWEEPS: usize = 60;
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for p in 0..n {
            for q in p + 1..n {
                let (alpha, beta) = (dot(&u.columns[p], &u.columns[p]), dot(&u.columns[q], &u.columns[q]));
                let gamma = dot(&u.columns[p], &u.columns[q]);
                if gamma.abs() <= 1e-15 * (alpha * beta).sqrt() || gamma == 0.0 {
                    continue;
                }
                rotated = true;
                let zeta = (beta - alpha) / (2.0 * gamma);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                let s = c * t;
                for m in [&mut u.columns, &mut v.columns] {
                    let (left, right) = m.split_at_mut(q);
                    for (x, y) in left[p].iter_mut().zip(&mut right[0]) {
                        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                    }
                }
            }
        }
        if !rotated {
            break;
        }
    }
    let sizes: Vec<f64> = u.columns.iter().map(|c| norm(c)).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| sizes[*b].total_cmp(&sizes[*a]));
    let pick = |m: &Columns| Columns { rows: m.rows, columns: order.iter().map(|k| m.columns[*k].clone()).collect() };
    let s: Vec<f64> = order.iter().map(|k| sizes[*k]).collect();
    let unit: Vec<f64> = s.iter().map(|s| if *s > 0.0 { 1.0 / s } else { 0.0 }).collect();
    Svd { u: pick(&u).scaled(&unit), s, v: pick(&v) }
}

/// The SVD of `scale · up · down` (`[o, r]` and `[r, i]`), exact, from the factors alone: the work is that of `r` columns.
pub fn of_product(up: &Tensor, down: &Tensor, scale: f64) -> Result<Svd> {
    let (q_up, r_up) = qr(Columns::of(up)?);
    let (q_down, r_down) = qr(Columns::of(&down.t()?)?);
    let mut core = r_up.matmul(&r_down.transposed());
    core.columns.iter_mut().flatten().for_each(|v| *v *= scale);
    let Svd { u, s, v } = svd(&core);
    Ok(Svd { u: q_up.matmul(&u), s, v: q_down.matmul(&v) })
}

/// Columns drawn beside those asked for, and how often the spectrum is sharpened: the error is then that of the best
/// approximation within a per cent, also where singular values fall slowly.
const OVERSAMPLE: usize = 16;
const POWER: usize = 3;

/// The leading `rank` singular triplets of a large fp32 matrix `[o, i]` (fewer where a side is shorter). Equal seeds give
/// equal results.
pub fn randomised(a: &Tensor, rank: usize, seed: u64) -> Result<Svd> {
    let (o, i) = a.dims2()?;
    let width = (rank + OVERSAMPLE).min(o.min(i));
    let draws = Philox::new(seed, 0x5f5d, 0, 0).normal(&[i, width], &Device::Cpu).map_err(candle_core::Error::wrap)?;
    let a_t = a.t()?;
    let mut q = orthonormal(&a.matmul(&draws)?)?;
    for _ in 0..POWER {
        let z = orthonormal(&a_t.matmul(&q)?)?;
        q = orthonormal(&a.matmul(&z)?)?;
    }
    // a ≈ q · (aᵀq)ᵀ, and aᵀq = q2 · r, so that a ≈ q · rᵀ · q2ᵀ.
    let (q2, r) = qr(Columns::of(&a_t.matmul(&q)?)?);
    let Svd { u, mut s, v } = svd(&r.transposed());
    s.truncate(rank);
    let keep = vec![1.0; s.len()];
    Ok(Svd { u: Columns::of(&q)?.matmul(&u.scaled(&keep)), s, v: q2.matmul(&v.scaled(&keep)) })
}

fn orthonormal(t: &Tensor) -> Result<Tensor> {
    qr(Columns::of(t)?).0.tensor()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(rows: usize, width: usize, item: u32) -> Tensor {
        Philox::new(7, 1, 0, item).normal(&[rows, width], &Device::Cpu).unwrap()
    }

    fn max_diff(a: &Columns, b: &Columns) -> f64 {
        assert_eq!((a.rows, a.width()), (b.rows, b.width()));
        a.columns.iter().flatten().zip(b.columns.iter().flatten()).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
    }

    fn assert_orthonormal(q: &Columns) {
        let gram = q.transposed().matmul(q);
        let mut unit = Columns::zeros(q.width(), q.width());
        (0..q.width()).for_each(|k| unit.columns[k][k] = 1.0);
        assert!(max_diff(&gram, &unit) < 1e-12, "{}", max_diff(&gram, &unit));
    }

    fn rebuilt(svd: &Svd) -> Columns {
        svd.u.clone().scaled(&svd.s).matmul(&svd.v.transposed())
    }

    #[test]
    fn qr_rebuilds_its_matrix_and_survives_dependent_columns() {
        let mut a = Columns::of(&normal(97, 9, 0)).unwrap();
        let (q, r) = qr(a.clone());
        assert_orthonormal(&q);
        assert!(max_diff(&q.matmul(&r), &a) < 1e-12);
        assert!((0..9).all(|k| r.columns[k][k + 1..].iter().all(|v| *v == 0.0)), "upper triangular");
        a.columns[4] = a.columns[1].iter().zip(&a.columns[2]).map(|(x, y)| 2.0 * x - y).collect();
        a.columns[7].fill(0.0);
        let (q, r) = qr(a.clone());
        assert!(max_diff(&q.matmul(&r), &a) < 1e-10);
        assert!(q.columns[4].iter().chain(&q.columns[7]).all(|v| *v == 0.0));
    }

    #[test]
    fn svd_of_known_matrices() {
        // [[3, 0], [4, 5]] has the singular values sqrt(45) and sqrt(5).
        let a = Columns { rows: 2, columns: vec![vec![3.0, 4.0], vec![0.0, 5.0]] };
        let found = svd(&a);
        assert!((found.s[0] - 45f64.sqrt()).abs() < 1e-14 && (found.s[1] - 5f64.sqrt()).abs() < 1e-14);
        assert!(max_diff(&rebuilt(&found), &a) < 1e-14);
        let zero = svd(&Columns::zeros(3, 3));
        assert_eq!(zero.s, [0.0; 3]);
        let a = Columns::of(&normal(33, 17, 1)).unwrap();
        let found = svd(&a);
        assert_orthonormal(&found.u);
        assert_orthonormal(&found.v);
        assert!(found.s.windows(2).all(|w| w[0] >= w[1]));
        assert!(max_diff(&rebuilt(&found), &a) < 1e-12);
    }

    #[test]
    fn a_product_is_taken_apart_without_being_formed() {
        let (up, down) = (normal(61, 5, 2), normal(5, 103, 3));
        let found = of_product(&up, &down, 0.5).unwrap();
        assert_orthonormal(&found.u);
        let want = Columns::of(&(up.matmul(&down).unwrap() * 0.5).unwrap()).unwrap();
        assert!(max_diff(&rebuilt(&found), &want) < 1e-5, "one fp32 product apart");
    }

    /// Against the exact SVD, on the spectrum that is hardest for it: one that hardly falls.
    #[test]
    fn the_randomised_svd_is_as_good_as_the_best_within_a_per_cent() {
        for (rows, width, rank) in [(97, 130, 8), (130, 97, 24), (40, 12, 20)] {
            let a = normal(rows, width, 9);
            let columns = Columns::of(&a).unwrap();
            let tall = if rows >= width { columns.clone() } else { columns.transposed() };
            let exact = svd(&tall).s;
            let total: f64 = exact.iter().map(|s| s * s).sum();
            let best = exact.iter().skip(rank).map(|s| s * s).sum::<f64>();
            let found = randomised(&a, rank, 1).unwrap();
            let kept = rank.min(width);
            assert_eq!(found.s.len(), kept);
            let off = max_diff(&rebuilt(&found), &columns);
            let error: f64 = {
                let r = rebuilt(&found);
                r.columns.iter().flatten().zip(columns.columns.iter().flatten()).map(|(x, y)| (x - y).powi(2)).sum()
            };
            assert!(error <= 1.02 * best + 1e-6 * total, "{rows}x{width}: {error} against {best} ({off})");
            let of_values = total - found.s.iter().map(|s| s * s).sum::<f64>();
            assert!((of_values - error).abs() < 1e-4 * total, "the error follows from the values: {of_values} {error}");
            let again = randomised(&a, rank, 1).unwrap();
            assert_eq!(again.s, found.s);
        }
    }
}
