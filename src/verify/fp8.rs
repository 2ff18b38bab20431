//! fp8: codes, scales and casts of single matrices; a DiT on fp8 weights, and a LoRA step on it.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{DType, Tensor};
use wan_kernels::fp8::{codec, Granularity, Weight as Fp8, BLOCK};
use wan_kernels::Exec;
use wan_models::adapter::NoAdapters;
use wan_models::keys;
use wan_models::linear::Weight;
use wan_models::wan::{BlockWeights, Numerics, ResidentWeights, WanModel, WanWeights};

use super::adapter_step::{check_step, Network, Setting};
use super::dit::{inputs, Base};
use super::json::{integer, list, text};
use super::{Case, Tolerance};

/// Matrices of several checkpoint dtypes, the plain cast, the table of codes.
pub fn matrices(case: &Case<'_>) -> Result<()> {
    let io = case.tensors("")?;
    case.check("table and casts", Tolerance::Exact, |line| {
        line.equal("the block size", &BLOCK, &integer(&case.json, "block_size")?);
        if let Some(table) = io.find("table.u8_to_f32") {
            // Codes that are no number are shown as 1234.
            let ours = (0..=255u8).map(codec::decode).map(|v| if v.is_nan() { 1234.0 } else { v });
            line.tensor("the table", &Tensor::from_iter(ours, table.device())?.reshape(table.dims())?, table)?;
        }
        if let Some(x) = io.find("castcases.x") {
            line.tensor("casts of fp32", &cast(x)?, io.get("castcases.u8")?)?;
            if let Some(want) = io.find("castcases.u8_from_bf16") {
                line.tensor("casts of bf16", &cast(&x.to_dtype(DType::BF16)?)?, want)?;
            }
        }
        Ok(())
    });
    let names: Vec<String> = io.keys("").filter_map(|key| Some(key.strip_suffix(".weight")?.to_string())).collect();
    for name in names {
        case.check(&name, Tolerance::Exact, |line| {
            let weight = io.get(&format!("{name}.weight"))?;
            for (variant, granularity) in
                [("", Granularity::Block), (".channel", Granularity::Channel), (".tensor", Granularity::Tensor)]
            {
                let recorded = |what: &str| io.find(&format!("{name}{variant}.{what}"));
                let Some(codes) = recorded("q_u8") else { continue };
                let ours = Fp8::quantize(weight, granularity)?;
                line.tensor(&format!("codes{variant}"), ours.codes_oi(), codes)?;
                if let Some(scale) = recorded("scale") {
                    line.tensor(&format!("scale{variant}"), ours.scale(), scale)?;
                }
                if let Some(values) = recorded("dequant") {
                    line.tensor(&format!("values{variant}"), &ours.dequantize()?, values)?;
                }
            }
            match io.find(&format!("{name}.cast_u8")) {
                Some(want) => line.tensor("plain cast", &cast(weight)?, want),
                None => Ok(()),
            }
        });
    }
    Ok(())
}

fn cast(t: &Tensor) -> Result<Tensor> {
    let values = t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let mut codes = vec![0u8; values.len()];
    codec::encode_slice(&values, &mut codes);
    Ok(Tensor::from_vec(codes, t.dims(), t.device())?)
}

type Stored = BTreeMap<String, Weight>;

/// A checkpoint of `dtype` with block-scaled linears.
fn scaled(base: &Base, dtype: DType) -> Result<Stored> {
    let store = |(key, t): (&String, &Tensor)| {
        let t = t.to_dtype(dtype)?;
        let weight = match keys::is_quantisable(key) {
            true => Weight::Fp8(Fp8::quantize(&t, Granularity::Block)?),
            false => Weight::Dense(t),
        };
        Ok((key.clone(), weight))
    };
    base.tensors.iter().map(store).collect()
}

/// Every tensor cast to e4m3 without a scale, norms and biases too.
fn all_cast(base: &Base) -> Result<Stored> {
    let store = |(key, t): (&String, &Tensor)| {
        let codes = cast(t)?;
        let weight = match keys::is_quantisable(key) {
            true => Weight::cast(codes)?,
            false => {
                let values: Vec<f32> = codes.flatten_all()?.to_vec1::<u8>()?.into_iter().map(codec::decode).collect();
                Weight::Dense(Tensor::from_vec(values, t.dims(), t.device())?)
            }
        };
        Ok((key.clone(), weight))
    };
    base.tensors.iter().map(store).collect()
}

