//! Tests of `adamw8bit`.
