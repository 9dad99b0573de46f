// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sizes as an operator writes them.

/// Bytes, with K, M, G or T for powers of 1024 if you like.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "a number, with K, M, G or T if you like")?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".into())
}

/// The same for memory that is counted in pages. None at all is fine; less than one is a unit that
/// was forgotten.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        bytes @ 1..4096 => Err(format!(
            "{bytes} bytes are less than a page of memory; {bytes}G, say?"
        )),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_with_or_without_a_unit() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("3k"), Ok(3 << 10));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_memory("0"), Ok(0));
        assert_eq!(parse_memory("4096"), Ok(4096));
        assert!(parse_memory("4095").unwrap_err().contains("4095G"));
        for text in ["", "G", "-1", "1.5G", "4GiB", "99999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
