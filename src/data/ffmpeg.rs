//! Demultiplexing and decoding through FFmpeg; `mp4` beside it encodes. Nobody else calls it.
//!
//! Errors say what is wrong with the file but not its name, which the caller knows.

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{anyhow, bail, Result};
use ffmpeg_next as ff;
use ffmpeg_next::software::scaling;
use ffmpeg_next::util::{color, format::Pixel};
use image::metadata::Orientation;
use image::{DynamicImage, RgbImage};

use super::frames::Span;
use super::picture::turns;
use super::video::Facts;

/// 8K in either direction, and more than any training resolution.
const MOST_PIXELS: u64 = 8192 * 8192;

/// Starts FFmpeg, once, and silences it.
pub fn ready() -> Result<()> {
    static READY: OnceLock<bool> = OnceLock::new();
    let ready = *READY.get_or_init(|| {
        ff::log::set_level(ff::log::Level::Quiet);
        ff::init().is_ok()
    });
    if !ready {
        bail!("FFmpeg cannot be started");
    }
    Ok(())
}

fn open(path: &Path) -> Result<ff::format::context::Input> {
    ready()?;
    if path.metadata()?.len() == 0 {
        bail!("the file is empty (0 bytes)");
    }
    // An absolute path has no "scheme:" that FFmpeg could mistake for a protocol, and a playlist inside the file
    // must not reach for the network.
    let absolute = std::path::absolute(path)?;
    if absolute.to_str().is_none() {
        bail!("the file name is not UTF-8; rename it");
    }
    let mut options = ff::Dictionary::new();
    options.set("protocol_whitelist", "file");
    ff::format::input_with_dictionary(&absolute, options)
        .map_err(|e| anyhow!("the file cannot be opened as a video: {e}"))
}

/// Rotation or mirroring, from the display matrix of the stream.
fn orientation(stream: &ff::format::stream::Stream<'_>) -> Orientation {
    let matrix = stream.side_data().find(|d| d.kind() == ff::codec::packet::side_data::Type::DisplayMatrix);
    let Some(matrix) = matrix.filter(|d| d.data().len() >= 36) else { return Orientation::NoTransforms };
    let at = |i: usize| {
        let bytes = [0, 1, 2, 3].map(|b| matrix.data()[i * 4 + b]);
        i64::from(i32::from_ne_bytes(bytes)).signum() * i64::from(i32::from_ne_bytes(bytes).unsigned_abs() > 1 << 14)
    };
    // x' = a·x + c·y, y' = b·x + d·y, with y pointing down; entries are 16.16 fixed point.
    match (at(0), at(1), at(3), at(4)) {
        (0, 1, -1, 0) => Orientation::Rotate90,
        (-1, 0, 0, -1) => Orientation::Rotate180,
        (0, -1, 1, 0) => Orientation::Rotate270,
        (-1, 0, 0, 1) => Orientation::FlipHorizontal,
        (1, 0, 0, -1) => Orientation::FlipVertical,
        (0, 1, 1, 0) => Orientation::Rotate90FlipH,
        (0, -1, -1, 0) => Orientation::Rotate270FlipH,
        _ => Orientation::NoTransforms,
    }
}

fn positive(r: ff::Rational) -> Option<f64> {
    (r.numerator() > 0 && r.denominator() > 0).then(|| f64::from(r))
}

/// The best video stream, opened for decoding.
struct Opened {
    input: ff::format::context::Input,
    decoder: ff::decoder::Video,
    stream: usize,
    /// Seconds a tick.
    tick: f64,
    orientation: Orientation,
    fps: Option<f64>,
    /// As the container tells; 0 where it does not.
    frames: usize,
    /// Seconds, of this stream.
    duration: Option<f64>,
    /// The index of the file (MP4 and MOV have a complete one) knows one frame rate only.
    even: bool,
}

impl Opened {
    fn new(path: &Path, upright: bool) -> Result<Self> {
        let input = open(path)?;
        let stream =
            input.streams().best(ff::media::Type::Video).ok_or_else(|| anyhow!("the file has no video stream"))?;
        let tick = f64::from(stream.time_base());
        let mut context = ff::codec::context::Context::from_parameters(stream.parameters())
            .map_err(|e| anyhow!("the video's codec cannot be set up: {e}"))?;
        context.set_threading(ff::threading::Config {
            kind: ff::threading::Type::Frame,
            count: std::thread::available_parallelism().map_or(1, |n| n.get().min(8)),
            ..Default::default()
        });
        let mut decoder = context.decoder();
        decoder.set_packet_time_base(stream.time_base());
        let decoder =
            decoder.video().map_err(|e| anyhow!("the video's codec cannot be decoded by this FFmpeg: {e}"))?;
        Ok(Self {
            stream: stream.index(),
            tick,
            orientation: if upright { orientation(&stream) } else { Orientation::NoTransforms },
            fps: positive(stream.avg_frame_rate()).or_else(|| positive(stream.rate())),
            frames: usize::try_from(stream.frames()).unwrap_or(0),
            duration: stream_duration(&stream, tick),
            even: stream.frames() > 0
                && input.format().name().contains("mp4")
                && stream.avg_frame_rate() == stream.rate(),
            decoder,
            input,
        })
    }

