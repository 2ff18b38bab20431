//! A training step with LoRA, LoHa or LoKr: prediction, loss, every gradient; ten steps of AdamW; the saved file.

use std::collections::BTreeMap;

use anyhow::{anyhow, bail, Context, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use wan_kernels::adamw::{clip_scale, AdamW};
use wan_kernels::flow::{FlowLoss, FlowLossArgs, FlowLossBackward, FlowLossBackwardArgs, FlowMix, FlowMixArgs};
use wan_kernels::Exec;
use wan_models::adapter::{Adapters, NoAdapters};
use wan_models::arch::WanArch;
use wan_models::keys;
use wan_models::wan::{Numerics, ResidentWeights, SavePlan, SavePolicy, Timesteps, WanInputs, WanModel};

use super::dit::{inputs, Base};
use super::golden::Tensors;
use super::json::{list, number, numbers, text};
use super::{Case, Tolerance};
use crate::adapter::network::NetworkOptions;
use crate::adapter::{select, AdapterParams, Grads, NetworkSpec};
use crate::checkpoint::{write_lora, Form, ModuleOut};
use crate::optim::{Adafactor, Optimizer, OptimizerKind, OptimizerSpec};
use crate::train::timesteps::{Draws, Sampling, TimestepSpec};

/// The trainer's own parameters with recorded values.
pub struct Network {
    pub params: AdapterParams,
    pub grads: Grads,
}

impl Network {
    /// A network as the JSON describes it, with the values of `tensors` (kohya's names).
    fn described(case: &Case<'_>, arch: &WanArch, tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let json = &case.json;
        let args = match json["network_args"].as_object() {
            Some(all) => all
                .iter()
                .map(|(key, value)| match value {
                    Value::String(text) => format!("{key}={text}"),
                    Value::Bool(on) => format!("{key}={}", if *on { "True" } else { "False" }),
                    other => format!("{key}={other}"),
                })
                .collect(),
            None => Vec::new(),
        };
        let module = format!("networks.{}", text(json, "kind")?.replace("lora", "lora_wan"));
        let (dim, alpha) = (number(json, "network_dim")? as u64, number(json, "network_alpha")?);
        let spec = NetworkSpec::parse(&NetworkOptions { module: &module, dim, alpha, dropout: None, args: &args })?;
        Self::new(spec, arch, tensors, case.exec.device())
    }

    /// A LoRA whose rank and alpha are those of `tensors`.
    pub fn of_tensors(arch: &WanArch, tensors: BTreeMap<String, Tensor>, device: &Device) -> Result<Self> {
        let down = tensors.iter().find(|(key, _)| key.ends_with("lora_down.weight"));
        let (key, down) = down.context("the network has no lora_down.weight")?;
        let alpha = &tensors[&key.replace("lora_down.weight", "alpha")];
        let spec = NetworkSpec::lora(down.dim(0)?, f64::from(alpha.to_dtype(DType::F32)?.to_scalar::<f32>()?));
        Self::new(spec, arch, tensors, device)
    }

    fn new(spec: NetworkSpec, arch: &WanArch, tensors: BTreeMap<String, Tensor>, device: &Device) -> Result<Self> {
        let sites = select(arch, &spec.patterns)?;
        let params = AdapterParams::new(spec, sites, 0, device)?;
        let mut values = BTreeMap::new();
        for (key, tensor) in &tensors {
            let (module, param) = key.split_once('.').ok_or_else(|| anyhow!("{key} names no parameter"))?;
            if param != "alpha" {
                let site = keys::site_from_kohya(module).ok_or_else(|| anyhow!("{module} is no site"))?;
                let flat = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                values.insert(format!("{site}.{param}"), (tensor.dims().to_vec(), flat));
            }
        }
        if values.len() != params.layout().params.len() {
            bail!("the file holds {} parameters, the network {}", values.len(), params.layout().params.len());
        }
        params.restore(|name| values.get(name).map(|(shape, flat)| (&shape[..], &flat[..])))?;
        let grads = Grads::new(params.layout().clone(), device)?;
        Ok(Network { params, grads })
    }

    /// Kohya's name of every parameter with its full name here.
    fn names(&self) -> impl Iterator<Item = (String, String)> + '_ {
        let layout = self.params.layout();
        layout.params.iter().map(move |p| {
            let kohya = format!("{}.{}", keys::kohya_name(&layout.sites[p.site].name), p.name);
            (kohya, layout.full_name(p))
        })
    }
}

