//! The layers of both VAEs. A layer holds weights only; what it remembers of earlier frames lies in a `Cache`, one slot
//! a layer, so that one VAE serves any number of streams. Every layer takes any number of frames `[b,c,f,y,x]` at once:
//! the cut of a clip changes memory, not results.

use crate::{Error, Result};
use candle_core::{DType, Tensor};
pub(super) use wan_kernels::conv3d::frames;
use wan_kernels::conv3d::{interleave, prepare, CausalConv3d, CausalConv3dArgs, ChannelNorm, ChannelNormArgs};
use wan_kernels::dense_attention::{DenseAttention, DenseAttentionArgs};
use wan_kernels::linear::{Linear, LinearArgs};
use wan_kernels::Exec;

pub(super) const MODEL: &str = "vae";

/// Where weights come from: a checkpoint, or a random generator.
pub(super) trait Source {
    /// The tensor of this key, which must have this shape.
    fn take(&mut self, key: &str, shape: &[usize]) -> Result<Tensor>;
}

/// Builds layers one after another, giving out cache slots.
pub(super) struct Builder<'a> {
    pub source: &'a mut dyn Source,
    pub exec: &'a Exec,
    pub slots: usize,
}

impl Builder<'_> {
    fn tensor(&mut self, key: &str, shape: &[usize]) -> Result<Tensor> {
        let t = self.source.take(key, shape)?;
        Ok(t.to_device(self.exec.device())?.to_dtype(self.exec.compute())?.contiguous()?)
    }

    fn slot(&mut self) -> usize {
        self.slots += 1;
        self.slots - 1
    }

    /// A convolution of kernel `[kt,ky,kx]` under `prefix.weight` and `prefix.bias`, stride 1, "same" in space, causal
    /// in time. `flat`: the checkpoint holds a 2-D kernel.
    fn conv(&mut self, prefix: &str, c: usize, o: usize, [kt, ky, kx]: [usize; 3], flat: bool) -> Result<Conv> {
        let shape = if flat { vec![o, c, ky, kx] } else { vec![o, c, kt, ky, kx] };
        let weight = self.tensor(&format!("{prefix}.weight"), &shape)?.reshape((o, c, kt, ky, kx))?;
        let weight = prepare(self.exec, &weight)?;
        let bias = self.tensor(&format!("{prefix}.bias"), &[o])?;
        Ok(Conv { weight, bias, pad_y: (ky / 2, ky / 2), pad_x: (kx / 2, kx / 2), step: 1, slot: self.slot() })
    }

    /// The 3x3x3 causal convolution.
    pub fn conv3(&mut self, prefix: &str, c: usize, o: usize) -> Result<Conv> {
        self.conv(prefix, c, o, [3, 3, 3], false)
    }

    /// The 1x1x1 convolution.
    pub fn pointwise(&mut self, prefix: &str, c: usize, o: usize) -> Result<Conv> {
        self.conv(prefix, c, o, [1, 1, 1], false)
    }

    /// The norm's `gamma`, stored with trailing axes of 1: three, or two where it belongs to an image layer.
    pub fn norm(&mut self, prefix: &str, c: usize, image: bool) -> Result<Norm> {
        let shape: &[usize] = if image { &[c, 1, 1] } else { &[c, 1, 1, 1] };
        Ok(Norm { gamma: self.tensor(&format!("{prefix}.gamma"), shape)?.flatten_all()? })
    }

    pub fn res(&mut self, prefix: &str, c: usize, o: usize) -> Result<Stage> {
        Ok(Stage::Res(ResBlock {
            norm_1: self.norm(&format!("{prefix}.residual.0"), c, false)?,
            conv_1: self.conv3(&format!("{prefix}.residual.2"), c, o)?,
            norm_2: self.norm(&format!("{prefix}.residual.3"), o, false)?,
            conv_2: self.conv3(&format!("{prefix}.residual.6"), o, o)?,
            shortcut: if c != o { Some(self.pointwise(&format!("{prefix}.shortcut"), c, o)?) } else { None },
        }))
    }

    pub fn attention(&mut self, prefix: &str, c: usize) -> Result<Stage> {
        Ok(Stage::Attention(Attention {
            norm: self.norm(&format!("{prefix}.norm"), c, true)?,
            to_qkv: self.conv(&format!("{prefix}.to_qkv"), c, 3 * c, [1, 1, 1], true)?,
            proj: self.conv(&format!("{prefix}.proj"), c, c, [1, 1, 1], true)?,
        }))
    }

    /// Halves the sides, and the frame rate where `time`.
    pub fn down(&mut self, prefix: &str, c: usize, time: bool) -> Result<Stage> {
        let mut space = self.conv(&format!("{prefix}.resample.1"), c, c, [1, 3, 3], true)?;
        (space.pad_y, space.pad_x, space.step) = ((0, 1), (0, 1), 2);
        let time_conv = format!("{prefix}.time_conv");
        let time = if time { Some(self.conv(&time_conv, c, c, [3, 1, 1], false)?) } else { None };
        Ok(Stage::Down(Down { space, time }))
    }

    /// Doubles the sides, and the frame rate where `time`; `c` channels to `o`.
    pub fn up(&mut self, prefix: &str, c: usize, o: usize, time: bool) -> Result<Stage> {
        let space = self.conv(&format!("{prefix}.resample.1"), c, o, [1, 3, 3], true)?;
        let time_conv = format!("{prefix}.time_conv");
        let time = if time { Some(self.conv(&time_conv, c, 2 * c, [3, 1, 1], false)?) } else { None };
        Ok(Stage::Up(Up { space, time }))
    }
}

