//! 8-bit AdamW on the card: all tensors of a network in one launch, see `adamw8bit.cu`. Codes lie at their parameters'
//! places in two flat buffers; a table says where each block begins and how its moments are kept.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::{signed_map, unsigned_map, Constants, Moments, BLOCK, MIN_QUANTIZED, NAME};
use crate::adamw::{check, AdamW, Step};
use crate::common::gpu::{tensor_address, Arg, Gpu, Launch};
use crate::Result;

/// One tensor in the flat buffers.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    pub range: Range<usize>,
    /// Belongs to the LoRA+ group.
    pub plus: bool,
}

/// The moments of a network.
pub struct State {
    parts: Vec<Part>,
    blocks: usize,
    /// `Piece` structs of the kernel, 24 bytes each.
    table: Tensor,
    codes: [Tensor; 2],
    tops: [Tensor; 2],
    full: [Tensor; 2],
    maps: Tensor,
}

impl State {
    /// Zero moments, as [`Moments::new`].
    pub fn new(gpu: &Gpu, parts: Vec<Part>) -> Result<Self> {
        let device = &gpu.device();
        let (mut table, mut full, mut blocks) = (Vec::<u8>::new(), 0usize, 0usize);
        for part in &parts {
            let coded = part.range.len() >= MIN_QUANTIZED;
            for first in part.range.clone().step_by(BLOCK) {
                let length = BLOCK.min(part.range.end - first);
                let at = if coded { -1 } else { (full + first - part.range.start) as i64 };
                table.extend((first as i64).to_le_bytes());
                table.extend((length as i32).to_le_bytes());
                table.extend(i32::from(part.plus).to_le_bytes());
                table.extend(at.to_le_bytes());
                blocks += 1;
            }
            full += if coded { 0 } else { part.range.len() };
        }
        let total = parts.iter().map(|p| p.range.end).max().unwrap_or(0).max(1);
        let maps = [signed_map(), unsigned_map()].map(|map| {
            let mut all = map.values().to_vec();
            all.extend((0..255).map(|i| map.midpoint(i)));
            all.push(f32::INFINITY);
            all
        });
        let bytes = table.len();
        Ok(State {
            blocks,
            table: Tensor::from_vec(table, bytes, device)?,
            codes: [Tensor::zeros(total, DType::U8, device)?, Tensor::zeros(total, DType::U8, device)?],
            tops: [zeros(blocks, device)?, zeros(blocks, device)?],
            full: [zeros(full, device)?, zeros(full, device)?],
            maps: Tensor::from_vec(maps.concat(), 1024, device)?,
            parts,
        })
    }

    /// [`super::step`] for every part; `lr_plus` is the rate of the LoRA+ group.
    pub fn step(
        &mut self,
        gpu: &Gpu,
        adamw: &AdamW,
        at: &Step,
        lr_plus: f64,
        params: &Tensor,
        grads: &Tensor,
    ) -> Result<()> {
        check(NAME, at, params.elem_count(), &[("grads", grads.elem_count())])?;
        let (main, plus) = (Constants::new(adamw, at), Constants::new(adamw, &Step { lr: lr_plus, ..*at }));
        let constants = [
            main.grad_scale,
            main.beta1,
            main.one_minus_beta1,
            main.beta2,
            main.one_minus_beta2,
            main.eps,
            main.step_size,
            plus.step_size,
            main.decay,
            plus.decay,
        ];
        let at = |t: &Tensor| -> Result<Arg> { Ok(Arg::ptr(tensor_address(NAME, t)?)) };
        let args = [
            at(params)?,
            at(grads)?,
            at(&self.table)?,
            at(&self.codes[0])?,
            at(&self.codes[1])?,
            at(&self.tops[0])?,
            at(&self.tops[1])?,
            at(&self.full[0])?,
            at(&self.full[1])?,
            at(&self.maps)?,
            Arg::i32(signed_map().zero().into()),
            Arg::i32(unsigned_map().zero().into()),
            Arg::words(&constants.map(f32::to_bits)),
        ];
        let launch = Launch::blocks((self.blocks, 1, 1), BLOCK as u32);
        gpu.launch("adamw8bit/adamw8bit", "adamw8bit_step", launch, &args)
    }

    /// Copies of the moments, part by part.
    pub fn export(&self) -> Result<Vec<Moments>> {
        let codes = [self.codes[0].to_vec1::<u8>()?, self.codes[1].to_vec1::<u8>()?];
        let tops = [self.tops[0].to_vec1::<f32>()?, self.tops[1].to_vec1::<f32>()?];
        let full = [self.full[0].to_vec1::<f32>()?, self.full[1].to_vec1::<f32>()?];
        let (mut block, mut at) = (0, 0);
        let mut out = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let blocks = block..block + part.range.len().div_ceil(BLOCK);
            block = blocks.end;
            if part.range.len() < MIN_QUANTIZED {
                let values = at..at + part.range.len();
                at = values.end;
                out.push(Moments::Full { m: full[0][values.clone()].to_vec(), v: full[1][values].to_vec() });
                continue;
            }
            let of = |codes: &[u8]| codes[part.range.clone()].to_vec();
            out.push(Moments::Blocks {
                m: of(&codes[0]),
                v: of(&codes[1]),
                m_max: tops[0][blocks.clone()].to_vec(),
                v_max: tops[1][blocks].to_vec(),
            });
        }
        Ok(out)
    }

    /// Takes over exported moments, one for each part, in order and of its form.
    pub fn import(&mut self, all: &[Moments]) -> Result<()> {
        let (mut codes, mut tops, mut full) = <([Vec<u8>; 2], [Vec<f32>; 2], [Vec<f32>; 2])>::default();
        codes.iter_mut().for_each(|c| c.resize(self.codes[0].elem_count(), 0));
        for (part, moments) in self.parts.iter().zip(all) {
            match moments {
                Moments::Full { m, v } => {
                    full[0].extend(m);
                    full[1].extend(v);
                    let blocks = part.range.len().div_ceil(BLOCK);
                    tops.iter_mut().for_each(|t| t.resize(t.len() + blocks, 0.0));
                }
                Moments::Blocks { m, v, m_max, v_max } => {
                    codes[0][part.range.clone()].copy_from_slice(m);
                    codes[1][part.range.clone()].copy_from_slice(v);
                    tops[0].extend(m_max);
                    tops[1].extend(v_max);
                }
            }
        }
        let device = self.maps.device().clone();
        let f32s = |values: Vec<f32>, like: &Tensor| -> Result<Tensor> {
            let mut values = values;
            values.resize(like.elem_count(), 0.0);
            Ok(Tensor::from_vec(values, like.shape(), &device)?)
        };
        let [m, v] = codes;
        let shape = self.codes[0].shape().clone();
        self.codes = [Tensor::from_vec(m, &shape, &device)?, Tensor::from_vec(v, &shape, &device)?];
        let [m, v] = tops;
        self.tops = [f32s(m, &self.tops[0])?, f32s(v, &self.tops[1])?];
        let [m, v] = full;
        self.full = [f32s(m, &self.full[0])?, f32s(v, &self.full[1])?];
        Ok(())
    }
}

/// At least one element: an empty buffer has no address.
fn zeros(len: usize, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros(len.max(1), DType::F32, device)?)
}
