//! What a run leaves on disk: the LoRA file people load (`lora_file` reads, `lora_write` writes, `metadata` says how it
//! was made), the full training state (`state`), and where they lie, how they are named and which are kept (`store`).

pub mod lora_file;
pub mod lora_keys;
pub mod lora_write;
pub mod metadata;
pub mod state;
pub mod store;

pub(crate) use lora_file::product;
pub use lora_file::{LoraFile, LoraModule};
pub use lora_keys::Form;
pub use lora_write::{convert, save_dtype, write_lora, Convert, ModuleOut};
pub use metadata::{Moment, RunFacts};
pub use state::{Identity, Master, Position, TrainState};
pub use store::{Names, Retention};
