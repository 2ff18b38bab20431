//! A directory that appears whole or not at all.

use super::{create_dir, explain, explain_any, parent_of, sibling, sync_dir, ASIDE_SUFFIX, TEMP_SUFFIX};
use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

/// Held locked inside a temporary directory while it has a living writer. It is removed after the rename: a kill in
/// between leaves it in the finished directory, where it means nothing.
pub(super) const LOCK: &str = ".writer";

/// Lets `body` fill a fresh temporary directory, then gives it the name `dir`, replacing a directory of that name.
/// Every file and the directory are synced to disk before the rename. On an error nothing remains of the new one and
/// the old one stays. If the process dies between setting the old directory aside and naming the new one, the next
/// [`super::clean_leftovers`] puts the old one back.
pub fn write_dir_atomic(dir: &Path, body: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    create_dir(parent_of(dir))?;
    let temp = sibling(dir, TEMP_SUFFIX)?;
    if let Err(e) = fill_and_name(dir, &temp, body) {
        let _ = std::fs::remove_dir_all(&temp);
        return Err(explain_any(e, dir));
    }
    sync_dir(parent_of(dir)).map_err(|e| explain(e, dir))
}

fn fill_and_name(dir: &Path, temp: &Path, body: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    std::fs::create_dir(temp)?;
    let lock_path = temp.join(LOCK);
    let mut lock = OpenOptions::new().write(true).create_new(true).open(&lock_path)?;
    let _ = fs4::fs_std::FileExt::try_lock_exclusive(&lock);
    lock.write_all(b"being written\n")?;

    body(temp)?;
    for entry in std::fs::read_dir(temp)? {
        let entry = entry?;
        if entry.file_type()?.is_file() && entry.file_name() != LOCK {
            File::open(entry.path())?.sync_all()?;
        }
    }

    let aside = if dir.exists() {
        let aside = sibling(dir, ASIDE_SUFFIX)?;
        std::fs::rename(dir, &aside)?;
        Some(aside)
    } else {
        None
    };
    sync_dir(temp)?;
    if let Err(e) = std::fs::rename(temp, dir) {
        if let Some(aside) = &aside {
            let _ = std::fs::rename(aside, dir);
        }
        return Err(e.into());
    }
    let _ = std::fs::remove_file(dir.join(LOCK));
    if let Some(aside) = &aside {
        // The new directory is in place; an old one that cannot be removed now is a leftover, no failure.
        let _ = std::fs::remove_dir_all(aside);
    }
    Ok(())
}

/// Removes a directory so that a kill half-way leaves a leftover, never a directory that looks whole.
pub fn remove_dir(dir: &Path) -> Result<()> {
    let temp = sibling(dir, TEMP_SUFFIX)?;
    std::fs::rename(dir, &temp).map_err(|e| explain(e, dir))?;
    // The name is free; what cannot be removed now is a leftover.
    let _ = std::fs::remove_dir_all(&temp);
    Ok(())
}

/// Gives a directory that was set aside its name back if that name is free, or removes it if it was replaced.
pub(super) fn put_back(aside: &Path) -> Result<()> {
    let name = aside.file_name().and_then(|n| n.to_str()).context("no name")?;
    // .<final name>.<unique>.wold
    let inner = name.strip_prefix('.').and_then(|n| n.strip_suffix(ASIDE_SUFFIX)).context("not an aside name")?;
    let (original, _unique) = inner.rsplit_once('.').context("not an aside name")?;
    let original = aside.with_file_name(original);
    if original.exists() {
        std::fs::remove_dir_all(aside)?;
    } else {
        std::fs::rename(aside, original)?;
    }
    Ok(())
}
