//! The numbers of a DiT's tensors, in whatever form they are stored: 16 and 32 bits, plain fp8, fp8 with scales. For work
//! on whole models that needs no architecture (merging, extracting).

use super::dit::check_quant_format;
use super::fp8::{dequantize, scale_tensor};
use super::source::Source;
use crate::error::UserError;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use wan_kernels::fp8::Granularity;
use wan_models::keys::{self, Entry};

/// A checkpoint's DiT by canonical names; other tensors of the file are not its business.
#[derive(Debug)]
pub struct DitValues<'a> {
    source: &'a Source,
    /// Canonical name -> key in the file.
    tensors: BTreeMap<String, String>,
    /// Canonical name of a weight -> key of its scale.
    scales: BTreeMap<String, String>,
    /// Keys that only say how the DiT is quantised, scales included.
    about_fp8: BTreeSet<String>,
}

impl<'a> DitValues<'a> {
    /// Reads the header only. Errors: no tensor of a Wan DiT, two keys for one tensor, a dtype that is none of fp32, fp16,
    /// bf16 and fp8, fp8 matrices of which some have a scale and some have none, a scale that fits no weight.
    pub fn new(source: &'a Source) -> Result<Self> {
        let (mut tensors, mut scales, mut about_fp8) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        let refuse = |what: String, hint: &str| -> anyhow::Error {
            UserError::new(format!("{} cannot be read as a model: {what}", source.path().display())).hint(hint).into()
        };
        for raw in source.keys() {
            let taken = match keys::classify(raw) {
                Entry::Tensor(name) => tensors.insert(name, raw.to_owned()),
                Entry::Scale(weight) => {
                    about_fp8.insert(raw.to_owned());
                    scales.insert(weight, raw.to_owned())
                }
                Entry::Note => {
                    check_quant_format(source, raw)?;
                    about_fp8.insert(raw.to_owned());
                    None
                }
                Entry::Foreign(_) => None,
            };
            if let Some(first) = taken {
                return Err(refuse(
                    format!("{first} and {raw} mean the same tensor"),
                    "use a file that holds one model",
                ));
            }
        }
        if tensors.is_empty() {
            return Err(UserError::new(format!(
                "{} is no Wan DiT: none of its tensors is known",
                source.path().display()
            ))
            .hint("give the DiT (diffusion model) file")
            .into());
        }
        for raw in tensors.values() {
            let dtype = source.dtype(raw).unwrap_or(Dtype::U8);
            if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) && !is_fp8(dtype) {
                let what = format!("{raw} is stored as {dtype:?}");
                return Err(refuse(what, "use the fp32, fp16, bf16 or fp8 file of this model"));
            }
        }
        let values = Self { source, tensors, scales, about_fp8 };
        values
            .check_scales()
            .map_err(|what| refuse(what, "download the file again, or use the fp16 or bf16 version"))?;
        Ok(values)
    }

    /// A scale belongs to an fp8 matrix whose shape it fits; where one matrix has a scale, all have.
    fn check_scales(&self) -> std::result::Result<(), String> {
        let shape = |raw: &str| self.source.shape(raw).unwrap_or_default();
        for (weight, scale) in &self.scales {
            let Some(raw) = self.tensors.get(weight).filter(|_| self.is_fp8(weight)) else {
                return Err(format!("{scale} belongs to no fp8 weight"));
            };
            let dims = shape(scale);
            let fits = match *shape(raw) {
                [o, i] => {
                    let known =
                        [Granularity::Block, Granularity::Channel, Granularity::Tensor].map(|g| g.scale_shape([o, i]));
                    known.iter().any(|k| k == dims) || matches!(dims, [] | [1, 1]) || dims == [o]
                }
                _ => dims.iter().product::<usize>() == 1,
            };
            if !fits {
                return Err(format!(
                    "{scale} has the shape {dims:?}, which scales no weight of shape {:?}",
                    shape(raw)
                ));
            }
        }
        let bare = |(name, raw): &(&String, &String)| {
            self.is_fp8(name) && shape(raw).len() == 2 && !self.scales.contains_key(*name)
        };
        match self.tensors.iter().find(bare) {
            Some((_, raw)) if !self.scales.is_empty() => {
                Err(format!("{raw} is stored in fp8 without a scale, and other weights have one"))
            }
            _ => Ok(()),
        }
    }

    /// Canonical names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.source.shape(self.tensors.get(name)?)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether a tensor is stored in 8 bits.
    pub fn is_fp8(&self, name: &str) -> bool {
        self.tensors.get(name).and_then(|raw| self.source.dtype(raw)).is_some_and(is_fp8)
    }

    /// Whether any tensor is.
    pub fn any_fp8(&self) -> bool {
        self.names().any(|name| self.is_fp8(name))
    }

    /// Whether a key of the file says how fp8 weights are to be read, and nothing else.
    pub fn is_about_fp8(&self, raw: &str) -> bool {
        self.about_fp8.contains(raw)
    }

    /// The 16-bit dtype that goes with what the file holds beside fp8: fp16 where that is the only one, else bf16.
    pub fn half(&self) -> DType {
        let has = |dtype| self.tensors.values().any(|raw| self.source.dtype(raw) == Some(dtype));
        match has(Dtype::F16) && !has(Dtype::BF16) {
            true => DType::F16,
            false => DType::BF16,
        }
    }

    /// One tensor in its own dtype; of fp8 the values in fp32, not rounded again.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let raw = self.tensors.get(name).with_context(|| format!("the model has no tensor {name}"))?;
        let failed = || format!("{}: {raw} cannot be read", self.source.path().display());
        match self.source.dtype(raw) {
            Some(Dtype::F8_E4M3) => {
                let shape = self.source.shape(raw).unwrap_or_default();
                let codes = Tensor::from_vec(self.source.bytes(raw)?, shape, &Device::Cpu)?;
                let scale = self.scale(name)?.map(|s| s.to_dtype(DType::F32)).transpose()?;
                dequantize(&codes, scale).with_context(failed)
            }
            Some(Dtype::F8_E5M2) => {
                let t = self.source.read(raw, &Device::Cpu)?.to_dtype(DType::F32)?;
                let Some(scale) = self.scale(name)? else { return Ok(t) };
                scaled(&t, &scale.to_dtype(DType::F32)?).with_context(failed)
            }
            _ => self.source.read(raw, &Device::Cpu),
        }
    }

    fn scale(&self, name: &str) -> Result<Option<Tensor>> {
        self.scales.get(name).map(|key| scale_tensor(self.source, key)).transpose()
    }
}

/// Values times one scale for each group of a row, for each row, or for all.
fn scaled(t: &Tensor, scale: &Tensor) -> candle_core::Result<Tensor> {
    let groups = scale.elem_count();
    t.reshape((groups, t.elem_count() / groups))?.broadcast_mul(&scale.reshape((groups, 1))?)?.reshape(t.dims())
}

fn is_fp8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2)
}
