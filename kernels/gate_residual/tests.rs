//! Tests of `gate_residual`.
