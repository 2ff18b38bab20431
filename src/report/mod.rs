//! What a run tells: progress on the terminal, tables, TensorBoard events, JSON lines, the loss curve.

pub mod table;
pub mod tensorboard;
