//! Checkpoint files of every form, whole and hostile.

mod dit;
mod hostile;
mod kept;
mod keyed;
mod mapped;
#[cfg(target_os = "linux")]
mod memory;
mod merge;
mod source;
pub mod torch_file;

use std::path::{Path, PathBuf};
use wan_models::arch::{ModelConfig, WanArch};
use wan_models::keys;
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

/// The header of a published model and no data: a sparse file of its full size.
pub fn hollow(path: &Path, arch: &WanArch, dtype: &str, width: usize) {
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for e in keys::expected(arch) {
        let n = e.shape.iter().product::<usize>() * width;
        header.insert(e.key, serde_json::json!({"dtype": dtype, "shape": e.shape, "data_offsets": [at, at + n]}));
        at += n;
    }
    let text = serde_json::Value::Object(header).to_string();
    let bytes = raw_safetensors(&text, &[]);
    std::fs::write(path, &bytes).unwrap();
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len((bytes.len() + at) as u64).unwrap();
}

/// The architecture of a task.
pub fn published(task: &str) -> WanArch {
    let text = std::fs::read_to_string(format!("{}/configs/models/{task}.toml", env!("CARGO_MANIFEST_DIR"))).unwrap();
    ModelConfig::from_toml(&text).unwrap().arch
}
