//! The buckets of a surveyed dataset, known before anything is encoded.

use std::collections::BTreeMap;

use super::cache::Prepared;
use crate::cache::BucketKey;

/// Items of one size and length in one dataset.
pub struct Bucket {
    pub dataset: usize,
    pub key: BucketKey,
    /// `batch_size` of its dataset.
    pub batch: usize,
    pub items: usize,
    pub repeats: usize,
}

impl Bucket {
    pub fn samples(&self) -> usize {
        self.items * self.repeats
    }

    pub fn batches(&self) -> usize {
        self.samples().div_ceil(self.batch)
    }

    pub fn largest_batch(&self) -> usize {
        self.batch.min(self.samples())
    }
}

impl Prepared {
    /// All buckets, by dataset and size, of what can be used.
    pub fn buckets(&self) -> Vec<Bucket> {
        let survey = &self.survey;
        let mut buckets: BTreeMap<(usize, BucketKey), Bucket> = BTreeMap::new();
        for entry in survey.entries.iter().filter(|e| e.fault.is_none()) {
            let item = &survey.items[entry.item];
            let source = survey.dataset(item);
            for clip in &entry.clips {
                let frames = survey.pixel_frames(item, clip.span);
                let key = BucketKey { width: clip.span.size.0 as usize, height: clip.span.size.1 as usize, frames };
                let bucket = buckets.entry((item.dataset, key)).or_insert_with(|| Bucket {
                    dataset: item.dataset,
                    key,
                    batch: source.batch_size.max(1),
                    items: 0,
                    repeats: source.num_repeats.max(1),
                });
                bucket.items += 1;
            }
        }
        buckets.into_values().collect()
    }
}