/// What one stream has seen.
pub(super) struct Cache {
    slots: Vec<Slot>,
}

/// The frames a layer still needs, oldest first, each `[b,c,1,y,x]`.
#[derive(Default)]
struct Slot {
    frames: Vec<Tensor>,
    started: bool,
}

impl Slot {
    /// Appends the frames of `x` and keeps the last `keep`.
    fn remember(&mut self, x: &Tensor, keep: usize) -> Result<()> {
        let f = x.dim(2)?;
        for i in f.saturating_sub(keep)..f {
            self.frames.push(frames(x, i, 1)?);
        }
        let surplus = self.frames.len().saturating_sub(keep);
        self.frames.drain(..surplus);
        Ok(())
    }
}

impl Cache {
    pub fn new(slots: usize) -> Self {
        Self { slots: (0..slots).map(|_| Slot::default()).collect() }
    }
}

/// A convolution; `weight` is `[o,c,kt,ky,kx]`.
pub(super) struct Conv {
    pub weight: Tensor,
    pub bias: Tensor,
    pad_y: (usize, usize),
    pad_x: (usize, usize),
    /// Stride in rows and columns.
    step: usize,
    slot: usize,
}

impl Conv {
    fn args<'a>(&'a self, x: &'a Tensor, past: &'a [Tensor], pad_front: usize, step_f: usize) -> CausalConv3dArgs<'a> {
        CausalConv3dArgs {
            x,
            weight: &self.weight,
            bias: Some(&self.bias),
            past,
            pad_front,
            pad_y: self.pad_y,
            pad_x: self.pad_x,
            stride: [step_f, self.step, self.step],
            up: false,
            add: None,
        }
    }

    /// Each frame from itself and the `kt - 1` before it; the stream starts with zeros.
    pub fn causal(&self, exec: &Exec, cache: &mut Cache, x: &Tensor) -> Result<Tensor> {
        self.causal_plus(exec, cache, x, None)
    }

    /// `causal`, and `add` to it.
    fn causal_plus(&self, exec: &Exec, cache: &mut Cache, x: &Tensor, add: Option<&Tensor>) -> Result<Tensor> {
        let keep = self.weight.dim(2)? - 1;
        let slot = &mut cache.slots[self.slot];
        let y = exec.run::<CausalConv3d>(&CausalConv3dArgs { add, ..self.args(x, &slot.frames, keep, 1) })?;
        if keep > 0 {
            slot.remember(x, keep)?;
        }
        Ok(y)
    }
}

pub(super) struct Norm {
    gamma: Tensor,
}

impl Norm {
    fn run(&self, exec: &Exec, x: &Tensor, silu: bool) -> Result<Tensor> {
        Ok(exec.run::<ChannelNorm>(&ChannelNormArgs { x, gamma: &self.gamma, silu })?)
    }
}

