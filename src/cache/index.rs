//! What training reads: the cached items of every data set, in a fixed order, grouped in buckets of equal size.

use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_core::{DType, Tensor};

use super::format::{self, FormatError, Header, LatentTensors};
use super::names::LATENT_SUFFIX;
use super::survey::Survey;
use crate::error::UserError;

/// Items that can share a batch: pixel width and height of the bucket, and pixel frames (1 for a picture).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BucketKey {
    pub width: usize,
    pub height: usize,
    pub frames: usize,
}

/// One latent file with the caption file that belongs to it.
#[derive(Debug, Clone, PartialEq)]
pub struct CachedItem {
    /// The latent file's name without its suffix: unique in its data set, the same on every machine.
    pub name: String,
    pub latent_path: PathBuf,
    pub text_path: PathBuf,
    pub bucket: BucketKey,
    /// How often an epoch sees it.
    pub repeats: usize,
    /// Position of its data set in the configuration.
    pub dataset: usize,
}

/// Items of one data set and one size; batches never cross buckets.
#[derive(Debug, Clone, PartialEq)]
pub struct Bucket {
    pub dataset: usize,
    pub key: BucketKey,
    pub batch_size: usize,
    /// Positions in `CacheIndex::items`, each as often as it repeats, repeats adjacent.
    pub entries: Vec<usize>,
}

/// Everything an epoch draws from. Order is by data set, then bucket, then name: independent of the file system.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CacheIndex {
    pub items: Vec<CachedItem>,
    pub buckets: Vec<Bucket>,
}

/// The tensors of one item on the CPU, in the dtypes of the files (bf16 unless asked otherwise; CLIP features fp16).
#[derive(Debug, Clone)]
pub struct ItemTensors {
    /// [c,F,h,w]
    pub latents: Tensor,
    /// [4+c,F,h,w], image-to-video only: 4 mask channels, then the encoded first frame
    pub latents_image: Option<Tensor>,
    /// [c,F,h,w]
    pub control: Option<Tensor>,
    /// [tokens,width], Wan 2.1 image-to-video only; [2,tokens,width] where the condition shows the last frame too
    pub clip: Option<Tensor>,
    /// Where the latent frames stand in time; one-frame caches only, others count from 0.
    pub positions: Option<Vec<usize>>,
    /// [tokens,width]: rows of the caption, without padding
    pub context: Tensor,
}

impl CacheIndex {
    /// The index of a surveyed data set, after caching. Refuses, with a list of all of them, while any file an item
    /// calls for is missing, stale or torn: nothing is trained on that is not what it should be. Files that belong to
    /// no item are not in it.
    pub fn build(survey: &mut Survey) -> anyhow::Result<Self> {
        survey.settle();
        survey.check()?;
        let mut items = Vec::new();
        for entry in survey.entries.iter().filter(|e| e.fault.is_none()) {
            let item = &survey.items[entry.item];
            let dataset = survey.dataset(item);
            for clip in &entry.clips {
                let name = clip.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                let frames = survey.pixel_frames(item, clip.span);
                items.push(CachedItem {
                    name: name.strip_suffix(LATENT_SUFFIX).unwrap_or(&name).to_string(),
                    latent_path: clip.path.clone(),
                    text_path: entry.text.path.clone(),
                    bucket: BucketKey { width: clip.span.size.0 as usize, height: clip.span.size.1 as usize, frames },
                    repeats: dataset.num_repeats.max(1),
                    dataset: item.dataset,
                });
            }
        }
        if items.is_empty() {
            return Err(UserError::new(format!("{} gives nothing to train on", survey.config.path.display()))
                .hint("the table above says what became of every file")
                .into());
        }
        let batch_sizes: Vec<usize> = survey.config.entries.iter().map(|e| e.batch_size).collect();
        Ok(Self::from_items(items, &batch_sizes))
    }

