//! What an epoch trains on, in which order: a pure function of (seed, epoch). Nothing is remembered between epochs, so a
//! resumed run repeats the order of an unbroken one, on any machine.

use wan_kernels::philox::{stream, Philox};

use crate::cache::index::Bucket;

/// One sample of an epoch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Position of the item in the index.
    pub item: usize,
    /// Number of this sample among all of an epoch (repeats count): with the epoch, the key of its random numbers. It
    /// depends on the data set alone, so noise is the same at any batch size.
    pub id: u32,
    /// Where the draw of its timestep is stratified: a value in [0, 1).
    pub stratum: Option<f32>,
}

/// Samples of one bucket that are trained on together.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchPlan {
    pub bucket: usize,
    pub samples: Vec<Sample>,
}

/// Keys in place of an item number, for what concerns the whole epoch.
const BATCH_ORDER: u32 = u32::MAX;
const STRATA: u32 = u32::MAX - 1;

/// The batches of an epoch: every bucket's samples shuffled, cut into batches (the last one of a bucket may be smaller),
/// then the batches of all buckets shuffled. `strata` ≥ 2 stratifies timesteps over that many equal parts.
pub fn epoch(buckets: &[Bucket], seed: u64, epoch: u64, strata: usize) -> Vec<BatchPlan> {
    let draws = |item: u32| Philox::new(seed, stream::SHUFFLE, epoch as u32, item).draws();
    let mut batches = Vec::new();
    let mut next_id = 0u32;
    for (number, bucket) in buckets.iter().enumerate() {
        let mut samples: Vec<Sample> = Vec::with_capacity(bucket.entries.len());
        for item in &bucket.entries {
            samples.push(Sample { item: *item, id: next_id, stratum: None });
            next_id += 1;
        }
        draws(number as u32).shuffle(&mut samples);
        let cut = samples.chunks(bucket.batch_size.max(1));
        batches.extend(cut.map(|c| BatchPlan { bucket: number, samples: c.to_vec() }));
    }
    draws(BATCH_ORDER).shuffle(&mut batches);
    if strata >= 2 {
        let mut draws = Philox::new(seed, stream::TIMESTEP, epoch as u32, STRATA).draws();
        let mut values = stratified(strata, &mut draws);
        for sample in batches.iter_mut().flat_map(|b| &mut b.samples) {
            sample.stratum = values.next();
        }
    }
    batches
}

/// Endless values in [0, 1), every run of `parts` of which falls once into each of the `parts` equal parts.
pub fn stratified(parts: usize, draws: &mut wan_kernels::philox::Draws) -> impl Iterator<Item = f32> + '_ {
    let mut run: Vec<usize> = Vec::new();
    std::iter::from_fn(move || {
        if run.is_empty() {
            run = (0..parts).collect();
            draws.shuffle(&mut run);
        }
        let part = run.pop()?;
        let value = ((part as f64 + draws.uniform()) / parts as f64) as f32;
        // Rounding to f32 must not carry a value over its part's end.
        Some(value.min((((part + 1) as f64 / parts as f64) as f32).next_down()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::index::BucketKey;
    use std::collections::BTreeSet;

    fn buckets(batch_size: usize) -> Vec<Bucket> {
        let key = |width| BucketKey { width, height: 16, frames: 1 };
        vec![
            Bucket { dataset: 0, key: key(16), batch_size, entries: vec![0, 0, 1, 1, 2, 2, 3, 3] },
            Bucket { dataset: 0, key: key(32), batch_size, entries: (4..9).collect() },
        ]
    }

    #[test]
    fn an_epoch_holds_every_sample_once_and_batches_stay_in_their_bucket() {
        for batch_size in [1, 2, 3, 100] {
            let plan = epoch(&buckets(batch_size), 7, 2, 0);
            let ids: BTreeSet<u32> = plan.iter().flat_map(|b| b.samples.iter().map(|s| s.id)).collect();
            assert_eq!(ids, (0..13).collect());
            assert_eq!(plan.len(), 8usize.div_ceil(batch_size) + 5usize.div_ceil(batch_size));
            for batch in &plan {
                assert!(batch.samples.len() <= batch_size);
                assert!(batch.samples.iter().all(|s| (s.item < 4) == (batch.bucket == 0)));
                assert!(batch
                    .samples
                    .iter()
                    .all(|s| s.item == if s.id < 8 { s.id as usize / 2 } else { s.id as usize - 4 }));
            }
        }
    }

    #[test]
    fn order_changes_with_epoch_and_seed_and_is_repeatable() {
        let order = |seed, number| -> Vec<u32> {
            epoch(&buckets(1), seed, number, 0).iter().map(|b| b.samples[0].id).collect()
        };
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        assert_ne!(order(1, 0), (0..13).collect::<Vec<_>>());
    }

    #[test]
    fn every_run_of_strata_covers_each_part_once() {
        for parts in [2, 4, 10, 1000] {
            let mut draws = Philox::new(5, stream::TIMESTEP, 0, STRATA).draws();
            let values: Vec<f32> = stratified(parts, &mut draws).take(3 * parts).collect();
            for run in values.chunks(parts) {
                let hit: BTreeSet<usize> = run.iter().map(|v| (f64::from(*v) * parts as f64) as usize).collect();
                assert_eq!(hit.len(), parts, "{parts}");
            }
        }
        let plan = epoch(&buckets(2), 7, 2, 4);
        assert!(plan.iter().all(|b| b.samples.iter().all(|s| s.stratum.is_some())));
    }
}
