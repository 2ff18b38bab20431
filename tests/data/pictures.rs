//! Picture files of every kind that people bring.

use image::RgbImage;
use wan_train::data::picture::{probe, read};

use super::{media, message, Place};

/// The source of the picture fixtures: 24x16, a red corner on ramps.
fn expected(x: u32, y: u32) -> [u8; 3] {
    match x < 8 && y < 8 {
        true => [220, 20, 20],
        false => [(x * 10) as u8, (y * 15) as u8, ((x + y) * 6) as u8],
    }
}

fn assert_close(picture: &RgbImage, tolerance: u8, at: impl Fn(u32, u32) -> [u8; 3]) {
    for (x, y, pixel) in picture.enumerate_pixels() {
        let want = at(x, y);
        let worst = pixel.0.iter().zip(want).map(|(a, b)| a.abs_diff(b)).max().unwrap();
        assert!(worst <= tolerance, "({x}, {y}): {:?}, not {want:?}", pixel.0);
    }
}

#[test]
fn lossless_formats_are_read_exactly() {
    for name in ["plain.webp", "plain.bmp", "plain.tiff", "rgb16.png"] {
        let picture = read(&media(name), true).unwrap();
        assert_eq!(picture.dimensions(), (24, 16), "{name}");
        assert_close(&picture, 0, expected);
        assert_eq!(probe(&media(name), true).unwrap(), (24, 16));
    }
}

#[test]
fn alpha_is_dropped_not_composited() {
    // The left half is fully transparent.
    assert_close(&read(&media("alpha.png"), true).unwrap(), 0, expected);
}

#[test]
fn palette_grey_and_16_bit_grey_become_rgb() {
    let palette = read(&media("palette.png"), true).unwrap();
    assert_eq!(palette.get_pixel(2, 2).0, [220, 20, 20]);
    assert_eq!(palette.get_pixel(20, 12).0, [200, 173, 189]);
    let grey = read(&media("grey.png"), true).unwrap();
    assert_eq!(grey.get_pixel(20, 12).0, [187; 3]);
    // 16 bits: y·4000 + x·37.
    let wide = read(&media("grey16.png"), true).unwrap();
    assert_close(&wide, 1, |x, y| [((y * 4000 + x * 37) / 257) as u8; 3]);
}

#[test]
fn cmyk_jpeg_becomes_rgb() {
    let picture = read(&media("cmyk.jpg"), true).unwrap();
    for (x, y) in [(2, 2), (20, 12), (20, 2), (12, 12)] {
        let worst = picture.get_pixel(x, y).0.iter().zip(expected(x, y)).map(|(a, b)| a.abs_diff(b)).max().unwrap();
        assert!(worst <= 12, "({x}, {y}): {:?}", picture.get_pixel(x, y));
    }
}

#[test]
fn exif_orientation_turns_the_picture() {
    let path = media("exif6.jpg");
    assert_eq!(probe(&path, true).unwrap(), (16, 24));
    assert_eq!(probe(&path, false).unwrap(), (24, 16));
    let upright = read(&path, true).unwrap();
    assert_eq!(upright.dimensions(), (16, 24));
    // Orientation 6: turn clockwise, so the red corner goes to the top right.
    let red = |p: &RgbImage, x, y| p.get_pixel(x, y).0[0] > 180 && p.get_pixel(x, y).0[1] < 60;
    assert!(red(&upright, 13, 2) && !red(&upright, 2, 2) && !red(&upright, 2, 21));
    let as_stored = read(&path, false).unwrap();
    assert_eq!(as_stored.dimensions(), (24, 16));
    assert!(red(&as_stored, 2, 2));
}

#[test]
fn avif_is_read_through_ffmpeg_or_refused_clearly() {
    match read(&media("plain.avif"), true) {
        Ok(picture) => assert_close(&picture, 40, expected),
        Err(e) => assert!(format!("{e:#}").contains("AVIF pictures cannot be read here; convert it to PNG"), "{e:#}"),
    }
}

#[test]
fn the_first_frame_of_an_animation_counts() {
    assert_eq!(read(&media("anim.gif"), true).unwrap().dimensions(), (40, 30));
}

#[test]
fn the_content_decides_not_the_extension() {
    let place = Place::new();
    let path = place.copy("plain.bmp", "picture.png");
    assert_close(&read(&path, true).unwrap(), 0, expected);
}

#[test]
fn damaged_files_are_refused() {
    let place = Place::new();
    let empty = place.write("empty.png", b"");
    assert_eq!(message(read(&empty, true)), "the file is empty (0 bytes)");
    assert_eq!(message(probe(&empty, true)), "the file is empty (0 bytes)");
    let text = place.write("text.png", b"this is no picture at all");
    assert_eq!(message(read(&text, true)), "the file holds no picture of a known format");
    for name in ["exif6.jpg", "cmyk.jpg", "alpha.png", "plain.webp", "plain.bmp", "plain.tiff", "grey16.png"] {
        let bytes = std::fs::read(media(name)).unwrap();
        for part in [bytes.len() / 4, bytes.len() / 2, bytes.len() - 2] {
            let cut = place.write(name, &bytes[..part]);
            let tail_only = part == bytes.len() - 2;
            // The last two bytes of a PNG, a WebP or a TIFF may be padding or checksum that decoding does without.
            match read(&cut, true) {
                Ok(_) => assert!(tail_only && !name.ends_with("jpg"), "{name} cut to {part} was read"),
                Err(e) => assert!(!format!("{e:#}").is_empty()),
            }
        }
    }
}

/// A PNG header that promises 60000x60000 pixels.
#[test]
fn decompression_bombs_are_refused() {
    let place = Place::new();
    let mut bytes = std::fs::read(media("grey.png")).unwrap();
    bytes[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    let path = place.write("bomb.png", bytes);
    for error in [message(read(&path, true)), message(probe(&path, true))] {
        assert!(error.contains("too many pixels") || error.contains("too large"), "{error}");
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, b| {
        (0..8).fold(crc ^ u32::from(*b), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
    })
}
