//! Training: schedules, timesteps, optimizer, trainer, residency, plan.

mod plan;
mod schedule;
mod timesteps;
