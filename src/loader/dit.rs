//! A DiT from a checkpoint of any form, tensor by tensor: read, merge LoRAs, quantise, hand on. Beside the result no
//! more than the tensor at hand (with its fp32 copies) is ever in memory.
//!
//! Everything that can be wrong with a file is found in its header, before data is read: the task, missing or foreign
//! tensors, shapes, formats of quantisation.

use super::fp8::{codes, dequantize, encode, quantize_in_pieces, scale};
use super::kept::scale_of;
use super::merge::{Added, LoraMerge};
use super::source::{Fetch, Source};
use crate::error::UserError;
use anyhow::{bail, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use wan_kernels::fp8;
use wan_models::arch::WanArch;
use wan_models::keys::{self, Entry};
use wan_models::linear::{Products, Weight};
use wan_models::wan::{BlockWeights, WanWeights};

/// How matrices of the blocks are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Fp8 {
    /// As the file has them (fp8 files stay fp8: that is exact).
    #[default]
    Keep,
    /// e4m3 codes with a scale per 64 weights.
    Scaled,
    /// The plain cast of every tensor, norms and biases too: the old tool's `--fp8_base` alone. Compatibility mode only.
    Cast,
}

/// What to make of a checkpoint.
pub struct LoadOptions<'a> {
    pub arch: &'a WanArch,
    /// The task as the user typed it, for messages.
    pub task: &'a str,
    pub fp8: Fp8,
    /// What the linears of the blocks are multiplied on.
    pub products: Products,
    pub merges: Vec<LoraMerge>,
    /// The blocks' matrices as an earlier load of the same kind made them: see [`super::KeptFp8`].
    pub kept: Option<Box<Source>>,
    pub device: Device,
    /// Dtype of what an fp8 file holds outside its matrices, and of fp8 matrices after a merge: bf16, or fp16 where the
    /// run computes in fp16.
    pub upcast: DType,
}

impl<'a> LoadOptions<'a> {
    /// The weights as the file has them, on the CPU.
    pub fn new(arch: &'a WanArch, task: &'a str) -> Self {
        Self {
            arch,
            task,
            fp8: Fp8::Keep,
            products: Products::Full,
            merges: Vec::new(),
            kept: None,
            device: Device::Cpu,
            upcast: DType::BF16,
        }
    }
}

impl LoadOptions<'_> {
    /// Where the matrix `key` is kept, if it is.
    fn kept_of(&self, key: &str) -> Option<&Source> {
        self.kept.as_deref().filter(|kept| key.ends_with(".weight") && kept.contains(key))
    }
}

/// Bytes of the file read so far, and in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub done: u64,
    pub total: u64,
}

/// Loads a DiT, handing over each block as soon as it is complete, in order: for whoever moves blocks elsewhere. What
/// stands outside the blocks is returned. `progress` is called after each tensor.
pub fn load_dit_by_block(
    source: &Source,
    options: &LoadOptions<'_>,
    progress: &mut dyn FnMut(Progress),
    sink: &mut dyn FnMut(usize, BlockWeights) -> Result<()>,
) -> Result<WanWeights> {
    let table = DitTable::new(source, options.arch, options.task)?;
    let names: BTreeSet<&str> = table.tensors.keys().map(String::as_str).collect();
    for merge in &options.merges {
        merge.check(&names)?;
    }
    #[cfg(feature = "cuda")]
    if let (Some(gpu), true) = (wan_kernels::gpu::Gpu::of(&options.device), options.fp8 != Fp8::Cast) {
        let ahead = super::ahead::Ahead::new(&gpu, table.in_order(source, options))?;
        let fetch = |source: &Source, raw: &str| ahead.fetch(source, raw);
        return ahead.during(|| load_table(&table, source, options, &fetch, progress, sink));
    }
    load_table(&table, source, options, &|_, _| Ok(None), progress, sink)
}

