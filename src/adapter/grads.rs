//! Gradients of all adapters in one flat fp32 buffer with the layout of the masters. `add` is `+=`: accumulation over
//! micro-batches is not clearing in between.

use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor};
use wan_models::wan::GradSink;
use wan_models::Error;

use super::flat::{add_assign, Flat};
use super::params::Layout;

pub struct Grads {
    layout: Arc<Layout>,
    flat: Flat,
}

impl Grads {
    pub fn new(layout: Arc<Layout>, device: &Device) -> Result<Self> {
        let flat = Flat::zeros(layout.len(), device)?;
        Ok(Self { layout, flat })
    }

    pub fn flat(&self) -> &Flat {
        &self.flat
    }

    pub fn clear(&self) -> Result<()> {
        self.flat.clear()
    }

    /// The gradient of one parameter, by full name; for tests and reports.
    pub fn get(&self, full_name: &str) -> Result<Option<Tensor>> {
        let hit = self.layout.params.iter().find(|p| self.layout.full_name(p) == full_name);
        hit.map(|p| self.flat.view(&p.range, &p.shape[..])).transpose()
    }
}

impl GradSink for Grads {
    fn add(&mut self, site: &str, param: &'static str, grad: &Tensor) -> wan_models::Result<()> {
        let unknown = || Error::Invalid { model: "adapter", what: format!("{site}.{param} is not trained") };
        let of_site = self.layout.of_site(site).ok_or_else(unknown)?;
        let p = of_site.iter().find(|p| p.name == param).ok_or_else(unknown)?;
        if grad.dims() != p.shape {
            let (key, got) = (format!("{site}.{param}"), grad.dims().to_vec());
            return Err(Error::WeightShape { model: "adapter", key, got, want: p.shape.to_vec() });
        }
        let view = self.flat.view(&p.range, &p.shape[..]).map_err(candle_core::Error::wrap)?;
        Ok(add_assign(&view, grad)?)
    }
}
