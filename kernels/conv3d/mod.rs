//! Convolutions and channel norm of the video VAEs. candle has no 3-D convolution.
//!
//! `CausalConv3d` reads, ahead of its input, the frames that an earlier call saw (`past`), so that a clip can be pushed
//! through in pieces of any length. Two paths: plain candle (any device, the definition) and a direct loop on the CPU
//! (`cpu.rs`), which needs no unfolded copy of the input and adds in one fixed order, so that cutting a clip
//! differently changes no bit. The two are held against each other, and both against a naive loop, in `tests.rs`.
//!
//! On a card 16-bit tensors keep their shape `[b,c,f,y,x]` but lie channels-last (see `cuda.rs`): what an op returns is
//! such a view, what another op takes may be, and [`planes`] makes an ordinary tensor of it.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod layout;
mod norm;
mod plain;
#[cfg(test)]
mod tests;
pub mod tile;

pub use layout::{frames, interleave, planes, prepare};
pub use norm::{ChannelNorm, ChannelNormArgs};

#[cfg(feature = "cuda")]
use crate::common::gpu::Gpu;
use crate::{Cost, Error, Op, Result};
use candle_core::{DType, Tensor};

/// `out[b,o,f,y,x] = bias[o] + sum over c,t,i,j of weight[o,c,t,i,j] * in[b,c, f*st + t, y*sy + i, x*sx + j]`, where `in` is
/// `pad_front` frames (zeros, the last of them replaced by `past`) then `x`, with zero rows and columns around.
pub struct CausalConv3dArgs<'a> {
    /// `[b,c,f,y,x]`, contiguous, f32/bf16/f16.
    pub x: &'a Tensor,
    /// `[o,c,kt,ky,kx]`.
    pub weight: &'a Tensor,
    /// `[o]`.
    pub bias: Option<&'a Tensor>,
    /// Frames `[b,c,1,y,x]` that came before `x`, oldest first; at most `pad_front`.
    pub past: &'a [Tensor],
    /// Frames ahead of `x`: `kt - 1` for a causal convolution.
    pub pad_front: usize,
    /// Zero rows above and below.
    pub pad_y: (usize, usize),
    /// Zero columns left and right.
    pub pad_x: (usize, usize),
    /// Steps in frames, rows, columns.
    pub stride: [usize; 3],
    /// The input is read as if every position were repeated 2 x 2; padding and strides are those of that larger picture.
    pub up: bool,
    /// Added to the result: of its shape, in the dtype of `x`.
    pub add: Option<&'a Tensor>,
}

impl<'a> CausalConv3dArgs<'a> {
    /// Stride 1, all of the past at hand, "same" zero padding in space: what most layers of the VAE are.
    pub fn causal(x: &'a Tensor, weight: &'a Tensor, bias: Option<&'a Tensor>, past: &'a [Tensor]) -> Result<Self> {
        let (_, _, kt, ky, kx) = weight.dims5()?;
        let (py, px) = (ky / 2, kx / 2);
        Ok(Self {
            x,
            weight,
            bias,
            past,
            pad_front: kt - 1,
            pad_y: (py, py),
            pad_x: (px, px),
            stride: [1; 3],
            up: false,
            add: None,
        })
    }
}

/// Sizes of one call, after `check`; `y` and `x` behind the repetition of `up`.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    b: usize,
    c: usize,
    f: usize,
    y: usize,
    x: usize,
    o: usize,
    kt: usize,
    ky: usize,
    kx: usize,
    f_out: usize,
    y_out: usize,
    x_out: usize,
}

impl CausalConv3dArgs<'_> {
    fn sizes(&self) -> Result<Sizes> {
        let (b, c, f, y, x) = self.x.dims5()?;
        let (y, x) = if self.up { (2 * y, 2 * x) } else { (y, x) };
        let (o, _, kt, ky, kx) = self.weight.dims5()?;
        let out = |name, len: usize, k: usize, stride: usize| match len.checked_sub(k) {
            Some(room) if stride > 0 => Ok(room / stride + 1),
            _ => Err(Error::Argument {
                op: CausalConv3d::NAME,
                what: format!("{len} {name} with padding do not hold a kernel of {k} at stride {stride}"),
            }),
        };
        let f_out = out("frames", f + self.pad_front, kt, self.stride[0])?;
        let y_out = out("rows", y + self.pad_y.0 + self.pad_y.1, ky, self.stride[1])?;
        let x_out = out("columns", x + self.pad_x.0 + self.pad_x.1, kx, self.stride[2])?;
        Ok(Sizes { b, c, f, y, x, o, kt, ky, kx, f_out, y_out, x_out })
    }
}

