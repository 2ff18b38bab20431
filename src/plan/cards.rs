//! What a card can do, from `configs/cards.toml`: rates by which arrangements are compared.

use serde::Deserialize;
use wan_kernels::fast_attention;
use wan_models::linear::Products;

use crate::config::registry;

/// One kind of card: data-sheet figures.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    pub name: String,
    /// Parts of the driver's name for it.
    matches: Vec<String>,
    /// Compute capability: `[8, 6]` is sm_86.
    pub capability: [u32; 2],
    /// Dense 16-bit products with fp32 sums.
    pub tensor_tflops: f64,
    /// The same for fp8, where there is any.
    pub fp8_tflops: Option<f64>,
    /// The same for int8 with int32 sums.
    pub int8_tflops: f64,
    pub memory_gb_s: f64,
    /// Pinned copies, each direction.
    pub bus_gb_s: f64,
    pub memory_gib: f64,
}

#[derive(Deserialize)]
struct File {
    card: Vec<Card>,
}

/// What parts of a step run at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Products with weights, FLOP/s.
    pub linears: f64,
    /// The same by 8-bit products, with everything that belongs to them: codes, scales, transposes.
    pub fp8_linears: Option<f64>,
    pub int8_linears: f64,
    pub attention: f64,
    /// Of forward with 8-bit codes, roundings included.
    pub fast_attention: f64,
    /// Tokens of a sample from which on it is used.
    pub fast_attention_from: usize,
    pub attention_backward: f64,
    /// Bytes/s of single passes over the card's memory.
    pub memory: f64,
    /// Bytes/s of a pinned copy in one direction.
    pub bus: f64,
}

impl Card {
    /// All cards of the table, in its order.
    pub fn all() -> Vec<Card> {
        let text = registry::text("cards.toml").unwrap_or_default();
        toml::from_str::<File>(text).map(|f| f.card).unwrap_or_default()
    }

    /// GiB that a run finds free on the card: the driver's context takes 0.6 (measured on an H200), a desktop some more.
    pub fn free_gib(&self) -> f64 {
        self.memory_gib - 1.0
    }

    /// The entry for a card by the driver's name.
    pub fn find(name: &str) -> Option<Card> {
        Self::all().into_iter().find(|c| c.matches.iter().any(|m| name.contains(m.as_str())))
    }

    /// What the kernels here reach of the peak. Measured on an H200 at 21600 tokens: linears 0.72, memory 0.85. Attention
    /// with `wgmma` 0.65 forward and 0.57 backward; with `mma.sync` in 99 KB of shared memory 0.37 and 0.32. Of the peak
    /// there, which is that of `wgmma`, these instructions are taken to reach 0.62 at best (not measured here): so 0.6 and
    /// 0.5 of the peak of cards that have no others. 8-bit linears as a whole, roundings included: e4m3 0.66; int8 0.55 (not
    /// measured on cards where the kernel here multiplies, which has 0.68 of what `mma.sync` reaches of int8 on the H200,
    /// before roundings). Attention in 8 bits is 1.27 times as fast there with `mma.sync`, 1.3 with `wgmma`; cards whose int8
    /// rate is four times that of 16 bits, not twice, should gain more.
    pub fn rates(&self) -> Rates {
        let peak = self.tensor_tflops * 1e12;
        let [forward, backward] = if self.capability[0] >= 9 { [0.66, 0.57] } else { [0.6, 0.5] };
        Rates {
            linears: 0.72 * peak,
            fp8_linears: self.fp8_tflops.map(|tflops| 0.66 * tflops * 1e12),
            int8_linears: 0.55 * self.int8_tflops * 1e12,
            attention: forward * peak,
            fast_attention: 1.27 * forward * peak,
            fast_attention_from: fast_attention::FROM_TOKENS[usize::from(self.capability[0] < 9)],
            attention_backward: backward * peak,
            memory: 0.85 * self.memory_gb_s * 1e9,
            bus: self.bus_gb_s * 1e9,
        }
    }
}

impl Rates {
    /// Of the blocks' linears; `None` where the card has no tensor cores for them.
    pub fn products(&self, products: Products) -> Option<f64> {
        match products {
            Products::Full => Some(self.linears),
            Products::Fp8 => self.fp8_linears,
            Products::Int8 => Some(self.int8_linears),
        }
    }
}

impl Default for Rates {
    /// Of a usual card of 24 GB.
    fn default() -> Self {
        match Card::find("") {
            Some(card) => card.rates(),
            // The table is embedded and tested; these are its last entry's.
            None => Rates {
                linears: 51e12,
                fp8_linears: None,
                int8_linears: 156e12,
                attention: 43e12,
                fast_attention: 55e12,
                fast_attention_from: fast_attention::FROM_TOKENS[1],
                attention_backward: 35e12,
                memory: 800e9,
                bus: 25e9,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_found_by_the_drivers_names() {
        let name = |driver: &str| Card::find(driver).unwrap().name;
        assert_eq!(name("NVIDIA H200"), "H200");
        assert_eq!(name("NVIDIA GeForce RTX 3090 Ti"), "RTX 3090");
        assert_eq!(name("NVIDIA RTX A6000"), "A6000");
        assert_eq!(name("NVIDIA GeForce RTX 4090"), "RTX 4090");
        assert_eq!(name("a card nobody knows"), "RTX 3090");
        let rates = Card::find("NVIDIA H200").unwrap().rates();
        assert!(rates.linears > 700e12 && rates.attention > rates.attention_backward);
        assert!(rates.products(Products::Fp8).unwrap() > 1.5 * rates.linears);
        let usual = Rates::default();
        assert_eq!(usual.products(Products::Fp8), None);
        assert!(usual.products(Products::Int8).unwrap() > 2.5 * usual.linears);
    }
}
