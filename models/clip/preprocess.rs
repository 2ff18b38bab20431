//! From a frame in [-1,1] to the tower's input. The bicubic resize is part of the numbers: it is torch's, without
//! antialiasing, corners not aligned, a = -0.75.

use super::arch::MODEL;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

const MEAN: [f32; 3] = [0.48145466, 0.4578275, 0.40821073];
const STD: [f32; 3] = [0.26862954, 0.261_302_6, 0.275_777_1];

/// The cubic convolution kernel at distance `x` from a sample, for |x| <= 1 and 1 <= |x| <= 2.
fn near(x: f32) -> f32 {
    const A: f32 = -0.75;
    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
}

fn far(x: f32) -> f32 {
    const A: f32 = -0.75;
    ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
}

/// The resize of one axis as a matrix `[from, to]`: four weights a column, edge samples repeated.
fn resize_matrix(from: usize, to: usize, device: &Device) -> Result<Tensor> {
    let scale = from as f32 / to as f32;
    let mut m = vec![0f32; from * to];
    for i in 0..to {
        let at = (i as f32 + 0.5) * scale - 0.5;
        let t = at - at.floor();
        for (k, w) in [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)].into_iter().enumerate() {
            let sample = (at.floor() as isize + k as isize - 1).clamp(0, from as isize - 1) as usize;
            m[sample * to + i] += w;
        }
    }
    Ok(Tensor::from_vec(m, (from, to), device)?)
}

/// `[b,3,H,W]` in [-1,1] to `[b,3,size,size]`, resized, brought to [0,1] and normalised; fp32.
pub(super) fn preprocess(images: &Tensor, size: usize) -> Result<Tensor> {
    let (b, h, w) = match *images.dims() {
        [b, 3, h, w] if h > 0 && w > 0 => (b, h, w),
        ref got => {
            let what = format!("images have shape {got:?}, expected [batch, 3, height, width]");
            return Err(Error::Invalid { model: MODEL, what });
        }
    };
    let device = images.device();
    let mut x = images.to_dtype(DType::F32)?.contiguous()?;
    if (h, w) != (size, size) {
        let columns = resize_matrix(w, size, device)?;
        x = x.reshape((b * 3 * h, w))?.matmul(&columns)?.reshape((b * 3, h, size))?;
        // [to, from] for each picture: rows are mixed from the left.
        let rows = resize_matrix(h, size, device)?.t()?.contiguous()?;
        let rows = rows.unsqueeze(0)?.broadcast_as((b * 3, size, h))?.contiguous()?;
        x = rows.matmul(&x)?.reshape((b, 3, size, size))?;
    }
    let channel = |v: [f32; 3]| Tensor::from_slice(&v, (1, 3, 1, 1), device);
    let x = ((x * 0.5)? + 0.5)?;
    Ok(x.broadcast_sub(&channel(MEAN)?)?.broadcast_div(&channel(STD)?)?)
}
