//! Two products by cublasLt, all heads in one call, and the softmax kernel between them. Scores are held for so many
//! queries at a time that they take at most [`SCORES`] bytes.

use candle_core::{DType, Tensor};

use super::{DenseAttention, DenseAttentionArgs};
use crate::common::blas::{Batch, Strided};
use crate::common::gpu::{tensor_address, Arg, Gpu, Launch, View};
use crate::linear::cuda::cast;
use crate::{Op, Result};

const OP: &str = DenseAttention::NAME;
/// A frame of 1280x720 has 14400 positions in the VAE: all scores would be 830 MB.
const SCORES: usize = 256 << 20;

/// A tensor [b, rows, d] in memory, rows and samples at any distance.
struct Rows {
    /// Of element (0, 0, 0).
    address: u64,
    row: usize,
    sample: usize,
    _tensor: Tensor,
}

impl Rows {
    /// `t` itself in `dtype`, or a copy of it where its rows do not suit.
    fn new(gpu: &Gpu, t: &Tensor, dtype: DType) -> Result<Self> {
        let fits = t.dtype() == dtype
            && t.stride()[2] == 1
            && t.stride()[1].is_multiple_of(8)
            && t.stride()[0].is_multiple_of(8);
        let tensor = if fits { t.clone() } else { cast(gpu, OP, &t.contiguous()?, dtype)? };
        let first_row = tensor.narrow(0, 0, 1)?.narrow(1, 0, 1)?;
        Ok(Rows {
            address: tensor_address(OP, &first_row)?,
            row: tensor.stride()[1],
            sample: tensor.stride()[0],
            _tensor: tensor,
        })
    }

    /// Address of element (sample, row, 0).
    fn at(&self, sample: usize, row: usize) -> u64 {
        self.address + 2 * (sample * self.sample + row * self.row) as u64
    }
}

pub(super) fn forward(a: &DenseAttentionArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
    let (b, l, d) = a.q_bld.dims3()?;
    let (m, n) = (a.k_bmd.dim(1)?, a.heads);
    let h = d / n;
    let (q, k, v) =
        (Rows::new(gpu, a.q_bld, compute)?, Rows::new(gpu, a.k_bmd, compute)?, Rows::new(gpu, a.v_bmd, compute)?);
    let bias = a.bias_nr.map(|t| Ok::<_, crate::Error>((View::new(OP, t)?, t.dim(1)?))).transpose()?;
    let out = gpu.empty((b, l, d), compute)?;
    let out_address = View::new(OP, &out)?.address;
    // Rows of scores begin at 16 bytes, also as 16-bit values.
    let pitch = m.next_multiple_of(8);
    let rows_at_a_time = (SCORES / (4 * n * pitch)).clamp(1, l);
    let scores = gpu.scratch("dense_attention scores", 4 * n * pitch * rows_at_a_time)?;
    let probabilities = gpu.scratch("dense_attention probabilities", 2 * n * pitch * rows_at_a_time)?;
    let code = if compute == DType::BF16 { 1 } else { 2 };
    for sample in 0..b {
        for first in (0..l).step_by(rows_at_a_time) {
            let rows = rows_at_a_time.min(l - first);
            let square = |address| Strided { address, row: pitch, batch: rows * pitch, transposed: false };
            gpu.blas().run_batch(&Batch {
                count: n,
                rows,
                columns: m,
                inner: h,
                left: Strided { address: q.at(sample, first), row: q.row, batch: h, transposed: false },
                right: Strided { address: k.at(sample, 0), row: k.row, batch: h, transposed: true },
                out: square(scores),
                operands: compute,
                result: DType::F32,
            })?;
            let (bias_row, centre) = bias.as_ref().map_or((0, 0), |(_, r)| (*r, r / 2));
            let args = [
                Arg::ptr(scores),
                Arg::pointers(&[probabilities], &[code]),
                Arg::ptr(bias.as_ref().map_or(0, |(view, _)| view.address)),
                Arg::i32(bias_row),
                Arg::i32(centre),
                Arg::i32(rows),
                Arg::i32(first),
                Arg::i32(m),
                Arg::i32(pitch),
                Arg::f32(a.scale as f32),
            ];
            // A warp has enough to do with a row of a prompt, and too much with one of a picture.
            let (kernel, each) = if m <= 1024 { ("softmax_warp", 8) } else { ("softmax_block", 1) };
            gpu.launch("dense_attention/softmax", kernel, Launch::blocks((rows.div_ceil(each), n, 1), 256), &args)?;
            gpu.blas().run_batch(&Batch {
                count: n,
                rows,
                columns: h,
                inner: m,
                left: square(probabilities),
                right: Strided { address: v.at(sample, 0), row: v.row, batch: h, transposed: false },
                out: Strided {
                    address: out_address + 2 * ((sample * l + first) * d) as u64,
                    row: d,
                    batch: h,
                    transposed: false,
                },
                operands: compute,
                result: compute,
            })?;
        }
    }
    cast(gpu, OP, &out, a.out)
}
