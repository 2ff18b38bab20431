//! Repair of text that was written as UTF-8 and read as some single-byte encoding.
//!
//! A heuristic (`is_bad`) finds pairs of characters that people hardly write but that such accidents produce. Text
//! that shows them is turned back into bytes by each encoding that has all its characters, and read as UTF-8; the
//! first that works wins. Where none does, stretches that look like UTF-8 sequences are repaired one by one. The rules
//! are those of ftfy 6.3.1, so that prompts keep the tokens that earlier caches were made with.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::OnceLock;

use regex::{bytes, Regex};

use super::tables::*;

/// Repairs again and again until nothing changes: mojibake may be several layers deep.
pub fn fix_encoding(text: &str) -> String {
    let mut text = text.to_string();
    loop {
        let fixed = fix_one_layer(&text);
        if fixed == text {
            return fixed;
        }
        text = fixed;
    }
}

fn fix_one_layer(text: &str) -> String {
    if text.is_ascii() || !is_bad(text) {
        return text.to_string();
    }
    let mut fits_latin_1 = false;
    for (i, charmap) in codecs().iter().enumerate() {
        let Some(encoded) = charmap.encode(text) else { continue };
        fits_latin_1 |= i == LATIN_1;
        if let Some(fixed) = utf8_from_bytes(encoded, &CHARMAPS[i]) {
            return fixed;
        }
    }
    let fixed = fix_embedded(text);
    if fixed != text {
        return fixed;
    }
    if fits_latin_1 {
        // Latin-1 with C1 controls was meant to be Windows-1252, unless it uses bytes that this lacks.
        let lacking = ['\u{81}', '\u{8d}', '\u{8f}', '\u{90}', '\u{9d}'];
        let fixed = fix_c1_controls(text);
        if !text.contains(lacking) && fixed != text {
            return fixed.into_owned();
        }
    }
    fix_c1_controls(text).into_owned()
}

/// Reads bytes as UTF-8 after undoing two further accidents: A0 that became a space, and lost bytes (1A).
fn utf8_from_bytes(mut encoded: Vec<u8>, charmap: &Charmap) -> Option<String> {
    if !charmap.mac && altered_utf8().is_match(&encoded) {
        encoded = restore_byte_a0(&encoded);
    }
    if charmap.sloppy {
        encoded = lossy_utf8().replace_all(&encoded, "\u{fffd}".as_bytes()).into_owned();
    }
    match encoded.contains(&0xed) || encoded.contains(&0xc0) {
        true => decode_utf8_variants(&encoded),
        false => String::from_utf8(encoded).ok(),
    }
}

/// C1 controls read as Windows-1252, like browsers do.
pub fn fix_c1_controls(text: &str) -> Cow<'_, str> {
    match text.contains(|c| ('\u{80}'..='\u{9f}').contains(&c)) {
        true => Cow::Owned(text.chars().map(c1_as_windows_1252).collect()),
        false => Cow::Borrowed(text),
    }
}

/// The Windows-1252 meaning of a C1 control; every other character is returned as it is.
pub fn c1_as_windows_1252(c: char) -> char {
    match c {
        '\u{80}'..='\u{9f}' => codecs()[WINDOWS_1252].high[c as usize - 0x80],
        c => c,
    }
}

/// One encoding, ready to turn text into bytes.
struct Codec {
    high: Vec<char>,
    bytes: HashMap<char, u8>,
    sloppy: bool,
}

impl Codec {
    /// `None` if some character does not exist in this encoding.
    fn encode(&self, text: &str) -> Option<Vec<u8>> {
        text.chars()
            .map(|c| match c {
                '\u{1a}' if self.sloppy => None,
                '\u{fffd}' if self.sloppy => Some(0x1a),
                '\0'..='\u{7f}' => Some(c as u8),
                c => self.bytes.get(&c).copied(),
            })
            .collect()
    }
}

fn codecs() -> &'static [Codec] {
    static ALL: OnceLock<Vec<Codec>> = OnceLock::new();
    ALL.get_or_init(|| {
        let codec = |map: &Charmap| {
            let high: Vec<char> = map.high.chars().collect();
            let bytes = high.iter().zip(0x80u8..=0xff).map(|(c, byte)| (*c, byte)).collect();
            Codec { high, bytes, sloppy: map.sloppy }
        };
        CHARMAPS.iter().map(codec).collect()
    })
}

