//! Files that are either whole or absent: a temporary file in the same directory, fsync, rename, fsync of the
//! directory. Whatever stops a write (an error, a full disk, a killed process), no half-written file ever carries the
//! final name, and what a killed run left behind is recognised by its suffix and removed at the next start.

use crate::error::UserError;
use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

mod claim;
mod dir;
pub mod tensors;

pub use claim::{claim, Claim};
pub use dir::{remove_dir, write_dir_atomic};
pub use tensors::{write_safetensors, write_streamed, TensorOut, TensorSpec};

/// Every temporary file or directory of ours is named `.<final name>.<unique>.wtmp`.
const TEMP_SUFFIX: &str = ".wtmp";
/// A directory that is being replaced waits under `.<final name>.<unique>.wold` between the two renames.
const ASIDE_SUFFIX: &str = ".wold";

static UNIQUE: AtomicU64 = AtomicU64::new(0);

/// A hidden sibling of `path` that no other process or thread uses.
fn sibling(path: &Path, suffix: &str) -> Result<PathBuf> {
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let n = UNIQUE.fetch_add(1, Ordering::Relaxed);
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    Ok(path.with_file_name(format!(".{}.{}-{n}-{nanos:x}{suffix}", name.to_string_lossy(), std::process::id())))
}

/// The directory that holds `path` ("." for a bare name).
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Writes a file so that it appears under `path` whole or not at all; an existing file is replaced in one step.
/// Missing parent directories are made. `body` gets a buffered writer.
///
/// Errors: a [`UserError`] naming the path and the remedy when the disk is full, read-only or not ours to write;
/// whatever `body` returned otherwise. The temporary file is gone in every case.
pub fn write_atomic(path: &Path, body: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    create_dir(parent_of(path))?;
    let temp = sibling(path, TEMP_SUFFIX)?;
    let written = write_temp(&temp, body).and_then(|()| Ok(std::fs::rename(&temp, path)?));
    if let Err(e) = written {
        // Best effort: the error worth reporting is the first one.
        let _ = std::fs::remove_file(&temp);
        return Err(explain_any(e, path));
    }
    sync_dir(parent_of(path)).map_err(|e| explain(e, path))
}

fn write_temp(temp: &Path, body: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).open(temp)?;
    // The lock tells a cleaner in another process that this file has a living writer; file systems without locks
    // fall back to the file's age there.
    let _ = fs4::fs_std::FileExt::try_lock_exclusive(&file);
    let mut w = BufWriter::with_capacity(1 << 20, file);
    body(&mut w)?;
    let file = w.into_inner().map_err(|e| e.into_error())?;
    file.sync_all()?;
    Ok(())
}

/// [`write_atomic`] of bytes already in memory.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic(path, |w| Ok(w.write_all(bytes)?))
}

/// Makes a directory and its parents. Errors name the path and the remedy.
pub fn create_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
            UserError::new(format!("{} cannot be a directory: a file is in the way", dir.display()))
                .hint("move that file away, or choose another directory")
                .into()
        }
        _ => explain(e, dir),
    })
}

/// Makes the directory, removes what a killed run left in it, and proves that it can be written to: for the start of
/// a run, so that hours of work do not end at a read-only disk.
pub fn ensure_writable_dir(dir: &Path) -> Result<()> {
    create_dir(dir)?;
    clean_leftovers(dir);
    let probe = dir.join("write-probe");
    let temp = sibling(&probe, TEMP_SUFFIX)?;
    let tried = File::create_new(&temp).and_then(|mut f| f.write_all(b"probe")).map_err(|e| explain(e, dir));
    let _ = std::fs::remove_file(&temp);
    tried
}

/// Bytes that this user may still write on the disk of `path`; `path` itself need not exist yet.
pub fn free_space(path: &Path) -> Result<u64> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let existing = absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    fs4::available_space(existing).with_context(|| format!("cannot ask for the free space of {}", existing.display()))
}

/// Refuses early when `bytes` more will not fit on the disk of `path`; `what` is what they are ("the fp8 cache").
pub fn require_space(path: &Path, bytes: u64, what: &str) -> Result<()> {
    let free = free_space(path)?;
    if bytes <= free {
        return Ok(());
    }
    Err(UserError::new(format!(
        "{what} needs {} on the disk of {}, but only {} are free",
        human(bytes),
        path.display(),
        human(free)
    ))
    .hint("free some space, or choose a directory on another disk")
    .into())
}

