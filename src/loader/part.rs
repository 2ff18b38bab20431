//! One file of a checkpoint, and the two ways to its bytes.

use super::header;
use crate::error::UserError;
use crate::fsio;
use anyhow::Result;
use std::fs::File;
use std::path::{Path, PathBuf};

#[cfg(target_os = "linux")]
use super::mapped::Mapped;

/// How the bytes of a file come into memory of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reading {
    /// Copied from a mapping of the file, where the system and the file's place allow one; else by position.
    #[default]
    Mapped,
    /// By position alone (`--disable_numpy_memmap`).
    Positional,
}

/// One open file.
#[derive(Debug)]
pub(super) struct Part {
    pub path: PathBuf,
    pub len: u64,
    file: File,
    /// `None` where it is read by position.
    mapped: Option<Mapped>,
}

pub(super) const AGAIN: &str = "download the file again, and compare its size with the one shown where it came from";

pub(super) fn refuse(path: &Path, why: impl std::fmt::Display, hint: &str) -> anyhow::Error {
    UserError::new(format!("{} cannot be loaded: {why}", path.display())).hint(hint).into()
}

impl Part {
    /// Opens a file. One that cannot be mapped is read by position, which `RUST_LOG=debug` tells with the reason.
    ///
    /// Errors: no such file, no right to read it, a directory.
    pub fn open(path: PathBuf, reading: Reading) -> Result<Self> {
        let file = File::open(&path).map_err(|e| fsio::explain(e, &path))?;
        let meta = file.metadata().map_err(|e| fsio::explain(e, &path))?;
        if meta.is_dir() {
            return Err(refuse(&path, "it is a directory", "name the file itself"));
        }
        let mapped = match reading {
            Reading::Mapped => Mapped::of(&file, meta.len()),
            Reading::Positional => Err("as asked".into()),
        };
        let mapped = mapped.inspect_err(|why| tracing::debug!("{} is read by position: {why}", path.display())).ok();
        Ok(Self { path, len: meta.len(), file, mapped })
    }

    pub fn is_mapped(&self) -> bool {
        self.mapped.is_some()
    }

    /// Fills `out` with the bytes from `at` on.
    ///
    /// Errors: the file became shorter than that; the system cannot read it.
    pub fn read_at(&self, out: &mut [u8], at: u64) -> Result<()> {
        let result = match &self.mapped {
            Some(mapped) => mapped.read(&self.file, out, at),
            None => read_exact_at(&self.file, out, at),
        };
        result.map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                refuse(&self.path, "it ended early: it became shorter while in use", AGAIN)
            }
            _ => fsio::explain(e, &self.path),
        })
    }

    pub fn safetensors(&self) -> std::result::Result<header::Header, String> {
        let words = |e: anyhow::Error| e.to_string();
        let mut first = [0u8; 8];
        self.read_at(&mut first, 0).map_err(words)?;
        let n = header::header_len(first, self.len)?;
        let mut text = vec![0u8; n as usize];
        self.read_at(&mut text, 8).map_err(words)?;
        header::parse(&text, self.len)
    }
}

#[cfg(unix)]
pub(super) fn read_exact_at(file: &File, out: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, at)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => (out, at) = (&mut out[n..], at + n as u64),
        }
    }
    Ok(())
}

/// Other systems have no call that brings pages in and fails where touching them would end the process.
#[cfg(not(target_os = "linux"))]
#[derive(Debug)]
enum Mapped {}

#[cfg(not(target_os = "linux"))]
impl Mapped {
    fn of(_: &File, _: u64) -> std::result::Result<Self, String> {
        Err("files are mapped on Linux only".into())
    }

    fn read(&self, _: &File, _: &mut [u8], _: u64) -> std::io::Result<()> {
        match *self {}
    }
}
