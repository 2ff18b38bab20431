//! The LoRAs of linears that read one input, as queries, keys and values do: their matrices `down` stand one below the
//! other, so that `x` is read once for all of them, and `dx` is written once.
//!
//! ```text
//! h [l, R] = x · downᵀ             columns of linear j: its own h
//! y_j      = base_j + h_j · up_jᵀ
//! dh       = [dy_0 · up_0 | dy_1 · up_1 | ..]
//! ddown    = dhᵀ · x               rows of linear j: its own ddown
//! dx       = base + dh · down
//! ```

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cost, last};
#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, num, Cost, Exec, Op, Result};

/// Matrices of several LoRAs over one input.
#[derive(Debug, Clone)]
pub struct Stack {
    /// `[R, i]`: the ranks' sum, each filled up as [`super::low_rank`] does.
    pub down_ri: Tensor,
    /// `[o, r]` of each.
    pub ups_or: Vec<Tensor>,
}

impl Stack {
    /// Of pairs `down` [r, i], `up` [o, r]; all have one `i`.
    pub fn new(exec: &Exec, pairs: &[(&Tensor, &Tensor)]) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Exec::Cuda { gpu, compute, .. } = exec {
            let (down_ri, ups_or) = gpu.timed("low_rank", || cuda::low_rank(gpu, pairs, *compute))?;
            return Ok(Stack { down_ri, ups_or });
        }
        let _ = exec;
        let downs_ri: Vec<_> = pairs.iter().map(|(down_ri, _)| *down_ri).collect();
        let ups_or = pairs.iter().map(|(_, up_or)| (*up_or).clone()).collect();
        Ok(Stack { down_ri: Tensor::cat(&downs_ri, 0)?, ups_or })
    }

    /// Where each LoRA's columns of `h` (rows of `down`) begin, and how many there are.
    pub fn parts(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.ups_or.iter().scan(0, |at, up_or| {
            let begin = *at;
            *at += last(up_or);
            Some((begin, last(up_or)))
        })
    }
}

/// `dh = [dy_0 · up_0 | dy_1 · up_1 | ..]`.
pub struct LinearStackBackward;

/// `dys` each `[.., o]` with its own `o` and the same leading axes, `ups_or` `[o, r]`; the result is `[.., R]` in the
/// compute dtype.
pub struct LinearStackBackwardArgs<'a> {
    pub dys: &'a [&'a Tensor],
    pub ups_or: &'a [Tensor],
}

impl Op for LinearStackBackward {
    type Args<'a> = LinearStackBackwardArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "linear_stack_backward";

    fn check(a: &LinearStackBackwardArgs<'_>) -> Result<()> {
        let Some(first) = a.dys.first().filter(|_| a.dys.len() == a.ups_or.len()) else {
            let shape = candle_core::Shape::from(a.dys.len());
            let want = format!("one for each of {} LoRAs, at least one", a.ups_or.len());
            return Err(crate::Error::Shape { op: Self::NAME, tensor: "dys", got: shape, want });
        };
        for (dy, up_or) in a.dys.iter().zip(a.ups_or) {
            let [o, _] = gate::dims::<2>(Self::NAME, "ups_or", up_or, "[o, r], nothing empty")?;
            gate::float(Self::NAME, "ups_or", up_or)?;
            gate::float(Self::NAME, "dys", dy)?;
            gate::rows(Self::NAME, "dys", dy)?;
            let mut want = first.dims().to_vec();
            want[first.rank() - 1] = o;
            gate::shape(Self::NAME, "dys", dy, &want, "the first one's leading axes and o")?;
        }
        Ok(())
    }

    fn cost(a: &LinearStackBackwardArgs<'_>) -> Cost {
        let each = a.dys.iter().zip(a.ups_or).map(|(dy, up)| cost(dy, last(up), gate::bytes(up), None, dy.dtype()));
        each.fold(Cost { flops: 0.0, bytes: 0.0 }, |sum, c| Cost {
            flops: sum.flops + c.flops,
            bytes: sum.bytes + c.bytes,
        })
    }

    fn reference(a: &LinearStackBackwardArgs<'_>, compute: DType) -> Result<Tensor> {
        let parts = a.dys.iter().zip(a.ups_or).map(|(dy, up_or)| {
            let rows = dy.reshape(((), last(dy)))?;
            num::matmul(&rows, up_or, compute)
        });
        let dh = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?;
        let mut shape = a.dys[0].dims().to_vec();
        shape[a.dys[0].rank() - 1] = dh.dim(1)?;
        Ok(dh.to_dtype(compute)?.reshape(shape)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &LinearStackBackwardArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        cuda::stack_backward(Self::NAME, gpu, a.dys, a.ups_or, compute)
    }
}
