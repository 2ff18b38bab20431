//! Weights of a layer as they are held, and the two operations that use them.

use candle_core::{DType, Tensor, D};

use super::{keys, Storage, Umt5Config, Umt5Options, WeightSource};
use crate::Result;

/// Largest finite e4m3fn number.
const E4M3_MAX: f64 = 448.0;

/// A bias-free linear.
pub(super) struct Matrix {
    /// `[o, i]`, in the file's dtype or e4m3.
    w_oi: Tensor,
    /// `[o, 1]` fp32, what an e4m3 row is multiplied by.
    scale_o1: Option<Tensor>,
    compute: DType,
}

impl Matrix {
    fn load(source: &dyn WeightSource, key: &str, options: &Umt5Options) -> Result<Self> {
        let w_oi = source.get(key)?;
        let (w_oi, scale_o1) = match options.storage {
            Storage::AsStored => (w_oi, None),
            Storage::Fp8 => {
                let w_oi = w_oi.to_dtype(DType::F32)?;
                // All-zero rows keep scale 1; the largest value of a row lands on the largest e4m3 code.
                let largest_o1 = w_oi.abs()?.max_keepdim(1)?;
                let scale_o1 = (largest_o1.eq(0f32)?.to_dtype(DType::F32)? + largest_o1 / E4M3_MAX)?;
                (w_oi.broadcast_div(&scale_o1)?.to_dtype(DType::F8E4M3)?, Some(scale_o1))
            }
            Storage::Fp8Cast => (to_e4m3(&w_oi)?, None),
        };
        let scale_o1 = scale_o1.map(|s| s.to_device(&options.device)).transpose()?;
        Ok(Matrix { w_oi: w_oi.to_device(&options.device)?, scale_o1, compute: options.compute })
    }

    /// `x [.., i] -> [.., o]` in the compute dtype.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (o, i) = self.w_oi.dims2()?;
        let w_oi = match &self.scale_o1 {
            Some(scale_o1) => self.w_oi.to_dtype(DType::F32)?.broadcast_mul(scale_o1)?.to_dtype(self.compute)?,
            None => self.w_oi.to_dtype(self.compute)?,
        };
        let mut dims = x.dims().to_vec();
        let rows = x.elem_count() / i;
        if let Some(last) = dims.last_mut() {
            *last = o;
        }
        Ok(x.reshape((rows, i))?.matmul(&w_oi.t()?)?.reshape(dims)?)
    }
}

/// Root-mean-square norm without a bias, statistics in fp32.
pub(super) struct Norm {
    w_d: Tensor,
}

impl Norm {
    pub(super) fn load(source: &dyn WeightSource, key: &str, options: &Umt5Options) -> Result<Self> {
        let w_d = source.get(key)?.to_device(&options.device)?;
        let w_d = match options.storage {
            Storage::Fp8Cast => through_e4m3(&w_d)?,
            _ => w_d,
        };
        Ok(Norm { w_d: w_d.to_dtype(options.compute)? })
    }

    pub(super) fn forward(&self, x_bld: &Tensor, eps: f64) -> Result<Tensor> {
        let x32 = x_bld.to_dtype(DType::F32)?;
        let rms = (x32.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
        let normed = x32.broadcast_div(&rms)?.to_dtype(self.w_d.dtype())?;
        Ok(normed.broadcast_mul(&self.w_d)?)
    }
}

/// The weights of one encoder layer.
pub(super) struct Layer {
    pub norm1: Norm,
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub o: Matrix,
    /// `[buckets, heads]`, absent where all layers share one.
    pub bias: Option<Tensor>,
    pub norm2: Norm,
    pub gate: Matrix,
    pub fc1: Matrix,
    pub fc2: Matrix,
}

impl Layer {
    pub(super) fn load(
        source: &dyn WeightSource,
        i: usize,
        config: &Umt5Config,
        options: &Umt5Options,
    ) -> Result<Self> {
        let matrix = |name: &str| Matrix::load(source, &format!("blocks.{i}.{name}.weight"), options);
        let norm = |name: &str| Norm::load(source, &format!("blocks.{i}.{name}.weight"), options);
        let bias = match config.shared_bias {
            true => None,
            false => Some(bias_table(source, i, config, options)?),
        };
        Ok(Layer {
            norm1: norm("norm1")?,
            q: matrix("attn.q")?,
            k: matrix("attn.k")?,
            v: matrix("attn.v")?,
            o: matrix("attn.o")?,
            bias,
            norm2: norm("norm2")?,
            gate: matrix("ffn.gate.0")?,
            fc1: matrix("ffn.fc1")?,
            fc2: matrix("ffn.fc2")?,
        })
    }
}

/// The relative position table of layer `i`, `[buckets, heads]`.
pub(super) fn bias_table(
    source: &dyn WeightSource,
    i: usize,
    config: &Umt5Config,
    options: &Umt5Options,
) -> Result<Tensor> {
    let table = source.get(&keys::bias_key(i, config.shared_bias))?.to_device(&options.device)?;
    match options.storage {
        Storage::Fp8Cast => through_e4m3(&table),
        _ => Ok(table),
    }
}

/// Rounds a tensor to e4m3 and back, unscaled.
pub(super) fn through_e4m3(x: &Tensor) -> Result<Tensor> {
    Ok(to_e4m3(x)?.to_dtype(x.dtype())?)
}

/// Plain cast to e4m3: what is too large for it becomes NaN, it does not saturate.
fn to_e4m3(x: &Tensor) -> Result<Tensor> {
    let x32 = x.to_dtype(DType::F32)?;
    let too_large = x32.abs()?.gt(464f32)?;
    Ok(too_large.where_cond(&x32.ones_like()?.affine(f64::NAN, 0.0)?, &x32)?.to_dtype(DType::F8E4M3)?)
}
