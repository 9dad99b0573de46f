// SPDX-License-Identifier: GPL-2.0

//! Names of files that are not to be reported: shell patterns, and the list of them.

use crate::list::{List, NoMemory};

/// Bytes of a list as it is shown, so that it fits a file in sysfs.
pub(crate) const MOST_BYTES: usize = 4000;

/// Why a list stays as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EditError {
    /// No pattern, a pattern that is there already, or one that is not.
    Invalid,
    /// The list would become longer than [`MOST_BYTES`].
    TooLong,
    /// No memory.
    NoMemory,
}

impl From<NoMemory> for EditError {
    fn from(_: NoMemory) -> Self {
        Self::NoMemory
    }
}

/// A list of patterns.
pub(crate) struct Patterns {
    /// Each followed by a newline.
    text: List<u8>,
}

impl Patterns {
    pub(crate) const fn new() -> Self {
        Self { text: List::new() }
    }

    /// The patterns, each on a line.
    pub(crate) fn as_text(&self) -> &[u8] {
        &self.text
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        words(&self.text)
    }

    fn push(&mut self, pattern: &[u8]) -> Result<(), EditError> {
        if self.text.len() + pattern.len() + 1 > MOST_BYTES {
            return Err(EditError::TooLong);
        }
        self.text.reserve(pattern.len() + 1)?;
        for &byte in pattern {
            self.text.push(byte)?;
        }
        self.text.push(b'\n')?;
        Ok(())
    }

    /// The list after `written` was written to it: patterns replace it, and are added or removed
    /// when each of them has a plus or a minus before it. Nothing at all is the empty list.
    pub(crate) fn edit(&self, written: &[u8]) -> Result<Self, EditError> {
        let signed = |word: &[u8]| matches!(word.first(), Some(b'+' | b'-'));
        let edits = words(written).any(signed);
        let mut edited = Self::new();
        if edits {
            for kept in self.iter() {
                let removed = |word: &[u8]| word.first() == Some(&b'-') && &word[1..] == kept;
                if !words(written).any(removed) {
                    edited.push(kept)?;
                }
            }
        }
        for word in words(written) {
            let pattern = match (edits, word.split_first()) {
                (false, _) => word,
                (true, Some((b'+', pattern))) => pattern,
                (true, Some((b'-', pattern))) if self.iter().any(|known| known == pattern) => {
                    continue;
                }
                (true, _) => return Err(EditError::Invalid),
            };
            if !is_pattern(pattern) {
                return Err(EditError::Invalid);
            }
            if !edited.iter().any(|known| known == pattern) {
                edited.push(pattern)?;
            }
        }
        Ok(edited)
    }

    /// Whether a file of this path is on the list. Patterns with a slash are compared with the
    /// path, others with what follows its last slash. A file without a path might be any, and is on
    /// every list that is not empty.
    pub(crate) fn has(&self, path: &[u8]) -> bool {
        if path.is_empty() {
            return !self.is_empty();
        }
        let base = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
        self.iter().any(|pattern| {
            let name = if pattern.contains(&b'/') { path } else { base };
            matches(pattern, name)
        })
    }
}

fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let words = text.split(u8::is_ascii_whitespace);
    words.filter(|word| !word.is_empty())
}

/// One step of a pattern.
enum Step<'a> {
    /// `*`
    Any,
    /// `?`
    One,
    /// `[…]`: what is in the brackets, and whether it is negated.
    Set(&'a [u8], bool),
    Byte(u8),
}

/// The first step of a pattern and what follows; `None` when it is no pattern.
fn step(pattern: &[u8]) -> Option<(Step<'_>, &[u8])> {
    let (&first, rest) = pattern.split_first()?;
    Some(match first {
        b'*' => (Step::Any, rest),
        b'?' => (Step::One, rest),
        b'\\' => {
            let (&byte, rest) = rest.split_first()?;
            (Step::Byte(byte), rest)
        }
        b'[' => {
            let negated = matches!(rest.first(), Some(b'!' | b'^'));
            let set = &rest[usize::from(negated)..];
            // A bracket that comes first is one of the set.
            let end = 1 + set.get(1..)?.iter().position(|&byte| byte == b']')?;
            (Step::Set(&set[..end], negated), &set[end + 1..])
        }
        byte => (Step::Byte(byte), rest),
    })
}

/// Whether every step of it makes sense.
fn is_pattern(mut pattern: &[u8]) -> bool {
    if pattern.is_empty() || pattern.contains(&0) {
        return false;
    }
    while !pattern.is_empty() {
        match step(pattern) {
            Some((_, rest)) => pattern = rest,
            None => return false,
        }
    }
    true
}

/// Whether `set` has `byte`, alone or between two with a hyphen.
fn is_in(mut set: &[u8], byte: u8) -> bool {
    loop {
        match *set {
            [from, b'-', to, ref rest @ ..] => {
                if (from..=to).contains(&byte) {
                    return true;
                }
                set = rest;
            }
            [one, ref rest @ ..] => {
                if one == byte {
                    return true;
                }
                set = rest;
            }
            [] => return false,
        }
    }
}

/// Whether the whole name fits the pattern. A star fits anything, slashes too.
fn matches(mut pattern: &[u8], mut name: &[u8]) -> bool {
    // Where to go on when it does not fit: behind the last star, with one byte less of the name.
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        let fits = match (step(pattern), name.split_first()) {
            (None, None) => return pattern.is_empty(),
            (Some((Step::Any, rest)), _) => {
                retry = Some((rest, name));
                pattern = rest;
                continue;
            }
            (Some((step, rest)), Some((&byte, others))) => {
                let fits = match step {
                    Step::Any | Step::One => true,
                    Step::Byte(wanted) => wanted == byte,
                    Step::Set(set, negated) => is_in(set, byte) != negated,
                };
                fits.then_some((rest, others))
            }
            _ => None,
        };
        match (fits, retry) {
            (Some(next), _) => (pattern, name) = next,
            (None, Some((behind, [_, fewer @ ..]))) => {
                retry = Some((behind, fewer));
                (pattern, name) = (behind, fewer);
            }
            _ => return false,
        }
    }
}
