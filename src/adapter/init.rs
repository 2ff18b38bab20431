//! How adapters start: random values keyed by the seed and the parameter's name, so a parameter starts the same whatever
//! other modules are trained beside it.

use anyhow::Result;
use wan_kernels::philox::{stream, Philox};
use wan_models::adapter::Init;

use super::flat::Flat;
use super::network::NetworkSpec;
use super::params::Layout;

/// Fills every master.
pub fn fill(layout: &Layout, spec: &NetworkSpec, seed: u64, master: &Flat) -> Result<()> {
    for (index, site) in layout.sites.iter().enumerate() {
        let inits = spec.adapter.layout(site.out_features, site.in_features).params;
        let params = layout.of_site(&layout.sites[index].name).unwrap_or_default();
        for (param, init) in params.iter().zip(inits) {
            let mut values = vec![0f32; param.range.len()];
            let philox = Philox::new(seed, stream::INIT, 0, name_hash(&layout.full_name(param)));
            match init.init {
                Init::Zeros => {}
                Init::Normal(std) => {
                    philox.fill_normal(&mut values);
                    values.iter_mut().for_each(|v| *v *= std as f32);
                }
                Init::Uniform(bound) => {
                    philox.fill_uniform(&mut values);
                    values.iter_mut().for_each(|v| *v = (2.0 * *v - 1.0) * bound as f32);
                }
            }
            master.set(&param.range, &values)?;
        }
    }
    Ok(())
}

/// FNV-1a, 32 bits.
pub(super) fn name_hash(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193))
}
