//! What a LoRA file holds.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde_json::{json, Value};

use super::low_rank::{factors, frobenius};
use crate::checkpoint::{Form, LoraFile, LoraModule};

/// One module, as the list shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub module: String,
    pub kind: &'static str,
    pub rank: Option<usize>,
    pub alpha: Option<f64>,
    /// alpha / rank; 1 without an alpha.
    pub scale: f64,
    pub dtype: String,
    /// `[o, i]` of the weight it adapts.
    pub shape: [usize; 2],
    /// ‖ΔW‖_F at strength 1.
    pub norm: f64,
}

/// The kind of one module's adapter.
pub fn kind(module: &LoraModule) -> &'static str {
    match module.factors.keys().next() {
        Some(k) if k.starts_with("hada") => "LoHa",
        Some(k) if k.starts_with("lokr") => "LoKr",
        _ => "LoRA",
    }
}

/// Describes every module. Norms of LoRA are worked out from their factors; other kinds are multiplied out one at a time.
pub fn rows(file: &LoraFile) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for name in file.modules() {
        let Some(module) = file.module(name)? else { continue };
        let (norm, shape) = match factors(&module)? {
            Some(f) => {
                // ‖BA‖² is the sum of (BᵀB) ∘ (AAᵀ).
                let gram = (f.up.t()?.matmul(&f.up)? * f.down.matmul(&f.down.t()?)?)?;
                let square: f64 = gram.to_dtype(candle_core::DType::F64)?.sum_all()?.to_scalar()?;
                (square.max(0.0).sqrt() * module.scale().abs(), [f.up.dims()[0], f.down.dims()[1]])
            }
            None => {
                let delta = module.delta()?;
                (frobenius(&delta)?, [delta.dims()[0], delta.dims()[1]])
            }
        };
        rows.push(Row {
            module: name.to_owned(),
            kind: kind(&module),
            rank: module.rank(),
            alpha: module.alpha,
            scale: module.scale(),
            dtype: module.factors.values().next().map(|t| t.dtype().as_str().to_owned()).unwrap_or_default(),
            shape,
            norm,
        });
    }
    Ok(rows)
}

pub fn form_name(form: Form) -> &'static str {
    match form {
        Form::Comfy => "comfyui",
        Form::Kohya => "kohya",
        Form::Diffusers => "diffusers",
    }
}

/// Different values in order, few in full and many as a range.
fn spread(values: impl Iterator<Item = String>) -> String {
    let all: BTreeSet<String> = values.collect();
    match all.len() {
        0 => "none".into(),
        1..=6 => all.into_iter().collect::<Vec<_>>().join(", "),
        n => format!("{n} different"),
    }
}

/// The head of the listing: facts in a few lines, then the metadata.
pub fn summary(file: &LoraFile, rows: &[Row], bytes: u64) -> String {
    let blocks: BTreeSet<&str> = rows.iter().filter_map(|r| r.module.split('.').nth(1)).collect();
    let inner = |r: &Row| r.module.splitn(3, '.').nth(2).unwrap_or(&r.module).to_owned();
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    rows.iter().for_each(|r| *kinds.entry(r.kind).or_default() += 1);
    let kinds: Vec<String> = kinds.iter().map(|(k, n)| format!("{n} {k}")).collect();
    let number = |x: f64| format!("{x}");
    let total = rows.iter().map(|r| r.norm * r.norm).sum::<f64>().sqrt();
    let mut text = format!(
        "file:      {}\nsize:      {}\nkeys:      {} form\nmodules:   {} in {} blocks ({})\ntargets:   {}\n\
         rank:      {}\nalpha:     {}\nscale:     {}\ndtype:     {}\nupdate:    Frobenius norm {total:.4} over all modules\n",
        file.path().display(),
        crate::fsio::human(bytes),
        form_name(file.form()),
        rows.len(),
        blocks.len(),
        kinds.join(", "),
        spread_of(rows.iter().map(inner)),
        spread(rows.iter().map(|r| r.rank.map_or("full".into(), |n| format!("{n}")))),
        spread(rows.iter().map(|r| r.alpha.map_or("none (scale 1)".into(), number))),
        spread(rows.iter().map(|r| number(r.scale))),
        spread(rows.iter().map(|r| r.dtype.clone())),
    );
    let diffs = file.diffs().count();
    if diffs > 0 {
        text.push_str(&format!("whole:     {diffs} tensors are changed as a whole (.diff)\n"));
    }
    text
}

fn spread_of(values: impl Iterator<Item = String>) -> String {
    values.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ")
}

/// Everything as one JSON object.
pub fn to_json(file: &LoraFile, rows: &[Row], bytes: u64) -> Value {
    let modules: Vec<Value> = rows
        .iter()
        .map(|r| {
            json!({
                "module": r.module, "kind": r.kind, "rank": r.rank, "alpha": r.alpha, "scale": r.scale,
                "dtype": r.dtype, "shape": r.shape, "norm": r.norm,
            })
        })
        .collect();
    json!({
        "file": file.path(), "bytes": bytes, "form": form_name(file.form()), "modules": modules,
        "diffs": file.diffs().collect::<Vec<_>>(), "metadata": file.metadata(),
    })
}
