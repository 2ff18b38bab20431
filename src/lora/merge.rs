//! Sums: several LoRAs as one, or LoRAs added to a DiT.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Tensor};
use safetensors::Dtype;
use wan_models::keys;

use super::low_rank::{factors, module_out, reduce_matrix, reduce_product, Cut, LowRank, Reduced};
use crate::checkpoint::{LoraFile, ModuleOut};
use crate::error::UserError;
use crate::fsio::{self, TensorOut, TensorSpec};
use crate::loader::{merge_into, DitValues, LoraMerge, Source};
use crate::report::{Progress, Work};

/// A sum of LoRAs.
#[derive(Debug, Default)]
pub struct Sum {
    pub modules: Vec<ModuleOut>,
    /// What was lost, by module; empty where nothing was cut.
    pub cuts: Vec<(String, Reduced)>,
}

/// The sum of several LoRAs, each times its strength. Without a cut the sum is exact: factors are put side by side, and
/// the rank is the sum of the ranks. With one, each module is brought down to it; what was lost comes back beside.
///
/// Errors: a LoHa or LoKr without a cut (it has no factors to put side by side), updates of different shapes, `.diff`.
pub fn sum(merges: &[LoraMerge], cut: Option<Cut>) -> Result<Sum> {
    for merge in merges {
        super::no_differences(&merge.file, "merged")?;
    }
    let names: BTreeSet<&str> = merges.iter().flat_map(|m| m.file.modules()).collect();
    let mut all = Sum::default();
    for name in names {
        let reduced = match (stacked(name, merges)?, cut) {
            (Ok(product), None) => {
                all.modules.push(module_out(name, &product));
                continue;
            }
            (Ok(product), Some(cut)) => reduce_product(&product, 1.0, cut)?,
            (Err(dense), Some(cut)) => reduce_matrix(&dense()?, cut, 0)?,
            (Err(_), None) => {
                return Err(UserError::usage(format!(
                    "{name} is a LoHa or LoKr in one of the files, and has no factors to add"
                ))
                .hint("give the rank of the result with --dim N")
                .into())
            }
        };
        all.modules.push(reduced.module(name));
        all.cuts.push((name.to_owned(), reduced));
    }
    Ok(all)
}

type Dense<'a> = Box<dyn FnOnce() -> Result<Tensor> + 'a>;

/// One module's sum as a product of wider factors, or else a way to work out the matrix.
fn stacked<'a>(name: &'a str, merges: &'a [LoraMerge]) -> Result<Result<LowRank, Dense<'a>>> {
    let (mut ups, mut downs) = (Vec::new(), Vec::new());
    for merge in merges {
        let Some(module) = merge.file.module(name)? else { continue };
        let Some(LowRank { up, down }) = factors(&module)? else {
            return Ok(Err(Box::new(move || dense(name, merges))));
        };
        ups.push(up.affine(module.scale() * merge.strength, 0.0)?);
        downs.push(down);
    }
    let (o, i) = (ups[0].dims()[0], downs[0].dims()[1]);
    if ups.iter().any(|u| u.dims()[0] != o) || downs.iter().any(|d| d.dims()[1] != i) {
        return Err(other_shapes(name, merges));
    }
    Ok(Ok(LowRank { up: Tensor::cat(&ups, 1)?, down: Tensor::cat(&downs, 0)? }))
}

fn dense(name: &str, merges: &[LoraMerge]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for merge in merges {
        let Some(module) = merge.file.module(name)? else { continue };
        let delta = module.delta()?.affine(merge.strength, 0.0)?;
        sum = Some(match sum {
            None => delta,
            Some(s) if s.dims() == delta.dims() => (s + delta)?,
            Some(_) => return Err(other_shapes(name, merges)),
        });
    }
    sum.ok_or_else(|| anyhow::anyhow!("{name} is in none of the files"))
}

fn other_shapes(name: &str, merges: &[LoraMerge]) -> anyhow::Error {
    let files: Vec<String> = merges.iter().map(|m| m.file.path().display().to_string()).collect();
    UserError::new(format!("{} cannot be merged: {name} has another size in each", files.join(" and ")))
        .hint("merge LoRAs of one base model")
        .into()
}

