//! Convolution and norm on the card, see `conv3d.cu` and `channels.cu`.
//!
//! A tensor `[b,c,f,y,x]` of 16-bit values is kept as a view of memory `[b,f,y,x,pitch]`, where `pitch` is `c` filled up
//! to a multiple of 32 and the values behind `c` are zeros. Only this file makes such views, so a tensor of exactly these
//! strides has the zeros; any other tensor is converted first. Weights `[o,c,kt,ky,kx]` are views of
//! `[kt,ky,kx,o,c]`, both filled up.

use candle_core::{DType, Tensor};

use super::tile::{Tile, COLUMNS, WIDE};
use super::{CausalConv3d, CausalConv3dArgs, ChannelNorm, ChannelNormArgs, Sizes};
use crate::common::gpu::{tensor_address, Arg, Gpu, Launch, View};
use crate::linear::cuda::{plain_product, Plain};
use crate::{Op, Result};

const CONV: &str = CausalConv3d::NAME;
const FILE: &str = "conv3d/channels";

/// Channels are filled up to a multiple of this: what the kernel takes at a time.
const CHANNELS: usize = 32;

fn filled(c: usize) -> usize {
    c.next_multiple_of(CHANNELS)
}

fn half(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16)
}

/// A tensor that lies channels-last.
struct Last {
    tensor: Tensor,
    address: u64,
    pitch: usize,
    /// Elements from a sample to the next.
    sample: usize,
}

impl Last {
    /// `t` if it is such a view.
    fn of(t: &Tensor) -> Result<Option<Self>> {
        let (Ok((_, c, _, y, x)), true) = (t.dims5(), half(t.dtype()) && t.device().is_cuda()) else { return Ok(None) };
        let (pitch, stride) = (filled(c), t.stride());
        if stride[1..] != [1, y * x * pitch, x * pitch, pitch] || stride[0] % 8 != 0 {
            return Ok(None);
        }
        // One position is contiguous whatever the rest is.
        let first = t.narrow(0, 0, 1)?.narrow(2, 0, 1)?.narrow(3, 0, 1)?.narrow(4, 0, 1)?;
        let address = tensor_address(CONV, &first)?;
        Ok((address % 16 == 0).then(|| Last { tensor: t.clone(), address, pitch, sample: stride[0] }))
    }

    /// `t` channels-last in `dtype`: itself or a copy.
    fn new(gpu: &Gpu, t: &Tensor, dtype: DType) -> Result<Self> {
        if t.dtype() == dtype {
            if let Some(last) = Last::of(t)? {
                return Ok(last);
            }
        }
        let (b, c, f, y, x) = t.dims5()?;
        let last = Last::empty(gpu, [b, c, f, y, x], dtype)?;
        let (from, positions) = (View::new(CONV, &planes(t)?.unwrap_or_else(|| t.clone()))?, f * y * x);
        let n = b * positions * last.pitch / 8;
        let args =
            [Arg::tensor(&from), last.arg(), Arg::i32(c), Arg::i32(last.pitch), Arg::i64(positions), Arg::i64(n)];
        gpu.launch(FILE, "into_last", Launch::over(n, 1), &args)?;
        Ok(last)
    }

    /// Memory that a kernel writes whole, zeros behind the channels included.
    fn empty(gpu: &Gpu, [b, c, f, y, x]: [usize; 5], dtype: DType) -> Result<Self> {
        let pitch = filled(c);
        let memory = gpu.empty((b, f, y, x, pitch), dtype)?;
        let address = View::new(CONV, &memory)?.address;
        let tensor = memory.narrow(4, 0, c)?.permute((0, 4, 1, 2, 3))?;
        Ok(Last { tensor, address, pitch, sample: f * y * x * pitch })
    }

    /// `wan::In` or `wan::Out`.
    fn arg(&self) -> Arg {
        Arg::pointers(&[self.address], &[if self.tensor.dtype() == DType::BF16 { 1 } else { 2 }])
    }

    /// Whether samples follow each other without a gap.
    fn gapless(&self) -> bool {
        self.tensor.dims()[0] == 1
            || self.sample * self.tensor.dims()[0] == self.tensor.elem_count() / self.tensor.dims()[1] * self.pitch
    }
}

