//! Random weights in a real model's shapes: on a card, for measuring without any file; and as a checkpoint, for what only a
//! file of the real size shows.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;
use wan_kernels::fp8;
use wan_kernels::gpu::Gpu;
use wan_kernels::philox::Philox;
use wan_models::arch::WanArch;
use wan_models::keys;
use wan_models::linear::Weight;
use wan_models::wan::{BlockWeights, WanWeights};

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

/// Random weights of the model's shapes, made on the card: matrices N(0, 1/inputs), blocks' linears in fp8 with
/// 16-bit scales; blocks that will stream go to host memory.
pub fn on_card(
    gpu: &Gpu,
    arch: &WanArch,
    compute: DType,
    streamed: &[usize],
    fast: bool,
) -> anyhow::Result<(WanWeights, Vec<BlockWeights>)> {
    let device = gpu.device();
    let normal = |shape: &[usize], key: &str| -> wan_models::Result<Tensor> {
        let (mean, std) = match shape.len() {
            1 if key.ends_with("bias") => (0.0, 0.02),
            1 => (1.0, 0.1),
            _ if key.ends_with("modulation") => (0.0, 0.1),
            _ => (0.0, 1.0 / (shape[1..].iter().product::<usize>() as f32).sqrt()),
        };
        Ok(Tensor::randn(mean, std, shape, &device)?.to_dtype(compute)?)
    };
    let shapes: BTreeMap<String, Vec<usize>> = keys::expected(arch).into_iter().map(|k| (k.key, k.shape)).collect();
    let mut get = |key: &str| -> wan_models::Result<Weight> {
        let shape = shapes.get(key).cloned().unwrap_or_default();
        let dense = normal(&shape, key)?;
        let linear = key.starts_with("blocks.") && shape.len() == 2;
        Ok(match linear {
            true if fast => Weight::Fp8Fast(fp8::Weight::quantize(&dense, fp8::Granularity::Block)?),
            true => Weight::Fp8(fp8::Weight::quantize(&dense, fp8::Granularity::Block)?),
            false => Weight::Dense(dense),
        })
    };
    let rest = WanWeights::from_getter(arch, &mut get)?;
    let mut blocks = Vec::with_capacity(arch.num_layers);
    for index in 0..arch.num_layers {
        let block = BlockWeights::from_getter(arch, index, &mut get)?;
        blocks.push(match streamed.contains(&index) {
            true => block.map(&mut |t| Ok(t.to_device(&Device::Cpu)?))?,
            false => block,
        });
    }
    Ok((rest, blocks))
}