/// Adds LoRAs to a DiT, tensor by tensor, into a new file; sums are formed in fp32 and rounded once, to the tensor's dtype.
/// What no LoRA touches is copied byte for byte, and keys stay as the file has them. An fp8 model comes out in 16 bits as a
/// whole, since fp8 would lose most of what is added: its matrices in `precision` (by itself the file's 16-bit dtype), its
/// scales left out.
///
/// Returns how many tensors changed. Errors: a target that the DiT lacks, a model that cannot be read, `precision` for a
/// model that is not fp8, sums that are not finite, the disk.
pub fn into_dit(
    dit: &Source,
    merges: &[LoraMerge],
    output: &Path,
    precision: Option<DType>,
    progress: &dyn Progress,
) -> Result<usize> {
    let values = DitValues::new(dit)?;
    if precision.is_some() && !values.any_fp8() {
        let what = format!("{} is no fp8 model and keeps its own dtype", dit.path().display());
        return Err(UserError::usage(what).hint("leave --save_precision out").into());
    }
    let names: BTreeSet<&str> = values.names().collect();
    for merge in merges {
        merge.check(&names)?;
    }
    let wide = precision.unwrap_or_else(|| values.half());
    let mut specs = Vec::new();
    for key in dit.keys().filter(|key| !values.is_about_fp8(key)) {
        let dtype = match keys::canonical(key).is_some_and(|name| values.is_fp8(&name)) {
            true => stored_as(wide),
            false => dit.dtype(key).unwrap_or(Dtype::F32),
        };
        specs.push(TensorSpec { name: key.to_owned(), dtype, shape: dit.shape(key).unwrap_or_default().to_vec() });
    }
    let bytes = specs.iter().map(|s| s.bytes() as u64).sum();
    fsio::require_space(output, bytes, &format!("the merged model {}", output.display()))?;
    let mut metadata = dit.metadata().clone();
    if values.any_fp8() {
        metadata.remove(QUANTIZATION);
    }
    let record: Vec<serde_json::Value> = merges
        .iter()
        .map(|m| {
            let name = m.file.path().file_name().map(|n| n.to_string_lossy().into_owned());
            serde_json::json!({ "file": name, "strength": m.strength })
        })
        .collect();
    metadata.insert("wan_train.merged".into(), serde_json::Value::Array(record).to_string());
    let mut task = progress.begin(Work { what: "merging", unit: "tensor", start: 0, total: specs.len() as u64 });
    let mut changed = 0;
    fsio::write_streamed(output, specs, &metadata, &mut |spec| {
        task.advance(1, &spec.name);
        let Some(name) = keys::canonical(&spec.name) else { return dit.bytes(&spec.name) };
        let (fp8, touched) = (values.is_fp8(&name), merges.iter().any(|m| m.touches(&name)));
        if !fp8 && !touched {
            return dit.bytes(&spec.name);
        }
        let base = values.read(&name)?;
        let sum = merge_into(&base, &name, merges)?.unwrap_or(base);
        let sum = if fp8 { sum.to_dtype(wide)? } else { sum };
        if !sum.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Err(UserError::new(format!("{name} would not be finite in the merged model"))
                .hint("lower --weights, or use the bf16 file of this model")
                .into());
        }
        changed += usize::from(touched);
        Ok(TensorOut::of(&spec.name, &sum)?.data.into_owned())
    })?;
    Ok(changed)
}

/// What newer ComfyUI files say in their header about quantised layers.
const QUANTIZATION: &str = "_quantization_metadata";

fn stored_as(dtype: DType) -> Dtype {
    match dtype {
        DType::F16 => Dtype::F16,
        DType::F32 => Dtype::F32,
        _ => Dtype::BF16,
    }
}

/// Opens the files with their strengths; one weight for all, or one each.
pub fn open(files: &[std::path::PathBuf], weights: &[f64]) -> Result<Vec<LoraMerge>> {
    if weights.len() > 1 && weights.len() != files.len() {
        return Err(UserError::usage(format!("{} weights for {} files", weights.len(), files.len()))
            .hint("give one weight for all files, or one for each")
            .into());
    }
    if let Some(w) = weights.iter().find(|w| !w.is_finite()) {
        return Err(UserError::usage(format!("--weights {w} is not a number")).into());
    }
    let strength = |i: usize| match weights {
        [] => 1.0,
        [all] => *all,
        each => each[i],
    };
    files.iter().enumerate().map(|(i, f)| Ok(LoraMerge { file: LoraFile::open(f)?, strength: strength(i) })).collect()
}
