//! DiT: predictions, activations on the way, and what the old tool makes of the same inputs.

use std::collections::BTreeMap;

use anyhow::{bail, Result};
use candle_core::{DType, Tensor};
use wan_models::adapter::NoAdapters;
use wan_models::arch::{NotInShapes, Shapes, WanArch};
use wan_models::keys;
use wan_models::wan::{Numerics, ResidentWeights, Timesteps, WanInputs, WanModel, WanWeights};

use super::golden::Tensors;
use super::json::{integer, list};
use super::{Case, Tolerance};

/// Weights of a DiT in fp32 under canonical names, with the architecture that shapes and configuration agree on.
pub struct Base {
    pub arch: WanArch,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Base {
    /// The base described by `config_file` and `weights_file`.
    pub fn load(case: &Case<'_>, config_file: &str, weights_file: &str) -> Result<Self> {
        let json = case.golden.json(config_file)?;
        let config = &json["config"];
        let mut tensors = BTreeMap::new();
        for (key, tensor) in case.golden.tensors(weights_file)?.all_f32(case.exec.device())? {
            match keys::canonical(&key) {
                Some(name) => drop(tensors.insert(name, tensor)),
                None => bail!("{weights_file}: {key} is no tensor of a DiT"),
            }
        }
        let shapes: Shapes = tensors.iter().map(|(key, t)| (key.clone(), t.dims().to_vec())).collect();
        let number = |key: &str| config[key].as_u64().map(|n| n as usize);
        let told =
            NotInShapes { num_heads: number("num_heads"), text_len: number("text_len"), eps: config["eps"].as_f64() };
        let arch = WanArch::from_shapes(&shapes, told)?;
        let read_off = [
            ("dim", arch.dim),
            ("ffn_dim", arch.ffn_dim),
            ("num_layers", arch.num_layers),
            ("num_heads", arch.num_heads),
            ("in_dim", arch.in_dim),
            ("out_dim", arch.out_dim),
            ("text_dim", arch.text_dim),
            ("freq_dim", arch.freq_dim),
        ];
        for (key, ours) in read_off {
            if integer(config, key)? != ours {
                bail!("{config_file}: {key} is {}, the tensors say {ours}", config[key]);
            }
        }
        if let Err(difference) = arch.agrees_with(&shapes) {
            bail!("{weights_file}: {difference}");
        }
        Ok(Base { arch, tensors })
    }

    pub fn model(&self, numerics: Numerics) -> Result<(WanModel, ResidentWeights)> {
        let (outer, blocks) = WanWeights::from_tensors(&self.arch, &self.tensors)?;
        Ok((WanModel::new(self.arch.clone(), outer, numerics)?, blocks))
    }
}

/// Inputs recorded under `prefix`; `x` and `t` are given by the caller.
pub fn inputs(case: &Case<'_>, io: &Tensors, prefix: &str, x: Tensor, t: &Tensor) -> Result<WanInputs> {
    let device = case.exec.device();
    Ok(WanInputs {
        t: Timesteps::from_tensor(t)?,
        context: io.sequence(&format!("{prefix}context"), device)?,
        y: io.f32_if_any(&format!("{prefix}y"), device)?,
        clip_fea: io.f32_if_any(&format!("{prefix}clip_fea"), device)?,
        f_indices: None,
        x,
    })
}

pub fn run(case: &Case<'_>) -> Result<()> {
    let base = Base::load(case, &format!("{}.json", case.stem), &format!("{}.weights.safetensors", case.stem))?;
    let device = case.exec.device();
    let io = case.tensors(".io")?;
    let acts = case.tensors_if_any(".acts")?;
    let (model, blocks) = base.model(Numerics::default())?;
    for entry in list(&case.json, "cases")? {
        let i = integer(entry, "case")?;
        let prefix = format!("case{i}.");
        let x = io.f32(&format!("{prefix}x"), device)?;
        let inputs = inputs(case, &io, &prefix, x, io.get(&format!("{prefix}t"))?)?;
        let recorded = acts.as_ref().filter(|_| case.json["acts_for_case"] == i);

        let mut seen = Vec::new();
        let mut keep = |name: &str, t: &Tensor| {
            if recorded.is_some_and(|acts| acts.keys(name).any(|key| key == name)) {
                seen.push((name.to_string(), t.clone()));
            }
            Ok(())
        };
        let pred = model.predict(case.exec, &inputs, &NoAdapters, &blocks, Some(&mut keep))?;
        case.check(&format!("case{i} pred"), Tolerance::Abs(3e-5), |line| {
            line.tensor("pred", &pred, &io.f32(&format!("{prefix}pred"), device)?)
        });
        if let Some(acts) = recorded {
            case.check(&format!("case{i} activations"), Tolerance::Abs(3e-5), |line| {
                for (name, got) in &seen {
                    let want = acts.f32(name, device)?;
                    // The recording keeps the first rows of the text embedding only.
                    let got = if got.dims() == want.dims() { got.clone() } else { got.narrow(1, 0, want.dim(1)?)? };
                    line.tensor(name, &got, &want)?;
                }
                Ok(())
            });
        }
        // The old tool: queries, keys and values rounded to bf16 before attention, and its own split of image rows.
        for (name, attention, tolerance) in [
            ("pred_musubi_bf16attn", Some(DType::BF16), Tolerance::L2(1e-2)),
            ("pred_musubi_disagrees", None, Tolerance::Abs(3e-5)),
        ] {
            let Some(want) = io.f32_if_any(&format!("{prefix}{name}"), device)? else { continue };
            case.check(&format!("case{i} {name}"), tolerance, |line| {
                let numerics = Numerics { attention, musubi_clip_split: true, ..Numerics::default() };
                let old = WanModel::new(base.arch.clone(), model.weights().clone(), numerics)?;
                line.tensor(name, &old.predict(case.exec, &inputs, &NoAdapters, &blocks, None)?, &want)
            });
        }
    }
    Ok(())
}
