//! Tests of `philox`.
