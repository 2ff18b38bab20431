//! Tests of `adamw`.
