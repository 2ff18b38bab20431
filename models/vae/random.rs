//! Seeded random weights: a VAE of any size without a checkpoint, for demonstrations and tests.

use super::layers::Source;
use super::{Vae, VaeArch, VaeOptions};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use wan_kernels::philox::{stream, Philox};
use wan_kernels::Exec;

/// `mean + std * normal`, from a seed and a name, so that a tensor's values do not depend on which others were made
/// before. Every value is exact in bf16, so that 16-bit files hold it without loss.
pub(crate) fn seeded(seed: u64, name: &str, shape: &[usize], mean: f64, std: f64) -> Result<Tensor> {
    // FNV-1a over the name.
    let item = name.bytes().fold(0x811c_9dc5u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let normal = Philox::new(seed, stream::INIT, 0, item).normal(shape, &Device::Cpu)?;
    Ok(normal.affine(std, mean)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)?)
}

struct Random<'a> {
    seed: u64,
    arch: &'a VaeArch,
    /// Drawn there, by its own generator: fast, and other numbers on every device.
    on: Option<&'a Device>,
    made: BTreeMap<String, Tensor>,
}

impl Source for Random<'_> {
    fn take(&mut self, key: &str, shape: &[usize]) -> Result<Tensor> {
        let normal = |mean: f64, std: f64| match self.on {
            Some(device) => Ok(Tensor::randn(mean as f32, std as f32, shape, device)?),
            None => seeded(self.seed, key, shape, mean, std),
        };
        let fan_in = shape[1..].iter().product::<usize>() as f64;
        let tensor = match key {
            // The encoder's last map is scaled and shifted to the latent statistics, and the decoder's first map back,
            // so that latents have about zero mean and unit deviation.
            "conv1.weight" => self.rows(normal(0.0, fan_in.powf(-0.5))?, &self.arch.latent_std)?,
            "conv1.bias" => self.stat(&self.arch.latent_mean, shape[0])?,
            "conv2.weight" => {
                let inverse: Vec<f32> = self.arch.latent_std.iter().map(|s| 1.0 / s).collect();
                let w = normal(0.0, fan_in.powf(-0.5))?;
                let inverse = Tensor::from_vec(inverse, (1, shape[1], 1, 1, 1), w.device())?;
                w.broadcast_mul(&inverse)?
            }
            _ if key.ends_with("gamma") => normal(1.0, 0.1)?,
            _ if key.ends_with("bias") => normal(0.0, 0.05)?,
            // Behind a norm and SiLU the mean square is about 0.36; the second convolution of a block adds half as much
            // variance as the stream has.
            _ if key.ends_with("residual.6.weight") => normal(0.0, (0.5 / (0.36 * fan_in)).sqrt())?,
            _ if key.ends_with("residual.2.weight") || key.ends_with("head.2.weight") => {
                normal(0.0, (1.0 / (0.36 * fan_in)).sqrt())?
            }
            _ => normal(0.0, fan_in.powf(-0.5))?,
        };
        let rounded = tensor.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
        if self.on.is_none() {
            self.made.insert(key.to_owned(), rounded.clone());
        }
        Ok(rounded)
    }
}

impl Random<'_> {
    /// Repeats the statistics of the mean's channels for the log-variance's.
    fn stat(&self, v: &[f32], n: usize) -> Result<Tensor> {
        let v: Vec<f32> = v.iter().cycle().take(n).copied().collect();
        Ok(Tensor::from_vec(v, n, self.on.unwrap_or(&Device::Cpu))?)
    }

    fn rows(&self, w: Tensor, v: &[f32]) -> Result<Tensor> {
        let n = w.dim(0)?;
        Ok(w.broadcast_mul(&self.stat(v, n)?.reshape((n, 1, 1, 1, 1))?)?)
    }
}

/// Seeded random weights under the official keys (F32, every value exact in bf16) whose latents are near zero mean and
/// unit deviation.
pub fn random_vae(arch: &VaeArch, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut source = Random { seed, arch, on: None, made: BTreeMap::new() };
    Vae::build(arch.clone(), &Exec::cpu(), VaeOptions::default(), &mut source)?;
    Ok(source.made)
}

/// A VAE of such weights for benches, drawn where it computes.
pub fn random_vae_on(arch: &VaeArch, exec: &Exec, options: VaeOptions) -> Result<Vae> {
    let mut source = Random { seed: 0, arch, on: Some(exec.device()), made: BTreeMap::new() };
    Vae::build(arch.clone(), exec, options, &mut source)
}