fn load_table(
    table: &DitTable,
    source: &Source,
    options: &LoadOptions<'_>,
    fetch: Fetch,
    progress: &mut dyn FnMut(Progress),
    sink: &mut dyn FnMut(usize, BlockWeights) -> Result<()>,
) -> Result<WanWeights> {
    let bytes_of = |key: &str| match (options.kept_of(key), table.tensors.get(key)) {
        (Some(kept), _) => kept.byte_len(key),
        (None, raw) => raw.and_then(|raw| source.byte_len(raw)),
    };
    let total = table.tensors.keys().filter_map(|key| bytes_of(key)).sum::<usize>() as u64;
    let mut done = 0;
    // The getter's error type has no room for ours: it waits here.
    let mut failed = None;
    let mut get = |key: &str| {
        let result = table.weight(source, options, fetch, key).map_err(|e| match e.is::<UserError>() {
            true => e,
            false => e.context(format!("{}: {key} cannot be loaded", source.path().display())),
        });
        done += bytes_of(key).unwrap_or(0) as u64;
        progress(Progress { done, total });
        let products = if keys::is_quantisable(key) { options.products } else { Products::Full };
        result.and_then(|w| Ok(w.for_products(products)?)).map_err(|e| {
            let what = format!("{e:#}");
            failed = Some(e);
            wan_models::Error::Invalid { model: "wan", what }
        })
    };
    let mut load = || -> Result<WanWeights> {
        let rest = WanWeights::from_getter(options.arch, &mut get)?;
        for i in 0..options.arch.num_layers {
            sink(i, BlockWeights::from_getter(options.arch, i, &mut get)?)?;
        }
        Ok(rest)
    };
    let result = load();
    match failed {
        Some(e) => Err(e),
        None => result,
    }
}

/// A checkpoint's keys under canonical names, checked against an architecture.
#[derive(Debug)]
pub struct DitTable {
    /// Canonical name -> key in the file.
    tensors: BTreeMap<String, String>,
    /// Canonical name of a weight -> key of its scale.
    scales: BTreeMap<String, String>,
    notes: Vec<String>,
}

impl DitTable {
    /// Reads the header only. Errors: not a DiT, another task (named), missing, foreign or misshapen tensors, a
    /// quantisation that cannot be read.
    pub fn new(source: &Source, arch: &WanArch, task: &str) -> Result<Self> {
        let refuse = |what: String, hint: &str| -> anyhow::Error {
            UserError::new(format!("{} cannot be used for {task}: {what}", source.path().display())).hint(hint).into()
        };
        let mut table = DitTable { tensors: BTreeMap::new(), scales: BTreeMap::new(), notes: source.notes().to_vec() };
        let (mut foreign, mut double) = (Vec::new(), None);
        for raw in source.keys() {
            let taken = match keys::classify(raw) {
                Entry::Tensor(name) => table.tensors.insert(name, raw.to_owned()),
                Entry::Scale(weight) => table.scales.insert(weight, raw.to_owned()),
                Entry::Note => {
                    check_quant_format(source, raw)?;
                    None
                }
                Entry::Foreign(_) => {
                    foreign.push(raw.to_owned());
                    None
                }
            };
            if let Some(first) = taken {
                double = Some(format!("{first} and {raw} mean the same tensor"));
            }
        }
        if let Some(what) = double {
            return Err(refuse(what, "use a file that holds one model"));
        }
        let mut shapes = BTreeMap::new();
        for (name, raw) in &table.tensors {
            shapes.insert(name.clone(), source.shape(raw).unwrap_or_default().to_vec());
        }
        if !shapes.contains_key("patch_embedding.weight") {
            let what = what_else(source).unwrap_or("it is not a Wan DiT (patch_embedding.weight is missing)");
            return Err(refuse(what.to_owned(), "give the DiT (diffusion model) file"));
        }
        if let Err(mismatch) = arch.agrees_with(&shapes) {
            let hint = match mismatch.looks_like {
                Some(task) => format!("choose the task these weights are for ({task}), or the weights of this task"),
                None => "use the weights of this task".to_owned(),
            };
            return Err(refuse(mismatch.to_string(), &hint));
        }
        table
            .check_keys(arch, &shapes)
            .map_err(|what| refuse(what, "download the file again, or use another version"))?;
        table.check_foreign(foreign).map_err(|what| {
            refuse(
                what,
                "use the plain model: VACE, Animate, S2V and other variants have layers that cannot be trained here",
            )
        })?;
        Ok(table)
    }

