//! Encoder and decoder as lists of named stages, and the flow of frames through such a list.

use super::arch::{VaeArch, VaeKind};
use super::layers::{frames, AvgDown, Builder, Cache, DupUp, Stage};
use super::Trace;
use crate::Result;
use candle_core::Tensor;
use wan_kernels::Exec;

/// Stages under their official module names, and how many cache slots they use.
pub(super) struct Net {
    stages: Vec<(String, Stage)>,
    slots: usize,
}

fn middle(stages: &mut Vec<(String, Stage)>, b: &mut Builder<'_>, half: &str, c: usize) -> Result<()> {
    let name = |i| format!("{half}.middle.{i}");
    stages.push((name(0), b.res(&name(0), c, c)?));
    stages.push((name(1), b.attention(&name(1), c)?));
    stages.push((name(2), b.res(&name(2), c, c)?));
    Ok(())
}

fn head(b: &mut Builder<'_>, half: &str, c: usize, o: usize) -> Result<(String, Stage)> {
    let norm = b.norm(&format!("{half}.head.0"), c, false)?;
    let name = format!("{half}.head.2");
    let conv = b.conv3(&name, c, o)?;
    Ok((name, Stage::Head(norm, conv)))
}

impl Net {
    /// Pixels `[b,3 or 12,f,y,x]` to encoder moments `[b,2z,f,y,x]`, before the last pointwise convolution.
    pub fn encoder(arch: &VaeArch, b: &mut Builder<'_>) -> Result<Self> {
        let mut stages = Vec::new();
        let name = "encoder.conv1".to_owned();
        let conv = b.conv3(&name, arch.pixel_channels(), arch.base_dim)?;
        stages.push((name, Stage::Conv(conv)));
        for level in 0..arch.levels() {
            let (c, o) = arch.enc_dims(level);
            let (last, time) = (level + 1 == arch.levels(), arch.down_in_time(level));
            let nested = format!("encoder.downsamples.{level}");
            let mut inner = Vec::new();
            let before = stages.len() - 1;
            let name = |i: usize| match arch.kind {
                VaeKind::Wan21 => format!("encoder.downsamples.{}", before + i),
                VaeKind::Wan22 => format!("{nested}.downsamples.{i}"),
            };
            for i in 0..arch.res_blocks {
                inner.push((name(i), b.res(&name(i), if i == 0 { c } else { o }, o)?));
            }
            if !last {
                let i = arch.res_blocks;
                inner.push((name(i), b.down(&name(i), o, time)?));
            }
            match arch.kind {
                VaeKind::Wan21 => stages.extend(inner),
                VaeKind::Wan22 => {
                    let (time, space) = (if time { 2 } else { 1 }, if last { 1 } else { 2 });
                    let skip = AvgDown { out: o, time, space, slot: b.slots };
                    b.slots += 1;
                    stages.push((nested, Stage::DownLevel(inner.into_iter().map(|(_, s)| s).collect(), skip)));
                }
            }
        }
        let c = arch.enc_dims(arch.levels() - 1).1;
        middle(&mut stages, b, "encoder", c)?;
        stages.push(head(b, "encoder", c, 2 * arch.z_dim)?);
        Ok(Self { stages, slots: b.slots })
    }

    /// `[b,z,f,y,x]`, behind the first pointwise convolution, to pixels `[b,3 or 12,f,y,x]`.
    pub fn decoder(arch: &VaeArch, b: &mut Builder<'_>) -> Result<Self> {
        let mut stages = Vec::new();
        let name = "decoder.conv1".to_owned();
        let c = arch.dec_dims(0).0;
        let conv = b.conv3(&name, arch.z_dim, c)?;
        stages.push((name, Stage::Conv(conv)));
        middle(&mut stages, b, "decoder", c)?;
        let first = stages.len();
        for level in 0..arch.levels() {
            let (c, o) = arch.dec_dims(level);
            let (last, time) = (level + 1 == arch.levels(), arch.up_in_time(level));
            let nested = format!("decoder.upsamples.{level}");
            let mut inner = Vec::new();
            let before = stages.len() - first;
            let name = |i: usize| match arch.kind {
                VaeKind::Wan21 => format!("decoder.upsamples.{}", before + i),
                VaeKind::Wan22 => format!("{nested}.upsamples.{i}"),
            };
            for i in 0..=arch.res_blocks {
                inner.push((name(i), b.res(&name(i), if i == 0 { c } else { o }, o)?));
            }
            if !last {
                let i = arch.res_blocks + 1;
                let to = if arch.kind == VaeKind::Wan21 { o / 2 } else { o };
                inner.push((name(i), b.up(&name(i), o, to, time)?));
            }
            match arch.kind {
                VaeKind::Wan21 => stages.extend(inner),
                VaeKind::Wan22 => {
                    let skip =
                        (!last).then_some(DupUp { out: o, time: if time { 2 } else { 1 }, space: 2, slot: b.slots });
                    b.slots += 1;
                    stages.push((nested, Stage::UpLevel(inner.into_iter().map(|(_, s)| s).collect(), skip)));
                }
            }
        }
        let c = arch.dec_dims(arch.levels() - 1).1;
        stages.push(head(b, "decoder", c, arch.pixel_channels())?);
        Ok(Self { stages, slots: b.slots })
    }

    pub fn cache(&self) -> Cache {
        Cache::new(self.slots)
    }

    /// Sends `x` through the stages, at most `step` frames at a time each, and appends what comes out to `out`.
    pub fn push(
        &self,
        exec: &Exec,
        cache: &mut Cache,
        x: Tensor,
        step: usize,
        trace: &mut Trace<'_>,
        out: &mut Vec<Tensor>,
    ) -> Result<()> {
        self.flow(0, &mut Flow { exec, cache, step, trace, out }, x)
    }

    fn flow(&self, at: usize, flow: &mut Flow<'_, '_>, x: Tensor) -> Result<()> {
        let Some((name, stage)) = self.stages.get(at) else {
            flow.out.push(x);
            return Ok(());
        };
        let f = x.dim(2)?;
        if f > flow.step {
            for i in (0..f).step_by(flow.step) {
                self.flow(at, flow, frames(&x, i, flow.step.min(f - i))?)?;
            }
            return Ok(());
        }
        match stage.forward(flow.exec, flow.cache, x)? {
            Some(y) => {
                (flow.trace)(name, &y)?;
                self.flow(at + 1, flow, y)
            }
            None => Ok(()),
        }
    }
}

struct Flow<'a, 't> {
    exec: &'a Exec,
    cache: &'a mut Cache,
    step: usize,
    trace: &'a mut Trace<'t>,
    out: &'a mut Vec<Tensor>,
}
