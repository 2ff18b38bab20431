//! A frozen linear and its adapter: forward and backward on one page. The base gets no gradient; adapters are looked
//! up, never wrapped in, so a weight that is streamed in moves no trainable tensor.

use candle_core::{DType, Tensor};
use wan_kernels::fp8;
use wan_kernels::gate_residual::{Residual, ResidualArgs};
use wan_kernels::gelu::{ActivationArgs, GeluTanh, GeluTanhBackward, GeluTanhBackwardArgs};
use wan_kernels::int8::{self, LinearInt8, LinearInt8Args, LinearInt8Backward, LinearInt8BackwardArgs};
use wan_kernels::linear::{
    eight, Linear, LinearArgs, LinearBackward, LinearBackwardArgs, LinearEight, LinearEightArgs, LinearEightBackward,
    LinearEightBackwardArgs, LinearFp8, LinearFp8Args, LinearFp8Backward, LinearFp8BackwardArgs,
};
use wan_kernels::Exec;

use crate::adapter::{Active, Dx};
use crate::wan::GradSink;
use crate::{Error, Result};

/// A weight as it is stored. Nothing trains it.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Any shape (a matrix is `[o, i]`), any float dtype.
    Dense(Tensor),
    /// A matrix of e4m3fn codes with scales by block, row or tensor; the value is code x scale rounded to the scale's
    /// dtype.
    Fp8(fp8::Weight),
    /// Codes with an fp32 scale an output, multiplied with on 8-bit tensor cores (`--fp8_fast`).
    Fp8Fast(fp8::Weight),
    /// Rotated int8 codes, multiplied with as they are (`--int8_fast`).
    Int8(int8::Weight),
}

/// What the linears of the blocks are multiplied on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Products {
    /// 16 bit (or fp32), whatever the weights are stored in.
    #[default]
    Full,
    /// fp8 tensor cores, for weights stored in fp8.
    Fp8,
    /// int8 tensor cores: weights become int8.
    Int8,
}

impl Weight {
    /// e4m3fn codes `[o, i]` (u8) and their scales, by block `[o, i/64, 1]`, by row `[o, 1]` or for all `[]` or `[1]`.
    pub fn scaled(codes_oi: Tensor, scale: Tensor) -> Result<Self> {
        Ok(Weight::Fp8(fp8::Weight::new(codes_oi, scale)?))
    }

    /// e4m3fn codes `[o, i]` (u8) without a scale: the lossy cast of the old tool's plain `--fp8_base`.
    pub fn cast(codes_oi: Tensor) -> Result<Self> {
        let one = Tensor::ones((), DType::F32, codes_oi.device())?;
        Self::scaled(codes_oi, one)
    }

    /// The shape of the values (codes have the same).
    pub fn dims(&self) -> &[usize] {
        match self {
            Weight::Dense(w) => w.dims(),
            Weight::Fp8(w) | Weight::Fp8Fast(w) => w.codes_oi().dims(),
            Weight::Int8(w) => w.codes_oi().dims(),
        }
    }

    /// The weight of a block's linear as `products` need it. What they cannot take (no fp8 codes; sizes that are not in
    /// multiples of 16, for int8 of 64) stays as it is.
    pub fn for_products(self, products: Products) -> Result<Self> {
        Ok(match (products, self) {
            (Products::Fp8, Weight::Fp8(w)) if eight::takes(w.shape()) => Weight::Fp8Fast(eight::by_rows(&w)?),
            (Products::Int8, Weight::Fp8(w)) if int8::takes(w.shape()) => {
                Weight::Int8(int8::Weight::quantize(&w.dequantize()?)?)
            }
            (Products::Int8, Weight::Dense(w)) => match *w.dims() {
                [o, i] if int8::takes([o, i]) => Weight::Int8(int8::Weight::quantize(&w)?),
                _ => Weight::Dense(w),
            },
            (_, other) => other,
        })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Weight::Dense(w) => w.elem_count() * w.dtype().size_in_bytes(),
            Weight::Fp8(w) | Weight::Fp8Fast(w) => w.bytes() as usize,
            Weight::Int8(w) => w.bytes() as usize,
        }
    }
}

/// An input rounded to 8 bit.
#[derive(Debug, Clone)]
pub enum Rounded {
    Eight(wan_kernels::linear::Rounded),
    Int8(wan_kernels::linear::Rounded),
}

impl Rounded {
    fn eight(&self) -> Option<&wan_kernels::linear::Rounded> {
        if let Rounded::Eight(rounded) = self {
            Some(rounded)
        } else {
            None
        }
    }
}

/// `y = x Wᵀ + b` with a weight that never changes.
#[derive(Debug, Clone)]
pub struct Frozen {
    pub weight: Weight,
    /// `[o]`, any float dtype.
    pub bias: Option<Tensor>,
}

