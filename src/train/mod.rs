//! Training: batches, noise and timesteps, the loss, and the loop that ties them to the model and the optimizer.
//!
//! Reading order: `settings` (what a run goes by) -> `order` (which samples, when) -> `batch` (what the model is given;
//! with `timesteps` and `noise`) -> `loss` -> `trainer` (the loop) -> `state` (resume).

pub mod batch;
pub mod expert;
pub mod history;
pub mod loss;
pub mod models;
pub mod noise;
pub mod observe;
pub mod order;
pub mod preview;
pub mod quantile;
pub mod scale;
pub mod settings;
pub mod state;
pub mod timesteps;
pub mod trainer;

pub use batch::{Assembler, Batch, Items};
pub use expert::Expert;
pub use models::{Frozen, Models};
pub use observe::{MicroStep, Observer, Outcome, RunFacts, Saver, Update, When};
pub use settings::{Compat, Length, SaveEvery, TrainSettings};
pub use trainer::{Parts, Saved, Trainer};
