//! The adapter of one site in one step: parameters and dropout together.

use candle_core::Tensor;
use wan_kernels::Exec;

use super::{Adapter, Adapters, At, Dropout, Lora, WeightDelta};
use crate::wan::GradSink;
use crate::Result;

/// What backward makes of the gradient of a linear's input.
pub enum Dx {
    /// Nothing below is trained.
    Unwanted,
    /// It is added to what other branches gave, which may be written over.
    Onto(Option<Tensor>),
}

/// An adapter that takes part in this step.
pub struct Active<'a> {
    adapter: &'a Adapter,
    site: String,
    dropout: Dropout,
}

impl<'a> Active<'a> {
    /// `None` where the site has no adapter, or module dropout skips it in this step.
    pub fn find(adapters: &'a dyn Adapters, site: &str, x_bli: &Tensor) -> Result<Option<Self>> {
        let Some(adapter) = adapters.get(site) else { return Ok(None) };
        let (batch, rows, _) = x_bli.dims3()?;
        let dropout = adapters.dropout(site, batch, rows)?;
        match dropout.skip {
            true => Ok(None),
            false => Ok(Some(Self { adapter, site: site.to_string(), dropout })),
        }
    }

    /// The module name, for the gradient sink.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// The LoRA, where it is one and nothing masks its low-rank activation in this step.
    pub fn plain_lora(&self) -> Option<&'a Lora> {
        match (self.adapter, &self.dropout.neuron, &self.dropout.rank) {
            (Adapter::Lora(lora), None, None) => Some(lora),
            _ => None,
        }
    }

    fn at<'b>(&'b self, exec: &'b Exec) -> At<'b> {
        At { exec, site: &self.site, dropout: &self.dropout }
    }

    /// `Δy` `[B, L, o]`, and for a LoRA the low-rank activation that backward can use.
    pub fn forward(&self, exec: &Exec, x_bli: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        Ok(match self.adapter {
            Adapter::Lora(a) => {
                let (delta, h) = a.forward(&self.at(exec), x_bli)?;
                (delta, Some(h))
            }
            Adapter::Loha(a) => (a.forward(&self.at(exec), x_bli)?, None),
            Adapter::Lokr(a) => (a.forward(&self.at(exec), x_bli)?, None),
        })
    }

    /// `h` is what forward returned; where it was not kept it is computed again, to the same bits. Returns the adapter's
    /// share of `dx`, onto the base, where that is wanted.
    pub fn backward(
        &self,
        exec: &Exec,
        x_bli: &Tensor,
        h: Option<&Tensor>,
        dy_blo: &Tensor,
        dx: Dx,
        sink: &mut dyn GradSink,
    ) -> Result<Option<Tensor>> {
        let at = self.at(exec);
        match self.adapter {
            Adapter::Lora(a) => {
                let h = match h {
                    Some(h) => h.clone(),
                    None => a.down_scaled(&at, x_bli)?,
                };
                a.backward(&at, x_bli, &h, dy_blo, dx, sink)
            }
            Adapter::Loha(a) => a.backward(&at, x_bli, dy_blo, dx, sink),
            Adapter::Lokr(a) => a.backward(&at, x_bli, dy_blo, dx, sink),
        }
    }
}
