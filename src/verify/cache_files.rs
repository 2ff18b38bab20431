//! Cache files: names, dtypes and metadata of the tensors, and the latents themselves.

use std::collections::BTreeMap;

use anyhow::{anyhow, Result};
use candle_core::{DType, Tensor};
use serde_json::Value;

use super::golden::Tensors;
use super::json::{flag, integer, list, text};
use super::vae::load;
use super::{Case, Tolerance};
use crate::cache::format::{latent_metadata, merge_text, text_metadata, to_bytes, LatentTensors};
use wan_models::vae::{Vae, VaeOptions};

pub fn run(case: &Case<'_>) -> Result<()> {
    let latents = case.golden.names_ending("latent_cache.safetensors");
    let file = latents.iter().find(|name| name[..2.min(name.len())] == case.stem[..2.min(case.stem.len())]);
    let io = case.golden.tensors(file.ok_or_else(|| anyhow!("there is no …latent_cache.safetensors beside it"))?)?;
    let stem = text(&case.json, "vae")?;
    for entry in list(&case.json, "latent_cases")? {
        let (n, dtype) = (integer(entry, "case")?, text(entry, "vae_dtype")?);
        let compute = match dtype {
            "float32" => DType::F32,
            "bfloat16" => DType::BF16,
            "float16" => DType::F16,
            other => return Err(anyhow!("vae_dtype {other}")),
        };
        let vae = load(case, stem, VaeOptions::compat(compute).encoder_only())?;
        let ours = latents_of(case, &vae, entry, &io)?;
        let named = ours.named()?;
        let recorded = io.part(&format!("case{n}.{dtype}."));
        case.check(&format!("case{n} {dtype} form"), Tolerance::Exact, |line| {
            let keys: Vec<&str> = list(entry, "cache_keys")?.iter().filter_map(Value::as_str).collect();
            line.equal("the keys", &named.keys().map(String::as_str).collect(), &keys);
            line.equal("the recorded keys", &recorded.keys().map(String::as_str).collect(), &keys);
            for (key, want) in &recorded {
                let got = named.get(key).map(|t| (t.dtype(), t.dims().to_vec()));
                line.equal(key, &got, &Some((want.dtype(), want.dims().to_vec())));
            }
            let (w, h) = (integer(entry, "W")?, integer(entry, "H")?);
            let metadata = latent_metadata(w, h, Some(integer(entry, "frames")?));
            line.equal("the metadata", &metadata, &serde_json::from_value(entry["metadata"].clone())?);
            let read = candle_core::safetensors::load_buffer(&to_bytes(&named, &metadata)?, &candle_core::Device::Cpu)?;
            line.equal("the tensors after writing and reading", &read.len(), &named.len());
            Ok(())
        });
        // 16-bit convolutions differ by the order of their sums.
        let tolerance = if compute == DType::F32 { Tolerance::Abs(1e-4) } else { Tolerance::L2(2e-2) };
        case.check(&format!("case{n} {dtype} latents"), tolerance, |line| {
            recorded.iter().try_for_each(|(key, want)| {
                let got = named.get(key).ok_or_else(|| anyhow!("{key} was not made"))?;
                line.tensor(key, got, want)
            })
        });
    }
    captions(case)
}

/// What the cache of a clip holds: its latents, and for image-to-video the condition of its first frame.
fn latents_of(case: &Case<'_>, vae: &Vae, entry: &Value, io: &Tensors) -> Result<LatentTensors> {
    let frames = io.get(&format!("case{}.frames_u8_fhwc", integer(entry, "case")?))?;
    let pixels =
        vae.pixels(&frames.permute((3, 0, 1, 2))?.unsqueeze(0)?.contiguous()?.to_device(case.exec.device())?)?;
    let image = match flag(entry, "i2v")? {
        true => {
            let first = pixels.narrow(2, 0, 1)?.contiguous()?;
            Some(vae.first_frame_condition(&first, integer(entry, "frames")?)?.squeeze(0)?)
        }
        false => None,
    };
    let latents = vae.encode(&pixels)?.squeeze(0)?;
    Ok(LatentTensors { latents, latents_image: image, latents_control: None, clip: None, positions: None })
}

/// Key and metadata of caption files.
fn captions(case: &Case<'_>) -> Result<()> {
    let recorded = &case.json["text_cache"];
    let keys = recorded["keys"].as_object().ok_or_else(|| anyhow!("text_cache has no keys"))?;
    case.check("caption files", Tolerance::Exact, |line| {
        for (key, form) in keys {
            let shape: Vec<usize> = serde_json::from_value(form[0].clone())?;
            let dtype = match text(form, "1").or_else(|_| form[1].as_str().ok_or_else(|| anyhow!("no dtype")))? {
                "torch.float32" => DType::F32,
                "torch.float16" => DType::F16,
                _ => DType::BF16,
            };
            let metadata: BTreeMap<String, String> = serde_json::from_value(recorded["metadata"].clone())?;
            let caption = metadata.get("caption1").map(String::as_str).unwrap_or_default();
            let context = Tensor::ones(shape, dtype, &candle_core::Device::Cpu)?;
            let (ours, tensors) = merge_text(None, &context, text_metadata(caption))?;
            line.equal("the keys", &tensors.keys().collect(), &vec![key]);
            line.equal("the dtype", &tensors[key].dtype(), &dtype);
            line.equal("the metadata", &ours, &metadata);
        }
        Ok(())
    });
    Ok(())
}
