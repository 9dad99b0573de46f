//! Bytes that harness and guest can both compute: what a test file must contain.

use sha2::{Digest, Sha256};

/// Pages of one pattern all differ, and so do the pages of two seeds.
pub fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    for (index, byte) in buffer.iter_mut().enumerate() {
        let position = offset + index as u64;
        let word = mix(seed ^ (position / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        *byte = word.to_le_bytes()[usize::from((position % 8) as u8)];
    }
}

/// Numbers that look random, and are the same for the same seed.
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    /// Those of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// The next one below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.any() % end
    }
}

/// The finaliser of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A file's expected content: one pattern after the other written over it.
#[derive(Clone, Debug)]
pub struct Expected {
    bytes: Vec<u8>,
}

impl Expected {
    /// A file written once from its start.
    pub fn new(seed: u64, bytes: u64) -> Self {
        let mut content = vec![0; bytes as usize];
        fill(seed, 0, &mut content);
        Self { bytes: content }
    }

    /// The same file after a range of it was written again.
    pub fn rewrite(&mut self, seed: u64, offset: u64, bytes: u64) {
        let range = offset as usize..(offset + bytes) as usize;
        fill(seed, offset, &mut self.bytes[range]);
    }

    /// Its SHA-256.
    pub fn sha256(&self) -> String {
        hex(&Sha256::digest(&self.bytes))
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_does_not_depend_on_how_it_is_cut() {
        let mut whole = [0; 64];
        fill(5, 100, &mut whole);
        let mut parts = [0; 64];
        fill(5, 100, &mut parts[..13]);
        fill(5, 113, &mut parts[13..]);
        assert_eq!(whole, parts);
    }

    #[test]
    fn seeds_and_pages_differ() {
        let page = |seed, offset| {
            let mut page = [0; 4096];
            fill(seed, offset, &mut page);
            page
        };
        assert_ne!(page(1, 0), page(2, 0));
        assert_ne!(page(1, 0), page(1, 4096));
    }

    #[test]
    fn a_rewrite_changes_its_range_only() {
        let mut file = Expected::new(1, 8192);
        let before = file.bytes.clone();
        file.rewrite(2, 4096, 10);
        assert_eq!(file.bytes[..4096], before[..4096]);
        assert_ne!(file.bytes[4096..4106], before[4096..4106]);
        assert_eq!(file.bytes[4106..], before[4106..]);
    }
}