/// Whether the text contains a sequence of characters that is much more likely to be mojibake than meant.
pub fn is_bad(text: &str) -> bool {
    static BADNESS: OnceLock<Regex> = OnceLock::new();
    BADNESS.get_or_init(|| Regex::new(&badness_expression()).expect("a constant expression")).is_match(text)
}

/// The alternatives of [`is_bad`], grouped by what they catch.
fn badness_expression() -> String {
    const SPACE: &str =
        r"[\t-\r\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]";
    const WORD: &str = r"[\p{L}\p{N}_]";
    let accented = format!("{LOWER_ACCENTED}{UPPER_ACCENTED}");
    let punctuation = format!("{START_PUNCTUATION}{END_PUNCTUATION}");
    let marked = format!("{accented}{BOX}{punctuation}{CURRENCY}{NUMERIC}{LAW}");
    let arabic = format!("[ØÙ][{COMMON}{CURRENCY}{BAD}{NUMERIC}{START_PUNCTUATION}ŸŠ®°µ»]");
    let between = format!("{C1}{BAD}{punctuation}{CURRENCY}");
    [
        // Pairs of categories that do not belong together.
        format!("[{C1}]"),
        format!("[{BAD}{marked}][{BAD}]"),
        format!("[a-zA-Z][{LOWER_COMMON}{UPPER_COMMON}][{BAD}]"),
        format!("[{BAD}][{marked}]"),
        format!("[{LOWER_ACCENTED}{LOWER_COMMON}{BOX}{END_PUNCTUATION}{CURRENCY}{NUMERIC}][{UPPER_ACCENTED}]"),
        format!("[{BOX}{END_PUNCTUATION}{CURRENCY}{NUMERIC}][{LOWER_ACCENTED}]"),
        format!("[{LOWER_ACCENTED}{BOX}{END_PUNCTUATION}][{CURRENCY}]"),
        format!("{SPACE}[{UPPER_ACCENTED}][{CURRENCY}]"),
        format!("[{UPPER_ACCENTED}{BOX}][{NUMERIC}{LAW}]"),
        format!("[{accented}{BOX}{CURRENCY}{END_PUNCTUATION}][{START_PUNCTUATION}][{NUMERIC}]"),
        format!("[{accented}{CURRENCY}{NUMERIC}{BOX}{LAW}][{END_PUNCTUATION}][{START_PUNCTUATION}]"),
        format!("[{CURRENCY}{NUMERIC}{BOX}][{START_PUNCTUATION}]"),
        format!("[a-z][{UPPER_ACCENTED}][{START_PUNCTUATION}{CURRENCY}]"),
        format!("[{BOX}][{KAOMOJI}]"),
        format!("[{accented}{CURRENCY}{NUMERIC}{punctuation}{LAW}][{BOX}]"),
        format!("[{BOX}][{END_PUNCTUATION}]"),
        format!("[{accented}][{punctuation}]{WORD}"),
        // Letters in company they do not keep.
        "[Œœ][^A-Za-z]".to_string(),
        format!("[{UPPER_ACCENTED}]°"),
        // Windows-1252.
        format!("[ÂÃÎÐ][€œŠš¢£Ÿž\u{a0}\u{ad}®©°·»{punctuation}–—´]"),
        "×[²³]".to_string(),
        format!("{arabic}{arabic}"),
        "à[²µ¹¼½¾]".to_string(),
        // Mac Roman.
        "√[±∂†≠®™´≤≥¥µø]".to_string(),
        "≈[°¢]".to_string(),
        "‚Ä[ìîïòôúùû†°¢π]".to_string(),
        "‚[âó][àä°ê]".to_string(),
        // Windows-1251.
        "вЂ".to_string(),
        format!("[ВГРС][{between}°µ][ВГРС]"),
        "ГўВЂВ.[A-Za-z ]".to_string(),
        // Letters a with an accent, and the no-break space, read as Windows-1252.
        "Ã[\u{a0}¡]".to_string(),
        format!("[a-z]{SPACE}?[ÃÂ][ ]"),
        "^[ÃÂ][ ]".to_string(),
        format!("[a-z.,?!{END_PUNCTUATION}]Â[ {punctuation}]"),
        // Windows-1253.
        "β€[™\u{a0}Ά\u{ad}®°]".to_string(),
        format!("[ΒΓΞΟ][{between}°][ΒΓΞΟ]"),
        // Windows-1257.
        "ā€".to_string(),
    ]
    .join("|")
}

