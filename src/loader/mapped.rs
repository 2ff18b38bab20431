//! A file read through a memory mapping, a piece at a time.
//!
//! A mapping that is merely used has two faults. The pages touched count as resident memory of the process until the
//! system wants them back: a checkpoint would be in memory twice by every account that users and containers keep. And a
//! page that the file no longer has, or that the disk cannot give, ends the process with SIGBUS where reading returns an
//! error. So for every piece:
//!
//! 1. the file's length is looked at: a file that was cut is an error;
//! 2. the system brings the piece's pages in (`MADV_POPULATE_READ`, Linux 5.14), which fails where touching them would
//!    kill: then the piece is read by position, and the error is the one that reading gives;
//! 3. the bytes are copied to the memory that the tensor owns;
//! 4. the pages are let go (`MADV_DONTNEED`): on a shared mapping of a file this only empties the page table. The page
//!    cache keeps the data.
//!
//! What remains is the time between 2 and 3, some milliseconds: a file cut by another program just then still ends the
//! process. On network file systems, where a server or another machine can take pages away at any time, files are read by
//! position altogether; so they are where the system refuses a mapping or does not know the call of step 2.

use super::part::read_exact_at;
use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};
use std::fs::File;
use std::io::{Error, ErrorKind, Result};

/// Bytes copied between two looks at the file. Letting pages go interrupts every processor that the process runs on: two
/// threads lost 25 % of their rate to it in pieces of 1 MiB, 5 % in pieces of 16 MiB.
const PIECE: usize = 16 << 20;
/// The most that is asked of the disk in one call: longer wishes are cut off at what it takes at once, 512 KiB or more.
const WISH: usize = 512 << 10;

/// A mapping of a whole file. No reference to its bytes is ever made: they may change under it.
#[derive(Debug)]
pub struct Mapped(MmapRaw);

impl Mapped {
    /// Maps `len` bytes of a file; or why it is to be read by position.
    pub fn of(file: &File, len: u64) -> std::result::Result<Self, String> {
        let len = usize::try_from(len).map_err(|_| "it is larger than the address space")?;
        if len == 0 {
            return Err("it is empty".into());
        }
        let on = rustix::fs::fstatfs(file).map_err(|e| format!("its file system does not say what it is ({e})"))?;
        if let Some(name) = remote(on.f_type as u32) {
            return Err(format!("it is on a file system of the kind {name}"));
        }
        let map = MmapOptions::new().len(len).map_raw_read_only(file).map_err(|e| format!("no mapping ({e})"))?;
        map.advise_range(Advice::PopulateRead, 0, 1).map_err(|e| format!("no pages in advance ({e})"))?;
        let map = Self(map);
        map.release(0, 1);
        Ok(map)
    }

    /// Fills `out` with the file's bytes from `at` on; the whole length was mapped when it was opened.
    ///
    /// Errors: `UnexpectedEof` where the file has become too short, else those of reading by position.
    pub fn read(&self, file: &File, out: &mut [u8], at: u64) -> Result<()> {
        let mut at = at;
        for piece in out.chunks_mut(PIECE) {
            let end = at.checked_add(piece.len() as u64).ok_or(ErrorKind::UnexpectedEof)?;
            if end > file.metadata()?.len() {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            match self.copy(piece, at as usize) {
                Ok(()) => {}
                // Also what the file has gained since it was mapped.
                Err(_) => read_exact_at(file, piece, at)?,
            }
            at = end;
        }
        Ok(())
    }

    /// Errors: pages that cannot be had; then nothing was touched.
    fn copy(&self, out: &mut [u8], at: usize) -> Result<()> {
        if at.checked_add(out.len()).is_none_or(|end| end > self.0.len()) {
            return Err(Error::from(ErrorKind::UnexpectedEof));
        }
        // A fault reads no more ahead than the disk is set to, 128 KiB as a rule: small reads, one after the other, where
        // the file is not in the page cache. A wish that is not granted costs nothing but time.
        for from in (0..out.len()).step_by(WISH) {
            let _ = self.0.advise_range(Advice::WillNeed, at + from, WISH.min(out.len() - from));
        }
        self.0.advise_range(Advice::PopulateRead, at, out.len())?;
        // SAFETY: `at + out.len()` is within the mapping (checked above), which lives as long as `self`; it is read-only
        // and `out` is memory of another's, so they do not overlap. The pages were there just now. Bytes that another
        // program changes meanwhile arrive changed or not, as with any read; there is no reference whose promise they
        // could break.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr().add(at), out.as_mut_ptr(), out.len()) };
        self.release(at, out.len());
        Ok(())
    }

    fn release(&self, at: usize, len: usize) {
        // SAFETY: this is a shared mapping of a file that nothing writes to, so a page that is dropped comes back with
        // the file's bytes; the pages at the ends, which a neighbour may be copying from, too. It fails for locked pages,
        // which then stay.
        let _ = unsafe { self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, at, len) };
    }
}

/// The name of a file system whose pages come from another machine or another program, by its number in
/// `linux/magic.h` (statfs(2)).
fn remote(kind: u32) -> Option<&'static str> {
    Some(match kind {
        0x6969 => "nfs",
        0x517B | 0xFF53_4D42 | 0xFE53_4D42 => "smb",
        0x6573_5546 => "fuse",
        0x0102_1997 => "9p",
        0x00C3_6400 => "ceph",
        0x5346_414F | 0x6B41_4653 => "afs",
        0x7375_7245 => "coda",
        0x0BD0_0BD0 => "lustre",
        0x4750_4653 => "gpfs",
        0x1983_0326 => "beegfs",
        0x0116_1970 => "gfs2",
        0x7461_636F => "ocfs2",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// What a mapping does not reach is read by position, from its own piece on.
    #[test]
    fn pages_that_cannot_be_had_are_read_by_position() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..50_000u32).map(|i| (i % 251) as u8).collect();
        file.write_all(&bytes[..10_000]).unwrap();
        let mapped = Mapped::of(&file, 10_000).unwrap();
        file.write_all(&bytes[10_000..]).unwrap();
        for (at, len) in [(0, 10_000), (9_000, 20_000), (40_000, 10_000)] {
            let mut out = vec![0u8; len];
            assert_eq!(mapped.copy(&mut out, at).is_ok(), at + len <= 10_000);
            out.fill(0);
            mapped.read(&file, &mut out, at as u64).unwrap();
            assert!(out == bytes[at..at + len]);
        }
        let past = mapped.read(&file, &mut [0; 10], 49_995).unwrap_err();
        assert_eq!(past.kind(), ErrorKind::UnexpectedEof);
        assert_eq!(mapped.read(&file, &mut [0; 10], u64::MAX - 3).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    /// The system says of pages behind the end that they cannot be had, instead of a signal when they are touched.
    #[test]
    fn pages_of_a_file_that_was_cut_are_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 1 << 20]).unwrap();
        let mapped = Mapped::of(&file, 1 << 20).unwrap();
        file.set_len(5_000).unwrap();
        let mut out = vec![0; 1 << 20];
        assert!(mapped.copy(&mut out, 0).is_err());
        assert!(out.iter().all(|b| *b == 0), "nothing was touched");
        mapped.copy(&mut out[..5_000], 0).unwrap();
        assert!(out[..5_000].iter().all(|b| *b == 7));
    }
}
