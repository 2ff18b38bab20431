//! Random numbers as files of the real size: checkpoints and LoRAs for what only those show.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_core::Device;
use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;
use wan_kernels::philox::Philox;
use wan_models::arch::WanArch;
use wan_models::keys;

use crate::fsio::{write_safetensors, TensorOut};

/// Writes every tensor of the architecture in fp16 under its official name: matrices N(0, 0.012²), norms near 1, the
/// rest near 0. All tensors of a kind are the same random numbers, so little memory makes a large file.
pub fn write(arch: &WanArch, path: &Path) -> Result<()> {
    let expected = keys::expected(arch);
    let elements = |shape: &[usize]| shape.iter().product::<usize>();
    let largest = expected.iter().map(|e| elements(&e.shape)).max().unwrap_or(1);
    let pool = |stream: u32, mean: f32, deviation: f32, count: usize| -> Result<Vec<u8>> {
        let normal = Philox::new(1, stream, 0, 0).normal(&[count], &Device::Cpu)?.to_vec1::<f32>()?;
        let values: Vec<f16> = normal.into_iter().map(|x| f16::from_f32(mean + deviation * x)).collect();
        Ok(bytemuck::cast_slice(values.reinterpret_cast()).to_vec())
    };
    let widest = expected.iter().filter(|e| e.shape.len() == 1).map(|e| e.shape[0]).max().unwrap_or(1);
    let matrices = pool(0, 0.0, 0.012, largest)?;
    let (norms, biases) = (pool(1, 1.0, 0.1, widest)?, pool(2, 0.0, 0.02, widest)?);
    let tensors = expected.iter().map(|e| {
        let from = match e.shape.len() {
            1 if e.key.ends_with("bias") => &biases,
            1 => &norms,
            _ => &matrices,
        };
        let data = Cow::Borrowed(&from[..2 * elements(&e.shape)]);
        TensorOut { name: e.key.clone(), dtype: Dtype::F16, shape: e.shape.clone(), data }
    });
    write_safetensors(path, tensors.collect(), &BTreeMap::new())
}

/// Writes a LoRA for every linear of the blocks in the form of the Lightning files: fp32 factors under
/// `diffusion_model.…`, an alpha of 8. All modules are the same random numbers.
pub fn write_lora(arch: &WanArch, rank: usize, path: &Path) -> Result<()> {
    let sites: Vec<_> = (0..arch.num_layers).flat_map(|i| arch.block_sites(i)).collect();
    let widest = sites.iter().map(|s| s.in_features.max(s.out_features)).max().unwrap_or(1);
    let normal = Philox::new(2, 0, 0, 0).normal(&[rank * widest], &Device::Cpu)?;
    let pool: Vec<u8> = bytemuck::cast_slice(&(normal * 0.01)?.to_vec1::<f32>()?).to_vec();
    let alpha = 8f32.to_le_bytes();
    let tensors = sites.iter().flat_map(|site| {
        let name = |suffix: &str| format!("diffusion_model.{}.{suffix}", site.name);
        let (i, o) = (site.in_features, site.out_features);
        [
            (name("lora_down.weight"), vec![rank, i], &pool[..4 * rank * i]),
            (name("lora_up.weight"), vec![o, rank], &pool[..4 * rank * o]),
            (name("alpha"), vec![], &alpha[..]),
        ]
    });
    let out = |(name, shape, data)| TensorOut { name, dtype: Dtype::F32, shape, data: Cow::Borrowed(data) };
    write_safetensors(path, tensors.map(out).collect(), &BTreeMap::new())
}
