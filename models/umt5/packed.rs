//! The forward pass in ops that have kernels: the tokens of all prompts lie side by side, `[1, l, d]`, so that padding costs
//! nothing; linears run over all of them, attention over each prompt by itself. The residual stream is fp32.

use candle_core::{DType, Tensor};
use wan_kernels::dense_attention::{DenseAttention, DenseAttentionArgs};
use wan_kernels::gelu::{GeluTanhGate, GeluTanhGateArgs};
use wan_kernels::linear::{Linear, LinearArgs, LinearFp8, LinearFp8Args};
use wan_kernels::norm::{RmsNorm, RmsNormArgs};
use wan_kernels::Exec;

use super::encoder::{relative_bucket, Trace, Umt5};
use super::store::{bias_table, Layer, Matrix, Norm};
use super::{keys, Residence, MODEL};
use crate::{Error, Result};

/// The rows of one prompt among those of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub first: usize,
    pub rows: usize,
    /// Rows that are tokens; those behind them are padding, which nobody attends to.
    pub keys: usize,
}

impl Segment {
    /// Prompts without padding, one behind the other.
    pub fn in_a_row(lengths: impl Iterator<Item = usize>) -> Vec<Self> {
        let mut first = 0;
        let next = |rows| {
            first += rows;
            Segment { first: first - rows, rows, keys: rows }
        };
        lengths.map(next).collect()
    }

    /// The rows of a padded batch; `mask_bl` is 1 at tokens and 0 behind them.
    pub fn padded(mask_bl: &Tensor) -> Result<Vec<Self>> {
        let rows = mask_bl.dim(1)?;
        let masks = mask_bl.to_dtype(DType::U32)?.to_vec2::<u32>()?;
        let one = |(i, mask): (usize, Vec<u32>)| {
            let keys = mask.iter().take_while(|m| **m != 0).count();
            if keys == 0 || mask[keys..].iter().any(|m| *m != 0) {
                let what = format!("the mask of prompt {i} is not tokens followed by padding");
                return Err(Error::Invalid { model: MODEL, what });
            }
            Ok(Segment { first: i * rows, rows, keys })
        };
        masks.into_iter().enumerate().map(one).collect()
    }
}

/// Layers in host memory that the card reads by itself.
pub(super) struct Pinned {
    #[cfg(feature = "cuda")]
    _memory: wan_kernels::gpu::Pinned,
}

impl Pinned {
    /// `None` where there is no card.
    #[cfg(feature = "cuda")]
    pub fn new(exec: &Exec, layers: &[Layer]) -> Result<Option<Self>> {
        let Exec::Cuda { gpu, .. } = exec else { return Ok(None) };
        let mut tensors = Vec::new();
        for layer in layers {
            layer.map(&mut |t| {
                tensors.push(t.clone());
                Ok(t.clone())
            })?;
        }
        Ok(Some(Pinned { _memory: gpu.pin(tensors)? }))
    }

    #[cfg(not(feature = "cuda"))]
    pub fn new(_exec: &Exec, _layers: &[Layer]) -> Result<Option<Self>> {
        Ok(None)
    }
}

/// A layer's weights, there or on their way.
enum Coming<'a> {
    There(&'a Layer),
    Read(Layer),
    #[cfg(feature = "cuda")]
    Copying(Layer, &'a wan_kernels::gpu::Gpu),
}

impl Coming<'_> {
    fn arrived(&self) -> Result<&Layer> {
        match self {
            Coming::There(layer) => Ok(layer),
            Coming::Read(layer) => Ok(layer),
            #[cfg(feature = "cuda")]
            Coming::Copying(layer, gpu) => {
                gpu.after_uploads()?;
                Ok(layer)
            }
        }
    }
}

fn norm(exec: &Exec, norm: &Norm, x: &Tensor, eps: f64, out: DType) -> Result<Tensor> {
    Ok(exec.run::<RmsNorm>(&RmsNormArgs { x, weight_d: &norm.w_d, eps, out })?)
}

fn linear(exec: &Exec, w: &Matrix, x: &Tensor) -> Result<Tensor> {
    product(exec, w, x, None, exec.compute())
}

/// `base + x·Wᵀ` in fp32.
fn linear_onto(exec: &Exec, w: &Matrix, x: &Tensor, base: Tensor) -> Result<Tensor> {
    product(exec, w, x, Some(base), DType::F32)
}

fn product(exec: &Exec, w: &Matrix, x: &Tensor, base: Option<Tensor>, out: DType) -> Result<Tensor> {
    Ok(match w {
        Matrix::Plain(weight_oi) => exec.run::<Linear>(&LinearArgs { x, weight_oi, bias_o: None, base, out })?,
        Matrix::Fp8(weight) => exec.run::<LinearFp8>(&LinearFp8Args { x, weight, bias_o: None, base, out })?,
    })
}

