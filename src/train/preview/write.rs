//! Previews as files: a PNG for one frame; for more an MP4, or where this program is built without FFmpeg a GIF that moves.

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use image::{ImageEncoder, RgbImage};
use wan_models::vae::{Decoder, Vae};

use crate::fsio;

/// Latents `[1, c, f, h, w]` to pictures, a latent frame at a time; `None` where `go_on`, asked before each, said no.
///
/// Errors: whatever the decoder says; numbers that are not finite.
pub fn decode(vae: &Vae, latents: &Tensor, go_on: &mut dyn FnMut(usize) -> bool) -> Result<Option<Vec<RgbImage>>> {
    let mut decoder = Decoder::new(vae)?;
    let mut frames = Vec::new();
    for f in 0..latents.dim(2)? {
        if !go_on(f) {
            return Ok(None);
        }
        for piece in decoder.push(&latents.narrow(2, f, 1)?.contiguous()?)? {
            let piece = piece.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let thwc = piece.squeeze(0)?.permute((1, 2, 3, 0))?.contiguous()?;
            let (_, h, w, _) = thwc.dims4()?;
            let values = thwc.flatten_all()?.to_vec1::<f32>()?;
            ensure!(values.iter().all(|v| v.is_finite()), "the VAE gave numbers that are not finite");
            let bytes: Vec<u8> = values.iter().map(|v| (v * 127.5 + 127.5).round().clamp(0.0, 255.0) as u8).collect();
            for frame in bytes.chunks(h * w * 3) {
                let picture = RgbImage::from_raw(w as u32, h as u32, frame.to_vec());
                frames.push(picture.context("a decoded frame is smaller than it says")?);
            }
        }
    }
    ensure!(!frames.is_empty(), "a latent without frames");
    Ok(Some(frames))
}

/// A picture as the bytes of a PNG file.
pub fn png(picture: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (w, h) = picture.dimensions();
    image::codecs::png::PngEncoder::new(&mut bytes).write_image(picture, w, h, image::ExtendedColorType::Rgb8)?;
    Ok(bytes)
}

/// Writes the frames under `dir`, whole or not at all; `stem` is the name without its ending. Returns the file.
pub fn write(dir: &Path, stem: &str, frames: &[RgbImage], fps: u32) -> Result<PathBuf> {
    let (name, bytes) = match frames {
        [picture] => (format!("{stem}_000.png"), png(picture)?),
        _ => moving(stem, frames, fps)?,
    };
    let path = dir.join(name);
    fsio::write_bytes(&path, &bytes)?;
    Ok(path)
}

/// What clips become in this build.
pub const MOVING: &str = if cfg!(feature = "video") { "MP4" } else { "GIF" };

#[cfg(feature = "video")]
fn moving(stem: &str, frames: &[RgbImage], fps: u32) -> Result<(String, Vec<u8>)> {
    Ok((format!("{stem}.mp4"), crate::data::video::to_mp4(frames, fps)?))
}

#[cfg(not(feature = "video"))]
fn moving(stem: &str, frames: &[RgbImage], fps: u32) -> Result<(String, Vec<u8>)> {
    Ok((format!("{stem}.gif"), gif(frames, fps)?))
}

/// A GIF that repeats. It counts time in hundredths of a second, so that frames take turns: 16 a second are 6 or 7 each.
#[cfg_attr(feature = "video", allow(dead_code))]
fn gif(frames: &[RgbImage], fps: u32) -> Result<Vec<u8>> {
    use image::codecs::gif::{GifEncoder, Repeat};
    let mut bytes = Vec::new();
    let mut encoder = GifEncoder::new_with_speed(&mut bytes, 10);
    encoder.set_repeat(Repeat::Infinite)?;
    let hundredths = |frame: usize| (frame as u32 * 100 + fps / 2) / fps;
    for (i, frame) in frames.iter().enumerate() {
        let delay = image::Delay::from_numer_denom_ms(10 * (hundredths(i + 1) - hundredths(i)), 1);
        let picture = image::DynamicImage::ImageRgb8(frame.clone()).into_rgba8();
        encoder.encode_frame(image::Frame::from_parts(picture, 0, 0, delay))?;
    }
    drop(encoder);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use image::AnimationDecoder;

    use super::*;

    #[test]
    fn a_gif_keeps_the_rate_over_a_second() {
        let frames: Vec<RgbImage> =
            (0..16u8).map(|i| RgbImage::from_pixel(16, 16, image::Rgb([16 * i, 0, 0]))).collect();
        let bytes = gif(&frames, 16).unwrap();
        let decoder = image::codecs::gif::GifDecoder::new(std::io::Cursor::new(bytes)).unwrap();
        let read = decoder.into_frames().collect_frames().unwrap();
        let length: u32 = read.iter().map(|f| f.delay().numer_denom_ms().0 / f.delay().numer_denom_ms().1).sum();
        assert_eq!((read.len(), length), (16, 1000));
        assert!(read[15].buffer().get_pixel(3, 3).0[0] > 200, "colours survive");
    }
}
