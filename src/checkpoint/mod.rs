//! What a run leaves on disk: the LoRA file people load (`lora_file`), the full training state (`state`), and where they
//! lie, how they are named and which of them are kept (`store`).

pub mod state;
pub mod store;

pub use state::{Identity, Master, Position, TrainState};
pub use store::{Names, Retention};
