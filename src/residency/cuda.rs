//! Blocks on a card, and blocks streamed to it from pinned host memory.

use std::sync::Arc;

use candle_core::Tensor;
use wan_kernels::gpu::{Gpu, Pinned};
use wan_models::wan::{BlockWeights, ResidentWeights};
use wan_models::Result;

use super::{Residency, ResidencySpec, Ring, Upload};

/// Copies a block on the copy stream while the card computes.
struct Stream {
    gpu: Gpu,
    /// The masters stay pinned as long as anything is copied from them.
    _pinned: Option<Pinned>,
}

impl Upload for Stream {
    fn upload(&self, master: &BlockWeights) -> Result<BlockWeights> {
        let mut sources = Vec::new();
        master.map(&mut |t| {
            sources.push(t.clone());
            Ok(t.clone())
        })?;
        let mut uploaded = self.gpu.upload(&sources)?.into_iter();
        master.map(&mut |t| match uploaded.next() {
            Some(copy) => Ok(copy),
            None => Ok(t.to_device(&self.gpu.device())?),
        })
    }
}

pub fn residency(
    gpu: &Gpu,
    blocks: Vec<BlockWeights>,
    spec: ResidencySpec,
) -> anyhow::Result<(Residency, Option<String>)> {
    let streamed = spec.streamed(blocks.len());
    let device = gpu.device();
    let (mut all, mut masters) = (Vec::with_capacity(blocks.len()), Vec::<Tensor>::new());
    for (index, block) in blocks.into_iter().enumerate() {
        all.push(Arc::new(match streamed.contains(&index) {
            false => block.map(&mut |t| Ok(t.to_device(&device)?))?,
            true => block.map(&mut |t| {
                let t = t.to_device(&candle_core::Device::Cpu)?;
                masters.push(t.clone());
                Ok(t)
            })?,
        }));
    }
    if streamed.is_empty() {
        return Ok((Residency::Resident(ResidentWeights(all)), None));
    }
    let (pinned, note) = match gpu.pin(masters) {
        Ok(pinned) => (Some(pinned), None),
        Err(e) => (None, Some(format!("host memory could not be pinned ({e}): streaming blocks will be slower"))),
    };
    let upload = Arc::new(Stream { gpu: gpu.clone(), _pinned: pinned });
    Ok((Residency::Ring(Ring::new(all, streamed, spec.ring_size, upload)), note))
}
