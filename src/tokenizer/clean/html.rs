//! HTML character references, in two readings: the browser's (`unescape`, like Python's `html.unescape`), which takes
//! `&eacute` without its semicolon, and a careful one (`unescape_strict`) for text that may not be HTML at all.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::OnceLock;

use regex::{Captures, Regex};

use super::mojibake::c1_as_windows_1252;

/// Names of HTML 5 with the code points they stand for, as the standard lists them: `name; hex [hex]`. Some old names
/// also occur without the semicolon.
const ENTITIES: &str = include_str!("../../../configs/tokenizer/html5_entities.txt");

fn entities() -> &'static HashMap<&'static str, String> {
    static TABLE: OnceLock<HashMap<&'static str, String>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = HashMap::new();
        for line in ENTITIES.lines() {
            let mut words = line.split(' ');
            let name = words.next().unwrap_or_default();
            let text = words.filter_map(|hex| char::from_u32(u32::from_str_radix(hex, 16).ok()?)).collect();
            table.insert(name, text);
        }
        table
    })
}

/// Names in capitals (`&EACUTE;`) that the standard does not know, and the capitals they must have meant.
fn shouted() -> &'static HashMap<String, String> {
    static TABLE: OnceLock<HashMap<String, String>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = HashMap::new();
        for (name, text) in entities() {
            let upper = name.to_uppercase();
            let reference = format!("&{upper}");
            if name.ends_with(';') && *name == name.to_lowercase() && unescape(&reference) == reference {
                table.insert(upper, text.to_uppercase());
            }
        }
        table
    })
}

/// Every reference that a browser would resolve.
pub fn unescape(text: &str) -> Cow<'_, str> {
    static REFERENCE: OnceLock<Regex> = OnceLock::new();
    if !text.contains('&') {
        return Cow::Borrowed(text);
    }
    let reference = REFERENCE.get_or_init(|| {
        Regex::new(r"&(#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\x0C <&#;]{1,32};?)").expect("a constant expression")
    });
    reference.replace_all(text, |m: &Captures<'_>| resolve(&m[1]))
}

/// References that end in a semicolon and have one meaning, and names of letters in capitals.
pub fn unescape_strict(text: &str) -> Cow<'_, str> {
    static REFERENCE: OnceLock<Regex> = OnceLock::new();
    if !text.contains('&') {
        return Cow::Borrowed(text);
    }
    let reference = REFERENCE.get_or_init(|| Regex::new("&#?[0-9A-Za-z]{1,24};").expect("a constant expression"));
    reference.replace_all(text, |m: &Captures<'_>| {
        let whole = &m[0];
        let name = &whole[1..];
        if let Some(text) = entities().get(name).or_else(|| shouted().get(name)) {
            return text.clone();
        }
        // A number that did not swallow the semicolon was only resolved in part.
        let resolved = if name.starts_with('#') { unescape(whole) } else { Cow::Borrowed(whole) };
        if resolved.contains(';') {
            whole.to_string()
        } else {
            resolved.into_owned()
        }
    })
}

/// What the reference between `&` and the optional `;` (given with it) stands for.
fn resolve(reference: &str) -> String {
    if let Some(number) = reference.strip_prefix('#') {
        let digits = number.trim_end_matches(';');
        return match digits.strip_prefix(['x', 'X']) {
            Some(hex) => code_point(hex, 16),
            None => code_point(digits, 10),
        };
    }
    if let Some(text) = entities().get(reference) {
        return text.clone();
    }
    // The longest known name at the start wins: `&notit;` is `¬it;`. Names have at least two letters.
    let cuts: Vec<usize> = reference.char_indices().map(|(at, _)| at).skip(2).collect();
    for at in cuts.into_iter().rev() {
        if let Some(text) = entities().get(&reference[..at]) {
            return format!("{text}{}", &reference[at..]);
        }
    }
    format!("&{reference}")
}

/// The standard's reading of a numeric reference: Windows-1252 for C1, nothing for other non-characters.
fn code_point(digits: &str, radix: u32) -> String {
    // A number with more digits than fit is out of range whatever it is.
    let number = u32::from_str_radix(digits.trim_start_matches('0'), radix);
    let number = match number {
        Ok(number) => number,
        Err(_) if digits.trim_start_matches('0').is_empty() => 0,
        Err(_) => u32::MAX,
    };
    match number {
        0 => "\u{fffd}".to_string(),
        0x0d => "\r".to_string(),
        0x80..=0x9f => c1_as_windows_1252(char::from_u32(number).unwrap_or('\u{fffd}')).to_string(),
        0x01..=0x08 | 0x0b | 0x0e..=0x1f | 0x7f | 0xfdd0..=0xfdef => String::new(),
        n if n <= 0x10ffff && n & 0xfffe == 0xfffe => String::new(),
        n => char::from_u32(n).unwrap_or('\u{fffd}').to_string(),
    }
}
