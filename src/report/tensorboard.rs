//! TensorBoard event files, written by hand: a file is a row of records, a record is a length, the event, and a checksum
//! of each (the TFRecord framing); an event is a few protobuf fields (tensorboard/compat/proto/event.proto, summary.proto).

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes one events file. Every `flush` leaves whole records on disk; a file cut off inside a record stays readable up to it.
pub struct EventWriter {
    out: BufWriter<File>,
    path: PathBuf,
}

/// Distinguishes writers of one process that start within the same second.
static WRITERS: AtomicU32 = AtomicU32::new(0);

impl EventWriter {
    /// Makes `dir` if need be and a new file in it. `first_step`: 0 for a new run; a resumed run gives the step it starts
    /// from, and TensorBoard then hides what the interrupted run wrote at that step and after.
    pub fn create(dir: &Path, first_step: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = if host.trim().is_empty() { "localhost" } else { host.trim() };
        let (seconds, pid, n) = (wall_time() as u64, std::process::id(), WRITERS.fetch_add(1, Ordering::Relaxed));
        let path = dir.join(format!("events.out.tfevents.{seconds:010}.{host}.{pid}.{n}"));
        let out = BufWriter::new(File::create_new(&path)?);
        let mut writer = Self { out, path };
        writer.record(&Message::event(0).string(3, "brain.Event:2"))?;
        if first_step > 0 {
            const SESSION_START: u64 = 1;
            let log = Message::default().varint(1, SESSION_START);
            writer.record(&Message::event(first_step).message(7, &log))?;
        }
        writer.flush()?;
        Ok(writer)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Several scalars of one step, in one event.
    pub fn scalars<'a>(&mut self, step: u64, values: impl IntoIterator<Item = (&'a str, f32)>) -> io::Result<()> {
        let summary = values.into_iter().fold(Message::default(), |summary, (tag, value)| {
            summary.message(1, &Message::default().string(1, tag).float(2, value))
        });
        self.record(&Message::event(step).message(5, &summary))
    }

    /// A text (Markdown) for the "Text" tab.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> io::Result<()> {
        const DT_STRING: u64 = 7;
        let tensor = Message::default().varint(1, DT_STRING).message(2, &Message::default()).string(8, text);
        let plugin = Message::default().message(1, &Message::default().string(1, "text"));
        let value = Message::default().string(1, tag).message(8, &tensor).message(9, &plugin);
        self.record(&Message::event(step).message(5, &Message::default().message(1, &value)))
    }

    /// A picture of width and height for the "Images" tab, as the bytes of a PNG file.
    pub fn picture(&mut self, step: u64, tag: &str, (w, h): (u32, u32), png: &[u8]) -> io::Result<()> {
        const RGB: u64 = 3;
        let picture = Message::default().varint(1, h.into()).varint(2, w.into()).varint(3, RGB).bytes(4, png);
        let value = Message::default().string(1, tag).message(4, &picture);
        self.record(&Message::event(step).message(5, &Message::default().message(1, &value)))
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    fn record(&mut self, event: &Message) -> io::Result<()> {
        let length = (event.0.len() as u64).to_le_bytes();
        self.out.write_all(&length)?;
        self.out.write_all(&masked_crc32c(&length).to_le_bytes())?;
        self.out.write_all(&event.0)?;
        self.out.write_all(&masked_crc32c(&event.0).to_le_bytes())
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A protobuf message under construction; fields in the order they are added.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// An `Event` with its wall time and step.
    fn event(step: u64) -> Self {
        Message::default().double(1, wall_time()).varint(2, step)
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(mut self, field: u64, value: u64) -> Self {
        self.key(field, 0);
        self.raw_varint(value);
        self
    }

    fn double(mut self, field: u64, value: f64) -> Self {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn float(mut self, field: u64, value: f32) -> Self {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, bytes: &[u8]) -> Self {
        self.key(field, 2);
        self.raw_varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    fn string(self, field: u64, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    fn message(self, field: u64, message: &Message) -> Self {
        self.bytes(field, &message.0)
    }
}

/// CRC-32C, rotated and offset so that a checksum of data holding checksums is no trivial value (TFRecord's masking).
pub fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC with the Castagnoli polynomial, reflected 0x82f63b78.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0u32; 256];
        let mut i = 0;
        while i < 256 {
            let mut crc = i as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !data.iter().fold(!0u32, |crc, &byte| TABLE[(crc as u8 ^ byte) as usize] ^ crc >> 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_of_the_standard_check_strings() {
        // RFC 3720, appendix B.4, and the check value of the CRC catalogue.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0u8; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xffu8; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b""), 0);
    }
}
