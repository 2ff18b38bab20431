//! The trainable parameters: one flat fp32 master buffer, a view per parameter, and the adapters made of those views.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{bail, Context, Result};
use candle_core::{Device, Tensor};
use wan_models::adapter::{Adapter, Adapters};
use wan_models::arch::Site;

use super::flat::Flat;
use super::init;
use super::network::NetworkSpec;

/// One trainable tensor.
#[derive(Debug, Clone)]
pub struct Param {
    /// Position of its site in [`AdapterParams::sites`].
    pub site: usize,
    /// Suffix of the site's name: `lora_down.weight`, `hada_w1_a`, `lokr_w2`, ...
    pub name: &'static str,
    pub shape: [usize; 2],
    /// Its elements in the flat buffers of masters, gradients and optimizer.
    pub range: Range<usize>,
    /// Belongs to the LoRA+ group.
    pub plus: bool,
}

/// Where each parameter lies; shared by masters, gradients and optimizer.
#[derive(Debug)]
pub struct Layout {
    pub sites: Vec<Site>,
    /// By site, each site's in creation order; ranges follow one another without gaps.
    pub params: Vec<Param>,
    /// Factor on each site's adapter, and its stored alpha.
    pub scales: Vec<Scale>,
    by_site: HashMap<String, Range<usize>>,
}

/// The factor of a site's adapter, and what its file says about it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    /// alpha / rank; 1 for a LoKr with a full w2.
    pub scale: f64,
    pub alpha: f64,
    pub alpha_is_integer: bool,
}

impl Layout {
    pub fn new(sites: Vec<Site>, spec: &NetworkSpec) -> Self {
        let (mut params, mut scales, mut by_site, mut end) = (Vec::new(), Vec::new(), HashMap::new(), 0);
        for (index, site) in sites.iter().enumerate() {
            let layout = spec.adapter.layout(site.out_features, site.in_features);
            let first = params.len();
            for p in &layout.params {
                let range = end..end + p.shape[0] * p.shape[1];
                end = range.end;
                let plus = p.name == "lora_up.weight";
                params.push(Param { site: index, name: p.name, shape: p.shape, range, plus });
            }
            scales.push(Scale { scale: layout.scale, alpha: layout.alpha, alpha_is_integer: layout.alpha_is_integer });
            by_site.insert(site.name.clone(), first..params.len());
        }
        Self { sites, params, scales, by_site }
    }

    /// Number of trainable elements.
    pub fn len(&self) -> usize {
        self.params.last().map_or(0, |p| p.range.end)
    }

    pub fn is_empty(&self) -> bool {
        self.params.is_empty()
    }

    /// The parameters of a site, by its name.
    pub fn of_site(&self, site: &str) -> Option<&[Param]> {
        self.by_site.get(site).map(|r| &self.params[r.clone()])
    }

    /// Full name of a parameter: `blocks.0.self_attn.q.lora_down.weight`.
    pub fn full_name(&self, param: &Param) -> String {
        format!("{}.{}", self.sites[param.site].name, param.name)
    }
}

/// Masters and the adapters that look into them.
pub struct AdapterParams {
    pub spec: NetworkSpec,
    layout: std::sync::Arc<Layout>,
    master: Flat,
    adapters: HashMap<String, Adapter>,
}

impl AdapterParams {
    /// Adapters on `sites` with their initial values, which depend on the seed and the parameter's name alone.
    pub fn new(spec: NetworkSpec, sites: Vec<Site>, seed: u64, device: &Device) -> Result<Self> {
        let layout = Layout::new(sites, &spec);
        let master = Flat::zeros(layout.len(), device)?;
        let mut adapters = HashMap::new();
        for (index, site) in layout.sites.iter().enumerate() {
            let mut views = HashMap::new();
            for param in layout.of_site(&site.name).unwrap_or_default() {
                views.insert(param.name, master.view(&param.range, &param.shape[..])?);
            }
            let adapter = Adapter::from_params(&mut |name| views.remove(name), layout.scales[index].scale)?;
            adapters.insert(site.name.clone(), adapter);
        }
        init::fill(&layout, &spec, seed, &master)?;
        Ok(Self { spec, layout: std::sync::Arc::new(layout), master, adapters })
    }

    pub fn layout(&self) -> &std::sync::Arc<Layout> {
        &self.layout
    }

    pub fn master(&self) -> &Flat {
        &self.master
    }

    /// Number of trainable elements.
    pub fn len(&self) -> usize {
        self.layout.len()
    }

    pub fn is_empty(&self) -> bool {
        self.layout.is_empty()
    }

    /// The view of one parameter.
    pub fn tensor(&self, param: &Param) -> Result<Tensor> {
        self.master.view(&param.range, &param.shape[..])
    }

    /// Every parameter with its full name, as views of the masters, in creation order.
    pub fn named(&self) -> Result<Vec<(String, Tensor)>> {
        self.layout.params.iter().map(|p| Ok((self.layout.full_name(p), self.tensor(p)?))).collect()
    }

    /// Replaces every master; names and shapes must be exactly those of this network.
    pub fn restore<'a>(&self, get: impl Fn(&str) -> Option<(&'a [usize], &'a [f32])>) -> Result<()> {
        let mut values = vec![0f32; self.len()];
        for param in &self.layout.params {
            let name = self.layout.full_name(param);
            let (shape, data) = get(&name).with_context(|| format!("{name} is missing"))?;
            if shape != param.shape || data.len() != param.range.len() {
                bail!("{name} has shape {shape:?}, this network's has {:?}", param.shape);
            }
            values[param.range.clone()].copy_from_slice(data);
        }
        self.master.set(&(0..self.len()), &values)
    }
}

impl Adapters for AdapterParams {
    fn get(&self, site: &str) -> Option<&Adapter> {
        self.adapters.get(site)
    }
}
