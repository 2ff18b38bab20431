//! What a file is, cheaply: identities of media and of model weights.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A medium as it was when something was made from it. Size and time are compared first; only when they differ, or when
/// they were taken too soon after a write to be trusted, is the content read again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceId {
    /// File name, or name of a directory of frames; no path, so that a data set can move.
    pub name: String,
    /// Bytes; of a directory, all its files together.
    pub size: u64,
    /// Last change in nanoseconds since 1970; of a directory, that of its newest file.
    pub mtime_ns: u64,
    /// SHA-256 of the content; of a directory, of its files' names and contents in order of name.
    pub sha256: String,
}

/// Clocks of file systems tick as coarsely as this; a change within the tick leaves the time as it was.
const TICK: Duration = Duration::from_secs(2);

impl SourceId {
    /// Reads the whole medium.
    pub fn of(path: &Path) -> io::Result<Self> {
        let (size, mtime_ns) = stat(path)?;
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { name, size, mtime_ns, sha256: content_hash(path)? })
    }

    /// `None` if `path` still is this medium, else what differs. `made_ns`: when the identity was taken.
    pub fn difference(&self, path: &Path, made_ns: u64) -> Option<String> {
        let shown = path.display();
        if path.file_name().map(|n| n.to_string_lossy()) != Some(self.name.as_str().into()) {
            return Some(format!("made from {}, not from this file", self.name));
        }
        let (size, mtime_ns) = match stat(path) {
            Ok(found) => found,
            Err(e) => return Some(format!("{shown} cannot be read ({e})")),
        };
        if size != self.size {
            return Some(format!("{} has changed: {} bytes, were {}", self.name, size, self.size));
        }
        let settled = self.mtime_ns.saturating_add(TICK.as_nanos() as u64) <= made_ns;
        if mtime_ns == self.mtime_ns && settled {
            return None;
        }
        match content_hash(path) {
            Ok(hash) if hash == self.sha256 => None,
            Ok(_) => Some(format!("the content of {} has changed", self.name)),
            Err(e) => Some(format!("{shown} cannot be read ({e})")),
        }
    }
}

