//! Weights of a layer as they are held, and the two operations that use them.

use candle_core::{DType, Tensor, D};
use wan_kernels::fp8;

use super::{keys, Storage, Umt5Config, Umt5Options, WeightSource};
use crate::Result;

/// A bias-free linear.
pub(super) enum Matrix {
    /// `[o, i]` in the file's dtype.
    Plain(Tensor),
    Fp8(fp8::Weight),
}

impl Matrix {
    fn load(source: &dyn WeightSource, key: &str, options: &Umt5Options) -> Result<Self> {
        let w_oi = source.get(key)?;
        // On a card matrices are held as they are used, and quantised there.
        let on_card = options.exec.device().is_cuda();
        let w_oi = match options.storage {
            Storage::AsStored if on_card => w_oi.to_device(options.exec.device())?.to_dtype(options.exec.compute())?,
            Storage::Fp8 if on_card => w_oi.to_device(options.exec.device())?,
            _ => w_oi,
        };
        Ok(match options.storage {
            Storage::AsStored => Matrix::Plain(w_oi.to_device(options.exec.device())?),
            Storage::Fp8 => {
                let weight = fp8::Weight::quantize(&w_oi.to_dtype(options.exec.compute())?, fp8::Granularity::Block)?;
                Matrix::Fp8(weight.to_device(options.exec.device())?)
            }
            Storage::Fp8Cast => {
                let one = Tensor::ones((), options.exec.compute(), w_oi.device())?;
                Matrix::Fp8(fp8::Weight::new(to_e4m3(&w_oi)?, one)?.to_device(options.exec.device())?)
            }
        })
    }

    /// The same weights, each tensor passed through `f`.
    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Matrix::Plain(w_oi) => Matrix::Plain(f(w_oi)?),
            Matrix::Fp8(weight) => Matrix::Fp8(fp8::Weight::new(f(weight.codes_oi())?, f(weight.scale())?)?),
        })
    }

    /// `x [.., i] -> [.., o]` in the dtype of `x`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let w_oi = match self {
            Matrix::Plain(w_oi) => w_oi.to_dtype(x.dtype())?,
            Matrix::Fp8(weight) => weight.dequantize()?.to_dtype(x.dtype())?,
        };
        let (o, i) = w_oi.dims2()?;
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
    pub w_d: Tensor,
}

impl Norm {
    pub(super) fn load(source: &dyn WeightSource, key: &str, options: &Umt5Options) -> Result<Self> {
        let w_d = source.get(key)?.to_device(options.exec.device())?;
        let w_d = match options.storage {
            Storage::Fp8Cast => through_e4m3(&w_d)?,
            _ => w_d,
        };
        Ok(Norm { w_d: w_d.to_dtype(options.exec.compute())? })
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

impl Layer {
    /// The same weights, each tensor passed through `f`, always in the same order.
    pub(super) fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Layer {
            norm1: Norm { w_d: f(&self.norm1.w_d)? },
            q: self.q.map(f)?,
            k: self.k.map(f)?,
            v: self.v.map(f)?,
            o: self.o.map(f)?,
            bias: self.bias.as_ref().map(&mut *f).transpose()?,
            norm2: Norm { w_d: f(&self.norm2.w_d)? },
            gate: self.gate.map(f)?,
            fc1: self.fc1.map(f)?,
            fc2: self.fc2.map(f)?,
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
    let table = source.get(&keys::bias_key(i, config.shared_bias))?.to_device(options.exec.device())?;
    match options.storage {
        Storage::Fp8Cast => through_e4m3(&table),
        _ => Ok(table),
    }
}

/// Rounds a tensor to e4m3 and back, unscaled.
pub(super) fn through_e4m3(x: &Tensor) -> Result<Tensor> {
    let rounded: Vec<f32> = codes(x)?.into_iter().map(fp8::codec::decode).collect();
    Ok(Tensor::from_vec(rounded, x.dims(), x.device())?.to_dtype(x.dtype())?)
}

/// Plain cast to e4m3 codes (U8): what is too large for it becomes NaN, it does not saturate.
fn to_e4m3(x: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_vec(codes(x)?, x.dims(), x.device())?)
}

fn codes(x: &Tensor) -> Result<Vec<u8>> {
    let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let mut codes = vec![0u8; values.len()];
    fp8::codec::encode_slice(&values, &mut codes);
    Ok(codes)
}
