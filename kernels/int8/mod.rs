//! int8 weights for `--int8_fast`, rotated so that rounding costs little, and products with them.
//!
//! `H` is the orthonormal Hadamard matrix of 64, applied to blocks of 64 along an axis: it spreads what a few channels
//! hold over all of their block, and is its own inverse. A weight W [o, i] is held as
//!
//! ```text
//! W = diag(outer) · H · diag(inner) · codes · H        outer: root mean square of W's rows; inner: max|row| / 127 of
//!                                                      the rotated rows; codes: -127 to 127
//! y  = x·Wᵀ = ((x·H) · codesᵀ · diag(inner)) · H · diag(outer)
//! dx = dy·W = ((dy·diag(outer)) · H · diag(inner)) · codes · H
//! ```
//!
//! One set of codes thus serves both passes: the rotation along `i` makes forward's activations easy to round, the one
//! along `o` backward's gradients, and what is left of each is undone on the result. Rows are brought to one size first,
//! or small rows would drown in the rounding of large ones they are rotated with. Activations are rounded with one scale
//! a row. Codes are exact in fp32, sums of their products in int32.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::linear::eight::WIDEST;
use crate::{gate, Error, Result};

#[cfg(feature = "cuda")]
mod cuda;
mod linear;
#[cfg(test)]
mod tests;

pub use linear::{round, LinearInt8, LinearInt8Args, LinearInt8Backward, LinearInt8BackwardArgs};

/// Bytes of sums that wait in memory at most, where the library multiplies (Hopper).
pub const SUMS: usize = 256 << 20;
/// Values that are rotated together.
pub const BLOCK: usize = 64;
/// The rotation's factor: 1 / √64.
const ROTATED: f32 = 0.125;
const LARGEST: f32 = 127.0;
/// Scales and sizes are no smaller, so that they can be divided by.
const TINY: f32 = 1e-30;

/// Whether a matrix [o, i] can be held so: both axes in whole blocks, and no longer than a row that one block of threads
/// rounds.
pub fn takes([o, i]: [usize; 2]) -> bool {
    [o, i].iter().all(|n| *n > 0 && n % BLOCK == 0 && *n <= WIDEST)
}

/// An int8 matrix [o, i].
#[derive(Debug, Clone)]
pub struct Weight {
    codes_oi: Tensor,
    scales_2o: Tensor,
}

impl Weight {
    const NAME: &'static str = "int8_weight";

    /// `codes_oi` U8 [o, i], the bytes of signed codes; `scales_2o` F32 [2, o]: `outer`, then `inner`.
    pub fn new(codes_oi: Tensor, scales_2o: Tensor) -> Result<Self> {
        let [o, i] = gate::dims::<2>(Self::NAME, "codes_oi", &codes_oi, "[o, i], nothing empty")?;
        gate::dtype(Self::NAME, "codes_oi", &codes_oi, DType::U8)?;
        gate::dtype(Self::NAME, "scales_2o", &scales_2o, DType::F32)?;
        gate::shape(Self::NAME, "scales_2o", &scales_2o, &[2, o], "[2, o]")?;
        check(Self::NAME, [o, i])?;
        Ok(Weight { codes_oi: codes_oi.contiguous()?, scales_2o: scales_2o.contiguous()? })
    }

    /// Rotates and rounds a matrix [o, i], where it lies.
    pub fn quantize(weight_oi: &Tensor) -> Result<Self> {
        let [o, i] = gate::dims::<2>(Self::NAME, "weight_oi", weight_oi, "[o, i], nothing empty")?;
        gate::float(Self::NAME, "weight_oi", weight_oi)?;
        check(Self::NAME, [o, i])?;
        #[cfg(feature = "cuda")]
        if let Some(gpu) = Gpu::of(weight_oi.device()) {
            return cuda::quantize(&gpu, weight_oi);
        }
        let mut values = weight_oi.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let (mut codes, mut outer, mut inner) = (vec![0u8; o * i], vec![0f32; o], vec![0f32; o]);
        let scales = outer.par_chunks_mut(BLOCK).zip(inner.par_chunks_mut(BLOCK));
        let bands = values.par_chunks_mut(BLOCK * i).zip(codes.par_chunks_mut(BLOCK * i));
        bands.zip(scales).for_each(|((values, codes), (outer, inner))| {
            for (row, outer) in values.chunks_mut(i).zip(outer) {
                *outer = size(row);
                let inverse = 1.0 / *outer;
                row.iter_mut().for_each(|v| *v *= inverse);
                rotate_row(row);
            }
            rotate_columns(values, i);
            for ((row, codes), inner) in values.chunks(i).zip(codes.chunks_mut(i)).zip(inner) {
                *inner = scale_of(row);
                let inverse = 1.0 / *inner;
                codes.iter_mut().zip(row).for_each(|(code, v)| *code = rounded(*v, inverse) as u8);
            }
        });
        outer.extend(inner);
        let device = weight_oi.device();
        Self::new(Tensor::from_vec(codes, (o, i), device)?, Tensor::from_vec(outer, (2, o), device)?)
    }