/// Files of a medium: itself, or those of a directory of frames, in order of name.
fn files_of(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Size and time of last change (nanoseconds since 1970).
fn stat(path: &Path) -> io::Result<(u64, u64)> {
    let (mut size, mut newest) = (0, 0);
    for file in files_of(path)? {
        let meta = fs::metadata(file)?;
        size += meta.len();
        newest = newest.max(nanoseconds(meta.modified()?));
    }
    Ok((size, newest))
}

/// Nanoseconds since 1970; 0 for times before.
pub fn nanoseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

fn content_hash(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    let is_dir = fs::metadata(path)?.is_dir();
    for file in files_of(path)? {
        if is_dir {
            let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            hash.update(name.as_bytes());
            hash.update(fs::metadata(&file)?.len().to_le_bytes());
        }
        io::copy(&mut File::open(&file)?, &mut hash)?;
    }
    Ok(hex(&hash.finalize()))
}

pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Bytes hashed at the start of a weight file: the whole header of a safetensors file, the directory of many others.
const HEAD: u64 = 1 << 20;
/// Samples taken over the rest, and their size.
const SAMPLES: u64 = 64;
const SAMPLE: u64 = 16 << 10;

/// Tells model weights apart without reading them whole (2 MiB of each file): SHA-256 over each file's size, its first
/// MiB, 64 samples of 16 KiB spread evenly over it and its last 16 KiB. A directory stands for the weight files in it,
/// in order of name. Paths and times do not enter, so a moved model keeps its fingerprint; an edit that leaves the size
/// alone and misses every sample is not seen.
pub fn of_weights(paths: &[PathBuf]) -> io::Result<String> {
    let mut hash = Sha256::new();
    for path in paths {
        let weights = |p: &PathBuf| {
            let extension = p.extension().and_then(|e| e.to_str()).unwrap_or_default();
            ["safetensors", "pth", "pt", "bin", "ckpt"].contains(&extension)
        };
        let is_dir = fs::metadata(path)?.is_dir();
        for file in files_of(path)?.into_iter().filter(|p| !is_dir || weights(p)) {
            sample(&file, &mut hash)?;
        }
    }
    Ok(hex(&hash.finalize()[..16]))
}

fn sample(path: &Path, hash: &mut Sha256) -> io::Result<()> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    hash.update(size.to_le_bytes());
    let mut feed = |from: u64, length: u64| -> io::Result<()> {
        file.seek(SeekFrom::Start(from))?;
        io::copy(&mut (&mut file).take(length), hash).map(|_| ())
    };
    feed(0, HEAD)?;
    if size > HEAD {
        let rest = size - HEAD;
        for i in 0..SAMPLES {
            feed(HEAD + (rest as u128 * u128::from(i) / u128::from(SAMPLES)) as u64, SAMPLE)?;
        }
        feed(size.saturating_sub(SAMPLE), SAMPLE)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn later() -> u64 {
        nanoseconds(SystemTime::now() + Duration::from_secs(3600))
    }

    #[test]
    fn a_touched_file_is_the_same_and_a_changed_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        fs::write(&path, b"first").unwrap();
        let id = SourceId::of(&path).unwrap();
        assert_eq!(id.difference(&path, later()), None);

        File::options().write(true).open(&path).unwrap().set_modified(UNIX_EPOCH + Duration::from_secs(1)).unwrap();
        assert_eq!(id.difference(&path, later()), None, "a touch changes nothing");
        fs::write(&path, b"other").unwrap();
        assert_eq!(id.difference(&path, later()).unwrap(), "the content of a.png has changed");
        fs::write(&path, b"longer than before").unwrap();
        assert!(id.difference(&path, later()).unwrap().contains("18 bytes, were 5"));
        fs::remove_file(&path).unwrap();
        assert!(id.difference(&path, later()).unwrap().contains("cannot be read"));
    }

    /// Same size, same time, other content: trusted only if the identity was taken well after that time.
    #[test]
    fn a_change_within_the_clock_tick_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        fs::write(&path, b"first").unwrap();
        let id = SourceId::of(&path).unwrap();
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, b"other").unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        assert_eq!(id.difference(&path, id.mtime_ns + 1).unwrap(), "the content of a.png has changed");
    }

    #[test]
    fn a_directory_of_frames_is_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let frames = dir.path().join("clip");
        fs::create_dir(&frames).unwrap();
        fs::write(frames.join("2.png"), b"two").unwrap();
        fs::write(frames.join("1.png"), b"one").unwrap();
        let id = SourceId::of(&frames).unwrap();
        assert_eq!(id.size, 6);
        assert_eq!(id.difference(&frames, later()), None);
        fs::rename(frames.join("2.png"), frames.join("3.png")).unwrap();
        let again = SourceId::of(&frames).unwrap();
        assert_ne!(id.sha256, again.sha256, "frame names set the order");
    }

    #[test]
    fn weights_are_told_apart_by_size_head_and_samples() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vae.safetensors");
        let mut bytes = vec![7u8; 3 << 20];
        let mut prints = Vec::new();
        let mut print = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            prints.push(of_weights(std::slice::from_ref(&path)).unwrap());
        };
        print(&bytes);
        print(&bytes);
        bytes[100] = 8;
        print(&bytes);
        *bytes.last_mut().unwrap() = 8;
        print(&bytes);
        bytes.push(1);
        print(&bytes);
        assert_eq!(prints[0], prints[1]);
        let unique: std::collections::BTreeSet<&String> = prints.iter().collect();
        assert_eq!(unique.len(), 4);
        fs::write(dir.path().join("readme.md"), b"not weights").unwrap();
        assert_eq!(of_weights(&[dir.path().to_path_buf()]).unwrap(), prints[4]);
    }
}
