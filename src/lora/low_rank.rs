//! Modules as products of two matrices, and how far their rank can be lowered.

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};

use super::svd::{self, Columns, Svd};
use crate::checkpoint::{LoraModule, ModuleOut};
use crate::error::UserError;

/// What decides the rank of each module; the limit holds in every case.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut {
    pub limit: usize,
    pub rule: Rule,
}

/// Rules over the singular values, from the largest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// As many as the limit.
    Limit,
    /// Those larger than the largest divided by this.
    Ratio(f64),
    /// As few as have this share of the sum of all.
    Cumulative(f64),
    /// As few as keep this share of the Frobenius norm.
    Frobenius(f64),
}

impl Rule {
    /// `--dynamic METHOD=VALUE`, the methods by the names that other tools give them.
    pub fn parse(text: &str) -> Result<Self, UserError> {
        let wrong = || {
            UserError::usage(format!("--dynamic `{text}` is not understood"))
                .hint("use sv_ratio=20, sv_cumulative=0.9 or sv_fro=0.97")
        };
        let (method, value) = text.split_once('=').ok_or_else(wrong)?;
        let value: f64 = value.trim().parse().map_err(|_| wrong())?;
        let share = (0.0..=1.0).contains(&value) && value > 0.0;
        match method.trim() {
            "sv_ratio" if value.is_finite() && value >= 1.0 => Ok(Rule::Ratio(value)),
            "sv_cumulative" if share => Ok(Rule::Cumulative(value)),
            "sv_fro" if share => Ok(Rule::Frobenius(value)),
            _ => Err(wrong()),
        }
    }
}

impl Cut {
    /// How many singular values are kept: at least one.
    pub fn rank(&self, s: &[f64]) -> usize {
        // As few as have `share` of the sum.
        let reaches = |share: f64, values: Vec<f64>| {
            let (mut sum, total) = (0.0, values.iter().sum::<f64>());
            let index = values.iter().position(|v| {
                sum += v;
                sum >= share * total
            });
            index.map_or(s.len(), |i| i + 1)
        };
        let by_rule = match self.rule {
            Rule::Limit => s.len(),
            Rule::Ratio(r) => s.iter().take_while(|v| **v > s[0] / r).count(),
            Rule::Cumulative(share) => reaches(share, s.to_vec()),
            // The norm's share is of its square here.
            Rule::Frobenius(share) => reaches(share * share, s.iter().map(|v| v * v).collect()),
        };
        by_rule.min(self.limit).min(s.len()).max(1)
    }
}

/// A module as `up · down`, scale 1.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[o, r]`, fp32
    pub up: Tensor,
    /// `[r, i]`, fp32
    pub down: Tensor,
}

/// Two factors of a LoRA in fp32, convolutions of one pixel flattened; `None` for other kinds of adapters.
pub fn factors(module: &LoraModule) -> Result<Option<LowRank>> {
    let get = |suffix: &str| module.factors.get(suffix).map(|t| t.to_dtype(DType::F32)?.flatten_from(1)).transpose();
    Ok(match (get("lora_up.weight")?, get("lora_down.weight")?) {
        (Some(up), Some(down)) => Some(LowRank { up, down }),
        _ => None,
    })
}

/// A cut module: its factors, its rank, and what was lost, as shares of the Frobenius norm.
#[derive(Debug, Clone)]
pub struct Reduced {
    pub factors: LowRank,
    pub rank: usize,
    /// ‖ΔW‖_F before.
    pub norm: f64,
    /// ‖ΔW − kept‖_F.
    pub lost: f64,
}

impl Reduced {
    /// From the leading triplets of a matrix of Frobenius norm `norm`, of whose square `outside` is not in them. The
    /// singular values are shared evenly among the factors, which keeps both in the range of 16-bit floats.
    fn from_svd(svd: Svd, cut: Cut, norm: f64, outside: f64) -> Result<Self> {
        let rank = cut.rank(&svd.s);
        let roots: Vec<f64> = svd.s[..rank].iter().map(|s| s.sqrt()).collect();
        let lost = (outside + svd.s[rank..].iter().map(|s| s * s).sum::<f64>()).sqrt();
        let up = svd.u.scaled(&roots).tensor()?;
        let down: Columns = svd.v.scaled(&roots);
        Ok(Self { factors: LowRank { up, down: down.tensor()?.t()?.contiguous()? }, rank, norm, lost })
    }

    pub fn share_lost(&self) -> f64 {
        if self.norm > 0.0 {
            self.lost / self.norm
        } else {
            0.0
        }
    }

    /// With alpha = rank: scale 1.
    pub fn module(&self, site: &str) -> ModuleOut {
        module_out(site, &self.factors)
    }
}

/// A product of two factors as a module with alpha = rank: scale 1.
pub fn module_out(site: &str, factors: &LowRank) -> ModuleOut {
    let rank = factors.down.dims()[0];
    ModuleOut {
        site: site.to_owned(),
        params: vec![("lora_down.weight", factors.down.clone()), ("lora_up.weight", factors.up.clone())],
        alpha: rank as f64,
    }
}

/// The best approximation of `scale · up · down` under the cut, found from the factors alone.
pub fn reduce_product(product: &LowRank, scale: f64, cut: Cut) -> Result<Reduced> {
    let svd = svd::of_product(&product.up, &product.down, scale)?;
    let norm = svd.s.iter().map(|s| s * s).sum::<f64>().sqrt();
    Reduced::from_svd(svd, cut, norm, 0.0)
}

