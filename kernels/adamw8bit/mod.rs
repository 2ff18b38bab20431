//! AdamW with block-wise 8-bit states, the scheme of bitsandbytes' `AdamW8bit` (Dettmers et al., "8-bit Optimizers via
//! Block-wise Quantization", 2021), on the CPU.
//!
//! Both moments are kept as codes into a 256-entry dynamic map times the largest magnitude of their block of 256
//! elements. Tensors below 4096 elements keep fp32 moments. Order of a step (it differs from [`crate::adamw`] in when
//! decay is applied): `m ← β1·m + (1 − β1)·g`, `v ← β2·v + (1 − β2)·g²`,
//! `p ← p − lr·√(1 − β2^t)/(1 − β1^t) · m / (√v + √(1 − β2^t)·eps)`, `p ← p·(1 − lr·wd)`; then the moments are coded
//! again. An element whose gradient is not finite keeps its parameter and loses its moments.
//!
//! The map is the paper's dynamic tree quantisation: seven decades, each with twice the steps of the one below.

use rayon::prelude::*;

use crate::adamw::{check, corrections, AdamW, Step};
use crate::{Error, Result};

#[cfg(feature = "cuda")]
pub mod cuda;
mod map;
#[cfg(test)]
mod tests;

pub use map::{signed_map, unsigned_map};

const NAME: &str = "adamw8bit";
/// Elements that share one scale.
pub const BLOCK: usize = 256;
/// Tensors with fewer elements keep fp32 moments.
pub const MIN_QUANTIZED: usize = 4096;
/// Blocks of a parallel piece.
const PIECE: usize = 64;

/// The two moments of one tensor; plain vectors, so that a checkpoint can hold them as they are.
#[derive(Debug, Clone, PartialEq)]
pub enum Moments {
    /// One fp32 value an element.
    Full { m: Vec<f32>, v: Vec<f32> },
    /// One code an element, one scale a block of [`BLOCK`] (the last block may be short).
    Blocks { m: Vec<u8>, v: Vec<u8>, m_max: Vec<f32>, v_max: Vec<f32> },
}

impl Moments {
    /// Zero moments for a tensor of `len` elements.
    pub fn new(len: usize) -> Self {
        if len < MIN_QUANTIZED {
            return Moments::Full { m: vec![0.0; len], v: vec![0.0; len] };
        }
        let blocks = len.div_ceil(BLOCK);
        Moments::Blocks { m: vec![0; len], v: vec![0; len], m_max: vec![0.0; blocks], v_max: vec![0.0; blocks] }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Moments::Full { m, .. } => m.len(),
            Moments::Blocks { m, .. } => m.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn check(&self, step: &Step, params: usize, grads: usize) -> Result<()> {
        let v_len = match self {
            Moments::Full { v, .. } => v.len(),
            Moments::Blocks { v, .. } => v.len(),
        };
        check(NAME, step, params, &[("grads", grads), ("m", self.len()), ("v", v_len)])?;
        if let Moments::Blocks { m_max, v_max, .. } = self {
            let blocks = params.div_ceil(BLOCK);
            if m_max.len() != blocks || v_max.len() != blocks {
                let what = format!("{} and {} scales for {blocks} blocks", m_max.len(), v_max.len());
                return Err(Error::Argument { op: NAME, what });
            }
        }
        Ok(())
    }
}

/// One step over one tensor; `params` and `moments` are updated in place.
///
/// Errors: `Argument` if the lengths differ or the step number is 0.
pub fn step(adamw: &AdamW, step: &Step, params: &mut [f32], grads: &[f32], moments: &mut Moments) -> Result<()> {
    moments.check(step, params.len(), grads.len())?;
    let c = Constants::new(adamw, step);
    match moments {
        Moments::Full { m, v } => {
            for (((p, &g), m), v) in params.iter_mut().zip(grads).zip(m).zip(v) {
                update(&c, p, g, m, v);
            }
        }
        Moments::Blocks { m, v, m_max, v_max } => {
            let span = BLOCK * PIECE;
            let codes = m.par_chunks_mut(span).zip(v.par_chunks_mut(span));
            let scales = m_max.par_chunks_mut(PIECE).zip(v_max.par_chunks_mut(PIECE));
            params.par_chunks_mut(span).zip(grads.par_chunks(span)).zip(codes).zip(scales).for_each(
                |(((p, g), (m, v)), (m_max, v_max))| {
                    let codes = m.chunks_mut(BLOCK).zip(v.chunks_mut(BLOCK));
                    let scales = m_max.iter_mut().zip(v_max);
                    for (((p, g), (m, v)), (m_max, v_max)) in
                        p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).zip(codes).zip(scales)
                    {
                        update_block(&c, p, g, Coded { codes: m, max: m_max }, Coded { codes: v, max: v_max });
                    }
                },
            );
        }
    }
    Ok(())
}

/// A step's scalars in fp32.
struct Constants {
    grad_scale: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    eps: f32,
    decay: f32,
}

impl Constants {
    fn new(adamw: &AdamW, step: &Step) -> Self {
        let (correction1, correction2) = corrections(adamw, step);
        Constants {
            grad_scale: step.grad_scale as f32,
            beta1: adamw.beta1 as f32,
            one_minus_beta1: (1.0 - adamw.beta1) as f32,
            beta2: adamw.beta2 as f32,
            one_minus_beta2: (1.0 - adamw.beta2) as f32,
            step_size: (step.lr * correction2 / correction1) as f32,
            eps: (correction2 * adamw.eps) as f32,
            decay: (1.0 - step.lr * adamw.weight_decay) as f32,
        }
    }
}

fn update(c: &Constants, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
    if !g.is_finite() {
        (*m, *v) = (0.0, 0.0);
        return;
    }
    let g = g * c.grad_scale;
    *m = c.beta1 * *m + c.one_minus_beta1 * g;
    *v = c.beta2 * *v + c.one_minus_beta2 * g * g;
    *p = (*p - c.step_size * *m / (v.sqrt() + c.eps)) * c.decay;
}

/// One block of one moment.
struct Coded<'a> {
    codes: &'a mut [u8],
    max: &'a mut f32,
}

fn update_block(c: &Constants, p: &mut [f32], g: &[f32], m: Coded<'_>, v: Coded<'_>) {
    let (m_map, v_map) = (signed_map(), unsigned_map());
    let (mut m_full, mut v_full) = ([0f32; BLOCK], [0f32; BLOCK]);
    let (mut m_max, mut v_max) = (0f32, 0f32);
    for (i, (p, &g)) in p.iter_mut().zip(g).enumerate() {
        m_full[i] = m_map.value(m.codes[i]) * *m.max;
        v_full[i] = v_map.value(v.codes[i]) * *v.max;
        update(c, p, g, &mut m_full[i], &mut v_full[i]);
        m_max = m_max.max(m_full[i].abs());
        v_max = v_max.max(v_full[i]);
    }
    (*m.max, *v.max) = (m_max, v_max);
    for (code, &full) in m.codes.iter_mut().zip(&m_full) {
        *code = m_map.nearest_of_sign(full, m_max);
    }
    for (code, &full) in v.codes.iter_mut().zip(&v_full) {
        *code = v_map.nearest(full, v_max);
    }
}
