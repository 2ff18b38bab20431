//! What a run tells: progress on the terminal, tables, TensorBoard events, JSON lines, the loss curve, a report.

pub mod curve;
mod font;
pub mod html;
pub mod progress;
pub mod runlog;
pub mod table;
pub mod tensorboard;
pub mod trace;

pub use curve::write_loss_curve;
pub use html::{write_report, RunReport};
pub use progress::{for_stderr, Progress, Silent, Task, Work};
pub use runlog::{event_dir, Point, RunLog, StepLog};
pub use table::Table;
