//! AdamW on the card, over flat F32 tensors that are updated in place; see `adamw.cu`.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::{AdamW, Constants, Step, NAME};
use crate::common::gpu::{error, tensor_address, Arg, Gpu, Launch};
use crate::{gate, Error, Result};

/// Blocks of the norm's kernel; the sum of their parts is taken on the host.
const NORM_BLOCKS: usize = 512;

fn address(t: &Tensor, n: usize, name: &'static str) -> Result<u64> {
    gate::dtype(NAME, name, t, DType::F32)?;
    gate::shape(NAME, name, t, &[n], "[n]")?;
    tensor_address(NAME, t)
}

/// [`super::step_ranges`] on tensors [n] of one card.
pub fn step_ranges(
    gpu: &Gpu,
    adamw: &AdamW,
    at: &Step,
    ranges: &[(Range<usize>, f64)],
    [params, grads, m, v]: [&Tensor; 4],
) -> Result<()> {
    let n = params.elem_count();
    super::check(NAME, at, n, &[])?;
    let all = [address(params, n, "params")?, address(grads, n, "grads")?, address(m, n, "m")?, address(v, n, "v")?];
    for (range, lr) in ranges {
        if range.end > n || range.is_empty() {
            let what = format!("range {range:?} lies outside {n} parameters");
            return Err(Error::Argument { op: NAME, what });
        }
        let c = Constants::new(adamw, &Step { lr: *lr, ..*at });
        let constants =
            [c.grad_scale, c.one_minus_beta1, c.beta2, c.one_minus_beta2, c.decay, c.step_size, c.correction2, c.eps];
        let mut args: Vec<Arg> = all.iter().map(|address| Arg::ptr(address + 4 * range.start as u64)).collect();
        args.push(Arg::words(&constants.map(f32::to_bits)));
        args.push(Arg::i64(range.len()));
        gpu.launch("adamw/adamw", "adamw_step", Launch::over(range.len(), 1), &args)?;
    }
    Ok(())
}

/// [`super::global_norm`] of a tensor [n]; waits for the card. In fp64, in a fixed order (another one than on the CPU).
pub fn global_norm(gpu: &Gpu, grads: &Tensor) -> Result<f64> {
    let n = grads.elem_count();
    let address = address(grads, n, "grads")?;
    let blocks = NORM_BLOCKS.min(n.div_ceil(256)).max(1);
    let partial = gpu.empty(blocks, DType::F64)?;
    let args = [Arg::ptr(address), Arg::ptr(tensor_address(NAME, &partial)?), Arg::i64(n)];
    gpu.launch("adamw/adamw", "squared_norm", Launch::blocks((blocks, 1, 1), 256), &args)?;
    let sum: f64 = partial.to_vec1::<f64>()?.iter().sum();
    if sum < 0.0 {
        return Err(error(NAME, format!("a sum of squares is {sum}")));
    }
    Ok(sum.sqrt())
}