/// What one step gives; its gradients are left in the network.
pub struct Step {
    pub pred: Tensor,
    pub loss: f64,
}

/// The fixed parts of a step.
pub struct Setting<'a> {
    pub exec: &'a Exec,
    pub model: &'a WanModel,
    pub blocks: &'a ResidentWeights,
    pub latents: &'a Tensor,
    /// Everything the model is given, with the timesteps; `x` is replaced by the noisy latents.
    pub given: &'a WanInputs,
}

impl Setting<'_> {
    /// Noise, forward, loss, backward.
    pub fn step(&self, network: &mut Network, noise: &Tensor, sigma_b: &Tensor) -> Result<Step> {
        let (exec, latents) = (self.exec, self.latents);
        let x = exec.run::<FlowMix>(&FlowMixArgs { latents, noise, sigma_b })?;
        let inputs = WanInputs { x, ..self.given.clone() };
        let Network { params, grads } = network;
        let plan = SavePlan::uniform(SavePolicy::Recompute);
        let (pred, saved) = self.model.forward(exec, &inputs, params, self.blocks, &plan)?;
        let loss = exec.run::<FlowLoss>(&FlowLossArgs { pred: &pred, latents, noise, weight_b: None })?;
        let backward = FlowLossBackwardArgs { pred: &pred, latents, noise, weight_b: None, dloss: 1.0 };
        let dpred = exec.run::<FlowLossBackward>(&backward)?;
        grads.clear()?;
        self.model.backward(exec, params, self.blocks, saved, &dpred, grads)?;
        Ok(Step { pred, loss: f64::from(loss.read()?.0) })
    }
}

/// Prediction, loss and every gradient of a step against what is recorded.
pub fn check_step(case: &Case<'_>, label: &str, ours: &Step, network: &Network, io: &Tensors) {
    let device = case.exec.device();
    case.check(&format!("{label}pred"), Tolerance::Abs(3e-5), |line| {
        line.tensor("pred", &ours.pred, &io.f32("pred", device)?)
    });
    case.check(&format!("{label}loss"), Tolerance::Rel(1e-5), |line| {
        line.values("loss", &[ours.loss], &super::line::numbers(io.get("loss")?)?);
        Ok(())
    });
    case.check(&format!("{label}gradients"), Tolerance::Rel(1e-4), |line| {
        for (kohya, name) in network.names() {
            let got = network.grads.get(&name)?.with_context(|| format!("{name} has no gradient"))?;
            line.tensor(&name, &got, &io.f32(&format!("grad.{kohya}"), device)?)?;
        }
        line.equal("the number of gradients", &network.names().count(), &io.keys("grad.").count());
        Ok(())
    });
}

pub fn run(case: &Case<'_>) -> Result<()> {
    let json = &case.json;
    let base = Base::load(case, text(json, "base_config")?, text(json, "base_weights")?)?;
    let device = case.exec.device();
    let (model, blocks) = base.model(Numerics::default())?;
    let initial = case.tensors(".network")?.part("");
    let io = case.tensors(".io")?;
    let mut network = Network::described(case, &base.arch, initial.clone())?;
    check_layout(case, &network, &initial);

    let (latents, noise, sigma) = (io.f32("latents", device)?, io.f32("noise", device)?, io.f32("sigma", device)?);
    let t = compat_timesteps(&sigma)?;
    case.check("timesteps and noising", Tolerance::Abs(1e-3), |line| {
        line.tensor("timesteps", &t, &io.f32("timesteps", device)?)?;
        // Latents in thousands, so that 1e-3 means 1e-6.
        let noisy = case.exec.run::<FlowMix>(&FlowMixArgs { latents: &latents, noise: &noise, sigma_b: &sigma })?;
        line.tensor("noisy latents", &(noisy * 1e3)?, &(io.f32("noisy", device)? * 1e3)?)
    });
    let given = inputs(case, &io, "", io.f32("noisy", device)?, &t)?;
    if let Some(want) = io.f32_if_any("pred_without_network", device)? {
        case.check("pred without network", Tolerance::Abs(3e-5), |line| {
            line.tensor("pred", &model.predict(case.exec, &given, &NoAdapters, &blocks, None)?, &want)
        });
    }
    let setting = Setting { exec: case.exec, model: &model, blocks: &blocks, latents: &latents, given: &given };
    let ours = setting.step(&mut network, &noise, &sigma)?;
    check_step(case, "", &ours, &network, &io);

    let variants = json.as_object().into_iter().flatten().filter_map(|(key, v)| Some((key.strip_prefix("traj_")?, v)));
    for (variant, recipe) in variants {
        let network = Network::described(case, &base.arch, initial.clone())?;
        trajectory(case, &setting, network, variant, recipe, &io)?;
    }
    let network = Network::described(case, &base.arch, initial)?;
    for (suffix, dtype) in [("bf16", DType::BF16), ("fp16", DType::F16), ("fp32", DType::F32)] {
        let file = format!("{}.saved_{suffix}.safetensors", case.stem);
        if case.golden.has(&file) {
            case.check(&format!("saved {suffix} file"), Tolerance::Exact, |line| {
                let (got, want) = (saved(case, &network, &file, dtype)?, case.golden.bytes(&file)?);
                line.equal("the metadata", &metadata(&got)?, &metadata(&want)?);
                line.equal("the tensors", &forms(&got)?, &forms(&want)?);
                line.equal("the bytes of the tensors", &(body(&got)? == body(&want)?), &true);
                let hash = json[format!("saved_{suffix}_metadata")]["sshs_model_hash"].as_str();
                line.equal("the hash", &metadata(&got)?.get("sshs_model_hash").map(String::as_str), &hash);
                Ok(())
            });
        }
    }
    Ok(())
}