impl Frozen {
    /// Checks shapes and dtypes once, when the model is put together.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Result<Self> {
        let invalid = |what: String| Err(Error::Invalid { model: "linear", what });
        let [o, i] = *weight.dims() else {
            return invalid(format!("a weight of shape {:?} is no matrix", weight.dims()));
        };
        if let Weight::Dense(w) = &weight {
            if !w.dtype().is_float() {
                return invalid(format!("a dense weight [{o}, {i}] of {:?}", w.dtype()));
            }
        }
        if let Some(b) = &bias {
            if b.dims() != [o] || !b.dtype().is_float() {
                return invalid(format!("a {:?} bias {:?} for a [{o}, {i}] weight", b.dtype(), b.dims()));
            }
        }
        Ok(Self { weight, bias })
    }

    /// The linear with every tensor put through `f`, which keeps shapes and dtypes.
    pub fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let weight = match &self.weight {
            Weight::Dense(w) => Weight::Dense(f(w)?),
            Weight::Fp8(w) => Weight::Fp8(fp8::Weight::new(f(w.codes_oi())?, f(w.scale())?)?),
            Weight::Fp8Fast(w) => Weight::Fp8Fast(fp8::Weight::new(f(w.codes_oi())?, f(w.scale())?)?),
            Weight::Int8(w) => Weight::Int8(int8::Weight::new(f(w.codes_oi())?, f(w.scales_2o())?)?),
        };
        Self::new(weight, self.bias.as_ref().map(&mut *f).transpose()?)
    }

    pub fn out_features(&self) -> usize {
        self.weight.dims()[0]
    }

    pub fn in_features(&self) -> usize {
        self.weight.dims()[1]
    }

    /// `x` `[.., i]` -> `x Wᵀ + b + base` `[.., o]` in `out`. The result may be written over `base`.
    pub fn forward(&self, exec: &Exec, x: &Tensor, base: Option<Tensor>, out: DType) -> Result<Tensor> {
        self.forward_rounded(exec, x, None, base, out)
    }

    /// The same for an `x` that some linears share; `rounded` is what [`Frozen::rounded`] of one of them gave.
    pub fn forward_rounded(
        &self,
        exec: &Exec,
        x: &Tensor,
        rounded: Option<&Rounded>,
        base: Option<Tensor>,
        out: DType,
    ) -> Result<Tensor> {
        let bias_o = self.bias.as_ref();
        Ok(match (&self.weight, rounded) {
            (Weight::Dense(w), _) => exec.run::<Linear>(&LinearArgs { x, weight_oi: w, bias_o, base, out })?,
            (Weight::Fp8(weight), _) => exec.run::<LinearFp8>(&LinearFp8Args { x, weight, bias_o, base, out })?,
            (Weight::Fp8Fast(weight), rounded) => {
                let rounded = rounded.and_then(Rounded::eight);
                exec.run::<LinearEight>(&LinearEightArgs { x, rounded, weight, bias_o, base, out })?
            }
            (Weight::Int8(weight), rounded) => {
                let rounded = rounded.and_then(|r| if let Rounded::Int8(r) = r { Some(r) } else { None });
                exec.run::<LinearInt8>(&LinearInt8Args { x, rounded, weight, bias_o, base, out })?
            }
        })
    }

    /// `x` as this linear's products take it, to be shared with its siblings; `None` where they take it as it is.
    pub fn rounded(&self, exec: &Exec, x: &Tensor) -> Result<Option<Rounded>> {
        Ok(match &self.weight {
            Weight::Fp8Fast(_) => eight::round(exec, x)?.map(Rounded::Eight),
            Weight::Int8(_) => int8::round(exec, x)?.map(Rounded::Int8),
            Weight::Dense(_) | Weight::Fp8(_) => None,
        })
    }

    /// `gelu_tanh(x)` for this linear to read; also rounded, where that comes with it.
    pub fn gelu(&self, exec: &Exec, x: &Tensor) -> Result<(Tensor, Option<Rounded>)> {
        if let Weight::Fp8Fast(_) = &self.weight {
            if let Some((y, rounded)) = eight::gelu(exec, x)? {
                return Ok((y, Some(Rounded::Eight(rounded))));
            }
        }
        Ok((exec.run::<GeluTanh>(&ActivationArgs { x })?, None))
    }

    /// `dx` of `gelu_tanh(x)`, where `x` is what this linear gave; also rounded, where that comes with it.
    pub fn gelu_backward(&self, exec: &Exec, x: &Tensor, dy: &Tensor) -> Result<(Tensor, Option<Rounded>)> {
        if let Weight::Fp8Fast(weight) = &self.weight {
            if let Some((dx, rounded)) = eight::gelu_backward(exec, x, dy, weight)? {
                return Ok((dx, Some(Rounded::Eight(rounded))));
            }
        }
        Ok((exec.run::<GeluTanhBackward>(&GeluTanhBackwardArgs { x, dy })?, None))
    }

    /// `dy` `[.., o]` -> `dx = dy W + base` `[.., i]` in `out`. The result may be written over `base`.
    pub fn backward(&self, exec: &Exec, dy: &Tensor, base: Option<Tensor>, out: DType) -> Result<Tensor> {
        self.backward_rounded(exec, dy, None, base, out)
    }

    /// The same for a `dy` that is rounded already.
    pub fn backward_rounded(
        &self,
        exec: &Exec,
        dy: &Tensor,
        rounded: Option<&Rounded>,
        base: Option<Tensor>,
        out: DType,
    ) -> Result<Tensor> {
        Ok(match &self.weight {
            Weight::Dense(w) => exec.run::<LinearBackward>(&LinearBackwardArgs { dy, weight_oi: w, base, out })?,
            Weight::Fp8(weight) => exec.run::<LinearFp8Backward>(&LinearFp8BackwardArgs { dy, weight, base, out })?,
            Weight::Fp8Fast(weight) => {
                let rounded = rounded.and_then(Rounded::eight);
                exec.run::<LinearEightBackward>(&LinearEightBackwardArgs { dy, rounded, weight, base, out })?
            }
            Weight::Int8(weight) => {
                exec.run::<LinearInt8Backward>(&LinearInt8BackwardArgs { dy, weight, base, out })?
            }
        })
    }
}