    /// What the user may want to know about the file.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    fn check_keys(&self, arch: &WanArch, shapes: &BTreeMap<String, Vec<usize>>) -> std::result::Result<(), String> {
        let expected = keys::expected(arch);
        let missing: Vec<&str> =
            expected.iter().filter(|e| !shapes.contains_key(&e.key)).map(|e| e.key.as_str()).collect();
        if !missing.is_empty() {
            return Err(format!("{} tensors are missing: {}", missing.len(), compact(&missing)));
        }
        for e in &expected {
            if shapes[&e.key] != e.shape {
                return Err(format!("{} has the shape {:?}, it should be {:?}", e.key, shapes[&e.key], e.shape));
            }
        }
        let known: BTreeSet<&str> = expected.iter().map(|e| e.key.as_str()).collect();
        let extra: Vec<&str> = shapes.keys().map(String::as_str).filter(|k| !known.contains(k)).collect();
        match extra.is_empty() {
            true => Ok(()),
            false => Err(format!("it has {} tensors too many: {}", extra.len(), compact(&extra))),
        }
    }

    /// Tensors of other parts of a combined file (text encoder, VAE) are passed over; layers in the DiT's own place that
    /// no Wan DiT has are not: the model would compute something else without them.
    fn check_foreign(&mut self, foreign: Vec<String>) -> std::result::Result<(), String> {
        let prefix =
            self.tensors.get("patch_embedding.weight").and_then(|raw| raw.strip_suffix("patch_embedding.weight"));
        let prefix = prefix.unwrap_or("");
        let (own, other): (Vec<&str>, Vec<&str>) =
            foreign.iter().map(String::as_str).partition(|k| k.starts_with(prefix));
        if !own.is_empty() {
            return Err(format!("it has {} tensors that no Wan DiT has: {}", own.len(), compact(&own)));
        }
        if !other.is_empty() {
            self.notes.push(format!("{} tensors outside the DiT were passed over ({})", other.len(), compact(&other)));
        }
        Ok(())
    }

    /// Everything that [`Self::weight`] will read, in the order in which it will: weights, their scales, what is merged
    /// into them.
    #[cfg(feature = "cuda")]
    fn in_order<'a>(&'a self, source: &'a Source, options: &'a LoadOptions<'_>) -> Vec<(&'a Source, String)> {
        let mut all = Vec::new();
        for key in keys::expected(options.arch).into_iter().map(|e| e.key) {
            let Some(raw) = self.tensors.get(&key) else { continue };
            if let Some(kept) = options.kept_of(&key) {
                all.push((kept, key.clone()));
                all.push((kept, scale_of(&key)));
                continue;
            }
            let coded = source.dtype(raw) == Some(Dtype::F8_E4M3);
            // Codes of other shapes are decoded on the CPU.
            if !coded || source.shape(raw).is_some_and(|s| s.len() == 2) {
                all.push((source, raw.clone()));
                all.extend(self.scales.get(&key).filter(|_| coded).map(|scale| (source, scale.clone())));
            }
            for lora in options.merges.iter().map(|m| &m.file) {
                let Some(file) = lora.source() else { continue };
                all.extend(lora.keys_for(&key).map(|raw| (file, raw.to_owned())));
            }
        }
        all
    }

    /// Reads one tensor and makes of it what the options say.
    fn weight(&self, source: &Source, options: &LoadOptions<'_>, fetch: Fetch, key: &str) -> Result<Weight> {
        let Some(raw) = self.tensors.get(key) else {
            bail!("{key} is missing");
        };
        let to = |t: Tensor| t.to_device(&options.device);
        let matrix = key.ends_with(".weight") && source.shape(raw).is_some_and(|s| s.len() == 2);
        let quantisable = matrix && keys::is_quantisable(key);

        if let Some(kept) = options.kept_of(key) {
            let codes = codes(kept, key, fetch(kept, key)?)?;
            let scale = scale(kept, &scale_of(key), fetch, codes.device())?;
            return Ok(Weight::scaled(to(codes)?, to(scale)?)?);
        }
        let there = fetch(source, raw)?;
        let beside = there.as_ref().map_or(&Device::Cpu, |t| t.device());
        // Read once: whoever reads ahead gives a tensor away.
        let added = Added::to(key, source.shape(raw).unwrap_or_default(), &options.merges, fetch, beside)?;
        if there.is_none() && quantisable && options.fp8 == Fp8::Scaled {
            if let Some((q, scale)) = quantize_in_pieces(source, raw, added.as_ref())? {
                return Ok(Weight::scaled(to(q)?, to(scale)?)?);
            }
        }
        let coded = source.dtype(raw) == Some(Dtype::F8_E4M3);
        let base = match there {
            _ if coded => {
                let codes = codes(source, raw, there)?;
                let stored = self.scales.get(key).map(|key| scale(source, key, fetch, codes.device())).transpose()?;
                if matrix && added.is_none() && (quantisable || options.fp8 == Fp8::Cast) {
                    return Ok(match (options.fp8, stored) {
                        (Fp8::Cast, None) => Weight::cast(to(codes)?)?,
                        // Without a scale the codes are the values, which any 16-bit dtype holds exactly.
                        (_, None) => Weight::scaled(to(codes)?, to(Tensor::ones((), options.upcast, &Device::Cpu)?)?)?,
                        (_, Some(scale)) => Weight::scaled(to(codes)?, to(scale)?)?,
                    });
                }
                dequantize(&codes, stored)?
            }
            Some(there) => there,
            None => match source.read(raw, &Device::Cpu)? {
                t if t.dtype() == DType::F64 => t.to_dtype(DType::F32)?,
                t => t,
            },
        };
        let base = added.map(|added| added.sum(&base)).transpose()?.unwrap_or(base);
        // Rounded once, behind the sum.
        let base = if coded { base.to_dtype(options.upcast)? } else { base };
        match options.fp8 {
            Fp8::Scaled if quantisable => {
                let q = fp8::Weight::quantize(&base, fp8::Granularity::Block)?;
                Ok(Weight::scaled(to(q.codes_oi().clone())?, to(q.scale().clone())?)?)
            }
            Fp8::Cast => {
                let codes = encode(&base)?;
                match matrix {
                    true => Ok(Weight::cast(to(codes)?)?),
                    false => Ok(Weight::Dense(to(dequantize(&codes, None)?.to_dtype(options.upcast)?)?)),
                }
            }
            _ => Ok(Weight::Dense(to(base)?)),
        }
    }
}

