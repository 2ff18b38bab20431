//! Cache files: their form, their recipes, and the run that makes them.

mod files;