/// `x + conv(silu(norm(conv(silu(norm(x))))))`.
pub(super) struct ResBlock {
    norm_1: Norm,
    conv_1: Conv,
    norm_2: Norm,
    conv_2: Conv,
    shortcut: Option<Conv>,
}

impl ResBlock {
    fn forward(&self, exec: &Exec, cache: &mut Cache, x: Tensor) -> Result<Tensor> {
        // One name, assigned again: a shadowed tensor would live to the end of the function.
        let mut h = self.norm_1.run(exec, &x, true)?;
        let skip = match &self.shortcut {
            Some(conv) => conv.causal(exec, cache, &x)?,
            None => x.clone(),
        };
        drop(x);
        h = self.conv_1.causal(exec, cache, &h)?;
        h = self.norm_2.run(exec, &h, true)?;
        self.conv_2.causal_plus(exec, cache, &h, Some(&skip))
    }
}

/// One head over the positions of each frame by itself.
pub(super) struct Attention {
    norm: Norm,
    to_qkv: Conv,
    proj: Conv,
}

/// Scores held at a time: 32 MiB. A 720p frame has 14400 positions, whose square would be 830 MB.
const SCORES: usize = 8 << 20;

impl Attention {
    fn forward(&self, exec: &Exec, cache: &mut Cache, x: Tensor) -> Result<Tensor> {
        let (b, c, f, y, w) = x.dims5()?;
        let n = y * w;
        let h = self.norm.run(exec, &x, false)?;
        if is_half_on_card(exec) {
            return self.on_card(exec, h, x);
        }
        let qkv = self.to_qkv.causal(exec, cache, &h)?.to_dtype(DType::F32)?;
        let scale = 1.0 / (c as f64).sqrt();
        let rows = (SCORES / n).clamp(1, n);
        let mut samples = Vec::with_capacity(b);
        for i in 0..b {
            let mut out_frames = Vec::with_capacity(f);
            for j in 0..f {
                let qkv = qkv.narrow(0, i, 1)?.narrow(2, j, 1)?.reshape((3, c, n))?;
                let (q_cn, k_cn, v_cn) = ((qkv.get(0)? * scale)?, qkv.get(1)?, qkv.get(2)?);
                let mut parts = Vec::with_capacity(n.div_ceil(rows));
                for l in (0..n).step_by(rows) {
                    let q_lc = q_cn.narrow(1, l, rows.min(n - l))?.t()?.contiguous()?;
                    let p_lm = candle_nn::ops::softmax_last_dim(&q_lc.matmul(&k_cn)?)?;
                    parts.push(v_cn.matmul(&p_lm.t()?)?);
                }
                out_frames.push(Tensor::cat(&parts, 1)?.reshape((1, c, 1, y, w))?);
            }
            samples.push(Tensor::cat(&out_frames, 2)?);
        }
        let h = Tensor::cat(&samples, 0)?.to_dtype(exec.compute())?;
        Ok((self.proj.causal(exec, cache, &h)? + x)?)
    }
}

impl Attention {
    /// The same over rows of channels: matrix products, none of which sees a whole clip's scores.
    fn on_card(&self, exec: &Exec, h: Tensor, x: Tensor) -> Result<Tensor> {
        let (b, c, f, y, w) = x.dims5()?;
        let rows = |t: &Tensor| t.permute((0, 2, 3, 4, 1))?.contiguous()?.reshape((b * f, y * w, c));
        let linear = |conv: &Conv, x: &Tensor| -> Result<Tensor> {
            let (o, i, ..) = conv.weight.dims5()?;
            let (weight_oi, bias_o) = (&conv.weight.reshape((o, i))?, Some(&conv.bias));
            Ok(exec.run::<Linear>(&LinearArgs { x, weight_oi, bias_o, base: None, out: exec.compute() })?)
        };
        let qkv = linear(&self.to_qkv, &rows(&h)?)?;
        let (q, k, v) = (qkv.narrow(2, 0, c)?, qkv.narrow(2, c, c)?, qkv.narrow(2, 2 * c, c)?);
        let h = exec.run::<DenseAttention>(&DenseAttentionArgs {
            q_bld: &q,
            k_bmd: &k,
            v_bmd: &v,
            heads: 1,
            scale: 1.0 / (c as f64).sqrt(),
            bias_nr: None,
            out: exec.compute(),
        })?;
        let y_rows = (linear(&self.proj, &h)? + rows(&x)?)?;
        Ok(y_rows.reshape((b, f, y, w, c))?.permute((0, 4, 1, 2, 3))?)
    }
}

