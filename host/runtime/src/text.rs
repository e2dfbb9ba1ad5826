//! Text that came from a guest, made fit for a terminal and bounded.

use std::fmt::Write as _;

/// Longest text that is kept of a guest's error message or of a name in its backtrace, in bytes.
pub(crate) const MAX_MESSAGE_BYTES: usize = 512;

/// `text` cut to `most_bytes` bytes of input at a character boundary, with every control character escaped (a guest must not be able to move an
/// operator's cursor or forge a second log line). The result is at most six times as long as the input that was kept.
#[must_use]
pub fn clean(text: &str, most_bytes: usize) -> String {
    let cut = text.floor_char_boundary(most_bytes);
    let mut out = String::with_capacity(cut + 3);
    for character in text[..cut].chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            c if is_unsafe(c) => {
                // Writing to a string cannot fail.
                let _ = write!(out, "{}", c.escape_default());
            }
            c => out.push(c),
        }
    }
    if cut < text.len() {
        out.push_str("...");
    }
    out
}

/// Control characters, and the marks that reorder or break displayed text.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::clean;

    #[test]
    fn control_characters_are_escaped_and_the_escape_is_unambiguous() {
        assert_eq!(clean("a\nb\u{1b}[2J\\n\u{202e}", 100), "a\\nb\\u{1b}[2J\\\\n\\u{202e}");
    }

    #[test]
    fn a_cut_never_splits_a_character() {
        assert_eq!(clean("aé", 2), "a...");
        assert_eq!(clean("aé", 3), "aé");
    }
}
