//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//!
//! A value is a pure function of (seed, stream, step, item, position), so noise and timesteps do not depend on batch
//! order, thread count, device or restarts. The key is the seed; the counter is (block, stream, item, step); block i
//! holds values 4i..4i+3.
//!
//! Conversions are fixed, down to the bit, by IEEE double arithmetic alone (no library function, no fused multiply-add):
//! - uniform f32 = the word's upper 24 bits · 2⁻²⁴; uniform f64 = the upper 27 and 26 bits of two words · 2⁻⁵³: [0, 1).
//! - normals by Box-Muller from a pair of words (a, b): r = √(−2·ln((a + 1)·2⁻³²)), θ = 2π·b·2⁻³², giving r·cos θ then
//!   r·sin θ in f64, rounded once to f32 where f32 is asked for. |z| ≤ 6.66.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::Result;

mod box_muller;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use box_muller::normal_pair;

/// What a stream of numbers is for; two purposes never share numbers.
pub mod stream {
    pub const NOISE: u32 = 0;
    pub const TIMESTEP: u32 = 1;
    pub const SHUFFLE: u32 = 2;
    pub const INIT: u32 = 3;
    pub const DROPOUT: u32 = 4;
    pub const FRAMES: u32 = 5;
    pub const PREVIEW: u32 = 6;
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32 with ten rounds.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let product = |m: u32, c: u32| u64::from(m) * u64::from(c);
        let (p0, p1) = (product(MULTIPLIERS[0], counter[0]), product(MULTIPLIERS[1], counter[2]));
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// All numbers of one purpose, step and item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
    stream: u32,
    item: u32,
    step: u32,
}

impl Philox {
    pub fn new(seed: u64, stream: u32, step: u32, item: u32) -> Self {
        Philox { key: [seed as u32, (seed >> 32) as u32], stream, item, step }
    }

    /// Words 4·i .. 4·i + 3.
    pub fn block(&self, i: u32) -> [u32; 4] {
        philox4x32([i, self.stream, self.item, self.step], self.key)
    }

    /// Uniforms in [0, 1), one word each.
    pub fn fill_uniform(&self, out: &mut [f32]) {
        self.fill(out, |words| words.map(uniform_f32));
    }

    /// Standard normals, one word each.
    pub fn fill_normal(&self, out: &mut [f32]) {
        self.fill(out, |[a, b, c, d]| {
            let ((z0, z1), (z2, z3)) = (normal_pair(a, b), normal_pair(c, d));
            [z0 as f32, z1 as f32, z2 as f32, z3 as f32]
        });
    }

    /// Standard normals as an F32 tensor, filled in row-major order; on a card they are made there, to the same bits.
    pub fn normal(&self, shape: &[usize], device: &Device) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = crate::gpu::Gpu::of(device) {
            return cuda::normal(&gpu, self, shape);
        }
        let mut values = vec![0f32; shape.iter().product()];
        self.fill_normal(&mut values);
        Ok(Tensor::from_vec(values, shape, device)?)
    }

    /// The same words drawn one after another.
    pub fn draws(&self) -> Draws {
        Draws { philox: *self, next: 0, spare: None }
    }

    fn fill(&self, out: &mut [f32], convert: impl Fn([u32; 4]) -> [f32; 4] + Sync) {
        const BLOCKS: usize = 1024;
        assert!(out.len() as u64 <= 4 << 32, "one item holds at most 2^34 numbers");
        out.par_chunks_mut(4 * BLOCKS).enumerate().for_each(|(chunk, out)| {
            for (block, out) in out.chunks_mut(4).enumerate() {
                let values = convert(self.block((chunk * BLOCKS + block) as u32));
                out.copy_from_slice(&values[..out.len()]);
            }
        });
    }
}

/// Sequential draws from a [`Philox`]: for timesteps, shuffles and the like.
#[derive(Debug, Clone)]
pub struct Draws {
    philox: Philox,
    /// Position of the next word.
    next: u64,
    /// The second normal of the last pair.
    spare: Option<f64>,
}

impl Draws {
    pub fn word(&mut self) -> u32 {
        let word = self.philox.block((self.next / 4) as u32)[(self.next % 4) as usize];
        self.next += 1;
        word
    }

    /// Uniform in [0, 1) with 53 random bits: two words.
    pub fn uniform(&mut self) -> f64 {
        let (a, b) = (self.word(), self.word());
        ((u64::from(a >> 5) << 26) + u64::from(b >> 6)) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in [0, 1) with 24 random bits: one word.
    pub fn uniform_f32(&mut self) -> f32 {
        uniform_f32(self.word())
    }

    /// Standard normal: two words for every second call.
    pub fn normal(&mut self) -> f64 {
        if let Some(z) = self.spare.take() {
            return z;
        }
        let (a, b) = (self.word(), self.word());
        let (z0, z1) = normal_pair(a, b);
        self.spare = Some(z1);
        z0
    }

    /// Uniform in 0..n without bias (n > 0): words at or beyond the largest multiple of n are drawn again.
    pub fn below(&mut self, n: u32) -> u32 {
        assert!(n > 0, "an empty range has no numbers");
        let limit = (1u64 << 32) / u64::from(n) * u64::from(n);
        loop {
            let word = self.word();
            if u64::from(word) < limit {
                return word % n;
            }
        }
    }

    /// Fisher-Yates from the end.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u32 + 1) as usize);
        }
    }
}

fn uniform_f32(word: u32) -> f32 {
    (word >> 8) as f32 / (1u32 << 24) as f32
}
