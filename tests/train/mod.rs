//! Training: schedules, timesteps, optimizer, trainer, residency, plan.

mod batches;
mod golden_steps;
mod plan;
mod previews;
mod prompts;
mod resume;
mod ring;
mod run;
mod schedule;
mod settings;
mod shared;
mod support;
mod timesteps;
