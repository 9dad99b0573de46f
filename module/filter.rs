// SPDX-License-Identifier: GPL-2.0

//! Which files have been met: a Bloom filter, so that a fault in a file that is known already can
//! be told from one in a new file in a few instructions and without a lock.
//!
//! Words are loaded and stored, never exchanged: of two insertions at the same moment one may be
//! lost, and that file is met once more. A file that looks known and is not waits for the next
//! pass.

/// 64 bits that several threads use.
pub(crate) trait Word {
    /// Reads them.
    fn load(&self) -> u64;
    /// Writes them.
    fn store(&self, bits: u64);
}

/// Words of a filter: 8 KiB.
pub(crate) const WORDS: usize = 1024;
const BITS: u64 = WORDS as u64 * 64;
/// With so many bits set about one new file in sixty looks known.
const CROWDED: u32 = BITS as u32 / 8;

/// The filter, by hashes of files.
pub(crate) struct Filter<W>([W; WORDS]);

impl<W: Word> Filter<W> {
    pub(crate) const fn new(words: [W; WORDS]) -> Self {
        Self(words)
    }

    /// The two bits of a hash: word and mask.
    fn bits(hash: u64) -> [(usize, u64); 2] {
        let mixed = (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        [mixed >> 48, mixed >> 32].map(|bit| {
            let bit = bit % BITS;
            ((bit / 64) as usize, 1 << (bit % 64))
        })
    }

    /// Adds a file. Returns whether it was new.
    pub(crate) fn insert(&self, hash: u64) -> bool {
        let mut new = false;
        for (word, mask) in Self::bits(hash) {
            let word = &self.0[word];
            let bits = word.load();
            if bits & mask == 0 {
                word.store(bits | mask);
                new = true;
            }
        }
        new
    }

    /// Forgets all files when there are too many to tell new ones from.
    pub(crate) fn thin_out(&self) {
        let ones: u32 = self.0.iter().map(|word| word.load().count_ones()).sum();
        if ones > CROWDED {
            self.clear();
        }
    }

    /// Forgets all files.
    pub(crate) fn clear(&self) {
        for word in &self.0 {
            word.store(0);
        }
    }
}