/// The newer ComfyUI files say in a small JSON text how each layer is quantised.
pub(super) fn check_quant_format(source: &Source, raw: &str) -> Result<()> {
    if !raw.ends_with(".comfy_quant") {
        return Ok(());
    }
    let json: serde_json::Value = serde_json::from_slice(&source.bytes(raw)?).unwrap_or_default();
    match json.get("format").and_then(|f| f.as_str()) {
        Some("float8_e4m3fn") | None => Ok(()),
        Some(other) => Err(UserError::new(format!(
            "{} cannot be used: its layers are quantised as {other}, which is not supported",
            source.path().display()
        ))
        .hint("use the fp16, bf16 or fp8 (e4m3) version of this model")
        .into()),
    }
}

/// What a file is that is no DiT, if it is something people mix up with one.
fn what_else(source: &Source) -> Option<&'static str> {
    let any = |words: &[&str]| source.keys().any(|k| words.iter().any(|w| k.contains(w)));
    if any(&["lora_down", "lora_up", "lora_A", "lora_B", "hada_w1", "lokr_w"]) {
        return Some("it is a LoRA, not a model");
    }
    if any(&["decoder.conv1.", "decoder.upsamples.", "decoder.conv_in."]) {
        return Some("it is a VAE, not a DiT");
    }
    if any(&["token_embedding.weight", "shared.weight", "SelfAttention"]) {
        return Some("it is a text encoder, not a DiT");
    }
    any(&["visual.transformer.", "vision_model.encoder."]).then_some("it is a CLIP model, not a DiT")
}

