//! Tests of `fp8`.
