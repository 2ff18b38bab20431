//! Tests of `linear`.