impl Umt5 {
    fn coming(&self, i: usize) -> Result<Coming<'_>> {
        let Some(layer) = self.layers.get(i) else {
            return Ok(Coming::Read(Layer::load(self.source.as_ref(), i, &self.config, &self.options)?));
        };
        #[cfg(feature = "cuda")]
        if let (Residence::Host, Exec::Cuda { gpu, .. }) = (self.options.residence, &self.options.exec) {
            let mut sources = Vec::new();
            layer.map(&mut |t| {
                sources.push(t.clone());
                Ok(t.clone())
            })?;
            let mut copies = gpu.start_upload(&sources)?.into_iter();
            let copy = layer.map(&mut |_| {
                let what = || Error::Invalid { model: MODEL, what: "a layer has more tensors than were copied".into() };
                copies.next().ok_or_else(what)
            })?;
            return Ok(Coming::Copying(copy, gpu));
        }
        debug_assert!(self.options.residence != Residence::Source);
        Ok(Coming::There(layer))
    }

    /// All layers over packed rows `[1, l, d]` in fp32, and the final norm: the same in fp32.
    pub(super) fn run_packed(&self, mut x: Tensor, segments: &[Segment], trace: Trace<'_>) -> Result<Tensor> {
        let (exec, eps, compute) = (&self.options.exec, self.config.eps, self.options.exec.compute());
        let last = Norm::load(self.source.as_ref(), "norm.weight", &self.options)?;
        let shared = match self.config.shared_bias {
            true => Some(bias_table(self.source.as_ref(), 0, &self.config, &self.options)?),
            false => None,
        };
        let longest = segments.iter().map(|s| s.rows).max().unwrap_or(1);
        let mut next = Some(self.coming(0)?);
        for i in 0..self.config.layers {
            let Some(now) = next.take() else { break };
            let w = now.arrived()?;
            // The next layer is on its way before this one is computed.
            next = if i + 1 < self.config.layers { Some(self.coming(i + 1)?) } else { None };
            let table = w.bias.as_ref().or(shared.as_ref()).ok_or_else(|| Error::MissingWeight {
                model: MODEL,
                key: keys::bias_key(i, self.config.shared_bias),
            })?;
            let bias_nr = self.bias_by_distance(table, longest)?;
            let h = norm(exec, &w.norm1, &x, eps, compute)?;
            let attended = self.attend(w, &h, &bias_nr, segments)?;
            x = linear_onto(exec, &w.o, &attended, x)?;
            let h = norm(exec, &w.norm2, &x, eps, compute)?;
            let (gate, up) = (linear(exec, &w.gate, &h)?, linear(exec, &w.fc1, &h)?);
            let h = exec.run::<GeluTanhGate>(&GeluTanhGateArgs { gate: &gate, x: &up })?;
            x = linear_onto(exec, &w.fc2, &h, x)?;
            trace(&format!("block{i}.out"), &x)?;
        }
        norm(exec, &last, &x, eps, DType::F32)
    }

    fn attend(&self, w: &Layer, h: &Tensor, bias_nr: &Tensor, segments: &[Segment]) -> Result<Tensor> {
        let exec = &self.options.exec;
        let (q, k, v) = (linear(exec, &w.q, h)?, linear(exec, &w.k, h)?, linear(exec, &w.v, h)?);
        let mut parts = Vec::with_capacity(segments.len());
        for s in segments {
            parts.push(exec.run::<DenseAttention>(&DenseAttentionArgs {
                q_bld: &q.narrow(1, s.first, s.rows)?,
                k_bmd: &k.narrow(1, s.first, s.keys)?,
                v_bmd: &v.narrow(1, s.first, s.keys)?,
                heads: self.config.heads,
                // No 1/sqrt(h): the weights were trained to be scaled already.
                scale: 1.0,
                bias_nr: Some(bias_nr),
                out: exec.compute(),
            })?);
        }
        Ok(Tensor::cat(&parts, 1)?)
    }

    /// The bias of every head at each distance `key - query` from `1 - l` to `l - 1`: `[n, 2l - 1]` fp32.
    fn bias_by_distance(&self, table: &Tensor, l: usize) -> Result<Tensor> {
        let far = l as i64 - 1;
        let buckets: Vec<u32> =
            (-far..=far).map(|rel| relative_bucket(rel, self.config.buckets, self.config.max_distance)).collect();
        let ids = Tensor::from_vec(buckets, 2 * l - 1, table.device())?;
        Ok(table.to_dtype(DType::F32)?.index_select(&ids, 0)?.t()?.contiguous()?)
    }
}
