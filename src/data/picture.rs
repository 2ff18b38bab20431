//! One still picture from a file: 8-bit RGB, upright, whatever the file holds.
//!
//! Alpha is dropped, not composited, 16 bits become 8, grey, palettes and CMYK become RGB; of an animation the first
//! frame counts. Errors say what is wrong with the file but not its name, which the caller knows.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{anyhow, bail, Context, Result};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageReader, Limits, RgbImage};

/// Extensions of pictures; those from the seventh on the old tool does not list.
pub const EXTENSIONS: [&str; 12] =
    ["png", "jpg", "jpeg", "webp", "bmp", "avif", "gif", "tif", "tiff", "jxl", "heic", "heif"];
/// How many of [`EXTENSIONS`] the old tool lists.
pub const OLD_EXTENSIONS: usize = 6;
/// More pixels than this are taken for a decompression bomb (Pillow's limit).
const MOST_PIXELS: u64 = 178_956_970;
const MOST_BYTES: u64 = 1 << 30;

/// Width and height as shown. `upright`: honour the EXIF orientation.
pub fn probe(path: &Path, upright: bool) -> Result<(u32, u32)> {
    if needs_ffmpeg(path)? {
        return Ok(through_ffmpeg(path)?.dimensions());
    }
    let file = fs::File::open(path)?;
    let mut decoder = open(std::io::BufReader::new(file))?;
    let (w, h) = decoder.dimensions();
    check_pixels(w, h)?;
    Ok(match upright && turns(decoder.orientation().unwrap_or(Orientation::NoTransforms)) {
        true => (h, w),
        false => (w, h),
    })
}

/// The picture. `upright`: honour the EXIF orientation.
pub fn read(path: &Path, upright: bool) -> Result<RgbImage> {
    if needs_ffmpeg(path)? {
        return through_ffmpeg(path);
    }
    let bytes = fs::read(path)?;
    if bytes.starts_with(&[0xff, 0xd8]) && !jpeg_is_complete(&bytes) {
        bail!("the file is truncated: its end marker is missing");
    }
    let mut decoder = open(Cursor::new(bytes))?;
    let (w, h) = decoder.dimensions();
    check_pixels(w, h)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut picture = DynamicImage::from_decoder(decoder).map_err(readable)?;
    if upright {
        picture.apply_orientation(orientation);
    }
    Ok(picture.into_rgb8())
}

/// Whether width and height change places.
pub fn turns(orientation: Orientation) -> bool {
    use Orientation::*;
    matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

fn open<'a, R: std::io::BufRead + std::io::Seek + 'a>(reader: R) -> Result<impl ImageDecoder + 'a> {
    let mut reader = ImageReader::new(reader).with_guessed_format()?;
    if reader.format().is_none() {
        bail!("the file holds no picture of a known format");
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(65_535);
    limits.max_image_height = Some(65_535);
    limits.max_alloc = Some(MOST_BYTES);
    reader.limits(limits);
    reader.into_decoder().map_err(readable)
}

fn check_pixels(w: u32, h: u32) -> Result<()> {
    if w == 0 || h == 0 {
        bail!("the picture is empty ({w}x{h})");
    }
    if u64::from(w) * u64::from(h) > MOST_PIXELS {
        bail!("{w}x{h} are too many pixels (at most {MOST_PIXELS}); scale it down");
    }
    Ok(())
}

/// Empty and huge files are refused here; true for the formats that only FFmpeg may read.
fn needs_ffmpeg(path: &Path) -> Result<bool> {
    let size = fs::metadata(path)?.len();
    if size == 0 {
        bail!("the file is empty (0 bytes)");
    }
    if size > MOST_BYTES {
        bail!("the file is too large for a picture ({} MiB)", size >> 20);
    }
    let mut head = [0u8; 16];
    let n = std::io::Read::read(&mut fs::File::open(path)?, &mut head)?;
    Ok(boxed_format(&head[..n]).is_some())
}

/// AVIF, HEIF and JPEG XL by their first bytes.
fn boxed_format(head: &[u8]) -> Option<&'static str> {
    match head {
        [_, _, _, _, b'f', b't', b'y', b'p', b'a', b'v', b'i', b'f' | b's', ..] => Some("AVIF"),
        [_, _, _, _, b'f', b't', b'y', b'p', b'h', b'e', b'i' | b'v', _, ..] => Some("HEIF"),
        [_, _, _, _, b'f', b't', b'y', b'p', b'm', b'i' | b's', b'f', b'1', ..] => Some("HEIF"),
        [0xff, 0x0a, ..] | [0, 0, 0, 0x0c, b'J', b'X', b'L', b' ', ..] => Some("JPEG XL"),
        _ => None,
    }
}

fn through_ffmpeg(path: &Path) -> Result<RgbImage> {
    let head = fs::read(path)?;
    let format = boxed_format(&head).unwrap_or("this");
    let picture = super::video::first_frame(path)
        .with_context(|| format!("{format} pictures cannot be read here; convert it to PNG or JPEG"))?;
    check_pixels(picture.width(), picture.height())?;
    Ok(picture)
}

/// One short sentence instead of the library's error chain.
fn readable(error: ImageError) -> anyhow::Error {
    match error {
        ImageError::Limits(_) => anyhow!("the picture is too large to be decoded"),
        ImageError::Unsupported(e) => anyhow!("the file is of a kind that cannot be read ({e}); convert it to PNG"),
        ImageError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => anyhow!("the file is truncated"),
        ImageError::IoError(e) => anyhow!("the file cannot be read: {e}"),
        other => anyhow!("the file is damaged: {other}"),
    }
}

/// Whether the end marker is reached. The decoder fills what is missing with grey and says nothing.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[0xff, marker]) = bytes.get(at..at + 2) {
        match marker {
            0xd9 => return true,
            0xff => at += 1,
            0x01 | 0xd0..=0xd8 => at += 2,
            _ => {
                let Some(&[high, low]) = bytes.get(at + 2..at + 4) else { return false };
                at += 2 + (usize::from(high) << 8 | usize::from(low)).max(2);
                if marker == 0xda {
                    // Entropy-coded data: up to the next marker that is neither a stuffed byte nor a restart.
                    let rest = bytes.get(at..).unwrap_or_default();
                    match rest.windows(2).position(|w| w[0] == 0xff && !matches!(w[1], 0 | 0xd0..=0xd7 | 0xff)) {
                        Some(n) => at += n,
                        None => return false,
                    }
                }
            }
        }
    }
    // Garbage between segments: leave the verdict to the decoder, as long as there is an end marker at all.
    at < bytes.len() && bytes[at..].windows(2).any(|w| w == [0xff, 0xd9])
}