/// Sites, scales and stored alphas.
fn check_layout(case: &Case<'_>, network: &Network, initial: &BTreeMap<String, Tensor>) {
    let layout = network.params.layout();
    case.check("sites and scales", Tolerance::Exact, |line| {
        let names: Vec<String> = layout.sites.iter().map(|s| keys::kohya_name(&s.name)).collect();
        let recorded: Vec<&str> = list(&case.json, "module_names")?.iter().filter_map(Value::as_str).collect();
        line.equal("the modules, in order,", &names.iter().map(String::as_str).collect(), &recorded);
        for (name, ours) in names.iter().zip(&layout.scales) {
            let scale = &case.json["scale_per_module"];
            line.equal(&format!("the scale of {name}"), &Some(ours.scale), &scale.as_f64().or(scale[name].as_f64()));
            let alpha = initial.get(&format!("{name}.alpha")).with_context(|| format!("{name} has no alpha"))?;
            let recorded = super::line::numbers(alpha)?;
            line.values(&format!("the alpha of {name}"), &[ours.alpha], &recorded);
            line.equal(&format!("an integer alpha of {name}"), &ours.alpha_is_integer, &(alpha.dtype() == DType::I64));
        }
        Ok(())
    });
}

/// What the old tool tells the model for these shares of noise: 1000 sigma + 1.
fn compat_timesteps(sigma_b: &Tensor) -> Result<Tensor> {
    let shares = sigma_b.to_vec1::<f32>()?;
    let spec = TimestepSpec { sampling: Sampling::Uniform, compat: true, ..TimestepSpec::default() };
    let drawn = spec.sample(&mut Given(shares.clone()), (2, 2), None, shares.len());
    Ok(Tensor::from_vec(drawn.iter().map(|s| s.t).collect::<Vec<f32>>(), shares.len(), sigma_b.device())?)
}

/// Hands out the given shares as draws.
struct Given(Vec<f32>);

impl Draws for Given {
    fn uniform(&mut self, n: usize) -> Vec<f32> {
        self.0.iter().copied().cycle().take(n).collect()
    }
    fn normal(&mut self, n: usize) -> Vec<f32> {
        vec![0.0; n]
    }
}

