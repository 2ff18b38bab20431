//! Frames to an MP4 in memory: H.264 where the linked FFmpeg has libx264, else MPEG-4 part 2.

use std::io::{Cursor, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{anyhow, ensure, Result};
use ffmpeg_next as ff;
use ffmpeg_next::format::context::{Output, StreamIo};
use ffmpeg_next::software::scaling;
use ffmpeg_next::util::format::Pixel;
use image::RgbImage;

use super::ffmpeg;

/// Bits a second, as the old trainer writes its samples.
const BIT_RATE: usize = 4_000_000;

/// What FFmpeg writes into, and whoever has started it reads afterwards.
#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Cursor<Vec<u8>>>>);

impl Buffer {
    fn with<T>(&self, body: impl FnOnce(&mut Cursor<Vec<u8>>) -> T) -> T {
        body(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.with(|cursor| cursor.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Seek for Buffer {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.with(|cursor| cursor.seek(to))
    }
}

/// The bytes of an MP4 file of frames of one size, whose sides are even.
pub fn to_mp4(frames: &[RgbImage], fps: u32) -> Result<Vec<u8>> {
    ffmpeg::ready()?;
    let codec = ff::encoder::find_by_name("libx264").or_else(|| ff::encoder::find(ff::codec::Id::MPEG4));
    encode(frames, fps, codec.ok_or_else(|| anyhow!("this FFmpeg has no encoder for MP4 (libx264 or mpeg4)"))?)
}

fn encode(frames: &[RgbImage], fps: u32, codec: ff::Codec) -> Result<Vec<u8>> {
    let (w, h) = frames.first().map(RgbImage::dimensions).unwrap_or_default();
    ensure!(w > 0 && h > 0 && w % 2 == 0 && h % 2 == 0 && fps > 0, "{w}x{h} at {fps} a second is no video");
    let said = |what: &'static str| move |e: ff::Error| anyhow!("{what}: {e}");
    let buffer = Buffer::default();
    let stream = StreamIo::from_write_seek(buffer.clone()).map_err(said("no video can be written"))?;
    let mut output = ff::format::output_to_stream(stream, None, Some("mp4")).map_err(said("no MP4 can be written"))?;
    let tick = ff::Rational::new(1, fps as i32);
    let mut encoder =
        ff::codec::Context::new_with_codec(codec).encoder().video().map_err(said("the encoder cannot be set up"))?;
    encoder.set_width(w);
    encoder.set_height(h);
    encoder.set_format(Pixel::YUV420P);
    encoder.set_time_base(tick);
    encoder.set_frame_rate(Some(tick.invert()));
    encoder.set_bit_rate(BIT_RATE);
    if output.format().flags().contains(ff::format::Flags::GLOBAL_HEADER) {
        encoder.set_flags(ff::codec::Flags::GLOBAL_HEADER);
    }
    let mut encoder = encoder.open_as(codec).map_err(said("the encoder cannot be opened"))?;
    let mut track = output.add_stream(codec).map_err(said("the file cannot take a video"))?;
    track.set_parameters(&encoder);
    track.set_time_base(tick);
    track.set_avg_frame_rate(tick.invert());
    output.write_header().map_err(said("the header cannot be written"))?;

    let mut scaler = scaling::Context::get(Pixel::RGB24, w, h, Pixel::YUV420P, w, h, scaling::Flags::BILINEAR)
        .map_err(said("RGB cannot be converted to YUV"))?;
    let mut rgb = ff::frame::Video::new(Pixel::RGB24, w, h);
    for (i, frame) in frames.iter().enumerate() {
        ensure!(frame.dimensions() == (w, h), "frames of different sizes");
        let stride = rgb.stride(0);
        for (to, from) in rgb.data_mut(0).chunks_mut(stride).zip(frame.as_raw().chunks(3 * w as usize)) {
            to[..from.len()].copy_from_slice(from);
        }
        let mut yuv = ff::frame::Video::empty();
        scaler.run(&rgb, &mut yuv).map_err(said("a frame cannot be converted"))?;
        yuv.set_pts(Some(i as i64));
        encoder.send_frame(&yuv).map_err(said("a frame cannot be encoded"))?;
        drain(&mut encoder, &mut output, tick)?;
    }
    encoder.send_eof().map_err(said("the last frame cannot be encoded"))?;
    drain(&mut encoder, &mut output, tick)?;
    output.write_trailer().map_err(said("the file cannot be finished"))?;
    drop(output);
    Ok(buffer.with(|cursor| std::mem::take(cursor.get_mut())))
}

/// Passes on what the encoder has ready.
fn drain(encoder: &mut ff::encoder::Video, output: &mut Output, tick: ff::Rational) -> Result<()> {
    let ticks = output.stream(0).map_or(tick, |track| track.time_base());
    let mut packet = ff::Packet::empty();
    loop {
        match encoder.receive_packet(&mut packet) {
            Ok(()) => {
                packet.set_stream(0);
                packet.set_duration(1);
                packet.rescale_ts(tick, ticks);
                packet.write_interleaved(output).map_err(|e| anyhow!("a frame cannot be written: {e}"))?;
            }
            Err(ff::Error::Eof) => return Ok(()),
            Err(ff::Error::Other { errno }) if errno == ff::error::EAGAIN => return Ok(()),
            Err(e) => return Err(anyhow!("a frame cannot be encoded: {e}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::video;

    #[test]
    fn what_is_written_is_read_back_at_its_rate() {
        let frames: Vec<RgbImage> =
            (0..9u8).map(|i| RgbImage::from_fn(48, 32, |x, _| image::Rgb([25 * i, 5 * x as u8, 120]))).collect();
        let dir = tempfile::tempdir().unwrap();
        ffmpeg::ready().unwrap();
        let names = ["libx264", "mpeg4"];
        let codecs: Vec<_> = names.iter().filter_map(|name| ff::encoder::find_by_name(name)).collect();
        assert!(!codecs.is_empty());
        for (codec, fps) in codecs.into_iter().flat_map(|codec| [(codec, 16), (codec, 24)]) {
            let path = dir.path().join("a.mp4");
            std::fs::write(&path, encode(&frames, fps, codec).unwrap()).unwrap();
            let facts = video::probe(&path, true, true).unwrap();
            assert_eq!((facts.size, facts.frames, facts.fps, facts.variable), ((48, 32), 9, Some(fps.into()), None));
            let mut reader = video::Reader::open(&path, true, true).unwrap();
            for frame in &frames {
                assert!(reader.advance().unwrap().is_some());
                let (got, want) = (reader.picture().unwrap(), frame);
                let far: u64 = got.as_raw().iter().zip(want.as_raw()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
                assert!(far / (got.as_raw().len() as u64) < 12, "{far}");
            }
            assert!(reader.advance().unwrap().is_none());
        }
        assert!(to_mp4(&[], 16).is_err());
        assert!(to_mp4(&[RgbImage::new(15, 16)], 16).is_err());
    }
}
