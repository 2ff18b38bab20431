//! Cache files: their form, their recipes, and the run that makes them.

mod files;
mod flow;
mod kill;
mod kitchen;
mod memory;
mod recorded;
mod variants;
