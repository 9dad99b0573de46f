// SPDX-License-Identifier: GPL-2.0

//! What knobs accept and how they are shown. One value a file, as text.

use core::fmt;

/// What was written is not what the knob takes; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Invalid;

/// A file's text under construction, in memory of fixed size.
pub(crate) struct Text<'a> {
    buffer: &'a mut [u8],
    length: usize,
}

impl<'a> Text<'a> {
    pub(crate) fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, length: 0 }
    }

    /// Bytes written so far.
    pub(crate) const fn length(&self) -> usize {
        self.length
    }

    /// Appends bytes; all of them or, without room, none.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> fmt::Result {
        let end = self.length + bytes.len();
        let room = self.buffer.get_mut(self.length..end).ok_or(fmt::Error)?;
        room.copy_from_slice(bytes);
        self.length = end;
        Ok(())
    }
}

impl fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.append(text.as_bytes())
    }
}

/// The text without the one newline that `echo` ends it with.
pub(crate) fn line(text: &[u8]) -> &[u8] {
    text.strip_suffix(b"\n").unwrap_or(text)
}

/// A decimal number: digits, and nothing but digits.
pub(crate) fn number(text: &[u8]) -> Result<u64, Invalid> {
    let digits = line(text);
    if digits.is_empty() {
        return Err(Invalid);
    }
    digits.iter().try_fold(0_u64, |number, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit <= 9);
        let digit = digit.ok_or(Invalid)?;
        let tens = number.checked_mul(10).ok_or(Invalid)?;
        tens.checked_add(u64::from(digit)).ok_or(Invalid)
    })
}

/// The index of the word that was written.
pub(crate) fn word(text: &[u8], words: &[&str]) -> Result<usize, Invalid> {
    let wanted = line(text);
    let found = words.iter().position(|word| word.as_bytes() == wanted);
    found.ok_or(Invalid)
}

/// All words, the active one in brackets.
pub(crate) fn show_words(text: &mut Text<'_>, words: &[&str], active: usize) -> fmt::Result {
    for (i, word) in words.iter().enumerate() {
        if i != 0 {
            text.append(b" ")?;
        }
        let (open, close): (&[u8], &[u8]) = if i == active {
            (b"[", b"]")
        } else {
            (b"", b"")
        };
        text.append(open)?;
        text.append(word.as_bytes())?;
        text.append(close)?;
    }
    text.append(b"\n")
}

/// Which pages may be reported. Each includes those of the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    /// What is mapped to be executed.
    Exec,
    /// What is mapped and not writable.
    Readonly,
    /// All cached pages of files that are mapped and not writable.
    Cached,
    /// All cached pages of regular files, mapped or not.
    Clean,
}

impl Scope {
    pub(crate) const WORDS: &'static [&'static str] = &["exec", "readonly", "cached", "clean"];

    /// The scope that [`Scope::WORDS`] has at `index`.
    pub(crate) const fn from_index(index: usize) -> Self {
        match index {
            0 => Self::Exec,
            2 => Self::Cached,
            3 => Self::Clean,
            _ => Self::Readonly,
        }
    }
}