/// 1536 -> "1.5 KiB".
pub fn human(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    if unit == 0 {
        format!("{bytes} bytes")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// Turns what the operating system said into a sentence with the path and the remedy.
pub fn explain(e: io::Error, path: &Path) -> anyhow::Error {
    let p = path.display();
    let user = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            let free = free_space(path).map(human).unwrap_or_else(|_| "nothing".into());
            UserError::new(format!("the disk is full: {p} could not be written ({free} free)"))
                .hint("free some space or choose a directory on another disk; no incomplete file was left behind")
        }
        io::ErrorKind::FileTooLarge => UserError::new(format!(
            "{p} could not be written: the file would be larger than this disk or user may hold"
        ))
        .hint("write to another disk, or raise the file size limit (ulimit -f)"),
        io::ErrorKind::ReadOnlyFilesystem => UserError::new(format!("{p} could not be written: the disk is read-only"))
            .hint("choose a directory on a disk that can be written to"),
        io::ErrorKind::PermissionDenied => UserError::new(format!("{p} could not be accessed: permission denied"))
            .hint("change the owner or mode of that path, or choose another one"),
        io::ErrorKind::NotFound => UserError::new(format!("{p} does not exist")).hint("check the spelling of the path"),
        io::ErrorKind::IsADirectory => UserError::new(format!("{p} is a directory, where a file is needed"))
            .hint("remove or rename that directory, or choose another name"),
        io::ErrorKind::NotADirectory => {
            UserError::new(format!("{p}: a part of this path is a file, not a directory")).hint("check the path")
        }
        io::ErrorKind::InvalidFilename => {
            UserError::new(format!("{p}: the file name is too long or not allowed here")).hint("choose a shorter name")
        }
        _ => return anyhow::Error::new(e).context(format!("{p}: input/output failed")),
    };
    user.into()
}

/// [`explain`] for an error that may have an `io::Error` somewhere in its chain; others pass through.
fn explain_any(e: anyhow::Error, path: &Path) -> anyhow::Error {
    if e.downcast_ref::<UserError>().is_some() {
        return e;
    }
    let Some(io) = e.chain().find_map(|c| c.downcast_ref::<io::Error>()) else {
        return e;
    };
    match io.raw_os_error() {
        Some(code) => explain(io::Error::from_raw_os_error(code), path),
        None => e,
    }
}

/// fsync of a directory, so that a rename in it survives a power cut. Not every system can (Windows), nor every file
/// system: there the rename itself has to do.
fn sync_dir(dir: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        match File::open(dir).and_then(|d| d.sync_all()) {
            Err(e) if !matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => return Err(e),
            _ => {}
        }
    }
    let _ = dir;
    Ok(())
}

/// Removes what a killed run left in `dir`: temporary files and directories without a living writer. A directory that
/// was being replaced when the process died gets its name back. Returns how many were cleaned; problems are ignored,
/// since leftovers do no harm.
pub fn clean_leftovers(dir: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let mut cleaned = 0;
    for entry in entries.flatten() {
        let path = entry.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        if !name.starts_with('.') {
            continue;
        }
        if name.ends_with(TEMP_SUFFIX) && is_dead(&path) {
            let gone = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            cleaned += usize::from(gone.is_ok());
        } else if name.ends_with(ASIDE_SUFFIX) {
            cleaned += usize::from(dir::put_back(&path).is_ok());
        }
    }
    cleaned
}

/// Whether nobody is writing this temporary file or directory any more: its lock can be had. One that has just been made
/// and not yet locked is empty, and left alone for a minute.
fn is_dead(path: &Path) -> bool {
    let lock_file = if path.is_dir() { path.join(dir::LOCK) } else { path.to_path_buf() };
    let age = |p: &Path| p.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
    let older_than = |p: &Path, secs| age(p).is_some_and(|a| a > Duration::from_secs(secs));
    let Ok(file) = File::open(&lock_file) else {
        let empty = || std::fs::read_dir(path).is_ok_and(|mut d| d.next().is_none());
        return path.is_dir() && (!empty() || older_than(path, 60));
    };
    match fs4::fs_std::FileExt::try_lock_exclusive(&file) {
        Ok(true) => path.is_dir() || file.metadata().is_ok_and(|m| m.len() > 0) || older_than(path, 60),
        Ok(false) => false,
        // No locks on this file system: a day without a write is dead enough.
        Err(_) => older_than(&lock_file, 24 * 3600),
    }
}

#[cfg(test)]
mod tests;
