mod cache;
mod config;
mod data;
mod golden_support;
mod loader;
mod report;
mod tokenizer;
mod train;
