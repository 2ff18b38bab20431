//! The small repairs: ligatures, full-width forms, quotes, line breaks, escapes, control characters.

use std::borrow::Cow;
use std::sync::OnceLock;

use regex::Regex;
use unicode_normalization::UnicodeNormalization;

use super::tables::LIGATURES;

/// Splits Latin ligatures, gives half- and full-width forms their standard width, straightens quotes.
pub fn standard_forms(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // The three character-wise steps run one after the other: the parts of a ligature may themselves be quotes.
        match LIGATURES.iter().find(|(ligature, _)| *ligature == c) {
            Some((_, letters)) => letters.chars().for_each(|c| widen_and_straighten(c, &mut out)),
            None => widen_and_straighten(c, &mut out),
        }
    }
    out
}

fn widen_and_straighten(c: char, out: &mut String) {
    match c {
        '\u{3000}' => out.push(' '),
        '\u{ff01}'..='\u{ffef}' => out.extend(std::iter::once(c).nfkc().map(straight)),
        c => out.push(straight(c)),
    }
}

fn straight(c: char) -> char {
    match c {
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => '\'',
        '\u{201c}'..='\u{201f}' => '"',
        c => c,
    }
}

/// Every kind of line break becomes `\n`.
pub fn line_breaks(text: &str) -> String {
    text.replace("\r\n", "\n").replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n")
}

/// Removes the escape sequences that colour text in terminals.
pub fn remove_terminal_escapes(text: &str) -> Cow<'_, str> {
    static ESCAPE: OnceLock<Regex> = OnceLock::new();
    let escape = ESCAPE.get_or_init(|| Regex::new("\u{1b}\\[[\\d;]*[a-zA-Z]").expect("a constant expression"));
    escape.replace_all(text, "")
}

/// Control characters without an effect on text: ASCII ones but for tab, line feed, form feed and return, deprecated
/// Arabic ones, byte order mark, interlinear annotation, object replacement.
pub fn is_useless_control(c: char) -> bool {
    matches!(
        c,
        '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' | '\u{206a}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffc}'
    )
}
