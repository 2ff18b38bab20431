//! Video files through FFmpeg, one frame at a time. Built with feature `video`; without it every call says so.
//!
//! Errors say what is wrong with the file but not its name, which the caller knows.

/// Extensions of videos; those from the eleventh on the old tool does not list.
pub const EXTENSIONS: [&str; 17] = [
    "mp4", "webm", "avi", "mkv", "mov", "flv", "wmv", "m4v", "mpg", "mpeg", "gif", "ts", "mts", "m2ts", "3gp", "ogv",
    "apng",
];
/// How many of [`EXTENSIONS`] the old tool lists.
pub const OLD_EXTENSIONS: usize = 10;

#[cfg(feature = "video")]
pub use super::ffmpeg::{first_frame, probe, read_through, Reader};
#[cfg(feature = "video")]
pub use super::mp4::to_mp4;
#[cfg(not(feature = "video"))]
pub use missing::{first_frame, probe, read_through, Reader};

/// What the container tells, see [`super::Probe`]; `notes` are worth a line in the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    pub size: (u32, u32),
    pub frames: usize,
    pub fps: Option<f64>,
    /// Length in seconds, where timestamps are uneven and were asked for.
    pub variable: Option<f64>,
    pub notes: Vec<String>,
}

#[cfg(not(feature = "video"))]
mod missing {
    use std::path::Path;

    use anyhow::{bail, Result};
    use image::RgbImage;

    use super::Facts;
    use crate::data::frames::Span;

    const WHY: &str = "this program was built without video support (feature `video`)";

    pub fn probe(_path: &Path, _upright: bool, _timing: bool) -> Result<Facts> {
        bail!(WHY)
    }

    pub fn read_through(_path: &Path) -> Result<()> {
        bail!(WHY)
    }

    pub fn first_frame(_path: &Path) -> Result<RgbImage> {
        bail!(WHY)
    }

    /// Cannot be made.
    pub enum Reader {}

    impl Reader {
        pub fn open(_path: &Path, _upright: bool, _tagged_colour: bool) -> Result<Self> {
            bail!(WHY)
        }

        pub fn size(&self) -> Result<(u32, u32)> {
            match *self {}
        }

        pub fn advance(&mut self) -> Result<Option<Span>> {
            match *self {}
        }

        pub fn picture(&mut self) -> Result<RgbImage> {
            match *self {}
        }
    }
}