pub(super) fn prepare(gpu: &Gpu, weight: &Tensor, compute: DType) -> Result<Tensor> {
    let weight = weight.to_device(&gpu.device())?.to_dtype(compute)?;
    if !half(compute) || Weight::of(&weight)?.is_some() {
        return Ok(weight);
    }
    let (o, c, ..) = weight.dims5()?;
    let memory = weight.permute((2, 3, 4, 0, 1))?.contiguous()?;
    let memory = memory.pad_with_zeros(3, 0, filled(o) - o)?.pad_with_zeros(4, 0, filled(c) - c)?.contiguous()?;
    // Axes of length 1 may have any stride in what is contiguous; `reshape` gives them the one that `Weight::of` knows.
    let memory = memory.reshape(memory.shape())?;
    Ok(memory.narrow(3, 0, o)?.narrow(4, 0, c)?.permute((3, 4, 0, 1, 2))?)
}

/// A weight as the kernel reads it.
struct Weight {
    _tensor: Tensor,
    address: u64,
}

impl Weight {
    fn of(t: &Tensor) -> Result<Option<Self>> {
        let (o, c, _, ky, kx) = t.dims5()?;
        let (o, c) = (filled(o), filled(c));
        if !half(t.dtype()) || t.stride() != [c, 1, ky * kx * o * c, kx * o * c, o * c] {
            return Ok(None);
        }
        let first = t.narrow(0, 0, 1)?.narrow(2, 0, 1)?.narrow(3, 0, 1)?.narrow(4, 0, 1)?;
        Ok(Some(Weight { address: tensor_address(CONV, &first)?, _tensor: t.clone() }))
    }

    fn new(gpu: &Gpu, t: &Tensor, compute: DType) -> Result<Self> {
        let t = if t.dtype() == compute { t.clone() } else { t.to_dtype(compute)? };
        match Weight::of(&t)? {
            Some(weight) => Ok(weight),
            None => {
                let prepared = prepare(gpu, &t, compute)?;
                let what = || crate::gpu::error(CONV, "a weight could not be laid out".into());
                Weight::of(&prepared)?.ok_or_else(what)
            }
        }
    }
}

/// Whether the kernel can do this; everything else runs as the definition.
pub(super) fn takes(a: &CausalConv3dArgs<'_>, s: Sizes, compute: DType) -> bool {
    let [_, sy, sx] = a.stride;
    let tiles = s.y_out.div_ceil(WIDE.rows) * s.x_out.div_ceil(COLUMNS);
    half(compute)
        && s.ky <= 3
        && s.kx <= 3
        && sy == sx
        && (1..=2).contains(&sy)
        && a.past.len() <= 3
        && tiles <= 65_535
        && s.b * s.f_out <= 65_535
        && s.y * s.x * filled(s.c) < 1 << 31
}

pub(super) fn forward(a: &CausalConv3dArgs<'_>, s: Sizes, gpu: &Gpu, compute: DType) -> Result<Tensor> {
    let one = [s.kt, s.ky, s.kx] == [1; 3] && a.stride == [1; 3] && !a.up;
    if one
        && a.pad_y == (0, 0)
        && a.pad_x == (0, 0)
        && a.pad_front == 0
        && s.c.is_multiple_of(CHANNELS)
        && s.o.is_multiple_of(CHANNELS)
    {
        return pointwise(a, s, gpu, compute);
    }
    let window = s.c * s.ky * s.kx;
    let same = (s.y_out, s.x_out) == (s.y, s.x) && a.stride[1] == 1;
    if s.ky * s.kx > 1 && window <= CHANNELS && same && !a.up {
        let x = windows(gpu, a.x, a, s, compute)?;
        let past = a.past.iter().map(|p| windows(gpu, p, a, s, compute)).collect::<Result<Vec<_>>>()?;
        // [o,c,kt,ky,kx] to taps in the order of a window, filled up by `prepare`.
        let weight = a.weight.to_dtype(compute)?.permute((0, 2, 3, 4, 1))?.contiguous()?;
        let weight = weight.reshape((s.o, s.kt, window))?.permute((0, 2, 1))?.reshape((s.o, window, s.kt, 1, 1))?;
        let weight = Weight::new(gpu, &weight, compute)?;
        let flat = Sizes { c: window, ky: 1, kx: 1, ..s };
        let pads = [a.pad_front, 0, 0];
        return convolve(a, flat, pads, gpu, &x, &past, &weight);
    }
    let x = Last::new(gpu, a.x, compute)?;
    let past = a.past.iter().map(|p| Last::new(gpu, p, compute)).collect::<Result<Vec<_>>>()?;
    let weight = Weight::new(gpu, a.weight, compute)?;
    convolve(a, s, [a.pad_front, a.pad_y.0, a.pad_x.0], gpu, &x, &past, &weight)
}