/// A near-best approximation of a whole matrix `[o, i]` under the cut.
pub fn reduce_matrix(a: &Tensor, cut: Cut, seed: u64) -> Result<Reduced> {
    let a = a.to_dtype(DType::F32)?.contiguous()?;
    let norm = frobenius(&a)?;
    let svd = svd::randomised(&a, cut.limit, seed).context("taking a matrix apart")?;
    let inside: f64 = svd.s.iter().map(|s| s * s).sum();
    Reduced::from_svd(svd, cut, norm, (norm * norm - inside).max(0.0))
}

/// The approximation of a module of any kind under the cut.
pub fn reduce(module: &LoraModule, cut: Cut) -> Result<Reduced> {
    match factors(module)? {
        Some(product) => reduce_product(&product, module.scale(), cut),
        None => reduce_matrix(&module.delta()?, cut, 0),
    }
}

/// The norm of all numbers, summed in fp64.
pub fn frobenius(t: &Tensor) -> Result<f64> {
    use rayon::prelude::*;
    let values = t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    // Pieces of fixed size: the same sum whatever the number of threads.
    let parts: Vec<f64> =
        values.par_chunks(1 << 16).map(|c| c.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()).collect();
    Ok(parts.iter().sum::<f64>().sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use std::collections::BTreeMap;

    #[test]
    fn rules_count_singular_values() {
        let s = [8.0, 4.0, 2.0, 1.0, 0.5];
        let rank = |limit, rule| Cut { limit, rule }.rank(&s);
        assert_eq!(rank(3, Rule::Limit), 3);
        assert_eq!(rank(99, Rule::Limit), 5);
        assert_eq!(rank(99, Rule::Ratio(4.5)), 3);
        assert_eq!(rank(99, Rule::Cumulative(12.0 / 15.5)), 2);
        assert_eq!(rank(99, Rule::Frobenius((80.0f64 / 85.25).sqrt())), 2);
        assert_eq!(rank(1, Rule::Frobenius(1.0)), 1);
        assert_eq!(Cut { limit: 4, rule: Rule::Ratio(2.0) }.rank(&[0.0, 0.0]), 1, "a module of zeros keeps one");
        assert_eq!(Rule::parse("sv_fro=0.97").unwrap(), Rule::Frobenius(0.97));
        for bad in ["sv_fro", "sv_fro=0", "sv_fro=1.5", "sv_ratio=0.5", "x=1", "sv_ratio=x"] {
            assert!(Rule::parse(bad).unwrap_err().to_string().contains("sv_ratio=20"), "{bad}");
        }
    }

    /// A product of known singular values: a diagonal. What is lost is what was cut off.
    #[test]
    fn a_cut_loses_exactly_the_values_beyond_it() {
        let eye = |n: usize, m: usize| {
            let v: Vec<f32> = (0..n * m).map(|k| f32::from(u8::from(k / m == k % m))).collect();
            Tensor::from_vec(v, (n, m), &Device::Cpu).unwrap()
        };
        let diagonal = Tensor::new(&[[3.0f32], [0.1], [2.0], [1.0]], &Device::Cpu).unwrap();
        let product = LowRank { up: eye(6, 4), down: eye(4, 5).broadcast_mul(&diagonal).unwrap() };
        let cut = reduce_product(&product, 2.0, Cut { limit: 2, rule: Rule::Limit }).unwrap();
        assert!((cut.norm - 2.0 * (9.0f64 + 0.01 + 4.0 + 1.0).sqrt()).abs() < 1e-6);
        assert!((cut.lost - 2.0 * (1.01f64).sqrt()).abs() < 1e-6, "{}", cut.lost);
        let kept = cut.factors.up.matmul(&cut.factors.down).unwrap().to_vec2::<f32>().unwrap();
        for (r, row) in kept.iter().enumerate() {
            for (c, v) in row.iter().enumerate() {
                let want = if r == c && r == 0 {
                    6.0
                } else if r == c && r == 2 {
                    4.0
                } else {
                    0.0
                };
                assert!((v - want).abs() < 1e-5, "{r} {c} {v}");
            }
        }
        let whole = product.up.matmul(&product.down).unwrap();
        let dense = reduce_matrix(&(whole * 2.0).unwrap(), Cut { limit: 2, rule: Rule::Limit }, 3).unwrap();
        assert!((dense.lost - cut.lost).abs() < 1e-4, "{} {}", dense.lost, cut.lost);
    }

    #[test]
    fn other_kinds_of_adapters_are_reduced_through_their_update() {
        let t = |shape: (usize, usize), k: f32| {
            let v: Vec<f32> = (0..shape.0 * shape.1).map(|i| ((i as f32 * 0.7 + k).sin()) * 0.3).collect();
            Tensor::from_vec(v, shape, &Device::Cpu).unwrap()
        };
        let factors = BTreeMap::from([
            ("hada_w1_a", t((12, 2), 0.1)),
            ("hada_w1_b", t((2, 9), 0.2)),
            ("hada_w2_a", t((12, 2), 0.3)),
            ("hada_w2_b", t((2, 9), 0.4)),
        ]);
        let loha = LoraModule { factors, alpha: Some(1.0) };
        // The product of two matrices of rank 2 has rank 4 at most.
        let cut = reduce(&loha, Cut { limit: 4, rule: Rule::Limit }).unwrap();
        assert!(cut.share_lost() < 1e-3, "{}", cut.share_lost());
        let (got, want) = (cut.factors.up.matmul(&cut.factors.down).unwrap(), loha.delta().unwrap());
        assert!(frobenius(&(got - &want).unwrap()).unwrap() < 1e-5 * frobenius(&want).unwrap().max(1e-3));
    }
}