/// UTF-8 sequences in which a space stands for A0, where the result is a likely character.
fn altered_utf8() -> &'static bytes::Regex {
    static ALTERED: OnceLock<bytes::Regex> = OnceLock::new();
    ALTERED.get_or_init(|| {
        let alternatives = [
            r"[\xc2\xc3\xc5\xce\xd0\xd9][ ]",
            r"[\xe2\xe3][ ][\x80-\x84\x86-\x9f\xa1-\xbf]",
            r"[\xe0-\xe3][\x80-\x84\x86-\x9f\xa1-\xbf][ ]",
            r"[\xf0][ ][\x80-\xbf][\x80-\xbf]",
            r"[\xf0][\x80-\xbf][ ][\x80-\xbf]",
            r"[\xf0][\x80-\xbf][\x80-\xbf][ ]",
        ];
        bytes::Regex::new(&format!("(?-u){}", alternatives.join("|"))).expect("a constant expression")
    })
}

/// UTF-8 and CESU-8 sequences of which bytes were lost (1A, or one question mark).
fn lossy_utf8() -> &'static bytes::Regex {
    static LOSSY: OnceLock<bytes::Regex> = OnceLock::new();
    LOSSY.get_or_init(|| {
        let alternatives = [
            r"[\xc2-\xdf][\x1a]",
            r"[\xc2-\xc3][?]",
            r"\xed[\xa0-\xaf][\x1a?]\xed[\xb0-\xbf][\x1a?\x80-\xbf]",
            r"\xed[\xa0-\xaf][\x1a?\x80-\xbf]\xed[\xb0-\xbf][\x1a?]",
            r"[\xe0-\xef][\x1a?][\x1a\x80-\xbf]",
            r"[\xe0-\xef][\x1a\x80-\xbf][\x1a?]",
            r"[\xf0-\xf4][\x1a?][\x1a\x80-\xbf][\x1a\x80-\xbf]",
            r"[\xf0-\xf4][\x1a\x80-\xbf][\x1a?][\x1a\x80-\xbf]",
            r"[\xf0-\xf4][\x1a\x80-\xbf][\x1a\x80-\xbf][\x1a?]",
            r"\x1a",
        ];
        bytes::Regex::new(&format!("(?-u){}", alternatives.join("|"))).expect("a constant expression")
    })
}

/// Puts A0 back where a space took its place. "à" as a word of its own keeps the space after it as well, except where
/// it starts a Portuguese contraction (às, àquele, àquela, àquilo).
fn restore_byte_a0(encoded: &[u8]) -> Vec<u8> {
    const CONTRACTIONS: [&[u8]; 5] = [b" ", b"quele", b"quela", b"quilo", b"s "];
    let mut words = Vec::with_capacity(encoded.len());
    let mut at = 0;
    while at < encoded.len() {
        let rest = &encoded[at..];
        if rest.starts_with(b"\xc3 ") && !CONTRACTIONS.iter().any(|c| rest[2..].starts_with(c)) {
            words.extend(b"\xc3\xa0 ");
            at += 2;
        } else {
            words.push(rest[0]);
            at += 1;
        }
    }
    let restore = |m: &bytes::Captures<'_>| -> Vec<u8> {
        m[0].iter().map(|byte| if *byte == b' ' { 0xa0 } else { *byte }).collect()
    };
    altered_utf8().replace_all(&words, restore).into_owned()
}