/// `pads`: frames ahead, rows above, columns left.
fn convolve(
    a: &CausalConv3dArgs<'_>,
    s: Sizes,
    pads: [usize; 3],
    gpu: &Gpu,
    x: &Last,
    past: &[Last],
    weight: &Weight,
) -> Result<Tensor> {
    let compute = x.tensor.dtype();
    let out = Last::empty(gpu, [s.b, s.o, s.f_out, s.y_out, s.x_out], compute)?;
    let add = a.add.map(|t| Last::new(gpu, t, compute)).transpose()?;
    // The kernel walks `add` as it walks the output.
    let add = match add {
        Some(add) if !add.gapless() => Some(Last::new(gpu, &add.tensor.contiguous()?, compute)?),
        add => add,
    };
    let bias = a.bias.map(|b| View::new(CONV, b)).transpose()?;
    let mut pointers = [x.address, 0, 0, 0, x.sample as u64];
    for (to, frame) in pointers[1..].iter_mut().zip(past) {
        *to = frame.address;
    }
    let (o, dims) = (filled(s.o), x.tensor.dims());
    let word = |n: usize| n as u32;
    let sizes = [s.f, dims[3], dims[4], x.pitch, s.f_out, s.y_out, s.x_out, o, if bias.is_some() { s.o } else { 0 }];
    let taps = [s.kt, s.ky, s.kx, a.stride[0], a.stride[1], pads[0], pads[1], pads[2], past.len(), usize::from(a.up)];
    let tile = Tile::choose(o, s.kx == 3 && a.stride[1] == 1, gpu.shared_bytes());
    let name = format!("{}_{}", tile.name, if compute == DType::BF16 { "bf16" } else { "f16" });
    let tiles = s.y_out.div_ceil(tile.rows) * s.x_out.div_ceil(COLUMNS);
    let args = [
        Arg::pointers(&pointers, &[]),
        Arg::words(&sizes.map(word)),
        Arg::words(&taps.map(word)),
        Arg::ptr(weight.address),
        Arg::optional(bias.as_ref()),
        Arg::ptr(add.as_ref().map_or(0, |t| t.address)),
        Arg::ptr(out.address),
    ];
    let grid = (o.div_ceil(tile.channels), tiles, s.b * s.f_out);
    let launch = Launch { shared: tile.shared(), ..Launch::blocks(grid, 32 * tile.warps as u32) };
    gpu.launch("conv3d/conv3d", &name, launch, &args)?;
    Ok(out.tensor)
}

/// A matrix product over positions.
fn pointwise(a: &CausalConv3dArgs<'_>, s: Sizes, gpu: &Gpu, compute: DType) -> Result<Tensor> {
    let mut x = Last::new(gpu, a.x, compute)?;
    if !x.gapless() {
        x = Last::new(gpu, &x.tensor.contiguous()?, compute)?;
    }
    let mut add = a.add.map(|t| Last::new(gpu, t, compute)).transpose()?;
    if let Some(gap) = add.as_ref().filter(|add| !add.gapless()) {
        add = Some(Last::new(gpu, &gap.tensor.contiguous()?, compute)?);
    }
    let weight = Weight::new(gpu, a.weight, compute)?;
    let out = Last::empty(gpu, [s.b, s.o, s.f_out, s.y_out, s.x_out], compute)?;
    let bias = a.bias.map(|b| b.to_dtype(compute)).transpose()?;
    let bias = bias.map(|b| View::new(CONV, &b)).transpose()?;
    plain_product(
        gpu,
        &Plain {
            rows: s.b * s.f * s.y * s.x,
            inner: s.c,
            columns: s.o,
            x: x.address,
            weight_oi: weight.address,
            bias: bias.as_ref().map(|b| b.address),
            add: add.as_ref().map(|t| t.address),
            out: out.address,
            dtype: compute,
        },
    )?;
    Ok(out.tensor)
}

/// All taps of a small kernel side by side, see `channels.cu`.
fn windows(gpu: &Gpu, x: &Tensor, a: &CausalConv3dArgs<'_>, s: Sizes, compute: DType) -> Result<Last> {
    let (b, c, f, y, w) = x.dims5()?;
    let out = Last::empty(gpu, [b, c * s.ky * s.kx, f, y, w], compute)?;
    let from = View::new(CONV, &planes(x)?.unwrap_or_else(|| x.clone()))?;
    let n = b * f * y * w;
    let mut args = vec![Arg::tensor(&from), out.arg()];
    args.extend([c, f, y, w, s.ky, s.kx, a.pad_y.0, a.pad_x.0].map(Arg::i32));
    args.push(Arg::i64(n));
    gpu.launch(FILE, "windows", Launch::over(n, 1), &args)?;
    Ok(out)
}