    /// Sorts the items and groups them; `batch_sizes[d]` is the batch size of data set `d`.
    pub fn from_items(mut items: Vec<CachedItem>, batch_sizes: &[usize]) -> Self {
        items.sort_by(|a, b| (a.dataset, a.bucket, &a.name).cmp(&(b.dataset, b.bucket, &b.name)));
        let mut buckets: Vec<Bucket> = Vec::new();
        for (i, item) in items.iter().enumerate() {
            if buckets.last().is_none_or(|b| (b.dataset, b.key) != (item.dataset, item.bucket)) {
                let batch_size = batch_sizes.get(item.dataset).copied().unwrap_or(1).max(1);
                buckets.push(Bucket { dataset: item.dataset, key: item.bucket, batch_size, entries: Vec::new() });
            }
            if let Some(bucket) = buckets.last_mut() {
                bucket.entries.extend(std::iter::repeat_n(i, item.repeats));
            }
        }
        Self { items, buckets }
    }

    /// Batches in an epoch: every bucket's last one may be smaller than the others.
    pub fn batches_per_epoch(&self) -> usize {
        self.buckets.iter().map(|b| b.entries.len().div_ceil(b.batch_size)).sum()
    }

    /// Items an epoch sees, repeats counted.
    pub fn entries_per_epoch(&self) -> usize {
        self.buckets.iter().map(|b| b.entries.len()).sum()
    }

    /// Reads both files of item `i`. Numbers that are not finite are an error.
    pub fn load_item(&self, i: usize) -> anyhow::Result<ItemTensors> {
        let item = &self.items[i];
        let latent = load_latents(&item.latent_path)?;
        let context = load_context(&item.text_path)?;
        let positions = match &latent.positions {
            None => None,
            Some(t) => {
                let of = |p: i64| usize::try_from(p).ok().with_context(|| format!("{}: position {p}", item.name));
                Some(t.to_dtype(DType::I64)?.to_vec1::<i64>()?.into_iter().map(of).collect::<anyhow::Result<_>>()?)
            }
        };
        Ok(ItemTensors {
            positions,
            latents: latent.latents,
            latents_image: latent.latents_image,
            control: latent.latents_control,
            clip: latent.clip,
            context,
        })
    }
}

/// Reads a latent file that the start-up check has accepted.
pub fn load_latents(path: &Path) -> anyhow::Result<LatentTensors> {
    let read = || -> Result<LatentTensors, FormatError> {
        let (metadata, tensors) = format::read_tensors(path)?;
        LatentTensors::from_named(&header_of(metadata, &tensors), tensors)
    };
    read().map_err(|e| unreadable(path, e)).with_context(|| format!("while reading {}", path.display()))
}

/// Reads the caption embedding [tokens,width].
pub fn load_context(path: &Path) -> anyhow::Result<Tensor> {
    let read = || -> Result<Tensor, FormatError> {
        let (metadata, mut tensors) = format::read_tensors(path)?;
        let (name, _) = format::text_info(&header_of(metadata, &tensors))?;
        let context = tensors.remove(&name).ok_or_else(|| FormatError::Torn(format!("{name} is gone")))?;
        format::check_finite(&name, &context)?;
        Ok(context)
    };
    read().map_err(|e| unreadable(path, e)).with_context(|| format!("while reading {}", path.display()))
}

fn header_of(metadata: format::Metadata, tensors: &format::Tensors) -> Header {
    let spec = |t: &Tensor| (st_dtype(t.dtype()), t.dims().to_vec());
    Header { metadata, tensors: tensors.iter().map(|(k, t)| (k.clone(), spec(t))).collect() }
}

fn st_dtype(dtype: candle_core::DType) -> safetensors::Dtype {
    use candle_core::DType as D;
    use safetensors::Dtype as S;
    match dtype {
        D::F32 => S::F32,
        D::BF16 => S::BF16,
        D::F16 => S::F16,
        D::F64 => S::F64,
        D::I64 => S::I64,
        D::I32 => S::I32,
        _ => S::U8,
    }
}

fn unreadable(path: &std::path::Path, error: FormatError) -> UserError {
    UserError::new(format!("{} cannot be trained on: {error}", path.display()))
        .hint("delete this file and run the command again: it will be made anew")
}
