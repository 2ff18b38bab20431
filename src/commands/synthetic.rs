//! Random weights in a real model's shapes, on a card: for measuring without any file.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use wan_kernels::{fp8, Exec};
use wan_models::arch::WanArch;
use wan_models::keys;
use wan_models::linear::{Products, Weight};
use wan_models::wan::{BlockWeights, WanWeights};

/// Random weights of the model's shapes, made on the card: matrices N(0, 1/inputs), blocks' linears in fp8 with 16-bit
/// scales where `fp8` says so, and as `products` need them; blocks that will stream go to host memory. The same numbers
/// after the same seed.
pub fn on_card(
    exec: &Exec,
    arch: &WanArch,
    streamed: &[usize],
    (fp8, products): (bool, Products),
) -> anyhow::Result<(WanWeights, Vec<BlockWeights>)> {
    let normal = |shape: &[usize], key: &str| -> wan_models::Result<Tensor> {
        let (mean, std) = match shape.len() {
            1 if key.ends_with("bias") => (0.0, 0.02),
            1 => (1.0, 0.1),
            _ if key.ends_with("modulation") => (0.0, 0.1),
            _ => (0.0, 1.0 / (shape[1..].iter().product::<usize>() as f32).sqrt()),
        };
        // Rounded by our own kernel: candle's would have to be translated for the card first.
        Ok(exec.cast(&Tensor::randn(mean, std, shape, exec.device())?)?)
    };
    let shapes: BTreeMap<String, Vec<usize>> = keys::expected(arch).into_iter().map(|k| (k.key, k.shape)).collect();
    let mut get = |key: &str| -> wan_models::Result<Weight> {
        let shape = shapes.get(key).cloned().unwrap_or_default();
        let dense = normal(&shape, key)?;
        let linear = key.starts_with("blocks.") && shape.len() == 2;
        Ok(match linear {
            true if fp8 => {
                Weight::Fp8(fp8::Weight::quantize(&dense, fp8::Granularity::Block)?).for_products(products)?
            }
            true => Weight::Dense(dense).for_products(products)?,
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
