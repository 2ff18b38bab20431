//! Seeded random weights for demos and tests: the same numbers on every machine.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::Umt5Config;
use crate::Result;

/// An encoder of random weights in `dtype` under the official keys: matrices N(0, 1/fan_in), norms near 1, position
/// tables N(0, 1/4), token rows N(0, 1), so that every path matters to the output.
pub fn weights(config: &Umt5Config, seed: u64, dtype: DType) -> Result<HashMap<String, Tensor>> {
    let mut normal = Normal { state: seed ^ 0x756d_7435 };
    let mut all = HashMap::new();
    for (key, shape) in config.tensors() {
        let count = shape.iter().product();
        let (mean, std) = match key.as_str() {
            k if k.contains("norm") => (1.0, 0.1),
            k if k.contains("pos_embedding") => (0.0, 0.5),
            k if k.contains("token_embedding") => (0.0, 1.0),
            _ => (0.0, 1.0 / (shape[1] as f32).sqrt()),
        };
        let values: Vec<f32> = (0..count).map(|_| mean + std * normal.next()).collect();
        all.insert(key, Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?);
    }
    Ok(all)
}

/// splitmix64 with the sum of twelve uniforms: no transcendental functions, hence the same bits everywhere.
struct Normal {
    state: u64,
}

impl Normal {
    fn next(&mut self) -> f32 {
        let mut sum = -6.0f32;
        for _ in 0..6 {
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            sum += ((z >> 40) as f32 + ((z >> 8) as u32 >> 8) as f32) / (1u32 << 24) as f32;
        }
        sum
    }
}
