//! Training: schedules, timesteps, optimizer, trainer, residency, plan.

mod batches;
mod golden_steps;
mod plan;
mod resume;
mod ring;
mod run;
mod schedule;
mod settings;
mod shared;
mod support;
mod timesteps;
