//! What a run leaves on disk: LoRA files, training states, and that none of it is ever half there.

mod faults;
mod lora;
mod state;
mod store;
