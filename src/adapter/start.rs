//! Starting from saved weights (`--network_weights`, `--resume_from`): every module and shape must be this network's.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::params::AdapterParams;
use crate::error::UserError;

/// The adapter of one module as a file holds it.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Suffix (`lora_down.weight`, `hada_w1_a`, ...) -> tensor.
    pub factors: BTreeMap<&'static str, Tensor>,
    /// `None`: the file says nothing, the scale is 1.
    pub alpha: Option<f64>,
}

/// Puts saved weights in the place of the initial ones. `label` names the file in errors.
///
/// A file saved with another scale (alpha / rank) is taken over so that it adds the same to the model: the difference
/// goes into the weights. Returns a sentence about that, if it happened.
pub fn load(params: &AdapterParams, label: &str, modules: &BTreeMap<String, Stored>) -> Result<Option<String>> {
    check_modules(params, label, modules)?;
    let layout = params.layout();
    let mut values = vec![0f32; params.len()];
    let mut rescaled = None;
    for (site, scale) in layout.sites.iter().zip(&layout.scales) {
        let stored = &modules[&site.name];
        let own = layout.of_site(&site.name).unwrap_or_default();
        for p in own {
            let t = &stored.factors[p.name];
            values[p.range.clone()].copy_from_slice(&t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
        }
        let rank = params.spec.adapter.rank as f64;
        let file_scale = match (stored.alpha, scale.alpha_is_integer) {
            (_, true) => 1.0,
            (Some(alpha), false) => alpha / rank,
            (None, false) => 1.0,
        };
        let factor = file_scale / scale.scale;
        // Files hold alpha in 16 bits too: a difference within their rounding is none.
        if (factor - 1.0).abs() > 4e-3 {
            let target = own.iter().find(|p| matches!(p.name, "lora_up.weight" | "hada_w1_a" | "lokr_w1"));
            if let Some(p) = target {
                values[p.range.clone()].iter_mut().for_each(|v| *v *= factor as f32);
            }
            rescaled.get_or_insert(file_scale);
        }
    }
    params.master().set(&(0..params.len()), &values)?;
    Ok(rescaled.map(|file| {
        format!(
            "{label} was saved with alpha/rank {file}, this run has {}: its weights were rescaled to add the same",
            layout.scales[0].scale
        )
    }))
}

fn check_modules(params: &AdapterParams, label: &str, modules: &BTreeMap<String, Stored>) -> Result<(), UserError> {
    let layout = params.layout();
    let refuse = |what: String| {
        UserError::new(format!("{label} does not fit this run: {what}"))
            .hint("give the --network_dim, --network_module and patterns it was trained with, or another file")
    };
    let own_kind = params.spec.kind_name();
    for (name, stored) in modules {
        let kind = match stored.factors.keys().next() {
            Some(k) if k.starts_with("lora_") => "lora",
            Some(k) if k.starts_with("hada_") => "loha",
            _ => "lokr",
        };
        if kind != own_kind {
            return Err(refuse(format!("it holds a {kind} network, this run trains {own_kind}")));
        }
        let Some(own) = layout.of_site(name) else {
            return Err(refuse(format!("it adapts {name}, which this run does not train")));
        };
        if let (Some(rank), "lora") = (stored.factors.get("lora_down.weight").and_then(|t| t.dim(0).ok()), kind) {
            let want = params.spec.adapter.rank;
            if rank != want {
                return Err(refuse(format!("its rank is {rank} (at {name}), this run's is {want}")));
            }
        }
        let (mut has, mut wants): (Vec<&str>, Vec<&str>) =
            (stored.factors.keys().copied().collect(), own.iter().map(|p| p.name).collect());
        has.sort_unstable();
        wants.sort_unstable();
        if has != wants {
            return Err(refuse(format!("{name} has {} there, {} here", has.join(", "), wants.join(", "))));
        }
        for p in own {
            let got = stored.factors[p.name].dims();
            if got != p.shape {
                return Err(refuse(format!("{name}.{} is {got:?} there, {:?} here", p.name, p.shape)));
            }
        }
    }
    let missing: Vec<&str> =
        layout.sites.iter().map(|s| s.name.as_str()).filter(|name| !modules.contains_key(*name)).collect();
    match missing.first() {
        None => Ok(()),
        Some(first) => Err(refuse(format!(
            "this run trains {first}{}, which it does not hold",
            if missing.len() > 1 { format!(" and {} more modules", missing.len() - 1) } else { String::new() }
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::NetworkSpec;
    use candle_core::Device;
    use wan_models::arch::Site;

    fn network(rank: usize, alpha: f64, names: &[&str]) -> AdapterParams {
        let sites = names.iter().map(|n| Site { name: n.to_string(), in_features: 6, out_features: 4 }).collect();
        AdapterParams::new(NetworkSpec::lora(rank, alpha), sites, 5, &Device::Cpu).unwrap()
    }

    fn stored(params: &AdapterParams, alpha: f64) -> BTreeMap<String, Stored> {
        let layout = params.layout();
        let of = |site: &Site| {
            let factors =
                layout.of_site(&site.name).unwrap().iter().map(|p| (p.name, params.tensor(p).unwrap().copy().unwrap()));
            Stored { factors: factors.collect(), alpha: Some(alpha) }
        };
        layout.sites.iter().map(|s| (s.name.clone(), of(s))).collect()
    }

    #[test]
    fn weights_are_taken_over_and_another_alpha_keeps_the_update() {
        let from = network(2, 2.0, &["a", "b"]);
        from.master().set(&(0..from.len()), &(0..from.len()).map(|i| i as f32).collect::<Vec<_>>()).unwrap();
        let same = network(2, 2.0, &["a", "b"]);
        assert_eq!(load(&same, "x", &stored(&from, 2.0)).unwrap(), None);
        assert_eq!(same.master().to_vec().unwrap(), from.master().to_vec().unwrap());
        // Saved with scale 2, used with scale 1/2: up is four times as large.
        let other = network(2, 1.0, &["a", "b"]);
        assert!(load(&other, "x", &stored(&from, 4.0)).unwrap().unwrap().contains("rescaled"));
        let (ours, theirs) = (other.master().to_vec().unwrap(), from.master().to_vec().unwrap());
        for p in &other.layout().params {
            let factor = if p.plus { 4.0 } else { 1.0 };
            assert!(p.range.clone().all(|i| ours[i] == factor * theirs[i]));
        }
    }

    #[test]
    fn another_network_is_refused_with_both_sides_named() {
        let file = stored(&network(2, 2.0, &["a", "b"]), 2.0);
        let text = |params: &AdapterParams| load(params, "x.safetensors", &file).unwrap_err().to_string();
        let rank = text(&network(3, 2.0, &["a", "b"]));
        assert!(rank.contains("x.safetensors") && rank.contains("rank is 2") && rank.contains("is 3"), "{rank}");
        assert!(text(&network(2, 2.0, &["a"])).contains("adapts b"));
        assert!(text(&network(2, 2.0, &["a", "b", "c", "d"])).contains("trains c and 1 more"));
    }
}
