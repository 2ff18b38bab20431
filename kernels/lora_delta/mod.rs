//! `up·down`, what a LoRA adds to a weight, to the same bits on every processor and card: a model merged into a file once
//! and a model merged while it is loaded are then the same model.
//!
//! ```text
//! delta [o, i] = up [o, r] · down [r, i]        each sum begins at 0 and goes from the first rank to the last, every
//!                                               product and every sum rounded to fp32
//! ```
//!
//! A library's product depends on tiles and instructions, and with them on the machine. Here vector units take several
//! columns at once, which leaves each column's sum as it is; a fused multiply-add would not, so there are none.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, Result};

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

const NAME: &str = "lora_delta";
/// Sums a thread of the CPU holds in registers: rows by columns.
const ROWS: usize = 4;
const COLUMNS: usize = 16;

/// `up_or` [o, r] times `down_ri` [r, i], both F32 and on one device: F32 [o, i] there.
///
/// Errors: `Shape` or `Dtype` on anything else, and whatever the device says.
pub fn delta(up_or: &Tensor, down_ri: &Tensor) -> Result<Tensor> {
    let [o, r] = gate::dims::<2>(NAME, "up_or", up_or, "[o, r], nothing empty")?;
    let [_, i] = gate::dims::<2>(NAME, "down_ri", down_ri, "[r, i], nothing empty")?;
    gate::shape(NAME, "down_ri", down_ri, &[r, i], "[r, i] with the rank of up_or")?;
    gate::dtype(NAME, "up_or", up_or, DType::F32)?;
    gate::dtype(NAME, "down_ri", down_ri, DType::F32)?;
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(up_or.device()) {
        return cuda::delta(&gpu, up_or, down_ri);
    }
    let (up, down) = (flat(up_or)?, flat(down_ri)?);
    let mut delta = vec![0f32; o * i];
    let vectors = wide();
    delta.par_chunks_mut(ROWS * i).zip(up.par_chunks(ROWS * r)).for_each(|(delta, up)| {
        let rows = up.len() / r;
        for at in (0..i).step_by(COLUMNS) {
            let columns = COLUMNS.min(i - at);
            let sums = match (rows, columns, vectors) {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `wide` has found AVX2.
                (ROWS, COLUMNS, true) => unsafe { sums_avx2(up, down.as_slice(), [r, i, at]) },
                (ROWS, COLUMNS, _) => sums(up, &down, [r, i, at]),
                _ => edge(up, &down, [r, i, at], columns),
            };
            for (row, sums) in delta.chunks_mut(i).zip(sums) {
                row[at..at + columns].copy_from_slice(&sums[..columns]);
            }
        }
    });
    Ok(Tensor::from_vec(delta, (o, i), &Device::Cpu)?.to_device(up_or.device())?)
}

fn flat(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.flatten_all()?.to_vec1()?)
}

fn wide() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

type Sums = [[f32; COLUMNS]; ROWS];

/// Of `ROWS` rows and the `COLUMNS` columns from `at` on.
#[inline(always)]
fn sums(up: &[f32], down: &[f32], [r, i, at]: [usize; 3]) -> Sums {
    let mut sums = [[0f32; COLUMNS]; ROWS];
    for rank in 0..r {
        let down = &down[rank * i + at..][..COLUMNS];
        for (row, sums) in sums.iter_mut().enumerate() {
            let up = up[row * r + rank];
            sums.iter_mut().zip(down).for_each(|(sum, down)| *sum += up * down);
        }
    }
    sums
}

/// [`sums`] by vectors of eight.
///
/// # Safety
/// AVX2 is present.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn sums_avx2(up: &[f32], down: &[f32], at: [usize; 3]) -> Sums {
    sums(up, down, at)
}

/// [`sums`] where fewer rows or columns are left.
fn edge(up: &[f32], down: &[f32], [r, i, at]: [usize; 3], columns: usize) -> Sums {
    let mut sums = [[0f32; COLUMNS]; ROWS];
    for (up, sums) in up.chunks(r).zip(&mut sums) {
        for (rank, up) in up.iter().enumerate() {
            let down = &down[rank * i + at..][..columns];
            sums.iter_mut().zip(down).for_each(|(sum, down)| *sum += up * down);
        }
    }
    sums
}
