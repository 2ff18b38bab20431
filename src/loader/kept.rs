//! The blocks' matrices in fp8, with LoRAs merged, kept on disk from one start to the next: half the bytes of a 16-bit
//! file, and nothing to merge or quantise.
//!
//! A file of its own for every model and merge: canonical names, codes as `….weight`, scales as `….scale_weight`. Its
//! header holds the recipe it was made by. Anything but the same recipe, whole, is made again.

use super::dit::LoadOptions;
use super::part::Reading;
use super::source::Source;
use super::values::DitValues;
use super::Fp8;
use crate::cache::fingerprint::{nanoseconds, of_weights, sha256_hex};
use crate::fsio::{self, TensorSpec};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Tensor};
use safetensors::Dtype;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use wan_kernels::fp8;
use wan_models::arch::{Site, WanArch};
use wan_models::linear::Weight;
use wan_models::wan::BlockWeights;

/// Grows when the same recipe gives other bytes.
const FORMAT: u32 = 2;
/// Key of the recipe in the file's metadata.
const RECIPE: &str = "wan_train.fp8_weights";

/// A file as it was when weights were made from it.
#[derive(Debug, Serialize)]
struct Made {
    path: String,
    bytes: u64,
    modified_ns: u64,
    /// Samples of the content, see [`of_weights`].
    content: String,
}

impl Made {
    fn from(path: &Path) -> Result<Self> {
        let path = path.canonicalize().map_err(|e| fsio::explain(e, path))?;
        let meta = path.metadata().map_err(|e| fsio::explain(e, &path))?;
        Ok(Self {
            bytes: meta.len(),
            modified_ns: meta.modified().map_or(0, nanoseconds),
            content: of_weights(std::slice::from_ref(&path)).map_err(|e| fsio::explain(e, &path))?,
            path: path.to_string_lossy().into_owned(),
        })
    }
}

/// All that decides about the bytes.
#[derive(Debug, Serialize)]
struct Recipe {
    format: u32,
    model: Vec<Made>,
    /// Each with its strength as the bits of an f64.
    loras: Vec<(Made, u64)>,
    /// What an fp8 model's sums are rounded to before they are quantised.
    upcast: String,
}

/// Where the weights of one model and merge are kept.
#[derive(Debug)]
pub struct KeptFp8 {
    path: PathBuf,
    recipe: String,
    /// Every matrix of every block, in the order of the blocks.
    sites: Vec<Site>,
    /// As the model's file is read.
    reading: Reading,
}

/// What is there.
#[derive(Debug)]
pub enum Found {
    Whole(Box<Source>),
    Absent,
    /// And why it cannot be used.
    Stale(String),
}

