//! Checkpoint files of every form, whole and hostile.

mod dit;
mod hostile;
mod keyed;
mod merge;
mod source;
pub mod torch_file;

use std::path::{Path, PathBuf};
use wan_train::error::UserError;

/// Writes `bytes` under `name` and returns the path.
pub fn put(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The text of an error meant for the user; panics where it is none.
pub fn user_error<T>(result: anyhow::Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(e) => e.downcast_ref::<UserError>().unwrap_or_else(|| panic!("not for users: {e:#}")).to_string(),
    }
}

/// A safetensors file with the given header text and body.
pub fn raw_safetensors(header: &str, body: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(body);
    out
}