/// Ten steps of AdamW with recorded noise, with or without clipping.
fn trajectory(
    case: &Case<'_>,
    setting: &Setting<'_>,
    mut network: Network,
    variant: &str,
    recipe: &Value,
    io: &Tensors,
) -> Result<()> {
    let device = case.exec.device();
    if !text(recipe, "optimizer")?.ends_with("AdamW") {
        bail!("traj_{variant} was made with {}", recipe["optimizer"]);
    }
    let [beta1, beta2] = numbers(recipe, "betas")?[..] else { bail!("traj_{variant}: betas are not a pair") };
    let (eps, weight_decay) = (number(recipe, "eps")?, number(recipe, "weight_decay")?);
    let adamw = AdamW { beta1, beta2, eps, weight_decay };
    let spec = OptimizerSpec { kind: OptimizerKind::AdamW, adamw, adafactor: Adafactor::default() };
    let layout = network.params.layout().clone();
    let mut optimizer = Optimizer::on(spec, &layout, device)?;
    let (lr, max_norm) = (number(recipe, "lr")?, recipe["max_grad_norm"].as_f64().unwrap_or(0.0));
    let (noise, sigma, t) =
        (io.f32("traj.noise", device)?, io.f32("traj.sigma", device)?, io.f32("traj.timesteps", device)?);
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for s in 0..noise.dim(0)? {
        let sigma_b = sigma.get(s)?;
        let given = WanInputs { t: Timesteps::from_tensor(&t.get(s)?)?, ..setting.given.clone() };
        let step = Setting { given: &given, ..*setting }.step(&mut network, &noise.get(s)?, &sigma_b)?;
        losses.push(step.loss);
        let norm = network.grads.flat().norm()?;
        norms.push(norm);
        let (master, grads) = (network.params.master(), network.grads.flat());
        optimizer.step(&layout, master, grads, lr, lr, clip_scale(norm, max_norm))?;
    }
    case.check(&format!("{variant} losses"), Tolerance::Abs(1e-5), |line| {
        let recorded = super::line::numbers(io.get(&format!("traj.{variant}.losses"))?)?;
        line.values("losses", &losses, &recorded);
        line.values("losses of the JSON", &losses, &numbers(recipe, "losses")?);
        Ok(())
    });
    case.check(&format!("{variant} gradient norms"), Tolerance::Rel(1e-4), |line| {
        line.values("norms", &norms, &numbers(recipe, "grad_norm_before_clip")?);
        Ok(())
    });
    let last = case.tensors(&format!(".traj_{variant}.final"))?;
    case.check(&format!("{variant} final weights"), Tolerance::Abs(1e-4), |line| {
        let by_name: BTreeMap<String, Tensor> = network.params.named()?.into_iter().collect();
        for (kohya, name) in network.names() {
            line.tensor(&name, &by_name[&name], &last.f32(&kohya, device)?)?;
        }
        let alphas = last.part("").into_iter().filter(|(key, _)| key.ends_with(".alpha")).count();
        line.equal("the number of alphas", &alphas, &layout.sites.len());
        Ok(())
    });
    Ok(())
}

/// The bytes of the file that the program writes for this network, with the recorded metadata.
fn saved(case: &Case<'_>, network: &Network, recorded: &str, dtype: DType) -> Result<Vec<u8>> {
    let layout = network.params.layout();
    let modules: Result<Vec<ModuleOut>> = layout
        .sites
        .iter()
        .zip(&layout.scales)
        .map(|(site, scale)| {
            let adapter = network.params.get(&site.name).with_context(|| format!("no adapter at {}", site.name))?;
            Ok(ModuleOut::of(&site.name, adapter, scale.alpha))
        })
        .collect();
    let mut given = metadata(&case.golden.bytes(recorded)?)?;
    given.retain(|key, _| !key.starts_with("sshs_"));
    let path = std::env::temp_dir().join(format!("wan-train-verify-{}.safetensors", std::process::id()));
    let written = write_lora(&path, &modules?, Form::Kohya, dtype, given).and_then(|()| Ok(std::fs::read(&path)?));
    // Gone or not, the copy in memory counts.
    let _ = std::fs::remove_file(&path);
    written
}

fn metadata(file: &[u8]) -> Result<BTreeMap<String, String>> {
    let (_, header) = safetensors::SafeTensors::read_metadata(file)?;
    Ok(header.metadata().clone().unwrap_or_default().into_iter().collect())
}

/// Key, dtype and shape of every tensor.
fn forms(file: &[u8]) -> Result<BTreeMap<String, String>> {
    let tensors = safetensors::SafeTensors::deserialize(file)?;
    Ok(tensors.iter().map(|(key, t)| (key.to_string(), format!("{:?} {:?}", t.dtype(), t.shape()))).collect())
}

/// What follows the header.
fn body(file: &[u8]) -> Result<&[u8]> {
    let length = u64::from_le_bytes(file.get(..8).context("no header")?.try_into()?);
    file.get(8 + usize::try_from(length)?..).context("no body")
}
