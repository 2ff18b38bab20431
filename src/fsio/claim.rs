//! A name under which one process at a time writes.

use super::{create_dir, explain, is_dead, parent_of, TEMP_SUFFIX};
use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Holds a name until it is dropped, or the process ends in whatever way.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    /// The lock goes with it.
    _file: File,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Left behind it is recognised as dead by the next run.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Claims `path` (a file that need not exist) for this process: a hidden file beside it, locked. `Err` of the inner result:
/// somebody else has it, the process of that number if it can be told. Where the file system knows no locks, a file that
/// was left behind by a kill is in the way for a day.
pub fn claim(path: &Path) -> Result<std::result::Result<Claim, Option<u32>>> {
    create_dir(parent_of(path))?;
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let lock = path.with_file_name(format!(".{}.claim{TEMP_SUFFIX}", name.to_string_lossy()));
    // A few times, since a dead one is removed first, and one that is being made looks taken.
    for _ in 0..3 {
        match OpenOptions::new().write(true).create_new(true).open(&lock) {
            Ok(mut file) => {
                hold(&file);
                writeln!(file, "{}", std::process::id()).map_err(|e| explain(e, &lock))?;
                return Ok(Ok(Claim { path: lock, _file: file }));
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                if !is_dead(&lock) {
                    let owner = std::fs::read_to_string(&lock).ok().and_then(|text| text.trim().parse().ok());
                    return Ok(Err(owner));
                }
                let _ = std::fs::remove_file(&lock);
            }
            Err(e) => return Err(explain(e, &lock)),
        }
    }
    Ok(Err(None))
}

/// Whoever looks whether it is dead holds the lock for a moment.
fn hold(file: &File) {
    for _ in 0..50 {
        match fs4::fs_std::FileExt::try_lock_exclusive(file) {
            Ok(false) => std::thread::sleep(Duration::from_millis(10)),
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::claim;

    #[test]
    fn a_name_has_one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deeper/cat.safetensors");
        let first = claim(&path).unwrap().unwrap();
        assert_eq!(claim(&path).unwrap().unwrap_err(), Some(std::process::id()));
        let other = claim(&dir.path().join("deeper/dog.safetensors")).unwrap().unwrap();
        drop(first);
        let again = claim(&path).unwrap().unwrap();
        drop((other, again));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn what_a_killed_process_left_is_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cat.safetensors");
        let lock = dir.path().join(".cat.safetensors.claim.wtmp");
        std::fs::write(&lock, "1\n").unwrap();
        let ours = claim(&path).unwrap().unwrap();
        assert_eq!(std::fs::read_to_string(&lock).unwrap(), format!("{}\n", std::process::id()));
        super::super::clean_leftovers(dir.path());
        assert!(lock.exists(), "a living claim is no leftover");
        drop(ours);
        std::fs::write(&lock, "1\n").unwrap();
        assert_eq!(super::super::clean_leftovers(dir.path()), 1);
    }
}
