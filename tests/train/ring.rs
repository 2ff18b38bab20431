//! The ring of streamed blocks: what is lent, when it is fetched, and what happens out of order or on failure.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use wan_models::wan::{BlockWeights, Pass, WeightProvider};
use wan_models::Result;
use wan_train::residency::{CpuCopy, Ring, Upload};

use super::support::{arch, model};

/// Copies, counts, and fails when told to.
#[derive(Default)]
struct Counting {
    uploads: AtomicUsize,
    fail: Mutex<bool>,
}

impl Upload for Counting {
    fn upload(&self, master: &BlockWeights) -> Result<BlockWeights> {
        self.uploads.fetch_add(1, Ordering::SeqCst);
        if *self.fail.lock().unwrap() {
            return Err(wan_models::Error::Invalid { model: "wan", what: "the link is down".into() });
        }
        CpuCopy.upload(master)
    }
}

fn ring(streamed: Vec<usize>, slots: usize) -> (Ring, Arc<Counting>) {
    let mut arch = arch();
    arch.num_layers = 6;
    let upload = Arc::new(Counting::default());
    (Ring::new(model(&arch).1 .0, streamed, slots, upload.clone()), upload)
}

fn first_weight(block: &BlockWeights) -> Vec<f32> {
    block.modulation.flatten_all().unwrap().to_vec1().unwrap()
}

/// One forward and one backward pass; every block must come with its own weights.
fn passes(ring: &Ring, want: &[Vec<f32>]) {
    for (i, weights) in want.iter().enumerate() {
        assert_eq!(first_weight(&ring.acquire(i, Pass::Forward).unwrap()), *weights);
    }
    for (i, weights) in want.iter().enumerate().rev() {
        assert_eq!(first_weight(&ring.acquire(i, Pass::Backward).unwrap()), *weights);
    }
}

fn truth() -> Vec<Vec<f32>> {
    let mut arch = arch();
    arch.num_layers = 6;
    model(&arch).1 .0.iter().map(|b| first_weight(b)).collect()
}

#[test]
fn every_block_comes_with_its_own_weights_in_any_ring() {
    let want = truth();
    assert!(want.windows(2).all(|w| w[0] != w[1]));
    for streamed in [vec![1], vec![0, 5], vec![1, 3, 5], (0..6).collect()] {
        for slots in 1..=7 {
            let (ring, _) = ring(streamed.clone(), slots);
            passes(&ring, &want);
            passes(&ring, &want);
        }
    }
}

#[test]
fn nothing_is_fetched_twice_in_a_pass_and_the_turn_around_is_free() {
    let want = truth();
    let (ring, upload) = ring((0..6).collect(), 2);
    for round in 1..=3 {
        passes(&ring, &want);
        // Forward fetches six; backward finds the last two in their slots and fetches four, which leaves the first
        // two for the next forward.
        assert_eq!(upload.uploads.load(Ordering::SeqCst), 6 + 4 + (round - 1) * 8);
    }
    assert_eq!(ring.loads(), upload.uploads.load(Ordering::SeqCst));
}

#[test]
fn a_block_asked_for_while_its_slot_is_in_use_is_brought_beside_the_ring() {
    let want = truth();
    let (ring, _) = ring((0..6).collect(), 2);
    let held = ring.acquire(0, Pass::Forward).unwrap();
    let other = ring.acquire(2, Pass::Forward).unwrap();
    assert_eq!((first_weight(&held), first_weight(&other)), (want[0].clone(), want[2].clone()));
    drop((held, other));
    for i in [5, 0, 3, 3, 1, 4, 2] {
        assert_eq!(first_weight(&ring.acquire(i, Pass::Backward).unwrap()), want[i]);
    }
}

#[test]
fn a_failed_copy_is_an_error_and_the_next_try_may_work() {
    let want = truth();
    let (ring, upload) = ring(vec![2, 4], 1);
    passes(&ring, &want);
    *upload.fail.lock().unwrap() = true;
    // The slot holds block 2 after backward; 4 has to be fetched.
    let error = ring.acquire(4, Pass::Forward).err().unwrap().to_string();
    assert!(error.contains("block 4") && error.contains("the link is down"), "{error}");
    *upload.fail.lock().unwrap() = false;
    assert_eq!(first_weight(&ring.acquire(4, Pass::Forward).unwrap()), want[4]);
    assert!(ring.acquire(6, Pass::Forward).is_err());
}
