//! Training: batches, noise and timesteps, the loss, and the loop that ties them to the model and the optimizer.

pub mod timesteps;
