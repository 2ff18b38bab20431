//! Dropout of adapters: masks keyed by (seed, micro-step, site), so forward, recompute and backward see the same ones and
//! a resumed run repeats them.

use candle_core::{Device, Tensor};
use wan_kernels::philox::{stream, Draws, Philox};
use wan_models::adapter::{Adapter, Adapters, Dropout, Kind};
use wan_models::Result;

use super::init::name_hash;
use super::params::AdapterParams;

/// The adapters as one micro-step sees them.
pub struct StepAdapters<'a> {
    params: &'a AdapterParams,
    seed: u64,
    /// Counts micro-steps over the whole run.
    micro_step: u64,
    device: &'a Device,
}

impl<'a> StepAdapters<'a> {
    pub fn new(params: &'a AdapterParams, seed: u64, micro_step: u64, device: &'a Device) -> Self {
        Self { params, seed, micro_step, device }
    }

    /// Factors of `n` units that are dropped with probability `p`: 0, or 1/(1-p).
    fn mask(&self, draws: &mut Draws, p: f64, shape: &[usize]) -> Result<Tensor> {
        let keep = (1.0 / (1.0 - p)) as f32;
        let n: usize = shape.iter().product();
        let factors: Vec<f32> = (0..n).map(|_| if f64::from(draws.uniform_f32()) < p { 0.0 } else { keep }).collect();
        Ok(Tensor::from_vec(factors, shape, self.device)?)
    }
}

impl Adapters for StepAdapters<'_> {
    fn get(&self, site: &str) -> Option<&Adapter> {
        self.params.get(site)
    }

    fn draws_by_row(&self) -> bool {
        self.params.spec.dropout.neuron > 0.0
    }

    fn dropout(&self, site: &str, batch: usize, rows: usize) -> Result<Dropout> {
        let spec = &self.params.spec;
        let p = spec.dropout;
        if p.is_off() {
            return Ok(Dropout::default());
        }
        // The high half of the counter would only be reached after four thousand million steps.
        let philox = Philox::new(self.seed, stream::DROPOUT, self.micro_step as u32, name_hash(site));
        let mut draws = philox.draws();
        let skip = draws.uniform() < p.module;
        if skip {
            return Ok(Dropout { skip, neuron: None, rank: None });
        }
        let rank_shape: Vec<usize> = match (spec.adapter.kind, self.params.get(site)) {
            (Kind::Lora, _) => vec![batch, 1, spec.adapter.rank],
            (_, Some(_)) => match self.params.layout().sites.iter().find(|s| s.name == site) {
                Some(s) => vec![s.out_features],
                None => return Ok(Dropout::default()),
            },
            (_, None) => return Ok(Dropout::default()),
        };
        let rank = (p.rank > 0.0).then(|| self.mask(&mut draws, p.rank, &rank_shape)).transpose()?;
        let neuron_shape = [batch, rows, spec.adapter.rank];
        let neuron = (p.neuron > 0.0).then(|| self.mask(&mut draws, p.neuron, &neuron_shape)).transpose()?;
        Ok(Dropout { skip, neuron, rank })
    }
}
