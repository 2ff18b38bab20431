//! VAE: encoder means, latents, stages of the first frame, decoded video.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use wan_kernels::Exec;
use wan_models::vae::{Encoder, Vae, VaeArch, VaeOptions};

use super::golden::Tensors;
use super::json::{integer, list, numbers, text};
use super::line::relative;
use super::{Case, Tolerance};

/// The VAE whose case is called `stem`, where the case is computed.
pub fn load(case: &Case<'_>, stem: &str, options: VaeOptions) -> Result<Vae> {
    load_on(case, stem, options, case.exec)
}

fn load_on(case: &Case<'_>, stem: &str, options: VaeOptions, exec: &Exec) -> Result<Vae> {
    let json = case.golden.json(&format!("{stem}.json"))?;
    let floats = |key: &str| -> Result<Vec<f32>> { Ok(numbers(&json, key)?.into_iter().map(|v| v as f32).collect()) };
    let arch = VaeArch::from_official(&json["config"], floats("latent_mean")?, floats("latent_std")?)?;
    let weights = case.golden.tensors(&format!("{stem}.weights.safetensors"))?;
    // Every weight belongs to the file's case, whichever half is used here.
    let all = weights.all_f32(exec.device())?;
    let missing = |key: &str| wan_models::Error::MissingWeight { model: "vae", key: key.to_string() };
    Ok(Vae::load(arch, exec, options, &mut |key| all.get(key).cloned().ok_or_else(|| missing(key)))?)
}

pub fn run(case: &Case<'_>) -> Result<()> {
    let vae = load(case, &case.stem, VaeOptions::default())?;
    let (io, device) = (case.tensors(".io")?, case.exec.device());
    let stats = [("latent_mean", &vae.arch().latent_mean), ("latent_std", &vae.arch().latent_std)];
    case.check("latent statistics", Tolerance::Exact, |line| {
        stats.iter().try_for_each(|(key, ours)| line.tensor(key, &Tensor::new(&ours[..], device)?, io.get(key)?))
    });
    for entry in list(&case.json, "cases")? {
        let (kind, i) = (text(entry, "kind")?, integer(entry, "idx")?);
        if kind == "decode" {
            case.check(&format!("decode {i}"), Tolerance::Abs(1e-4), |line| {
                let video = vae.decode_unclamped(&io.f32(&format!("dec{i}.latent"), device)?.unsqueeze(0)?)?;
                line.tensor("video", &video.squeeze(0)?, &io.f32(&format!("dec{i}.video_unclamped"), device)?)
            });
            continue;
        }
        case.check(&format!("{kind} {i}"), Tolerance::Abs(1e-4), |line| {
            let video = io.get(&format!("enc{i}.video_u8"))?.unsqueeze(0)?.to_device(device)?;
            let mut encoder = Encoder::new(&vae)?;
            encoder.push(&vae.pixels(&video)?)?;
            let encoded = encoder.finish()?;
            line.tensor("mean", &encoded.mean.squeeze(0)?, &io.f32(&format!("enc{i}.mu_raw"), device)?)?;
            line.tensor("latent", &encoded.latent.squeeze(0)?, &io.f32(&format!("enc{i}.latent"), device)?)
        });
    }
    if device.is_cuda() {
        in_sixteen_bit(case, &io)?;
    }
    let prefix = "trace_enc0_frame0.";
    if io.keys(prefix).next().is_some() {
        case.check("stages of one frame", Tolerance::Abs(1e-4), |line| {
            let first = io.get("enc0.video_u8")?.narrow(1, 0, 1)?.unsqueeze(0)?.contiguous()?.to_device(device)?;
            let mut stages: Vec<(String, Tensor)> = Vec::new();
            let mut trace = |name: &str, t: &Tensor| {
                stages.push((name.to_string(), t.to_dtype(DType::F32)?));
                Ok(())
            };
            let mut encoder = Encoder::new(&vae)?;
            encoder.push_traced(&vae.pixels(&first)?, &mut trace)?;
            encoder.finish()?;
            for (name, got) in &stages {
                if let Some(want) = io.f32_if_any(&format!("{prefix}{name}"), device)? {
                    line.tensor(name, &got.squeeze(0)?, &want)?;
                }
            }
            Ok(())
        });
    }
    Ok(())
}

/// As a card makes caches: 16-bit activations in the kernels' own layout. They may be twice as far from the recorded
/// numbers as the plain definition in the same dtype.
fn in_sixteen_bit(case: &Case<'_>, io: &Tensors) -> Result<()> {
    for compute in [DType::BF16, DType::F16] {
        let options = VaeOptions { compute, frames_per_step: 4, ..VaeOptions::default() };
        let fast = load_on(case, &case.stem, options, case.exec)?;
        let naive = load_on(case, &case.stem, options, &Exec::cpu())?;
        for entry in list(&case.json, "cases")? {
            let (kind, i) = (text(entry, "kind")?, integer(entry, "idx")?);
            let (input, want) = match kind {
                "decode" => (format!("dec{i}.latent"), format!("dec{i}.video_unclamped")),
                _ => (format!("enc{i}.video_u8"), format!("enc{i}.latent")),
            };
            let want = io.f32(&want, &Device::Cpu)?.unsqueeze(0)?;
            let run = |vae: &Vae, device: &Device| -> Result<Tensor> {
                let input = io.get(&input)?.unsqueeze(0)?.to_device(device)?;
                let out = match kind {
                    "decode" => vae.decode_unclamped(&input)?,
                    _ => vae.encode(&vae.pixels(&input)?)?,
                };
                Ok(out.to_dtype(DType::F32)?)
            };
            let allowed = 2.0 * relative(&run(&naive, &Device::Cpu)?, &want)?;
            case.check(&format!("{kind} {i} in {compute:?}"), Tolerance::L2(allowed), |line| {
                line.tensor("result", &run(&fast, case.exec.device())?, &want)
            });
        }
    }
    Ok(())
}
