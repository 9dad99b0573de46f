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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_with_or_without_a_unit() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("3k"), Ok(3 << 10));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        for text in ["", "G", "-1", "1.5G", "4GiB", "99999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
