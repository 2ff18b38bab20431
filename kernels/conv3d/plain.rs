//! The definition in plain candle: one 2-D convolution for each temporal tap of each output frame, in bands of rows, so
//! that the unfolded input which candle makes inside stays small.

use super::{CausalConv3dArgs, Sizes};
use crate::Result;
use candle_core::{DType, Tensor};

/// Elements of an unfolded band; 64 MiB in fp32.
const BAND: usize = 16 << 20;

pub(super) fn forward(a: &CausalConv3dArgs<'_>, s: Sizes, compute: DType) -> Result<Tensor> {
    let at = |t: &Tensor| t.to_dtype(compute)?.to_dtype(DType::F32);
    let weight = at(a.weight)?;
    let bias = a.bias.map(|b| at(b)?.reshape((1, s.o, 1, 1))).transpose()?;
    let frame = |i: usize| -> Result<Option<Tensor>> {
        let zeros = a.pad_front - a.past.len();
        let t = match i.checked_sub(zeros) {
            None => return Ok(None),
            Some(j) if j < a.past.len() => a.past[j].squeeze(2)?,
            Some(j) => a.x.narrow(2, j - a.past.len(), 1)?.squeeze(2)?,
        };
        let t = at(&t)?.pad_with_zeros(2, a.pad_y.0, a.pad_y.1)?;
        Ok(Some(t.pad_with_zeros(3, a.pad_x.0, a.pad_x.1)?))
    };
    // candle's conv2d has one stride for both sides: convolve densely at the larger common step, then thin out.
    let [st, sy, sx] = a.stride;
    let step = if sy == sx { sy } else { 1 };
    let rows = (BAND / (s.b * s.c * s.ky * s.kx * s.x_out * if step == 1 { sx } else { 1 }).max(1)).clamp(1, s.y_out);
    let mut frames = Vec::with_capacity(s.f_out);
    for f in 0..s.f_out {
        let taps: Vec<(usize, Tensor)> = (0..s.kt)
            .map(|t| Ok(frame(f * st + t)?.map(|x| (t, x))))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .flatten()
            .collect();
        let mut bands = Vec::new();
        for y0 in (0..s.y_out).step_by(rows) {
            let n = rows.min(s.y_out - y0);
            let mut sum: Option<Tensor> = None;
            for (t, x) in &taps {
                let w = weight.narrow(2, *t, 1)?.squeeze(2)?.contiguous()?;
                let band = x.narrow(2, y0 * sy, (n - 1) * sy + s.ky)?.contiguous()?;
                let mut y = band.conv2d(&w, 0, step, 1, 1)?;
                if step == 1 && (sy, sx) != (1, 1) {
                    let pick = |n: usize, stride: usize| {
                        Tensor::arange_step(0u32, (n * stride) as u32, stride as u32, y.device())
                    };
                    let (iy, ix) = (pick(n, sy)?, pick(s.x_out, sx)?);
                    y = y.index_select(&iy, 2)?.index_select(&ix, 3)?;
                }
                sum = Some(match sum {
                    Some(acc) => (acc + y)?,
                    None => y,
                });
            }
            let zero = || Tensor::zeros((s.b, s.o, n, s.x_out), DType::F32, a.x.device());
            let sum = sum.map_or_else(zero, Ok)?;
            bands.push(match &bias {
                Some(b) => sum.broadcast_add(b)?.to_dtype(compute)?,
                None => sum.to_dtype(compute)?,
            });
        }
        frames.push(Tensor::cat(&bands, 2)?.unsqueeze(2)?);
    }
    Ok(Tensor::cat(&frames, 2)?)
}