    fn size(&self) -> Result<(u32, u32)> {
        let (w, h) = (self.decoder.width(), self.decoder.height());
        if w == 0 || h == 0 {
            bail!("the video has no picture size: the file is damaged");
        }
        Ok(if turns(self.orientation) { (h, w) } else { (w, h) })
    }

    /// The next packet of the stream; `None` at the end of the file.
    fn packet(&mut self) -> Result<Option<ff::Packet>> {
        loop {
            let mut packet = ff::Packet::empty();
            match packet.read(&mut self.input) {
                Ok(()) if packet.stream() == self.stream => return Ok(Some(packet)),
                Ok(()) => {}
                Err(ff::Error::Eof) => return Ok(None),
                Err(e) => bail!("the file is damaged or truncated: {e}"),
            }
        }
    }
}

/// Matroska tells a stream's length in a tag only.
fn stream_duration(stream: &ff::format::stream::Stream<'_>, tick: f64) -> Option<f64> {
    if stream.duration() > 0 {
        return Some(stream.duration() as f64 * tick);
    }
    let metadata = stream.metadata();
    let mut parts = metadata.get("DURATION")?.splitn(3, ':').map(str::parse::<f64>);
    match (parts.next()?, parts.next()?, parts.next()?) {
        (Ok(h), Ok(m), Ok(s)) => Some((h * 60.0 + m) * 60.0 + s),
        _ => None,
    }
}

/// Size, frames and rate. `timing`: find out whether the frame rate is uneven, reading all packets if need be.
pub fn probe(path: &Path, upright: bool, timing: bool) -> Result<Facts> {
    let mut opened = Opened::new(path, upright)?;
    let mut facts =
        Facts { size: opened.size()?, frames: opened.frames, fps: opened.fps, variable: None, notes: vec![] };
    let timing = timing && !opened.even;
    if timing || facts.frames == 0 {
        let stamps = packet_times(&mut opened)?;
        facts.frames = stamps.count;
        if timing {
            facts.variable = stamps.variable();
        }
    }
    let aspect = opened.decoder.aspect_ratio();
    if positive(aspect).is_some_and(|a| (a - 1.0).abs() > 1e-3) {
        let note = "its pixels are not square ({}:{}), which is not corrected";
        let note = note.replacen("{}", &aspect.numerator().to_string(), 1);
        facts.notes.push(note.replacen("{}", &aspect.denominator().to_string(), 1));
    }
    use color::TransferCharacteristic::{ARIB_STD_B67, SMPTE2084};
    if matches!(opened.decoder.color_transfer_characteristic(), SMPTE2084 | ARIB_STD_B67) {
        facts.notes.push("it is HDR, which is not tone-mapped: colours will look flat".into());
    }
    Ok(facts)
}

struct PacketTimes {
    count: usize,
    /// Seconds, ascending, from 0; empty where any is unknown.
    stamps: Vec<f64>,
}

fn packet_times(opened: &mut Opened) -> Result<PacketTimes> {
    let (mut count, mut known, mut stamps) = (0, true, Vec::new());
    while let Some(packet) = opened.packet()? {
        match packet.pts() {
            // Before the start of an edit list: decoded but not shown.
            Some(pts) if pts < 0 => continue,
            Some(pts) => stamps.push(pts as f64 * opened.tick),
            None => known = false,
        }
        count += 1;
    }
    stamps.sort_by(f64::total_cmp);
    let first = stamps.first().copied().unwrap_or(0.0);
    stamps.iter_mut().for_each(|t| *t -= first);
    if !known {
        stamps.clear();
    }
    Ok(PacketTimes { count, stamps })
}

