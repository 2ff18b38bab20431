//! The ring: streamed block of rank r uses slot r mod slots. When a block is done, the one that will need its slot next
//! in the same direction is fetched by a worker thread. Forward leaves the last blocks in the ring, which backward needs
//! first; backward leaves the first ones. A miss is loaded on demand, so any order of asking works, only slower.

use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use wan_models::wan::{BlockWeights, Lease, Pass, WeightProvider};
use wan_models::{Error, Result};

/// Brings the master of a block to where it is computed with.
pub trait Upload: Send + Sync {
    fn upload(&self, master: &BlockWeights) -> Result<BlockWeights>;
}

/// A ring on the CPU copies for real, so that it is tested with the same code as any other.
pub struct CpuCopy;

impl Upload for CpuCopy {
    fn upload(&self, master: &BlockWeights) -> Result<BlockWeights> {
        master.map(&mut |t| Ok(t.copy()?))
    }
}

/// Streams some blocks through a few slots.
pub struct Ring {
    blocks: Vec<Arc<BlockWeights>>,
    /// Rank of a block among the streamed ones.
    ranks: Vec<Option<usize>>,
    shared: Arc<Shared>,
    orders: Option<Sender<usize>>,
    worker: Option<JoinHandle<()>>,
    upload: Arc<dyn Upload>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    slots: Vec<Slot>,
    /// Uploads done, for tests and reports.
    loads: usize,
}

#[derive(Default)]
struct Slot {
    /// What is in the slot, or on its way there.
    rank: Option<usize>,
    weights: Option<Arc<BlockWeights>>,
    failed: Option<String>,
    leases: usize,
}

impl Shared {
    /// A panic while the lock was held leaves nothing half-done here: slots are changed in single assignments.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    /// `streamed` are block indices in ascending order; `slots` is cut to their number.
    pub fn new(blocks: Vec<Arc<BlockWeights>>, streamed: Vec<usize>, slots: usize, upload: Arc<dyn Upload>) -> Self {
        let mut ranks = vec![None; blocks.len()];
        streamed.iter().enumerate().for_each(|(rank, block)| ranks[*block] = Some(rank));
        let slots = slots.clamp(1, streamed.len().max(1));
        let state = State { slots: (0..slots).map(|_| Slot::default()).collect(), loads: 0 };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let (orders, incoming) = channel::<usize>();
        let masters: Vec<Arc<BlockWeights>> = streamed.iter().map(|b| blocks[*b].clone()).collect();
        let worker = std::thread::spawn({
            let (shared, upload) = (shared.clone(), upload.clone());
            move || {
                for rank in incoming {
                    let loaded = upload.upload(&masters[rank]);
                    let mut state = shared.lock();
                    state.loads += 1;
                    let slot_count = state.slots.len();
                    let slot = &mut state.slots[rank % slot_count];
                    // The order may have been overtaken by one for another block of the same slot.
                    if slot.rank == Some(rank) {
                        match loaded {
                            Ok(weights) => slot.weights = Some(Arc::new(weights)),
                            Err(e) => slot.failed = Some(e.to_string()),
                        }
                    }
                    shared.changed.notify_all();
                }
            }
        });
        let ring = Self { blocks, ranks, shared, orders: Some(orders), worker: Some(worker), upload };
        (0..slots.min(streamed.len())).for_each(|rank| ring.order(rank));
        ring
    }

    /// Uploads done so far.
    pub fn loads(&self) -> usize {
        self.shared.lock().loads
    }

    /// Starts bringing a block into its slot, unless it is there, on its way, or the slot is in use.
    fn order(&self, rank: usize) {
        let mut state = self.shared.lock();
        let slot_count = state.slots.len();
        let slot = &mut state.slots[rank % slot_count];
        if slot.rank == Some(rank) || slot.leases > 0 {
            return;
        }
        *slot = Slot { rank: Some(rank), ..Slot::default() };
        if let Some(orders) = &self.orders {
            // The worker lives as long as the ring.
            let _ = orders.send(rank);
        }
    }

    fn lend(&self, rank: usize, block: usize, pass: Pass) -> Result<Lease<'_>> {
        self.order(rank);
        let mut state = self.shared.lock();
        loop {
            let slot_count = state.slots.len();
            let slot = &mut state.slots[rank % slot_count];
            if slot.rank != Some(rank) {
                // The slot is in use by another block: this one is brought beside the ring.
                drop(state);
                return Ok(Lease::new(Arc::new(self.upload.upload(&self.blocks[block])?)));
            }
            if let Some(what) = slot.failed.take() {
                *slot = Slot::default();
                return Err(Error::Invalid { model: "wan", what: format!("block {block} cannot be streamed: {what}") });
            }
            if let Some(weights) = slot.weights.clone() {
                slot.leases += 1;
                return Ok(Lease::with_release(weights, move || self.release(rank, pass)));
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn release(&self, rank: usize, pass: Pass) {
        let mut state = self.shared.lock();
        let slot_count = state.slots.len();
        let slot = &mut state.slots[rank % slot_count];
        slot.leases -= 1;
        drop(state);
        let streamed = self.ranks.iter().flatten().count();
        let next = match pass {
            Pass::Forward => Some(rank + slot_count).filter(|r| *r < streamed),
            Pass::Backward => rank.checked_sub(slot_count),
        };
        if let Some(next) = next {
            self.order(next);
        }
    }
}

impl WeightProvider for Ring {
    fn acquire(&self, block: usize, pass: Pass) -> Result<Lease<'_>> {
        match self.ranks.get(block) {
            Some(Some(rank)) => self.lend(*rank, block, pass),
            Some(None) => Ok(Lease::new(self.blocks[block].clone())),
            None => {
                let what = format!("block {block} was asked for, there are {}", self.blocks.len());
                Err(Error::Invalid { model: "wan", what })
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The worker ends when nobody can order any more.
        self.orders = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}
