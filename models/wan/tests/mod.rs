//! The DiT against the reference numbers, against the tape, and against itself.

mod forward;
mod fp8;
mod inputs;
mod tape;
mod train;
