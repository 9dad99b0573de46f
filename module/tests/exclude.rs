// SPDX-License-Identifier: GPL-2.0

use crate::exclude::{EditError, Patterns, MOST_BYTES};
use proptest::prelude::*;

fn list(text: &str) -> Patterns {
    match Patterns::new().edit(text.as_bytes()) {
        Ok(list) => list,
        Err(error) => panic!("{text:?}: {error:?}"),
    }
}

fn text(list: &Patterns) -> &str {
    std::str::from_utf8(list.as_text()).expect("what was written")
}

/// What a pattern of these few letters means, said as plainly as possible.
fn model(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.first(), name.first()) {
        (None, None) => true,
        (Some(b'*'), None) => model(&pattern[1..], name),
        (Some(b'*'), Some(_)) => model(&pattern[1..], name) || model(pattern, &name[1..]),
        (Some(b'?'), Some(_)) => model(&pattern[1..], &name[1..]),
        (Some(a), Some(b)) => a == b && model(&pattern[1..], &name[1..]),
        _ => false,
    }
}

proptest! {
    #[test]
    fn stars_and_question_marks_fit_as_the_model_says(pattern in "[ab*?]{1,8}", name in "[ab]{1,10}") {
        let fits = model(pattern.as_bytes(), name.as_bytes());
        prop_assert_eq!(list(&pattern).has(name.as_bytes()), fits);
    }

    #[test]
    fn anything_written_gives_a_list_that_reads_back(written in prop::collection::vec(any::<u8>(), 0..200), name in prop::collection::vec(any::<u8>(), 0..40)) {
        if let Ok(list) = Patterns::new().edit(&written) {
            list.has(&name);
            prop_assert!(list.as_text().len() <= MOST_BYTES);
            let signed = list.as_text().split(|byte| *byte == b'\n').any(|word| matches!(word.first(), Some(b'+' | b'-')));
            if !signed {
                let again = Patterns::new().edit(list.as_text());
                prop_assert!(again.is_ok_and(|again| again.as_text() == list.as_text()));
            }
        }
    }

    #[test]
    fn an_edit_is_a_set_of_patterns(edits in prop::collection::vec((any::<bool>(), "[a-e]{1,2}"), 0..40)) {
        let mut list = Patterns::new();
        let mut model: Vec<String> = Vec::new();
        for (add, pattern) in edits {
            let edit = list.edit(format!("{}{pattern}\n", if add { '+' } else { '-' }).as_bytes());
            let known = model.contains(&pattern);
            if add {
                list = edit.unwrap_or_else(|error| panic!("{error:?}"));
                if !known {
                    model.push(pattern);
                }
            } else if known {
                list = edit.unwrap_or_else(|error| panic!("{error:?}"));
                model.retain(|other| *other != pattern);
            } else {
                prop_assert_eq!(edit.err(), Some(EditError::Invalid));
            }
            let lines: Vec<String> = text(&list).lines().map(str::to_owned).collect();
            prop_assert_eq!(&lines, &model);
        }
    }
}

#[test]
fn a_pattern_without_a_slash_is_for_the_last_name() {
    let list = list("libcrypto.so*");
    for (path, fits) in [
        ("/usr/lib/x86_64-linux-gnu/libcrypto.so.3", true),
        ("/usr/lib/libcrypto.so", true),
        ("libcrypto.so", true),
        ("/libcrypto.so.d/other", false),
        ("/usr/lib/mylibcrypto.so", false),
        ("/usr/lib/libcrypto", false),
    ] {
        assert_eq!(list.has(path.as_bytes()), fits, "{path}");
    }
}

#[test]
fn a_file_without_a_name_is_on_every_list_but_the_empty_one() {
    assert!(list("libcrypto.so*").has(b""));
    assert!(!list("").has(b""));
}

#[test]
fn a_pattern_with_a_slash_is_for_the_whole_path() {
    let list = list("/opt/*/secret /srv/[!a-c]?");
    for (path, fits) in [
        ("/opt/a/secret", true),
        ("/opt/a/b/secret", true),
        ("/opt/secret", false),
        ("/mnt/opt/a/secret", false),
        ("/srv/d1", true),
        ("/srv/b1", false),
        ("/srv/d", false),
    ] {
        assert_eq!(list.has(path.as_bytes()), fits, "{path}");
    }
}

#[test]
fn sets_and_escapes() {
    for (pattern, name, fits) in [
        ("[abc]", "b", true),
        ("[a-c]x", "cx", true),
        ("[a-c]x", "dx", false),
        ("[!a-c]", "d", true),
        ("[^a-c]", "b", false),
        ("[]]", "]", true),
        ("[!]]", "]", false),
        ("[a-]", "-", true),
        ("[z-a]", "m", false),
        (r"\*", "*", true),
        (r"\*", "a", false),
        (r"a\\b", r"a\b", true),
        ("**", "anything", true),
        ("a*b*c", "aXbXbXc", true),
        ("a*b*c", "aXbXbX", false),
    ] {
        assert_eq!(list(pattern).has(name.as_bytes()), fits, "{pattern} {name}");
    }
}

#[test]
fn a_list_is_replaced_edited_and_emptied() {
    let first = list("a*  b?\n\tc\n");
    assert_eq!(text(&first), "a*\nb?\nc\n");
    let edited = first
        .edit(b"+d -a* +c")
        .unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(text(&edited), "b?\nc\nd\n");
    let replaced = edited
        .edit(b"x")
        .unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(text(&replaced), "x\n");
    for nothing in ["", "\n", " \n\t"] {
        let empty = replaced.edit(nothing.as_bytes());
        assert!(empty.is_ok_and(|empty| empty.is_empty()), "{nothing:?}");
    }
    // What begins with a sign is written with a backslash.
    assert!(list(r"\-x").has(b"-x"));
}

#[test]
fn nonsense_is_refused_as_a_whole() {
    let first = list("a b");
    for nonsense in [
        "+", "-", "+c -d", "+c d", "a +c", "c[", "[", "[]", "[!", "[!]", "x\\", "a\0b", "+a[",
    ] {
        let edit = first.edit(nonsense.as_bytes());
        assert_eq!(edit.err(), Some(EditError::Invalid), "{nonsense:?}");
    }
    let long = "x".repeat(MOST_BYTES);
    assert_eq!(first.edit(long.as_bytes()).err(), Some(EditError::TooLong));
    assert!(first.edit(&long.as_bytes()[1..]).is_ok());
    let more = format!("+{}", &long[4..]);
    assert_eq!(first.edit(more.as_bytes()).err(), Some(EditError::TooLong));
    assert_eq!(text(&first), "a\nb\n");
}

#[test]
fn a_pattern_of_many_stars_ends_soon() {
    let pattern = "*a".repeat(30) + "*b";
    let name = "a".repeat(4000);
    assert!(!list(&pattern).has(name.as_bytes()));
}
