//! Caption files and their encodings.

use std::path::Path;

/// Reads a caption file: UTF-8 with or without a byte order mark, any line ends, surrounding blank space removed.
///
/// `Ok(None)`: there is no such file. `Err`: why it cannot be used.
pub fn read(path: &Path) -> Result<Option<String>, String> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("the caption {} cannot be read: {e}", path.display())),
    };
    decode(&bytes).map(|text| Some(strip(&text).to_string())).map_err(|why| format!("{} {why}", path.display()))
}

/// UTF-8 bytes as text with `\n` line ends, as Python's text files read.
pub fn decode(bytes: &[u8]) -> Result<String, String> {
    for (mark, name) in [([0xff, 0xfe], "UTF-16 (little endian)"), ([0xfe, 0xff], "UTF-16 (big endian)")] {
        if bytes.starts_with(&mark) {
            return Err(format!("is {name}, not UTF-8 (byte 0); save it as UTF-8"));
        }
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").map_or((bytes, 0), |rest| (rest, 3));
    let text = std::str::from_utf8(bytes.0)
        .map_err(|e| format!("is not UTF-8 (byte {} is wrong); save it as UTF-8", e.valid_up_to() + bytes.1))?;
    Ok(text.replace("\r\n", "\n").replace('\r', "\n"))
}

/// Without surrounding blank space, by Python's idea of it (which has the separators U+001C to U+001F too).
fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_line_ends_and_space() {
        assert_eq!(strip(&decode(b"\xef\xbb\xbf a cat\r\non a mat \r\n\n").unwrap()), "a cat\non a mat");
        assert_eq!(decode("größe".as_bytes()).unwrap(), "größe");
        assert_eq!(strip("\u{1f}\u{3000}x\u{a0}"), "x");
    }

    #[test]
    fn other_encodings_say_where() {
        assert_eq!(decode(b"gr\xf6\xdfe").unwrap_err(), "is not UTF-8 (byte 2 is wrong); save it as UTF-8");
        assert_eq!(decode(b"\xef\xbb\xbfgr\xf6").unwrap_err(), "is not UTF-8 (byte 5 is wrong); save it as UTF-8");
        assert!(decode(b"\xff\xfea\0").unwrap_err().contains("UTF-16 (little endian)"));
    }
}
