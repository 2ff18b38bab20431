mod config;
mod golden_support;
mod train;