/// UTF-8 with two tolerated deviations: characters beyond U+FFFF as a pair of encoded surrogates (CESU-8), and U+0000
/// as C0 80. A final line feed may stand for the missing end of such a sequence.
fn decode_utf8_variants(mut rest: &[u8]) -> Option<String> {
    fn surrogates(b: &[u8]) -> bool {
        let head = b.len() >= 5 && b[0] == 0xed && b[1] & 0xf0 == 0xa0 && b[2] & 0xc0 == 0x80 && b[3] == 0xed;
        head && b[4] & 0xf0 == 0xb0
            && b.get(5).is_some_and(|last| last & 0xc0 == 0x80 || (*last == b'\n' && b.len() == 6))
    }
    let mut out = String::with_capacity(rest.len());
    while !rest.is_empty() {
        let special = |at: usize| {
            let b = &rest[at..];
            (b[0] == 0xc0 && (b.get(1) == Some(&0x80) || b[1..] == *b"\n")) || surrogates(b)
        };
        let cut = (0..rest.len()).find(|at| special(*at)).unwrap_or(rest.len());
        out.push_str(std::str::from_utf8(&rest[..cut]).ok()?);
        rest = &rest[cut..];
        if rest.first() == Some(&0xc0) {
            out.push('\0');
            rest = &rest[2..];
        } else if !rest.is_empty() {
            let bits = |i: usize, mask: u8, shift: u32| u32::from(rest[i] & mask) << shift;
            let code = 0x10000 + bits(1, 0x0f, 16) + bits(2, 0x3f, 10) + bits(4, 0x0f, 6) + bits(5, 0x3f, 0);
            out.push(char::from_u32(code)?);
            rest = &rest[6..];
        }
    }
    Some(out)
}

/// Repairs stretches that look like UTF-8 sequences inside text that otherwise is not mojibake.
fn fix_embedded(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let class = sequence_classes();
    let is = |at: usize, bit: u8| chars.get(at).is_some_and(|c| class.get(c).is_some_and(|bits| bits & bit != 0));
    // Length of the sequence that starts at `at`, 0 if there is none.
    let sequence = |at: usize| {
        let lead = |bit: u8, more: usize| is(at, bit) && (1..=more).all(|k| is(at + k, CONTINUATION));
        if lead(FIRST_OF_2, 1) {
            2
        } else if lead(FIRST_OF_3, 2) {
            3
        } else if lead(FIRST_OF_4, 3) {
            4
        } else {
            0
        }
    };
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let mut end = at;
        // Not in the middle of a longer garble: repairing its tail alone would hide the rest.
        if at == 0 || !is(at - 1, STRICT) {
            while end < chars.len() && sequence(end) > 0 {
                end += sequence(end);
            }
        }
        if end == at {
            out.push(chars[at]);
            at += 1;
            continue;
        }
        let stretch: String = chars[at..end].iter().collect();
        match end - at < chars.len() && is_bad(&stretch) {
            true => out.push_str(&fix_encoding(&stretch)),
            false => out.push_str(&stretch),
        }
        at = end;
    }
    out
}

const FIRST_OF_2: u8 = 1;
const FIRST_OF_3: u8 = 2;
const FIRST_OF_4: u8 = 4;
const CONTINUATION: u8 = 8;
const STRICT: u8 = 16;

/// For every character that bytes of a UTF-8 sequence may have become: in which places of a sequence.
fn sequence_classes() -> &'static HashMap<char, u8> {
    static CLASSES: OnceLock<HashMap<char, u8>> = OnceLock::new();
    CLASSES.get_or_init(|| {
        let mut classes: HashMap<char, u8> = HashMap::new();
        for (members, bit) in [
            (UTF8_FIRST_OF_2, FIRST_OF_2),
            (UTF8_FIRST_OF_3, FIRST_OF_3),
            (UTF8_FIRST_OF_4, FIRST_OF_4),
            (UTF8_CONTINUATION, CONTINUATION),
            (UTF8_CONTINUATION_STRICT, STRICT),
        ] {
            let members: Vec<char> = members.chars().collect();
            let mut at = 0;
            while at < members.len() {
                let (from, to) = match members.get(at + 1) {
                    Some('-') => (members[at], members[at + 2]),
                    _ => (members[at], members[at]),
                };
                (from..=to).for_each(|c| *classes.entry(c).or_default() |= bit);
                at += if from == to { 1 } else { 3 };
            }
        }
        classes
    })
}
