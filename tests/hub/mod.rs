//! Downloads, against a server on this machine that answers as the hub does, and as it does on a bad day.

mod fetch;
mod server;

pub use server::{Fault, Server};
