//! Seeded random weights: a VAE of any size without a checkpoint, for demonstrations and tests.

use super::layers::Source;
use super::{Vae, VaeArch, VaeOptions};
use crate::Result;
use candle_core::{Device, Tensor};
use half::bf16;
use std::collections::BTreeMap;
use wan_kernels::Exec;

/// Normal numbers from a seed and a name, so that a tensor's values do not depend on which others were made before.
pub(crate) struct Normals {
    state: u64,
    spare: Option<f64>,
}

impl Normals {
    pub fn new(seed: u64, name: &str) -> Self {
        // FNV-1a over the name.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3));
        Self { state: hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), spare: None }
    }

    /// SplitMix64, to (0, 1].
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Box-Muller.
    pub fn next(&mut self) -> f64 {
        if let Some(n) = self.spare.take() {
            return n;
        }
        let r = (-2.0 * self.uniform().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        self.spare = Some(r * sin);
        r * cos
    }

    /// A tensor of `mean + std * normal`, every value exact in bf16, so that 16-bit files hold it without loss.
    pub fn tensor(&mut self, shape: &[usize], mean: f64, std: f64) -> Result<Tensor> {
        let n = shape.iter().product();
        let data: Vec<f32> = (0..n).map(|_| bf16::from_f64(mean + std * self.next()).to_f32()).collect();
        Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
    }
}

struct Random<'a> {
    seed: u64,
    arch: &'a VaeArch,
    made: BTreeMap<String, Tensor>,
}

impl Source for Random<'_> {
    fn take(&mut self, key: &str, shape: &[usize]) -> Result<Tensor> {
        let mut normals = Normals::new(self.seed, key);
        let fan_in = shape[1..].iter().product::<usize>() as f64;
        let tensor = match key {
            // The encoder's last map is scaled and shifted to the latent statistics, and the decoder's first map back,
            // so that latents have about zero mean and unit deviation.
            "conv1.weight" => self.rows(normals.tensor(shape, 0.0, fan_in.powf(-0.5))?, &self.arch.latent_std)?,
            "conv1.bias" => self.stat(&self.arch.latent_mean, shape[0])?,
            "conv2.weight" => {
                let inverse: Vec<f32> = self.arch.latent_std.iter().map(|s| 1.0 / s).collect();
                let w = normals.tensor(shape, 0.0, fan_in.powf(-0.5))?;
                w.broadcast_mul(&Tensor::from_vec(inverse, (1, shape[1], 1, 1, 1), &Device::Cpu)?)?
            }
            _ if key.ends_with("gamma") => normals.tensor(shape, 1.0, 0.1)?,
            _ if key.ends_with("bias") => normals.tensor(shape, 0.0, 0.05)?,
            // Behind a norm and SiLU the mean square is about 0.36; the second convolution of a block adds half as much
            // variance as the stream has.
            _ if key.ends_with("residual.6.weight") => normals.tensor(shape, 0.0, (0.5 / (0.36 * fan_in)).sqrt())?,
            _ if key.ends_with("residual.2.weight") || key.ends_with("head.2.weight") => {
                normals.tensor(shape, 0.0, (1.0 / (0.36 * fan_in)).sqrt())?
            }
            _ => normals.tensor(shape, 0.0, fan_in.powf(-0.5))?,
        };
        let rounded = tensor.to_dtype(candle_core::DType::BF16)?.to_dtype(candle_core::DType::F32)?;
        self.made.insert(key.to_owned(), rounded.clone());
        Ok(rounded)
    }
}

impl Random<'_> {
    /// Repeats the statistics of the mean's channels for the log-variance's.
    fn stat(&self, v: &[f32], n: usize) -> Result<Tensor> {
        let v: Vec<f32> = v.iter().cycle().take(n).copied().collect();
        Ok(Tensor::from_vec(v, n, &Device::Cpu)?)
    }

    fn rows(&self, w: Tensor, v: &[f32]) -> Result<Tensor> {
        let n = w.dim(0)?;
        Ok(w.broadcast_mul(&self.stat(v, n)?.reshape((n, 1, 1, 1, 1))?)?)
    }
}

/// Seeded random weights under the official keys (F32, every value exact in bf16) whose latents are near zero mean and
/// unit deviation.
pub fn random_vae(arch: &VaeArch, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut source = Random { seed, arch, made: BTreeMap::new() };
    Vae::build(arch.clone(), &Exec::cpu(), VaeOptions::default(), &mut source)?;
    Ok(source.made)
}
