mod config;
mod data;
mod golden_support;
mod train;