    pub fn codes_oi(&self) -> &Tensor {
        &self.codes_oi
    }

    pub fn scales_2o(&self) -> &Tensor {
        &self.scales_2o
    }

    /// [o, i].
    pub fn shape(&self) -> [usize; 2] {
        [self.codes_oi.dims()[0], self.codes_oi.dims()[1]]
    }

    /// Bytes held.
    pub fn bytes(&self) -> f64 {
        gate::bytes(&self.codes_oi) + gate::bytes(&self.scales_2o)
    }

    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Weight { codes_oi: self.codes_oi.to_device(device)?, scales_2o: self.scales_2o.to_device(device)? })
    }

    /// The values of the codes [o, i], `outer` and `inner`, on the CPU.
    fn parts(&self) -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)> {
        let codes = self.codes_oi.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
        let [outer, inner]: [Vec<f32>; 2] = self
            .scales_2o
            .to_device(&Device::Cpu)?
            .to_vec2::<f32>()?
            .try_into()
            .map_err(|_| Error::Argument { op: Self::NAME, what: "the scales are not two rows".to_string() })?;
        Ok((codes.into_iter().map(|code| f32::from(code as i8)).collect(), outer, inner))
    }

    /// The matrix [o, i] that the codes stand for, in F32 on the CPU.
    pub fn dequantize(&self) -> Result<Tensor> {
        let ([o, i], (mut values, outer, inner)) = (self.shape(), self.parts()?);
        values.chunks_mut(i).zip(&inner).for_each(|(row, inner)| row.iter_mut().for_each(|v| *v *= inner));
        values.par_chunks_mut(BLOCK * i).for_each(|band| {
            rotate_columns(band, i);
            band.chunks_mut(i).for_each(rotate_row);
        });
        values.chunks_mut(i).zip(&outer).for_each(|(row, outer)| row.iter_mut().for_each(|v| *v *= outer));
        Ok(Tensor::from_vec(values, (o, i), &Device::Cpu)?)
    }
}

fn check(op: &'static str, oi: [usize; 2]) -> Result<()> {
    if takes(oi) {
        return Ok(());
    }
    Err(Error::Argument { op, what: format!("{oi:?} is not in blocks of {BLOCK}, up to {WIDEST}") })
}

/// Root mean square in a fixed order: 32 sums of every 32nd value, then sums in pairs.
fn size(row: &[f32]) -> f32 {
    let mut sums = [0f32; 32];
    for piece in row.chunks(32) {
        sums.iter_mut().zip(piece).for_each(|(sum, v)| *sum += v * v);
    }
    for mask in [1, 2, 4, 8, 16] {
        sums = std::array::from_fn(|lane| sums[lane] + sums[lane ^ mask]);
    }
    (sums[0] / row.len() as f32).sqrt().max(TINY)
}

/// `max|row| / 127`; NaN anywhere makes it NaN, and with it the whole row of a product.
fn scale_of(row: &[f32]) -> f32 {
    let top = row.iter().fold(0f32, |top, v| if v.is_nan() || v.abs() > top { v.abs() } else { top });
    let scale = top / LARGEST;
    if scale < TINY {
        TINY
    } else {
        scale
    }
}

/// The integer nearest to the exact product, ties to even; NaN is 0.
fn rounded(v: f32, inverse: f32) -> i8 {
    (f64::from(v) * f64::from(inverse)).round_ties_even() as i8
}

/// Every block of 64 values rotated: steps from neighbours to distance 32, as on a card.
fn rotate_row(row: &mut [f32]) {
    for block in row.chunks_exact_mut(BLOCK) {
        for step in [1, 2, 4, 8, 16, 32] {
            for pair in block.chunks_exact_mut(2 * step) {
                let (low, high) = pair.split_at_mut(step);
                butterfly(low, high);
            }
        }
        block.iter_mut().for_each(|v| *v *= ROTATED);
    }
}

/// 64 rows of `width` rotated across.
fn rotate_columns(band: &mut [f32], width: usize) {
    for step in [1, 2, 4, 8, 16, 32] {
        for pair in band.chunks_exact_mut(2 * step * width) {
            let (low, high) = pair.split_at_mut(step * width);
            butterfly(low, high);
        }
    }
    band.iter_mut().for_each(|v| *v *= ROTATED);
}

fn butterfly(low: &mut [f32], high: &mut [f32]) {
    for (a, b) in low.iter_mut().zip(high) {
        (*a, *b) = (*a + *b, *a - *b);
    }
}
