//! The tensors of a model other than the DiT under the names that the model asks for.

use super::dit::check_quant_format;
use super::fp8::{dequantize, scale_tensor};
use super::part::Reading;
use super::source::Source;
use crate::error::UserError;
use anyhow::Result;
use candle_core::{Device, Tensor};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::Path;

/// A checkpoint seen through a map of names. fp8 weights with a scale come out as fp32 numbers.
#[derive(Debug)]
pub struct Keyed {
    source: Source,
    model: &'static str,
    /// The model's name -> key in the file.
    names: BTreeMap<String, String>,
    /// The model's name of a weight -> key of its scale.
    scales: BTreeMap<String, String>,
}

impl Keyed {
    /// Opens `path`, to be read as `reading` says, for the model called `model` in messages (with its article: "the VAE"). `name` gives the model's own name for a key of the file,
    /// or `None` for keys that are not the model's; it may keep suffixes such as `.scale_weight`.
    ///
    /// Errors: those of [`Source::open`]; a file in which nothing has a name; a quantisation that cannot be read.
    pub fn open(
        path: &Path,
        reading: Reading,
        model: &'static str,
        name: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        Self::of(Source::open_by(path, reading)?, model, name)
    }

    /// The same for a file already open.
    pub fn of(source: Source, model: &'static str, name: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let (mut names, mut scales) = (BTreeMap::new(), BTreeMap::new());
        for raw in source.keys() {
            check_quant_format(&source, raw)?;
            let Some(ours) = name(raw) else { continue };
            if let Some(module) = [".scale_weight", ".weight_scale"].iter().find_map(|s| ours.strip_suffix(s)) {
                scales.insert(format!("{module}.weight"), raw.to_owned());
            } else if [".scale_input", ".input_scale", ".comfy_quant"].iter().all(|s| !ours.ends_with(s)) {
                // Tied tensors are stored twice by some programs (`shared.weight`, `embed_tokens.weight`): one will do.
                names.entry(ours).or_insert_with(|| raw.to_owned());
            }
        }
        if names.is_empty() {
            return Err(UserError::new(format!(
                "{} cannot be used as {model}: it has none of its tensors",
                source.path().display()
            ))
            .hint(format!("give the file of {model}"))
            .into());
        }
        Ok(Self { source, model, names, scales })
    }

    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The model's names, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    pub fn shape(&self, key: &str) -> Option<Vec<usize>> {
        self.names.get(key).and_then(|raw| self.source.shape(raw)).map(<[usize]>::to_vec)
    }

    /// Reads one tensor; `None` where the file has none of that name.
    pub fn try_get(&self, key: &str, device: &Device) -> Result<Option<Tensor>> {
        let Some(raw) = self.names.get(key) else { return Ok(None) };
        let tensor = match (self.source.dtype(raw), self.scales.get(key)) {
            (Some(Dtype::F8_E4M3), Some(scale)) => {
                let codes = Tensor::from_vec(
                    self.source.bytes(raw)?,
                    self.source.shape(raw).unwrap_or_default(),
                    &Device::Cpu,
                )?;
                dequantize(&codes, Some(scale_tensor(&self.source, scale)?.to_dtype(candle_core::DType::F32)?))?
            }
            _ => self.source.read(raw, &Device::Cpu)?,
        };
        Ok(Some(tensor.to_device(device)?))
    }

    /// Reads one tensor that must exist.
    pub fn get(&self, key: &str, device: &Device) -> Result<Tensor> {
        self.try_get(key, device)?.ok_or_else(|| {
            let path = self.source.path().display();
            UserError::new(format!("{path} cannot be used as {}: {key} is missing", self.model))
                .hint("download the file again, and compare its size with the one shown where it came from")
                .into()
        })
    }

    /// Some rows of a matrix, without reading the others.
    pub fn rows(&self, key: &str, rows: &[u32], device: &Device) -> Result<Tensor> {
        match self.names.get(key) {
            Some(raw) if !self.scales.contains_key(key) => self.source.read_rows(raw, rows, device),
            _ => {
                let index = Tensor::new(rows, device)?;
                Ok(self.get(key, device)?.index_select(&index, 0)?)
            }
        }
    }
}

/// Names of a Wan VAE (2.1 and 2.2): official, with or without the prefix of a combined file.
pub fn vae_name(key: &str) -> Option<String> {
    let bare = strip(key, &["first_stage_model.", "vae.", "model.", "module."]);
    ["encoder.", "decoder.", "conv1.", "conv2."].iter().any(|p| bare.starts_with(p)).then(|| bare.to_owned())
}

/// Names of the CLIP vision tower, official (`visual.…`) or of transformers (`vision_model.…`). The text tower has none.
pub fn clip_name(key: &str) -> Option<String> {
    let bare = strip(key, &["clip_vision.", "image_encoder.", "model.", "module."]);
    let known = ["visual.", "vision_model.", "visual_projection."];
    known.iter().any(|p| bare.starts_with(p)).then(|| bare.to_owned())
}

fn strip<'a>(mut key: &'a str, prefixes: &[&str]) -> &'a str {
    while let Some(rest) = prefixes.iter().find_map(|p| key.strip_prefix(p)) {
        key = rest;
    }
    key
}