impl PacketTimes {
    /// The length in seconds, if some frame is more than half a frame away from where an even rate puts it.
    fn variable(&self) -> Option<f64> {
        let n = self.stamps.len();
        if n < 3 {
            return None;
        }
        let step = self.stamps[n - 1] / (n - 1) as f64;
        let uneven = self.stamps.iter().enumerate().any(|(i, t)| (t - i as f64 * step).abs() > 0.5 * step);
        uneven.then_some(self.stamps[n - 1] + step)
    }
}

/// Reads all packets, which finds a file that breaks off without the cost of decoding, and decodes the first frame.
pub fn read_through(path: &Path) -> Result<()> {
    let mut opened = Opened::new(path, false)?;
    let times = packet_times(&mut opened)?;
    let end = times.stamps.last().map(|t| t + t / times.count.max(1) as f64);
    check_length(times.count, end, opened.frames, opened.duration)?;
    first_frame(path).map(|_| ())
}

/// A file that ends well before its container says was cut off.
fn check_length(count: usize, end: Option<f64>, frames: usize, duration: Option<f64>) -> Result<()> {
    if count == 0 {
        bail!("the video holds no frame");
    }
    // Edit lists hide a few frames of what the container counts; a tenth is beyond that.
    let short = |have: f64, want: f64, slack: f64| have + slack < want * 0.9;
    if frames > 0 && short(count as f64, frames as f64, 8.0) {
        bail!("the file is truncated: {count} of {frames} frames are there");
    }
    if let (Some(have), Some(want)) = (end, duration) {
        if frames == 0 && short(have, want, 0.5) {
            bail!("the file is truncated: {have:.1} of {want:.1} seconds are there");
        }
    }
    Ok(())
}

/// The first frame, upright.
pub fn first_frame(path: &Path) -> Result<RgbImage> {
    let mut reader = Reader::open(path, true, true)?;
    if reader.advance()?.is_none() {
        bail!("the video holds no frame");
    }
    reader.picture()
}

/// Frames in the order they are shown, each decoded when asked for and converted only on demand.
pub struct Reader {
    opened: Opened,
    upright: bool,
    tagged_colour: bool,
    current: Option<Stamped>,
    ahead: Option<Stamped>,
    started: bool,
    draining: bool,
    /// Frames decoded so far.
    count: usize,
    first: Option<f64>,
    scaler: Option<(ScalerKey, scaling::Context)>,
}

struct Stamped {
    frame: ff::frame::Video,
    /// Seconds since the first frame.
    at: Option<f64>,
    lasts: Option<f64>,
}

#[derive(PartialEq)]
struct ScalerKey(Pixel, u32, u32, color::Space, color::Range);

impl Reader {
    /// `upright`: turn frames as the file's display matrix says. `tagged_colour`: convert by the colour matrix and
    /// range the frames are tagged with, instead of always by BT.601 (frames without a tag are).
    pub fn open(path: &Path, upright: bool, tagged_colour: bool) -> Result<Self> {
        Ok(Self {
            opened: Opened::new(path, upright)?,
            upright,
            tagged_colour,
            current: None,
            ahead: None,
            started: false,
            draining: false,
            count: 0,
            first: None,
            scaler: None,
        })
    }

    /// Width and height as shown.
    pub fn size(&self) -> Result<(u32, u32)> {
        self.opened.size()
    }

    /// Moves to the next frame and says when it is shown; `None` after the last.
    pub fn advance(&mut self) -> Result<Option<Span>> {
        if !self.started {
            self.started = true;
            self.ahead = self.decode()?;
        }
        self.current = self.ahead.take();
        let Some(current) = &self.current else { return Ok(None) };
        let (at, lasts) = (current.at, current.lasts);
        self.ahead = self.decode()?;
        let following = self.ahead.as_ref().and_then(|f| f.at);
        let step = lasts.or(self.opened.fps.map(|fps| 1.0 / fps));
        Ok(Some(match (at, following.or_else(|| Some(at? + step?))) {
            (Some(from), Some(to)) => Span { from, to },
            _ => Span::UNKNOWN,
        }))
    }

