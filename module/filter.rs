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

/// Words of a filter: 32 KiB.
pub(crate) const WORDS: usize = 4096;
const BITS: u64 = WORDS as u64 * 64;
/// One word in so many is counted to tell how full a filter is. Hashes fill all alike.
const SAMPLED: usize = 16;
/// With so many bits set in these about one new file in sixty looks known.
const CROWDED: u32 = (BITS / SAMPLED as u64) as u32 / 8;

/// The filter, by hashes of files.
struct Filter<W>([W; WORDS]);

impl<W: Word> Filter<W> {
    const fn new(words: [W; WORDS]) -> Self {
        Self(words)
    }

    /// The two bits of a hash: word and mask.
    fn bits(hash: u64) -> [(usize, u64); 2] {
        let mixed = (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        [mixed >> 46, mixed >> 28].map(|bit| {
            let bit = bit % BITS;
            ((bit / 64) as usize, 1 << (bit % 64))
        })
    }

    /// Adds a file. Returns whether it was new.
    fn insert(&self, hash: u64) -> bool {
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

    /// Whether a file was added, as far as can be told.
    fn has(&self, hash: u64) -> bool {
        let is_set = |(word, mask): (usize, u64)| self.0[word].load() & mask != 0;
        Self::bits(hash).into_iter().all(is_set)
    }

    /// Whether there are too many to tell new ones from.
    fn is_crowded(&self) -> bool {
        let words = self.0.iter().step_by(SAMPLED);
        let ones: u32 = words.map(|word| word.load().count_ones()).sum();
        ones > CROWDED
    }

    fn clear(&self) {
        for word in &self.0 {
            word.store(0);
        }
    }
}

/// Files that were met. What is forgotten stays known until a pass, which meets all that is mapped,
/// has come to its end: otherwise every fault meanwhile would be in a new file.
pub(crate) struct Met<W> {
    filters: [Filter<W>; 2],
    /// Which of them files are added to.
    current: W,
    /// Not 0 when something is to be forgotten.
    forgets: W,
    /// Not 0 while the filter before it is in use.
    uses_both: W,
}

impl<W: Word> Met<W> {
    /// All of it must be 0.
    pub(crate) const fn new(
        one: [W; WORDS],
        other: [W; WORDS],
        current: W,
        forgets: W,
        uses_both: W,
    ) -> Self {
        Self {
            filters: [Filter::new(one), Filter::new(other)],
            current,
            forgets,
            uses_both,
        }
    }

    /// The filter that files are added to, and the one before it.
    fn both(&self) -> (&Filter<W>, &Filter<W>) {
        let [one, other] = &self.filters;
        if self.current.load() == 0 {
            (one, other)
        } else {
            (other, one)
        }
    }

    /// Adds a file. Returns whether it was new.
    pub(crate) fn insert(&self, hash: u64) -> bool {
        let (current, before) = self.both();
        current.insert(hash) && !before.has(hash)
    }

    /// Files are to be news when they come back: those that the next pass does not meet.
    pub(crate) fn forget(&self) {
        self.forgets.store(1);
    }

    /// A pass begins: it meets all that is mapped.
    pub(crate) fn begin_pass(&self) {
        let (current, before) = self.both();
        if self.forgets.load() != 0 || current.is_crowded() {
            self.forgets.store(0);
            before.clear();
            self.uses_both.store(1);
            self.current.store(self.current.load() ^ 1);
        }
    }

    /// It has come to its end.
    pub(crate) fn end_pass(&self) {
        if self.uses_both.load() != 0 {
            self.both().1.clear();
            self.uses_both.store(0);
        }
    }

    /// Nothing was met.
    pub(crate) fn clear(&self) {
        for filter in &self.filters {
            filter.clear();
        }
    }
}
