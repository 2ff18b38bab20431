mod cache;
mod config;
mod data;
mod golden_support;
mod loader;
mod report;
mod train;
mod tokenizer;
