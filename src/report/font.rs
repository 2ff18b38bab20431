//! Letters for charts: 5×7 pixels each, drawn here so that a picture needs no font file.

use image::{Rgb, RgbImage};

pub const GLYPH_WIDTH: u32 = 5;
pub const GLYPH_HEIGHT: u32 = 7;
/// From one letter to the next: a column stays empty.
pub const ADVANCE: u32 = GLYPH_WIDTH + 1;

/// Bands of glyphs: a line of characters, then seven rows, one space between glyphs. Letters of
/// `DESCENDING` hang two pixels lower.
const BANDS: &str = "\
0 1 2 3 4 5 6 7 8 9
.###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ..#.. .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ...#. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ...#.
.###. .###. ##### .###. ...#. .###. .###. .#... .###. .##..
a b c d e f g h i j
..... #.... ..... ....# ..... ..##. ..... #.... ..#.. ...#.
..... #.... ..... ....# ..... .#..# .###. #.... ..... .....
.###. #.##. .###. .##.# .###. .#... #...# #.##. .##.. ..##.
....# ##..# #.... #..## #...# ###.. #...# ##..# ..#.. ...#.
.#### #...# #.... #...# ##### .#... .#### #...# ..#.. ...#.
#...# #...# #...# #...# #.... .#... ....# #...# ..#.. #..#.
.#### ####. .###. .#### .###. .#... .###. #...# .###. .##..
k l m n o p q r s t
#.... .##.. ..... ..... ..... ..... ..... ..... ..... .#...
#.... ..#.. ..... ..... ..... ####. .##.# ..... ..... .#...
#..#. ..#.. ##.#. #.##. .###. #...# #..## #.##. .###. ###..
#.#.. ..#.. #.#.# ##..# #...# #...# #...# ##..# #.... .#...
##... ..#.. #.#.# #...# #...# ####. .#### #.... .###. .#...
#.#.. ..#.. #...# #...# #...# #.... ....# #.... ....# .#..#
#..#. .###. #...# #...# .###. #.... ....# #.... ####. ..##.
u v w x y z . , - +
..... ..... ..... ..... ..... ..... ..... ..... ..... .....
..... ..... ..... ..... #...# ..... ..... ..... ..... ..#..
#...# #...# #...# #...# #...# ##### ..... ..... ..... ..#..
#...# #...# #...# .#.#. #...# ...#. ..... ..... ##### #####
#...# #...# #.#.# ..#.. .#### ..#.. ..... .##.. ..... ..#..
#..## .#.#. #.#.# .#.#. ....# .#... .##.. ..#.. ..... ..#..
.##.# ..#.. .#.#. #...# .###. ##### .##.. .#... ..... .....
: / ( ) % = _ ?
..... ..... ...#. .#... ##... ..... ..... .###.
.##.. ....# ..#.. ..#.. ##..# ..... ..... #...#
.##.. ...#. .#... ...#. ...#. ##### ..... ....#
..... ..#.. .#... ...#. ..#.. ..... ..... ...#.
.##.. .#... .#... ...#. .#... ##### ..... ..#..
.##.. #.... ..#.. ..#.. #..## ..... ..... .....
..... ..... ...#. .#... ...## ..... ##### ..#..
";

const DESCENDING: &str = "gpqy";

/// Rows of a glyph, five bits each, leftmost pixel highest. Capitals are drawn as small letters, other characters as `?`.
fn glyph(c: char) -> [u8; 7] {
    let c = c.to_ascii_lowercase();
    if c == ' ' {
        return [0; 7];
    }
    let lines: Vec<&str> = BANDS.lines().collect();
    for band in lines.chunks(8) {
        let Some(column) = band[0].split(' ').position(|name| name == c.to_string()) else { continue };
        let row = |line: &str| {
            let cells = line.split(' ').nth(column).unwrap_or_default();
            cells.bytes().fold(0, |bits, cell| bits << 1 | u8::from(cell == b'#'))
        };
        return std::array::from_fn(|y| row(band[y + 1]));
    }
    glyph('?')
}

/// Width in pixels of a text at an integer `scale`.
pub fn text_width(text: &str, scale: u32) -> u32 {
    (text.chars().count() as u32 * ADVANCE).saturating_sub(1) * scale
}

/// Draws a text with its top left corner at `(x, y)`; what falls outside the picture is left out.
pub fn draw_text(image: &mut RgbImage, (x, y): (i64, i64), text: &str, scale: u32, colour: Rgb<u8>) {
    for (i, c) in text.chars().enumerate() {
        let drop = if DESCENDING.contains(c) { i64::from(2 * scale) } else { 0 };
        for (gy, bits) in glyph(c).into_iter().enumerate() {
            for gx in (0..GLYPH_WIDTH).filter(|gx| bits >> (GLYPH_WIDTH - 1 - gx) & 1 == 1) {
                for (dx, dy) in (0..scale * scale).map(|k| (k % scale, k / scale)) {
                    let px = x + i64::from((i as u32 * ADVANCE + gx) * scale + dx);
                    let py = y + drop + i64::from(gy as u32 * scale + dy);
                    if let (Ok(px), Ok(py)) = (u32::try_from(px), u32::try_from(py)) {
                        if let Some(pixel) = image.get_pixel_mut_checked(px, py) {
                            *pixel = colour;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_glyph_is_whole_and_unlike_the_others() {
        let mut seen = std::collections::BTreeMap::new();
        for band in BANDS.lines().collect::<Vec<_>>().chunks(8) {
            let names: Vec<&str> = band[0].split(' ').collect();
            for line in &band[1..] {
                assert_eq!(line.split(' ').count(), names.len(), "{line}");
                assert!(line.split(' ').all(|cells| cells.len() == 5), "{line}");
            }
            for name in names {
                let c = name.chars().next().unwrap();
                assert_eq!(seen.insert(glyph(c), c), None, "{c} looks like another");
                assert_ne!(glyph(c), [0; 7]);
            }
        }
        assert_eq!(seen.len(), 48);
        assert_eq!(glyph('L'), glyph('l'));
        assert_eq!(glyph('§'), glyph('?'));
    }
}
