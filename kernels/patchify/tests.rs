//! Tests of `patchify`.
