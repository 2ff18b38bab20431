//! Training: schedules, timesteps, optimizer, trainer, residency, plan.

mod schedule;
mod timesteps;