/// What forward leaves for backward beside the input: the output, where a later step reads it, and a LoRA's low-rank
/// activation.
#[derive(Debug, Clone)]
pub struct LinearOut {
    /// `[B, L, o]` in the compute dtype.
    pub y: Tensor,
    /// `[B, L, r]`
    pub h: Option<Tensor>,
}

/// One linear at work in one step: the lent weight and the adapter that stands beside it.
pub struct Site<'a> {
    pub exec: &'a Exec,
    pub frozen: &'a Frozen,
    pub adapter: Option<Active<'a>>,
}

impl Site<'_> {
    /// The adapter's module name.
    pub(crate) fn name(&self) -> Result<&str> {
        let missing = || Error::Invalid { model: "linear", what: "an adapter went missing in backward".into() };
        self.adapter.as_ref().map(Active::site).ok_or_else(missing)
    }

    /// `y = x Wᵀ + b + Δy`, all in the compute dtype. The adapter's share comes first: it is a narrow product that only
    /// writes, and the base's product reads it where it writes its own sums.
    pub fn forward(&self, x_bli: &Tensor) -> Result<LinearOut> {
        self.forward_rounded(x_bli, None)
    }

    /// The same for an `x` that is rounded already.
    pub fn forward_rounded(&self, x_bli: &Tensor, rounded: Option<&Rounded>) -> Result<LinearOut> {
        let (delta, h) = match &self.adapter {
            None => (None, None),
            Some(adapter) => {
                let (delta, h) = adapter.forward(self.exec, x_bli)?;
                (Some(delta), h)
            }
        };
        let out = self.exec.compute();
        Ok(LinearOut { y: self.frozen.forward_rounded(self.exec, x_bli, rounded, delta, out)?, h })
    }

    /// `dx + base` (`=`); the adapter's gradients go to the sink (`+=` there). `h` may be missing: it is then computed
    /// again.
    pub fn backward(
        &self,
        x_bli: &Tensor,
        h: Option<&Tensor>,
        dy_blo: &Tensor,
        base: Option<Tensor>,
        sink: &mut dyn GradSink,
    ) -> Result<Tensor> {
        self.backward_rounded(x_bli, h, dy_blo, None, base, sink)
    }

    /// The same for a `dy` that is rounded already.
    pub fn backward_rounded(
        &self,
        x_bli: &Tensor,
        h: Option<&Tensor>,
        dy_blo: &Tensor,
        rounded: Option<&Rounded>,
        base: Option<Tensor>,
        sink: &mut dyn GradSink,
    ) -> Result<Tensor> {
        let share = match &self.adapter {
            None => base,
            Some(adapter) => adapter.backward(self.exec, x_bli, h, dy_blo, Dx::Onto(base), sink)?,
        };
        self.frozen.backward_rounded(self.exec, dy_blo, rounded, share, self.exec.compute())
    }

    /// The adapter's gradients alone, where nothing below the input is trained.
    pub fn backward_params(
        &self,
        x_bli: &Tensor,
        h: Option<&Tensor>,
        dy_blo: &Tensor,
        sink: &mut dyn GradSink,
    ) -> Result<()> {
        if let Some(adapter) = &self.adapter {
            adapter.backward(self.exec, x_bli, h, dy_blo, Dx::Unwanted, sink)?;
        }
        Ok(())
    }
}

/// `a + b` in the compute dtype, summed in fp32.
pub(crate) fn add(exec: &Exec, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(exec.run::<Residual>(&ResidualArgs { x: a, y: b, out: exec.compute() })?)
}