/// Many keys in few words: `blocks.0-39.cross_attn.k_img.weight (40), head.modulation`.
pub fn compact(keys: &[&str]) -> String {
    let mut groups: Vec<(String, Vec<usize>)> = Vec::new();
    for key in keys {
        let parts: Vec<&str> = key.split('.').collect();
        let number = parts.iter().position(|p| p.parse::<usize>().is_ok());
        // Only the block number is folded: the first number behind a word that says so.
        let number = number.filter(|i| *i > 0 && (parts[i - 1].ends_with("blocks") || parts[i - 1].ends_with("block")));
        let (pattern, index) = match number {
            Some(i) => {
                let mut p = parts.clone();
                p[i] = "*";
                (p.join("."), parts[i].parse().ok())
            }
            None => (key.to_string(), None),
        };
        match groups.iter_mut().find(|(p, _)| *p == pattern) {
            Some((_, indices)) => indices.extend(index),
            None => groups.push((pattern, index.into_iter().collect())),
        }
    }
    const SHOWN: usize = 5;
    let name = |(pattern, indices): &(String, Vec<usize>)| match indices.as_slice() {
        [] => pattern.clone(),
        [one] => pattern.replacen('*', &one.to_string(), 1),
        many => {
            let (low, high) = (many.iter().min().unwrap_or(&0), many.iter().max().unwrap_or(&0));
            format!("{} ({})", pattern.replacen('*', &format!("{low}-{high}"), 1), many.len())
        }
    };
    let mut text = groups.iter().take(SHOWN).map(name).collect::<Vec<_>>().join(", ");
    if groups.len() > SHOWN {
        text += &format!(" and {} more kinds", groups.len() - SHOWN);
    }
    text
}

/// The dtype of a checkpoint, by the tensor that decides it everywhere: `blocks.0.cross_attn.k.weight`.
pub fn checkpoint_dtype(source: &Source) -> Option<Dtype> {
    source
        .keys()
        .find(|k| keys::canonical(k).as_deref() == Some("blocks.0.cross_attn.k.weight"))
        .and_then(|k| source.dtype(k))
}

/// Holds the checkpoint's dtype against `--mixed_precision`. Weights of one 16-bit kind can be computed with in the
/// other at some loss, which is worth a note; the old tool refused it, and so does compatibility mode.
pub fn check_precision(source: &Source, mixed_precision: &str, compat: bool) -> Result<Option<String>> {
    let (dtype, wants) = match checkpoint_dtype(source) {
        Some(Dtype::F16) => ("fp16", "fp16"),
        Some(Dtype::BF16) => ("bf16", "bf16"),
        _ => return Ok(None),
    };
    if mixed_precision == wants || mixed_precision == "no" {
        return Ok(None);
    }
    let what =
        format!("{} is a {dtype} checkpoint and --mixed_precision is {mixed_precision}", source.path().display());
    if compat {
        return Err(UserError::new(what).hint(format!("use --mixed_precision {wants} or no")).into());
    }
    Ok(Some(format!("{what}: its weights are converted for each product, which loses a little; {wants} would not")))
}
