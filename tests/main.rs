mod golden_support;
mod train;