impl KeptFp8 {
    /// The place in `dir` for what `options` make of `source`; `None` where nothing is quantised: other options, a file
    /// whose matrices are all in fp8 and stay as they are.
    ///
    /// Errors: files that cannot be read.
    pub fn place(dir: &Path, source: &Source, options: &LoadOptions<'_>) -> Result<Option<Self>> {
        let values = DitValues::new(source)?;
        let sites: Vec<Site> = (0..options.arch.num_layers).flat_map(|i| options.arch.block_sites(i)).collect();
        let made = |site: &Site| {
            let key = format!("{}.weight", site.name);
            !values.is_fp8(&key) || options.merges.iter().any(|m| m.touches(&key))
        };
        if options.fp8 != Fp8::Scaled || !sites.iter().any(made) {
            return Ok(None);
        }
        let loras = options.merges.iter().map(|m| Ok((Made::from(m.file.path())?, m.strength.to_bits())));
        let recipe = Recipe {
            format: FORMAT,
            model: source.files().map(Made::from).collect::<Result<_>>()?,
            loras: loras.collect::<Result<_>>()?,
            upcast: format!("{:?}", options.upcast),
        };
        // The name says which files and strengths, so that a changed file takes the place of what it was before.
        let files = recipe.model.iter().chain(recipe.loras.iter().map(|(m, _)| m)).map(|m| m.path.as_str());
        let strengths = recipe.loras.iter().map(|(_, s)| format!("{s:x}"));
        let which = files.map(str::to_owned).chain(strengths).collect::<Vec<_>>().join("\n");
        let stem = source.path().file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let name = format!("{stem}-{}.fp8.safetensors", &sha256_hex(which.as_bytes())[..12]);
        Ok(Some(Self {
            path: dir.join(name),
            recipe: serde_json::to_string(&recipe)?,
            sites,
            reading: source.reading(),
        }))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens what is there, and holds it against the recipe and the architecture. Reads the header only.
    pub fn open(&self) -> Found {
        if !self.path.exists() {
            return Found::Absent;
        }
        match Source::open_by(&self.path, self.reading).and_then(|source| self.check(&source).map(|()| source)) {
            Ok(source) => Found::Whole(Box::new(source)),
            Err(e) => Found::Stale(format!("{e:#}")),
        }
    }

    fn check(&self, source: &Source) -> Result<()> {
        let recipe = source.metadata().get(RECIPE);
        ensure!(recipe == Some(&self.recipe), "the model or a LoRA has changed since, or another version made it");
        let values = DitValues::new(source)?;
        for site in &self.sites {
            let key = format!("{}.weight", site.name);
            let right = values.is_fp8(&key) && values.shape(&key) == Some(&[site.out_features, site.in_features]);
            ensure!(right && source.contains(&scale_of(&key)), "{key} is missing or has another shape");
        }
        Ok(())
    }

    /// What the blocks hold, under its names: handles to the tensors, wherever they are.
    ///
    /// Errors: a matrix that is not in fp8.
    pub fn tensors(&self, blocks: &[BlockWeights]) -> Result<BTreeMap<String, Tensor>> {
        let mut all = BTreeMap::new();
        for (site, linear) in self.sites.iter().zip(blocks.iter().flat_map(|b| b.linears())) {
            let (Weight::Fp8(weight) | Weight::Fp8Fast(weight)) = &linear.weight else {
                anyhow::bail!("{} is not in fp8", site.name);
            };
            let key = format!("{}.weight", site.name);
            all.insert(scale_of(&key), weight.scale().clone());
            all.insert(key, weight.codes_oi().clone());
        }
        ensure!(all.len() == 2 * self.sites.len(), "the model has more matrices than its blocks");
        Ok(all)
    }

    /// Writes the file, whole or not at all; `bytes` gives a tensor's content.
    pub fn write(
        &self,
        tensors: &BTreeMap<String, Tensor>,
        bytes: &mut dyn FnMut(&Tensor) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let specs = tensors.iter().map(|(name, t)| {
            let dtype = match t.dtype() {
                DType::U8 => Dtype::F8_E4M3,
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                _ => Dtype::F32,
            };
            TensorSpec { name: name.clone(), dtype, shape: t.dims().to_vec() }
        });
        let metadata = BTreeMap::from([(RECIPE.to_owned(), self.recipe.clone())]);
        fsio::write_streamed(&self.path, specs.collect(), &metadata, &mut |spec| {
            bytes(tensors.get(&spec.name).context("a tensor that was announced")?)
        })
    }
}

/// Bytes of the file for an architecture, near enough to ask for room.
pub fn kept_bytes(arch: &WanArch) -> u64 {
    let matrix = |site: Site| {
        let oi = [site.out_features, site.in_features];
        let count = oi[0] * oi[1];
        (count + 4 * count / fp8::Granularity::Block.group(oi)) as u64
    };
    (0..arch.num_layers).flat_map(|i| arch.block_sites(i)).map(matrix).sum()
}

/// The key of a kept matrix' scale.
pub(super) fn scale_of(weight: &str) -> String {
    format!("{}.scale_weight", weight.strip_suffix(".weight").unwrap_or(weight))
}
