//! Normals made on the card, see `philox.cu`.

use candle_core::{DType, Tensor};

use super::Philox;
use crate::common::gpu::{Arg, Gpu, Launch, View};
use crate::Result;

pub(super) fn normal(gpu: &Gpu, p: &Philox, shape: &[usize]) -> Result<Tensor> {
    let out = gpu.empty(shape, DType::F32)?;
    let n = out.elem_count();
    if n == 0 {
        return Ok(out);
    }
    let word = |w: u32| Arg::words(&[w]);
    let args = [
        word(p.key[0]),
        word(p.key[1]),
        word(p.stream),
        word(p.item),
        word(p.step),
        Arg::ptr(View::new("philox", &out)?.address),
        Arg::i64(n),
    ];
    gpu.launch("philox/philox", "philox_normal", Launch::over(n, 4), &args)?;
    Ok(out)
}
