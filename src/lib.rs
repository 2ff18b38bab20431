//! Trains LoRA adapters for the Wan 2.1/2.2 video models on one GPU.
//!
//! Reading order: `main` (what a run is) -> `config` (what the user meant) -> `commands` (one file per verb)
//! -> `data`, `cache`, `train` (the stages). Dependencies point one way: `kernels <- models <- this crate`, and inside
//! it `data <- cache <- train`; nobody imports `commands` or `cli`.

pub mod adapter;
pub mod cache;
pub mod checkpoint;
pub mod cli;
pub mod commands;
pub mod config;
pub mod data;
pub mod error;
pub mod fsio;
pub mod hub;
pub mod kwargs;
pub mod loader;
pub mod lora;
pub mod optim;
pub mod plan;
pub mod report;
pub mod residency;
pub mod sampler;
pub mod schedule;
pub mod tokenizer;
pub mod train;
pub mod verify;