/// Where activations are kept channels-last, in 16 bit.
fn is_half_on_card(exec: &Exec) -> bool {
    exec.device().is_cuda() && exec.compute() != DType::F32
}

pub(super) struct Down {
    space: Conv,
    time: Option<Conv>,
}

impl Down {
    /// In time: the first frame passes, then each pair with the frame before it becomes one; a frame without its pair
    /// waits in the slot.
    fn forward(&self, exec: &Exec, cache: &mut Cache, mut x: Tensor) -> Result<Option<Tensor>> {
        x = self.space.causal(exec, cache, &x)?;
        let Some(time) = &self.time else { return Ok(Some(x)) };
        let slot = &mut cache.slots[time.slot];
        let f = x.dim(2)?;
        let mut out = Vec::new();
        let rest = if slot.started {
            x
        } else {
            slot.started = true;
            let first = frames(&x, 0, 1)?;
            slot.remember(&first, 1)?;
            out.push(first);
            if f == 1 {
                return Ok(out.pop());
            }
            frames(&x, 1, f - 1)?
        };
        let waiting = slot.frames.len();
        let total = waiting + rest.dim(2)?;
        if total >= 3 {
            out.push(exec.run::<CausalConv3d>(&time.args(&rest, &slot.frames, waiting, 2))?);
        }
        slot.remember(&rest, if total % 2 == 1 { 1 } else { 2 })?;
        match out.len() {
            0 => Ok(None),
            1 => Ok(out.pop()),
            _ => Ok(Some(Tensor::cat(&out, 2)?)),
        }
    }
}

pub(super) struct Up {
    space: Conv,
    time: Option<Conv>,
}

impl Up {
    /// In time: the first frame stays one, every later one becomes two. The convolution's history starts after the
    /// first frame, which it never sees.
    fn forward(&self, exec: &Exec, cache: &mut Cache, mut x: Tensor) -> Result<Tensor> {
        x = match &self.time {
            None => x,
            Some(time) => {
                let f = x.dim(2)?;
                let started = std::mem::replace(&mut cache.slots[time.slot].started, true);
                match (started, f) {
                    (true, _) => interleave(&time.causal(exec, cache, &x)?)?,
                    (false, 1) => x,
                    (false, _) => {
                        let rest = interleave(&time.causal(exec, cache, &frames(&x, 1, f - 1)?)?)?;
                        Tensor::cat(&[frames(&x, 0, 1)?, rest], 2)?
                    }
                }
            }
        };
        Ok(exec.run::<CausalConv3d>(&CausalConv3dArgs { up: true, ..self.space.args(&x, &[], 0, 1) })?)
    }
}

/// Mean over blocks of `time` frames by `space` x `space` pixels and over groups of neighbouring channels.
pub(super) struct AvgDown {
    pub out: usize,
    pub time: usize,
    pub space: usize,
    pub slot: usize,
}

impl AvgDown {
    /// The stream starts with zero frames, so that the first frame closes a block; frames of an open block wait.
    fn forward(&self, cache: &mut Cache, x: Tensor) -> Result<Option<Tensor>> {
        let slot = &mut cache.slots[self.slot];
        if !std::mem::replace(&mut slot.started, true) {
            let zero = frames(&x, 0, 1)?.zeros_like()?;
            slot.frames = vec![zero; self.time - 1];
        }
        let x = if slot.frames.is_empty() {
            x
        } else {
            slot.frames.push(x);
            Tensor::cat(&std::mem::take(&mut slot.frames), 2)?
        };
        let (b, c, f, y, w) = x.dims5()?;
        let blocks = f / self.time;
        if f % self.time != 0 {
            slot.remember(&frames(&x, blocks * self.time, f % self.time)?, self.time)?;
        }
        if blocks == 0 {
            return Ok(None);
        }
        let dtype = x.dtype();
        let x = frames(&x, 0, blocks * self.time)?.to_dtype(DType::F32)?;
        let (t, s) = (self.time, self.space);
        let cells = x.reshape(&[b, c, blocks, t, y / s, s, w / s, s][..])?;
        let cells = cells.permute(vec![0, 1, 3, 5, 7, 2, 4, 6])?.contiguous()?;
        let group = c * t * s * s / self.out;
        let y = cells.reshape(&[b, self.out, group, blocks, y / s, w / s][..])?.mean(2)?;
        Ok(Some(y.to_dtype(dtype)?))
    }
}