fn build(base: &Base, stored: &Stored, numerics: Numerics) -> Result<(WanModel, ResidentWeights)> {
    let missing = |key: &str| wan_models::Error::MissingWeight { model: "wan", key: key.to_string() };
    let mut get = |key: &str| stored.get(key).cloned().ok_or_else(|| missing(key));
    let outer = WanWeights::from_getter(&base.arch, &mut get)?;
    let blocks: wan_models::Result<Vec<_>> =
        (0..base.arch.num_layers).map(|i| BlockWeights::from_getter(&base.arch, i, &mut get)).collect();
    Ok((WanModel::new(base.arch.clone(), outer, numerics)?, ResidentWeights::new(blocks?)))
}

/// Predictions of a DiT on fp8 weights stored and computed in several ways, and a LoRA step on the first.
pub fn dit(case: &Case<'_>) -> Result<()> {
    let stem = text(&case.json, "base")?;
    let base = Base::load(case, &format!("{stem}.json"), &format!("{stem}.weights.safetensors"))?;
    let device = case.exec.device();
    let io = case.tensors("")?;
    let (x, t) = (io.f32("x", device)?, io.get("t")?);
    let given = inputs(case, &io, "", x.clone(), t)?;

    let full = scaled(&base, DType::F32)?;
    case.check("codes and scales", Tolerance::Exact, |line| {
        let ours: Vec<&str> = full
            .iter()
            .filter(|(_, w)| !matches!(w, Weight::Dense(_)))
            .filter_map(|(key, _)| key.strip_suffix(".weight"))
            .collect();
        let recorded: Vec<&str> = list(&case.json, "quantized_layers")?.iter().filter_map(|l| l.as_str()).collect();
        line.equal("the quantised layers", &ours, &recorded);
        for (layer, codes) in io.part("q_u8.") {
            let Some(Weight::Fp8(weight)) = full.get(&format!("{layer}.weight")) else { continue };
            line.tensor(&format!("codes of {layer}"), weight.codes_oi(), &codes)?;
            line.tensor(&format!("scale of {layer}"), weight.scale(), io.get(&format!("scale.{layer}"))?)?;
        }
        Ok(())
    });

    let dense = base.tensors.iter().map(|(key, t)| (key.clone(), Weight::Dense(t.clone()))).collect();
    let (half, lossy) = (scaled(&base, DType::BF16)?, all_cast(&base)?);
    let bf16 = Exec::Reference { device: device.clone(), compute: DType::BF16 };
    let fp32 = (case.exec, Numerics::default(), Tolerance::Abs(3e-5));
    let autocast = (&bf16, Numerics::musubi(), Tolerance::L2(2e-2));
    for (name, stored, (exec, numerics, tolerance)) in [
        ("pred_fp32_unquantized", &dense, fp32),
        ("pred_fp8scaled_fp32scale", &full, fp32),
        ("pred_fp8scaled_bf16scale_fp32compute", &half, fp32),
        ("pred_fp8scaled_bf16_autocast", &half, autocast),
        ("pred_fp8base_cast_fp32compute", &lossy, fp32),
        ("pred_fp8base_bf16_autocast", &lossy, autocast),
    ] {
        let Some(want) = io.f32_if_any(name, device)? else { continue };
        case.check(name, tolerance, |line| {
            let (model, blocks) = build(&base, stored, numerics)?;
            line.tensor(name, &model.predict(exec, &given, &NoAdapters, &blocks, None)?, &want)
        });
    }

    let file = format!("{}.safetensors", case.stem.replace("dit", "lora_step"));
    if file == format!("{}.safetensors", case.stem) || !case.golden.has(&file) {
        return Ok(());
    }
    let recorded = case.golden.tensors(&file)?;
    let mut network = Network::of_tensors(&base.arch, recorded.part("network."), device)?;
    let (model, blocks) = build(&base, &full, Numerics::default())?;
    // Here the model is given t itself, and sigma is t / 1000.
    let (noise, sigma) = (recorded.f32("noise", device)?, recorded.f32("sigma", device)?);
    let setting = Setting { exec: case.exec, model: &model, blocks: &blocks, latents: &x, given: &given };
    let ours = setting.step(&mut network, &noise, &sigma)?;
    check_step(case, "LoRA step ", &ours, &network, &recorded);
    Ok(())
}
