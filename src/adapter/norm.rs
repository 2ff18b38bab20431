//! Max-norm regularisation (`--scale_weight_norms`): a LoRA update whose Frobenius norm has grown beyond the limit is
//! scaled back to it, both factors alike.

use anyhow::Result;

use super::params::AdapterParams;

/// What one application did, over all sites.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct NormReport {
    pub keys_scaled: usize,
    /// Norms after scaling; below half the limit they count as half the limit, as the old tool reports them.
    pub mean: f64,
    pub max: f64,
}

/// Brings ‖scale · up · down‖ of every site to at most `limit`.
pub fn apply(params: &AdapterParams, limit: f64) -> Result<NormReport> {
    let layout = params.layout().clone();
    params.master().edit(|all| {
        let mut report = NormReport::default();
        for (site, scale) in layout.sites.iter().zip(&layout.scales) {
            let Some([down, up]) = layout.of_site(&site.name) else { continue };
            let norm = scale.scale * product_norm(&all[up.range.clone()], &all[down.range.clone()], down.shape[0]);
            let counted = norm.max(limit / 2.0);
            let ratio = counted.min(limit) / counted;
            if ratio != 1.0 {
                let factor = ratio.sqrt() as f32;
                all[down.range.clone()].iter_mut().for_each(|v| *v *= factor);
                all[up.range.clone()].iter_mut().for_each(|v| *v *= factor);
                report.keys_scaled += 1;
            }
            report.mean += counted * ratio / layout.sites.len() as f64;
            report.max = report.max.max(counted * ratio);
        }
        report
    })
}

/// ‖up · down‖ without forming the product: the trace of (upᵀup)(down downᵀ), both `[r, r]`.
fn product_norm(up_or: &[f32], down_ri: &[f32], rank: usize) -> f64 {
    let width = down_ri.len() / rank;
    let mut trace = 0.0;
    for a in 0..rank {
        for b in a..rank {
            let down: f64 =
                (0..width).map(|i| f64::from(down_ri[a * width + i]) * f64::from(down_ri[b * width + i])).sum();
            let up: f64 = up_or.chunks_exact(rank).map(|row| f64::from(row[a]) * f64::from(row[b])).sum();
            trace += up * down * if a == b { 1.0 } else { 2.0 };
        }
    }
    // Rounding can leave a product of nothing slightly negative.
    trace.max(0.0).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::NetworkSpec;
    use candle_core::Device;
    use wan_models::arch::Site;

    #[test]
    fn updates_are_scaled_back_to_the_limit_and_no_further() {
        let site = |name: &str| Site { name: name.into(), in_features: 5, out_features: 7 };
        let params =
            AdapterParams::new(NetworkSpec::lora(3, 6.0), vec![site("a"), site("b")], 1, &Device::Cpu).unwrap();
        let up = &params.layout().of_site("a").unwrap()[1];
        let values: Vec<f32> = (0..21).map(|i| (i as f32 - 9.0) / 4.0).collect();
        params.master().set(&up.range, &values).unwrap();
        let norm = |name: &str| {
            let [down, up] = params.layout().of_site(name).unwrap() else { unreachable!() };
            let product = params.tensor(up).unwrap().matmul(&params.tensor(down).unwrap()).unwrap();
            2.0 * product.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt()
        };
        let before = norm("a");
        assert!(before > 1.0);
        assert_eq!(apply(&params, 2.0 * f64::from(before)).unwrap().keys_scaled, 0);
        assert_eq!(norm("a"), before);
        let report = apply(&params, 1.0).unwrap();
        assert_eq!(report.keys_scaled, 1);
        assert!((norm("a") - 1.0).abs() < 1e-5, "{}", norm("a"));
        assert_eq!(norm("b"), 0.0);
        assert!((report.max - 1.0).abs() < 1e-9 && (report.mean - 0.75).abs() < 1e-9, "{report:?}");
    }
}
