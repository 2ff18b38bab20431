//! A name under which one process at a time writes.

use super::{create_dir, explain, parent_of, TEMP_SUFFIX};
use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Holds a name until it is dropped, or the process ends in whatever way.
#[derive(Debug)]
pub struct Claim {
    /// The file and its lock; none where the file system knows no locks.
    held: Option<(PathBuf, File)>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some((path, _)) = &self.held {
            // Left behind it is recognised as dead by the next run.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Claims `path` (a file that need not exist) for this process: a hidden file beside it, locked. `Err` of the inner result:
/// somebody else has it, the process of that number if it can be told. Where the file system knows no locks, nobody can be
/// told from one that was killed: there everybody gets a claim, and nothing is held.
pub fn claim(path: &Path) -> Result<std::result::Result<Claim, Option<u32>>> {
    create_dir(parent_of(path))?;
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let lock = path.with_file_name(format!(".{}.claim{TEMP_SUFFIX}", name.to_string_lossy()));
    for _ in 0..TRIES {
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&lock);
        let mut file = opened.map_err(|e| explain(e, &lock))?;
        match fs4::fs_std::FileExt::try_lock_exclusive(&file) {
            // What a dead process left is as good as new. Not so one that its owner has just removed.
            Ok(true) if is_at(&file, &lock) => {
                let ours = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
                ours.map_err(|e| explain(e, &lock))?;
                return Ok(Ok(Claim { held: Some((lock, file)) }));
            }
            // Whoever looks for leftovers holds the lock for a moment.
            Ok(_) => std::thread::sleep(Duration::from_millis(10)),
            Err(_) => {
                let _ = std::fs::remove_file(&lock);
                return Ok(Ok(Claim { held: None }));
            }
        }
    }
    Ok(Err(std::fs::read_to_string(&lock).ok().and_then(|text| text.trim().parse().ok())))
}

const TRIES: usize = 20;

/// Whether `path` still names this open file.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let of = |m: std::fs::Metadata| (m.dev(), m.ino());
        matches!((file.metadata().map(of), std::fs::metadata(path).map(of)), (Ok(a), Ok(b)) if a == b)
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
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
    fn of_many_at_once_one_gets_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cat.safetensors");
        std::fs::write(dir.path().join(".cat.safetensors.claim.wtmp"), "1\n").unwrap();
        let claims: Vec<_> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(|| claim(&path).unwrap())).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(claims.iter().filter(|claim| claim.is_ok()).count(), 1);
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