/// Most channels of a norm: 32 threads with 4 groups of 8.
const NORM_CHANNELS: usize = 1024;

pub(super) fn norm_takes(a: &ChannelNormArgs<'_>, compute: DType) -> bool {
    half(compute) && a.x.rank() == 5 && a.x.dims()[1] <= NORM_CHANNELS
}

pub(super) fn norm(a: &ChannelNormArgs<'_>, gpu: &Gpu, compute: DType) -> Result<Tensor> {
    let (b, c, f, y, w) = a.x.dims5()?;
    let mut x = Last::new(gpu, a.x, compute)?;
    if !x.gapless() {
        x = Last::new(gpu, &x.tensor.contiguous()?, compute)?;
    }
    let out = Last::empty(gpu, [b, c, f, y, w], compute)?;
    let gamma = View::new(ChannelNorm::NAME, a.gamma)?;
    // As few threads a position as hold its channels: 3 loads in flight each at 96, 192 and 384 channels.
    let lanes = [4, 8, 16, 32].into_iter().find(|lanes| lanes * 32 >= x.pitch).unwrap_or(32);
    let rows = b * f * y * w;
    let args = [
        x.arg(),
        Arg::tensor(&gamma),
        out.arg(),
        Arg::i64(rows),
        Arg::i32(c),
        Arg::i32(x.pitch),
        Arg::f32((c as f32).sqrt()),
        Arg::i32(usize::from(a.silu)),
    ];
    gpu.launch(FILE, &format!("channel_norm_{lanes}"), Launch::blocks((rows.div_ceil(256 / lanes), 1, 1), 256), &args)?;
    Ok(out.tensor)
}

fn card(x: &Last) -> Result<Gpu> {
    let what = || crate::gpu::error(CONV, "a tensor of a card that was not opened here".into());
    Gpu::of(x.tensor.device()).ok_or_else(what)
}

pub(super) fn frames(x: &Tensor, i: usize, n: usize) -> Result<Option<Tensor>> {
    let Some(last) = Last::of(x)? else { return Ok(None) };
    let (gpu, (b, c, _, y, w)) = (card(&last)?, x.dims5()?);
    let out = Last::empty(&gpu, [b, c, n, y, w], x.dtype())?;
    let frame = y * w * last.pitch; // elements; 8 a thread
    let from = last.address + 2 * (i * frame) as u64;
    let (each, n) = (n * frame / 8, b * n * frame / 8);
    let args = [Arg::ptr(from), Arg::ptr(out.address), Arg::i64(each), Arg::i64(last.sample / 8), Arg::i64(n)];
    gpu.launch(FILE, "copy_frames", Launch::over(n, 1), &args)?;
    Ok(Some(out.tensor))
}

pub(super) fn interleave(x: &Tensor) -> Result<Option<Tensor>> {
    let (b, c, f, y, w) = x.dims5()?;
    let Some(last) = Last::of(x)?.filter(|last| c % (2 * CHANNELS) == 0 && last.gapless()) else { return Ok(None) };
    let gpu = card(&last)?;
    let out = Last::empty(&gpu, [b, c / 2, 2 * f, y, w], x.dtype())?;
    let (chunks, n) = (c / 16, b * f * y * w * c / 8);
    let args = [Arg::ptr(last.address), Arg::ptr(out.address), Arg::i32(chunks), Arg::i64(y * w), Arg::i64(n)];
    gpu.launch(FILE, "halves", Launch::over(n, 1), &args)?;
    Ok(Some(out.tensor))
}

pub(super) fn planes(x: &Tensor) -> Result<Option<Tensor>> {
    let Some(last) = Last::of(x)? else { return Ok(None) };
    let (gpu, (b, c, f, y, w)) = (card(&last)?, x.dims5()?);
    let (out, positions) = (gpu.empty((b, c, f, y, w), x.dtype())?, f * y * w);
    let n = b * positions * c.div_ceil(8);
    let args = [
        last.arg(),
        Arg::tensor(&View::new(CONV, &out)?),
        Arg::i32(c),
        Arg::i32(last.pitch),
        Arg::i64(positions),
        Arg::i64(last.sample),
        Arg::i64(n),
    ];
    gpu.launch(FILE, "from_last", Launch::over(n, 1), &args)?;
    Ok(Some(out))
}
