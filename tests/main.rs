mod golden_support;
