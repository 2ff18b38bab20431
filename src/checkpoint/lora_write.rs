//! Writing LoRA files, and converting one form into another.

use super::lora_file::LoraFile;
use super::lora_keys::Form;
use super::metadata;
use crate::error::UserError;
use crate::fsio::{self, TensorOut};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;
use wan_models::adapter::Adapter;

/// One module of a LoRA to write.
#[derive(Debug, Clone)]
pub struct ModuleOut {
    /// `blocks.0.self_attn.q`
    pub site: String,
    /// Suffix (`lora_down.weight`, `hada_w1_a`, …) and master.
    pub params: Vec<(&'static str, Tensor)>,
    pub alpha: f64,
}

impl ModuleOut {
    /// An adapter as the models know it.
    pub fn of(site: &str, adapter: &Adapter, alpha: f64) -> Self {
        let params = adapter.params().into_iter().map(|(s, t)| (s, t.clone())).collect();
        Self { site: site.to_owned(), params, alpha }
    }
}

/// The dtype of `--save_precision` (fp32 where it is not given).
pub fn save_dtype(save_precision: Option<&str>) -> Result<DType> {
    match save_precision {
        None | Some("fp32" | "float32" | "float") => Ok(DType::F32),
        Some("fp16" | "float16") => Ok(DType::F16),
        Some("bf16" | "bfloat16") => Ok(DType::BF16),
        Some(other) => Err(UserError::usage(format!("--save_precision {other} is not known"))
            .hint("use fp32, fp16 or bf16")
            .into()),
    }
}

/// Writes a LoRA atomically: every tensor, alphas too, in `dtype`; the hashes are added to `metadata`. Equal input gives
/// equal bytes.
///
/// Errors: numbers that are not finite, or too large for fp16 (named); the disk.
pub fn write_lora(
    path: &Path,
    modules: &[ModuleOut],
    form: Form,
    dtype: DType,
    mut metadata: BTreeMap<String, String>,
) -> Result<()> {
    let mut outs = Vec::with_capacity(modules.len() * 3);
    for m in modules {
        for (suffix, master) in &m.params {
            outs.push(TensorOut::of(form.key(&m.site, suffix), &finite(path, &m.site, master, dtype)?)?);
        }
        let alpha = Tensor::new(m.alpha as f32, &Device::Cpu)?.to_dtype(dtype)?;
        outs.push(TensorOut::of(form.key(&m.site, "alpha"), &alpha)?);
    }
    metadata::add_hashes(&mut metadata, &mut outs)?;
    fsio::write_safetensors(path, outs, &metadata)
}

/// The tensor in its saved dtype, on the CPU; refused where a number did not survive.
fn finite(path: &Path, site: &str, master: &Tensor, dtype: DType) -> Result<Tensor> {
    let magnitude = |t: &Tensor| -> Result<f32> {
        if t.elem_count() == 0 {
            return Ok(0.0);
        }
        // A NaN anywhere makes the sum NaN; an infinity stays one.
        Ok(t.to_dtype(DType::F32)?.abs()?.flatten_all()?.sum(0)?.to_scalar::<f32>()?)
    };
    let master = master.to_device(&Device::Cpu)?;
    let saved = master.to_dtype(dtype)?;
    if magnitude(&saved)?.is_finite() {
        return Ok(saved);
    }
    let (what, hint) = match magnitude(&master)?.is_finite() {
        true => ("a weight too large for fp16", "save with --save_precision bf16 or fp32"),
        false => (
            "a weight that is not a number",
            "training has diverged: resume from an earlier checkpoint with a lower learning rate",
        ),
    };
    Err(UserError::new(format!("{} was not written: {site} has {what}", path.display())).hint(hint).into())
}

/// What a conversion does besides renaming.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Convert {
    pub form: Form,
    /// Multiply alpha / rank into both factors of a LoRA and drop the alpha, as the old converter does. LoHa and LoKr
    /// keep theirs.
    pub fold_alpha: bool,
}

/// Converts a LoRA file into another form. Dtypes and metadata are kept, hashes made anew. A missing alpha stays
/// missing in the ComfyUI form (it means scale 1) and becomes the rank in kohya's, whose readers need one. The diffusers
/// form has no alpha: where it is not the rank, alpha / rank goes into the up factor, which is exact if that is a power
/// of two.
/// Whole differences (`.diff`) have a name in the ComfyUI form only, LoHa and LoKr none in the diffusers form: errors.
pub fn convert(input: &Path, output: &Path, how: Convert) -> Result<()> {
    let file = LoraFile::open(input)?;
    let mut outs = Vec::new();
    let names: Vec<String> = file.modules().map(str::to_owned).collect();
    for name in names {
        let Some(module) = file.module(&name)? else { continue };
        let is_lora = module.factors.contains_key("lora_down.weight");
        let fold = how.fold_alpha && is_lora;
        let diffusers = how.form == Form::Diffusers;
        if diffusers && !is_lora {
            return Err(UserError::new(format!(
                "{} cannot be converted: {name} is no LoRA, and the diffusers form has no names for other kinds",
                input.display()
            ))
            .hint("keep it in the ComfyUI form, or make a LoRA of it with `wan-train lora resize`")
            .into());
        }
        let factor = |suffix: &str| match (fold, diffusers) {
            (true, _) => module.scale().sqrt(),
            (false, true) if suffix == "lora_up.weight" => module.scale(),
            _ => 1.0,
        };
        let mut dtype = DType::F32;
        for (suffix, t) in &module.factors {
            dtype = t.dtype();
            let factor = factor(suffix);
            let t = match factor == 1.0 {
                true => t.clone(),
                false => t.to_dtype(DType::F32)?.affine(factor, 0.0)?.to_dtype(dtype)?,
            };
            outs.push(TensorOut::of(how.form.key(&name, suffix), &t)?);
        }
        let alpha = match (module.alpha, module.rank(), how.form) {
            _ if fold || diffusers => None,
            (Some(alpha), ..) => Some(alpha),
            (None, Some(rank), Form::Kohya) => Some(rank as f64),
            (None, ..) => None,
        };
        if let Some(alpha) = alpha {
            let alpha = Tensor::new(alpha as f32, &Device::Cpu)?.to_dtype(dtype)?;
            outs.push(TensorOut::of(how.form.key(&name, "alpha"), &alpha)?);
        }
    }
    for tensor in file.diffs().map(str::to_owned).collect::<Vec<_>>() {
        if how.form != Form::Comfy {
            let form = if how.form == Form::Kohya { "kohya's form" } else { "the diffusers form" };
            return Err(UserError::new(format!(
                "{} cannot be converted: it changes {tensor} as a whole, for which {form} has no name",
                input.display()
            ))
            .hint("keep it in the ComfyUI form")
            .into());
        }
        let Some(diff) = file.diff(&tensor)? else { continue };
        let key = match (tensor.strip_suffix(".weight"), tensor.strip_suffix(".bias")) {
            (Some(m), _) => format!("diffusion_model.{m}.diff"),
            (_, Some(m)) => format!("diffusion_model.{m}.diff_b"),
            _ => format!("diffusion_model.{tensor}.diff"),
        };
        outs.push(TensorOut::of(key, &diff)?);
    }
    let mut metadata = file.metadata().clone();
    metadata::add_hashes(&mut metadata, &mut outs)?;
    fsio::write_safetensors(output, outs, &metadata)
}
