//! Prompt cleaning, as the old tool does it before tokenizing: repair of broken text (ftfy's defaults), HTML entities,
//! white space. Prompts that differ only in such accidents must give the same tokens.

mod fixes;
mod html;
mod mojibake;
mod tables;

use std::borrow::Cow;

use unicode_normalization::UnicodeNormalization;

/// Longest piece of text that is repaired in one go, in characters.
const SEGMENT: usize = 1_000_000;

/// The text that is tokenized: [`fix_text`], HTML entities twice, and white space collapsed to single spaces.
pub fn clean(text: &str) -> String {
    let fixed = fix_text(text);
    let plain = html::unescape(&html::unescape(&fixed)).into_owned();
    plain.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// ftfy 6.3.1 `fix_text` with its defaults: every line is repaired by itself. HTML entities are left alone from the
/// first line on that contains a `<`, since such text is meant to be HTML.
pub fn fix_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut unescape = true;
    for line in text.split_inclusive('\n') {
        let mut rest = line;
        while !rest.is_empty() {
            let end = rest.char_indices().nth(SEGMENT).map_or(rest.len(), |(at, _)| at);
            let (segment, after) = rest.split_at(end);
            unescape &= !segment.contains('<');
            out.push_str(&fix_segment(segment, unescape));
            rest = after;
        }
    }
    out
}

/// Applies every fix in turn until none changes anything.
fn fix_segment(segment: &str, unescape: bool) -> String {
    let mut text = segment.to_string();
    loop {
        let mut fixed = Cow::Borrowed(text.as_str());
        if unescape {
            fixed = Cow::Owned(html::unescape_strict(&fixed).into_owned());
        }
        let fixed = mojibake::fix_encoding(&fixed);
        let fixed = mojibake::fix_c1_controls(&fixed);
        let fixed = fixes::standard_forms(&fixed);
        let fixed = fixes::line_breaks(&fixed);
        let fixed = fixes::remove_terminal_escapes(&fixed);
        let fixed: String = fixed.chars().filter(|c| !fixes::is_useless_control(*c)).nfc().collect();
        if fixed == text {
            return fixed;
        }
        text = fixed;
    }
}

/// White space as Python's `str.strip` and `\s` see it: Unicode's, and the four separators 1C to 1F.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