/// The reverse: each value is repeated over its block and its group of channels.
pub(super) struct DupUp {
    pub out: usize,
    pub time: usize,
    pub space: usize,
    pub slot: usize,
}

impl DupUp {
    /// Of the first frame of a stream only the last of its `time` copies is kept.
    fn forward(&self, cache: &mut Cache, x: &Tensor) -> Result<Tensor> {
        let first = !std::mem::replace(&mut cache.slots[self.slot].started, true);
        let (b, c, f, y, w) = x.dims5()?;
        let (t, s) = (self.time, self.space);
        let repeats = self.out * t * s * s / c;
        let x = x.reshape(&[b, c, 1, f, y, w][..])?.broadcast_as(&[b, c, repeats, f, y, w][..])?.contiguous()?;
        let x = x.reshape(&[b, self.out, t, s, s, f, y, w][..])?.permute(vec![0, 1, 5, 2, 6, 3, 7, 4])?;
        let x = x.contiguous()?.reshape((b, self.out, f * t, y * s, w * s))?;
        Ok(frames(&x, if first { t - 1 } else { 0 }, if first { f * t - (t - 1) } else { f * t })?)
    }
}

/// One entry of an encoder's or decoder's list.
pub(super) enum Stage {
    Conv(Conv),
    Res(ResBlock),
    Attention(Attention),
    Down(Down),
    Up(Up),
    /// A level of the 2.2 VAE: stages in a row and a skip around them all.
    DownLevel(Vec<Stage>, AvgDown),
    UpLevel(Vec<Stage>, Option<DupUp>),
    /// Norm, SiLU, convolution.
    Head(Norm, Conv),
}

impl Stage {
    /// What `x` lets the stage put out now; `None` while it waits for more frames.
    pub fn forward(&self, exec: &Exec, cache: &mut Cache, x: Tensor) -> Result<Option<Tensor>> {
        let run = |inner: &[Stage], cache: &mut Cache, x: Tensor| -> Result<Option<Tensor>> {
            let mut x = x;
            for stage in inner {
                match stage.forward(exec, cache, x)? {
                    Some(y) => x = y,
                    None => return Ok(None),
                }
            }
            Ok(Some(x))
        };
        Ok(match self {
            Stage::Conv(conv) => Some(conv.causal(exec, cache, &x)?),
            Stage::Res(block) => Some(block.forward(exec, cache, x)?),
            Stage::Attention(attention) => Some(attention.forward(exec, cache, x)?),
            Stage::Down(down) => down.forward(exec, cache, x)?,
            Stage::Up(up) => Some(up.forward(exec, cache, x)?),
            Stage::DownLevel(inner, skip) => {
                let main = run(inner, cache, x.clone())?;
                match (main, skip.forward(cache, x)?) {
                    (Some(main), Some(skip)) => Some((main + skip)?),
                    (None, None) => None,
                    // Both count frames alike; this would be a fault of ours.
                    _ => {
                        return Err(Error::Invalid {
                            model: MODEL,
                            what: "a level and its skip fell out of step".into(),
                        })
                    }
                }
            }
            Stage::UpLevel(inner, skip) => {
                let main = run(inner, cache, x.clone())?;
                match (main, skip) {
                    (Some(main), Some(skip)) => Some((main + skip.forward(cache, &x)?)?),
                    (main, _) => main,
                }
            }
            Stage::Head(norm, conv) => Some(conv.causal(exec, cache, &norm.run(exec, &x, true)?)?),
        })
    }
}
