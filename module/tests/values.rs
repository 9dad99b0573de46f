// SPDX-License-Identifier: GPL-2.0

use crate::values::{number, show_words, word, Invalid, Scope, Text};
use proptest::prelude::*;

proptest! {
    #[test]
    fn a_number_is_what_display_writes(value in any::<u64>(), newline in any::<bool>()) {
        let text = format!("{value}{}", if newline { "\n" } else { "" });
        prop_assert_eq!(number(text.as_bytes()), Ok(value));
    }

    #[test]
    fn nothing_else_is_a_number(text in prop::collection::vec(any::<u8>(), 0..24)) {
        let digits = text.strip_suffix(b"\n").unwrap_or(&text);
        let expected = if digits.iter().all(u8::is_ascii_digit) {
            std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok())
        } else {
            None
        };
        prop_assert_eq!(number(&text), expected.ok_or(Invalid));
    }
}

#[test]
fn nonsense_is_no_number() {
    for text in [
        "",
        "\n",
        "-1",
        "+1",
        " 1",
        "1 ",
        "1\n\n",
        "0x10",
        "1e3",
        "1.5",
        "one",
        "1 2",
        "1\0",
        "18446744073709551616",
        "99999999999999999999999",
        "١",
    ] {
        assert_eq!(number(text.as_bytes()), Err(Invalid), "{text:?}");
    }
    assert_eq!(number(b"18446744073709551615\n"), Ok(u64::MAX));
    assert_eq!(number(b"007"), Ok(7));
}

#[test]
fn one_word_is_chosen_and_shown_in_brackets() {
    for (i, name) in Scope::WORDS.iter().enumerate() {
        assert_eq!(word(name.as_bytes(), Scope::WORDS), Ok(i));
        assert_eq!(word(format!("{name}\n").as_bytes(), Scope::WORDS), Ok(i));
        assert_eq!(Scope::from_index(i) as usize, i);
    }
    for text in [
        "",
        "\n",
        "Exec",
        "exec ",
        " exec",
        "exec readonly",
        "[exec]",
        "exe",
    ] {
        assert_eq!(
            word(text.as_bytes(), Scope::WORDS),
            Err(Invalid),
            "{text:?}"
        );
    }
    let mut buffer = [0; 64];
    let mut text = Text::new(&mut buffer);
    assert_eq!(
        show_words(&mut text, Scope::WORDS, Scope::Readonly as usize),
        Ok(())
    );
    let length = text.length();
    assert_eq!(&buffer[..length], b"exec [readonly] cached clean\n");
}

#[test]
fn text_that_does_not_fit_is_an_error() {
    let mut buffer = [0; 4];
    let mut text = Text::new(&mut buffer);
    assert!(text.append(b"abc").is_ok());
    assert!(text.append(b"de").is_err());
    assert!(text.append(b"d").is_ok());
    assert_eq!(text.length(), 4);
    assert_eq!(&buffer, b"abcd");
}