    fn decode(&mut self) -> Result<Option<Stamped>> {
        let mut frame = ff::frame::Video::empty();
        loop {
            match self.opened.decoder.receive_frame(&mut frame) {
                Ok(()) => {
                    self.count += 1;
                    if frame.has_decode_errors() {
                        bail!("frame {} is damaged", self.count);
                    }
                    let seconds = frame.timestamp().map(|t| t as f64 * self.opened.tick);
                    let first = *self.first.get_or_insert(seconds.unwrap_or(0.0));
                    let lasts = frame.packet().duration;
                    return Ok(Some(Stamped {
                        frame,
                        at: seconds.map(|t| t - first),
                        lasts: (lasts > 0).then_some(lasts as f64 * self.opened.tick),
                    }));
                }
                Err(ff::Error::Eof) => {
                    let end = self.current.as_ref().and_then(|c| c.at);
                    check_length(self.count, end, self.opened.frames, self.opened.duration)?;
                    return Ok(None);
                }
                Err(ff::Error::Other { errno }) if errno == ff::error::EAGAIN && !self.draining => {}
                Err(e) => bail!("frame {} cannot be decoded: {e}", self.count + 1),
            }
            match self.opened.packet()? {
                Some(packet) => self
                    .opened
                    .decoder
                    .send_packet(&packet)
                    .map_err(|e| anyhow!("the file is damaged near frame {}: {e}", self.count + 1))?,
                None => {
                    self.draining = true;
                    self.opened
                        .decoder
                        .send_eof()
                        .map_err(|e| anyhow!("the file is damaged near frame {}: {e}", self.count + 1))?;
                }
            }
        }
    }

    /// The frame that [`Reader::advance`] moved to, as RGB and upright.
    pub fn picture(&mut self) -> Result<RgbImage> {
        let Some(current) = &self.current else { bail!("there is no current frame") };
        let frame = &current.frame;
        let key = ScalerKey(frame.format(), frame.width(), frame.height(), frame.color_space(), frame.color_range());
        if self.scaler.as_ref().is_none_or(|(k, _)| *k != key) {
            let scaler = scaler(&key, self.tagged_colour)?;
            self.scaler = Some((key, scaler));
        }
        let Some((_, scaler)) = &mut self.scaler else { bail!("there is no colour converter") };
        let mut rgb = ff::frame::Video::empty();
        scaler.run(frame, &mut rgb).map_err(|e| anyhow!("a frame cannot be converted to RGB: {e}"))?;
        let (w, h) = (rgb.width() as usize, rgb.height() as usize);
        let rows = rgb.data(0).chunks(rgb.stride(0)).take(h);
        let pixels: Vec<u8> = rows.flat_map(|row| &row[..w * 3]).copied().collect();
        let picture = RgbImage::from_raw(w as u32, h as u32, pixels)
            .ok_or_else(|| anyhow!("a converted frame is smaller than it says"))?;
        if !self.upright || self.opened.orientation == Orientation::NoTransforms {
            return Ok(picture);
        }
        let mut picture = DynamicImage::ImageRgb8(picture);
        picture.apply_orientation(self.opened.orientation);
        Ok(picture.into_rgb8())
    }
}

fn scaler(key: &ScalerKey, tagged_colour: bool) -> Result<scaling::Context> {
    let ScalerKey(format, w, h, space, range) = *key;
    // The safe wrapper does not notice when the RGB frame cannot be allocated.
    if u64::from(w) * u64::from(h) > MOST_PIXELS {
        bail!("{w}x{h} are too many pixels; scale the video down");
    }
    let mut context = scaling::Context::get(format, w, h, Pixel::RGB24, w, h, scaling::Flags::BILINEAR)
        .map_err(|_| anyhow!("pixel format {format:?} cannot be converted to RGB"))?;
    let tagged = space != color::Space::Unspecified || range == color::Range::JPEG;
    if tagged_colour && tagged {
        set_colour(&mut context, space, range);
    }
    Ok(context)
}

/// Tells swscale the matrix and range of its input. Has no effect where the input is not YUV.
fn set_colour(context: &mut scaling::Context, space: color::Space, range: color::Range) {
    use ff::ffi::{sws_getCoefficients, sws_getColorspaceDetails, sws_setColorspaceDetails, AVColorSpace};
    let (mut source, mut target) = (std::ptr::null_mut(), std::ptr::null_mut());
    let (mut from_full, mut to_full, mut brightness, mut contrast, mut saturation) = (0, 0, 0, 0, 0);
    // SAFETY: the safe wrapper has no call for this. The context is alive and not shared; the out-pointers are
    // local; swscale copies the coefficient tables, which are its own constants.
    unsafe {
        let sws = context.as_mut_ptr();
        let known = sws_getColorspaceDetails(
            sws,
            &mut source,
            &mut from_full,
            &mut target,
            &mut to_full,
            &mut brightness,
            &mut contrast,
            &mut saturation,
        );
        if known < 0 {
            return;
        }
        let matrix = sws_getCoefficients(AVColorSpace::from(space) as i32);
        let from_full = if range == color::Range::JPEG { 1 } else { from_full };
        sws_setColorspaceDetails(sws, matrix, from_full, target, to_full, brightness, contrast, saturation);
    }
}
