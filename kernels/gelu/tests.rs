//! Tests of `gelu`.
