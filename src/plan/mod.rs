//! Memory, planned before anything is allocated: what will be where (`memory`), which saving policy and residency fit a
//! budget (`choose`), what there is (`device`), what a run is (`shape`). Pure arithmetic on architecture numbers; nothing
//! here touches a tensor.

pub mod cards;
pub mod choose;
pub mod device;
pub mod memory;
pub mod shape;

pub use cards::{Card, Rates};
pub use choose::Wishes;
pub use choose::{choose, offers, predict, unused, Plan, Shortfall};
pub use device::{available_ram, host_peak, Budget};
pub use memory::{price, Arrangement, Job, Memory, Moments, Target, WeightForm, OF_A_STEP};
pub use shape::RunShape;

/// Bytes as GiB for people; small models show more digits.
pub fn gib(bytes: u64) -> String {
    let gib = bytes as f64 / (1u64 << 30) as f64;
    match gib < 0.1 {
        true => format!("{gib:.4}"),
        false => format!("{gib:.2}"),
    }
}
