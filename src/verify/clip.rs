//! CLIP vision tower: preprocessing, embedding, the output that the DiT reads, the whole depth.

use anyhow::Result;
use candle_core::DType;
use wan_models::clip::{ClipArch, ClipVision};

use super::json::{integer, list};
use super::{Case, Tolerance};

pub fn run(case: &Case<'_>) -> Result<()> {
    let device = case.exec.device();
    let arch = ClipArch::from_official(&case.json["config"])?;
    let weights = case.tensors(".weights")?.all_f32(device)?;
    let clip = ClipVision::load(arch, device, DType::F32, &mut |key| Ok(weights.get(key).cloned()))?;
    let io = case.tensors(".io")?;
    for entry in list(&case.json, "cases")? {
        let i = integer(entry, "i")?;
        case.check(&format!("image {i}"), Tolerance::Abs(1e-4), |line| {
            let pixels = io.f32(&format!("img{i}.u8"), device)?.unsqueeze(0)?;
            let images = pixels.affine(1.0 / 127.5, -1.0)?;
            let prepared = clip.preprocess(&images)?;
            for (name, got) in [
                ("preprocessed", prepared.clone()),
                ("after_pre_norm", clip.embed(&prepared)?),
                ("penultimate", clip.encode(&images)?),
                ("full_depth", clip.full_depth(&prepared)?),
            ] {
                if let Some(want) = io.f32_if_any(&format!("img{i}.{name}"), device)? {
                    line.tensor(name, &got.squeeze(0)?, &want)?;
                }
            }
            Ok(())
        });
    }
    Ok(())
}
