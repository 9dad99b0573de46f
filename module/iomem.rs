// SPDX-License-Identifier: GPL-2.0

//! `/proc/iomem`: lines of an indented `first-last : name`, in hexadecimal.

/// First byte of the first range of this name, and the byte after its last.
pub(crate) fn find(text: &[u8], name: &[u8]) -> Option<(u64, u64)> {
    text.split(|&byte| byte == b'\n')
        .find_map(|line| range(line, name))
}

fn range(line: &[u8], name: &[u8]) -> Option<(u64, u64)> {
    let (bounds, rest) = split(line, b" : ")?;
    if rest != name {
        return None;
    }
    let (first, last) = split(bounds, b"-")?;
    let (first, last) = (number(first.trim_ascii_start())?, number(last)?);
    let end = last.checked_add(1)?;
    // Those who may not know see only zeros.
    (first < last).then_some((first, end))
}

/// What is before and after the first `separator`.
fn split<'a>(text: &'a [u8], separator: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let mut windows = text.windows(separator.len());
    let at = windows.position(|window| window == separator)?;
    Some((&text[..at], &text[at + separator.len()..]))
}

fn number(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(core::str::from_utf8(text).ok()?, 16).ok()
}