/// Causal 3-D convolution with a feature cache; 2-D convolutions are the case `kt = 1`.
pub struct CausalConv3d;

impl Op for CausalConv3d {
    type Args<'a> = CausalConv3dArgs<'a>;
    type Out = Tensor;
    const NAME: &'static str = "causal_conv3d";

    fn check(a: &Self::Args<'_>) -> Result<()> {
        let shape = |tensor, got: &Tensor, want: String| Error::Shape {
            op: Self::NAME,
            tensor,
            got: got.shape().clone(),
            want,
        };
        if a.x.rank() != 5 {
            return Err(shape("x", a.x, "[b,c,f,y,x]".into()));
        }
        if a.weight.rank() != 5 || a.weight.dim(1)? != a.x.dim(1)? {
            return Err(shape("weight", a.weight, format!("[o,{},kt,ky,kx]", a.x.dim(1)?)));
        }
        if let Some(bias) = a.bias {
            if bias.dims() != [a.weight.dim(0)?] {
                return Err(shape("bias", bias, format!("[{}]", a.weight.dim(0)?)));
            }
        }
        let (b, c, _, y, x) = a.x.dims5()?;
        for frame in a.past {
            if frame.dims() != [b, c, 1, y, x] {
                return Err(shape("past", frame, format!("{:?}", [b, c, 1, y, x])));
            }
            if frame.dtype() != a.x.dtype() {
                return Err(Error::Dtype { op: Self::NAME, tensor: "past", got: frame.dtype(), want: "that of x" });
            }
        }
        if a.past.len() > a.pad_front {
            return Err(Error::Argument {
                op: Self::NAME,
                what: format!("{} past frames, but only {} are read", a.past.len(), a.pad_front),
            });
        }
        for (tensor, t) in [("x", a.x), ("weight", a.weight)] {
            if !matches!(t.dtype(), DType::F32 | DType::BF16 | DType::F16) {
                return Err(Error::Dtype { op: Self::NAME, tensor, got: t.dtype(), want: "f32, bf16 or f16" });
            }
        }
        let s = a.sizes()?;
        if let Some(add) = a.add {
            let want = [s.b, s.o, s.f_out, s.y_out, s.x_out];
            if add.dims() != want {
                return Err(shape("add", add, format!("{want:?}")));
            }
        }
        Ok(())
    }

    fn cost(a: &Self::Args<'_>) -> Cost {
        let Ok(s) = a.sizes() else { return Cost::default() };
        let out = (s.b * s.o * s.f_out * s.y_out * s.x_out) as f64;
        let taps = (s.c * s.kt * s.ky * s.kx) as f64;
        let width = a.x.dtype().size_in_bytes() as f64;
        let stored = a.x.elem_count() + a.past.iter().chain(a.add).map(Tensor::elem_count).sum::<usize>();
        let read = stored as f64 * width;
        let weight = s.o as f64 * taps * a.weight.dtype().size_in_bytes() as f64;
        Cost { flops: 2.0 * out * taps, bytes: read + weight + out * width }
    }

    /// Sums in fp32 over values of dtype `compute`, and rounds the result to `compute` once; an addition once more.
    fn reference(a: &Self::Args<'_>, compute: DType) -> Result<Tensor> {
        let sizes = a.sizes()?;
        let repeated = a.up.then(|| Ok::<_, Error>((doubled(a.x)?, doubled_all(a.past)?))).transpose()?;
        let a = match &repeated {
            Some((x, past)) => &CausalConv3dArgs { x, past, ..*a },
            None => a,
        };
        let y = match a.x.device().is_cpu() {
            true => cpu::forward(a, sizes, compute)?,
            false => plain::forward(a, sizes, compute)?,
        };
        match a.add {
            Some(add) => Ok((y + add.to_dtype(compute)?)?),
            None => Ok(y),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda(a: &Self::Args<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
        let sizes = a.sizes()?;
        match cuda::takes(a, sizes, compute) {
            true => cuda::forward(a, sizes, gpu, compute),
            false => Self::reference(a, compute),
        }
    }
}

/// Every position of `[b,c,f,y,x]` repeated 2 x 2.
fn doubled(x: &Tensor) -> Result<Tensor> {
    let (b, c, f, y, w) = x.dims5()?;
    Ok(x.reshape((b, c * f, y, w))?.upsample_nearest2d(2 * y, 2 * w)?.reshape((b, c, f, 2 * y, 2 * w))?)
}

fn doubled_all(frames: &[Tensor]) -> Result<Vec<Tensor>> {
    frames.iter().map(doubled).collect()
}
