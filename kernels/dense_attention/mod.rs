//! Attention by plain matrix products, for what the flash kernels do not take: heads of any width (the VAE's one head of
//! 384 channels) and a bias by relative position (umT5). No backward: both models are frozen.
//!
//! Operands are rounded to `compute`, scores and softmax are fp32, probabilities are rounded to `compute`, sums fp32.

use candle_core::{DType, Tensor, D};

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{gate, num, Cost, Error, Op, Result};

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

/// `softmax(scale · q·kᵀ + bias[m − l]) · v`, for each head by itself.
pub struct DenseAttention;

/// `q_bld` [b, l, n·h], `k_bmd` and `v_bmd` [b, m, n·h]: parts of wider rows are taken without a copy.
pub struct DenseAttentionArgs<'a> {
    pub q_bld: &'a Tensor,
    pub k_bmd: &'a Tensor,
    pub v_bmd: &'a Tensor,
    pub heads: usize,
    pub scale: f64,
    /// F32 [n, 2s − 1], the bias of a key `m − l` positions to the right at place `m − l + s − 1`; `s` is at least `l` and `m`.
    pub bias_nr: Option<&'a Tensor>,
    /// Dtype of the result [b, l, n·h].
    pub out: DType,
}

impl Op for DenseAttention {
    type Args<'a> = DenseAttentionArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "dense_attention";

    fn check(a: &DenseAttentionArgs<'_>) -> Result<()> {
        let [b, l, d] = gate::dims::<3>(Self::NAME, "q_bld", a.q_bld, "[b, l, n·h], nothing empty")?;
        let [_, m, _] = gate::dims::<3>(Self::NAME, "k_bmd", a.k_bmd, "[b, m, n·h], nothing empty")?;
        gate::shape(Self::NAME, "k_bmd", a.k_bmd, &[b, m, d], "[b, m, n·h]")?;
        gate::shape(Self::NAME, "v_bmd", a.v_bmd, &[b, m, d], "[b, m, n·h]")?;
        for (name, t) in [("q_bld", a.q_bld), ("k_bmd", a.k_bmd), ("v_bmd", a.v_bmd)] {
            gate::float(Self::NAME, name, t)?;
        }
        gate::out(Self::NAME, a.out)?;
        if a.heads == 0 || d % a.heads != 0 {
            let what = format!("a width of {d} does not split into {} heads", a.heads);
            return Err(Error::Argument { op: Self::NAME, what });
        }
        if let Some(bias) = a.bias_nr {
            gate::dtype(Self::NAME, "bias_nr", bias, DType::F32)?;
            let [n, r] = gate::dims::<2>(Self::NAME, "bias_nr", bias, "[n, 2s - 1]")?;
            if n != a.heads || r % 2 == 0 || r / 2 + 1 < l.max(m) {
                let want = format!("[{}, 2s - 1] with s of at least {}", a.heads, l.max(m));
                return Err(Error::Shape { op: Self::NAME, tensor: "bias_nr", got: bias.shape().clone(), want });
            }
        }
        Ok(())
    }

    fn cost(a: &DenseAttentionArgs<'_>) -> Cost {
        let elements = |t: &Tensor| t.elem_count() as f64;
        let flops = 4.0 * elements(a.q_bld) * a.k_bmd.dims()[1] as f64;
        let bytes = gate::bytes(a.q_bld) + gate::bytes(a.k_bmd) + gate::bytes(a.v_bmd);
        Cost { flops, bytes: bytes + elements(a.q_bld) * a.out.size_in_bytes() as f64 }
    }

    fn reference(a: &DenseAttentionArgs<'_>, compute: DType) -> Result<Tensor> {
        let (b, l, d) = a.q_bld.dims3()?;
        let (m, n) = (a.k_bmd.dim(1)?, a.heads);
        let split = |t: &Tensor, rows: usize| -> Result<Tensor> {
            let t = t.to_dtype(compute)?.to_dtype(DType::F32)?.reshape((b, rows, n, d / n))?;
            Ok(t.transpose(1, 2)?.contiguous()?)
        };
        let (q_bnlh, k_bnmh, v_bnmh) = (split(a.q_bld, l)?, split(a.k_bmd, m)?, split(a.v_bmd, m)?);
        let mut s_bnlm = (q_bnlh.matmul(&k_bnmh.t()?)? * a.scale)?;
        if let Some(bias_nr) = a.bias_nr {
            let middle = bias_nr.dim(1)? / 2;
            let rows: Vec<Tensor> =
                (0..l).map(|i| bias_nr.narrow(1, middle - i, m)).collect::<candle_core::Result<_>>()?;
            s_bnlm = s_bnlm.broadcast_add(&Tensor::stack(&rows, 1)?.unsqueeze(0)?)?;
        }
        let p_bnlm = s_bnlm.broadcast_sub(&s_bnlm.max_keepdim(D::Minus1)?)?.exp()?;
        let p_bnlm = p_bnlm.broadcast_div(&p_bnlm.sum_keepdim(D::Minus1)?)?;
        let p_bnlm = num::f32(&p_bnlm.to_dtype(compute)?)?;
        Ok(p_bnlm.matmul(&v_bnmh)?.transpose(1, 2)?.reshape((b, l, d))?.to_dtype(compute)?.to_dtype(a.out)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &DenseAttentionArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        match compute {
            DType::BF16 | DType::F16 => cuda::forward(a, gpu, compute),
            _ => Self::reference(a, compute),
        }
    }
}
