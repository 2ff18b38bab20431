//! What the user meant: options resolved from template < file < flags into one printable [`RunConfig`].

mod experts;
mod layers;
mod options;
mod reference;
pub mod registry;
mod validate;

pub use experts::{merged_name, SHARED};
pub use layers::{line_column, needs_level, resolve, resolve_runs, unknown, Layer, Resolved, Typed};
pub use options::{find, Kind, Opt, RunConfig, OPTIONS, SCHEDULES, TASKS, TIMESTEP_MODES};
pub use reference::options_markdown;
