// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A table from hashes to 32-bit references that grows bucket by bucket.
//!
//! A table that doubles is half empty on average and holds old and new while it grows. Here
//! (linear hashing) one bucket is split at a time, so that all of them always hold about as
//! many references, and a reference takes about six bytes with everything around it.

/// References per bucket, on average, at which another bucket is made.
const MOST: usize = 48;
/// A bucket grows by so many.
const GROWTH: usize = 4;
/// A reference and the tag of its hash, bytes.
const EACH: usize = 1 + size_of::<u32>();

/// References by hash. The hash of a reference is asked for when its bucket is split.
#[derive(Debug)]
pub(super) struct References {
    buckets: Vec<Bucket>,
    len: usize,
}

impl Default for References {
    fn default() -> Self {
        Self {
            buckets: vec![Bucket::default()],
            len: 0,
        }
    }
}

/// Eight bits of the hash of each, all side by side to be looked through at once, and then, in the same
/// order, the references.
#[derive(Debug, Default)]
struct Bucket(Vec<u8>);

impl Bucket {
    fn len(&self) -> usize {
        self.0.len() / EACH
    }

    fn reference(&self, index: usize) -> u32 {
        let at = self.len() + index * size_of::<u32>();
        let mut bytes = [0; size_of::<u32>()];
        bytes.copy_from_slice(&self.0[at..at + size_of::<u32>()]);
        u32::from_le_bytes(bytes)
    }

    /// Those with this tag, and where.
    fn with_tag(&self, tag: u8) -> impl Iterator<Item = (usize, u32)> {
        memchr::memchr_iter(tag, &self.0[..self.len()]).map(|at| (at, self.reference(at)))
    }

    fn push(&mut self, tag: u8, reference: u32) {
        let len = self.len();
        if self.0.len() + EACH > self.0.capacity() {
            self.0.reserve_exact(GROWTH * EACH);
        }
        self.0.insert(len, tag);
        self.0.extend(reference.to_le_bytes());
    }

    /// The last one takes its place.
    fn swap_remove(&mut self, index: usize) {
        let last = self.len() - 1;
        let reference = self.reference(last).to_le_bytes();
        let at = last + 1 + index * size_of::<u32>();
        self.0[at..at + size_of::<u32>()].copy_from_slice(&reference);
        self.0.truncate(self.0.len() - size_of::<u32>());
        self.0.swap(index, last);
        self.0.remove(last);
        if self.0.capacity() - self.0.len() > 2 * GROWTH * EACH {
            self.0.shrink_to(self.0.len() + GROWTH * EACH);
        }
    }
}

impl References {
    /// The reference with this hash that `is_it`.
    pub(super) fn find(&self, hash: u64, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let bucket = &self.buckets[self.bucket(hash)];
        let mut found = bucket.with_tag(tag(hash)).map(|(_, reference)| reference);
        found.find(|&reference| is_it(reference))
    }

    /// Adds a reference; `hash_of` those that are there.
    pub(super) fn insert(&mut self, hash: u64, reference: u32, hash_of: impl Fn(u32) -> u64) {
        if self.len >= self.buckets.len() * MOST {
            self.split(hash_of);
        }
        let bucket = self.bucket(hash);
        self.buckets[bucket].push(tag(hash), reference);
        self.len += 1;
    }

    /// Removes a reference that is there.
    pub(super) fn remove(&mut self, hash: u64, reference: u32) {
        let bucket = self.bucket(hash);
        let bucket = &mut self.buckets[bucket];
        let Some((at, _)) = bucket.with_tag(tag(hash)).find(|it| it.1 == reference) else {
            debug_assert!(false, "a reference that is not there");
            return;
        };
        bucket.swap_remove(at);
        self.len -= 1;
        if self.len == 0 {
            *self = Self::default();
        }
    }

    /// Memory taken, bytes, without what the allocator adds.
    pub(super) fn bytes(&self) -> usize {
        let buckets = self.buckets.iter().map(|it| it.0.capacity());
        buckets.sum::<usize>() + self.buckets.capacity() * size_of::<Bucket>()
    }

    /// With `n` buckets, `2^k <= n`, a hash belongs to bucket `hash mod 2^(k+1)`, or, when
    /// there is none yet, `hash mod 2^k`.
    fn bucket(&self, hash: u64) -> usize {
        let low = hash as usize & (self.buckets.len().next_power_of_two() - 1);
        if low < self.buckets.len() {
            low
        } else {
            low - self.buckets.len().next_power_of_two() / 2
        }
    }

    /// Makes one more bucket from the one it belongs to.
    fn split(&mut self, hash_of: impl Fn(u32) -> u64) {
        let count = self.buckets.len();
        if count == self.buckets.capacity() {
            self.buckets.reserve_exact((count / 8).max(1));
        }
        self.buckets.push(Bucket::default());
        let from = count - (count + 1).next_power_of_two() / 2;
        let old = std::mem::take(&mut self.buckets[from]);
        let [mut stay, mut go] = [Bucket::default(), Bucket::default()];
        for reference in (0..old.len()).map(|index| old.reference(index)) {
            let hash = hash_of(reference);
            let to = if self.bucket(hash) == from {
                &mut stay
            } else {
                &mut go
            };
            to.push(tag(hash), reference);
        }
        self.buckets[from] = stay;
        self.buckets[count] = go;
    }
}

/// The bits that do not choose the bucket.
fn tag(hash: u64) -> u8 {
    (hash >> 56) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Spread over all bits, and its own inverse's input.
    fn hash_of(reference: u32) -> u64 {
        (u64::from(reference) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    #[test]
    fn buckets_stay_evenly_filled_while_the_table_grows() {
        let mut table = References::default();
        for reference in 0..200_000 {
            table.insert(hash_of(reference), reference, hash_of);
            if reference.is_power_of_two() || reference == 199_999 {
                for it in 0..=reference {
                    assert_eq!(table.find(hash_of(it), |other| other == it), Some(it));
                }
            }
        }
        let fullest = table.buckets.iter().map(Bucket::len).max().unwrap();
        assert!(fullest < 4 * MOST, "{fullest}");
        let each = table.bytes() as f64 / 200_000.0;
        assert!(each < 6.5, "{each} bytes for each reference");
    }

    #[test]
    fn equal_hashes_are_told_apart() {
        let mut table = References::default();
        for reference in 0..1000 {
            table.insert(7, reference, |_| 7);
        }
        assert_eq!(table.find(7, |it| it == 999), Some(999));
        table.remove(7, 500);
        assert_eq!(table.find(7, |it| it == 500), None);
        assert_eq!(table.find(7, |it| it == 501), Some(501));
    }

    proptest! {
        #[test]
        fn what_was_put_in_is_found_until_it_is_taken_out(
            steps in prop::collection::vec((0..400_u32, any::<bool>()), 0..2000)
        ) {
            let mut table = References::default();
            let mut there = std::collections::BTreeSet::new();
            for (reference, insert) in steps {
                if insert && there.insert(reference) {
                    table.insert(hash_of(reference), reference, hash_of);
                } else if !insert && there.remove(&reference) {
                    table.remove(hash_of(reference), reference);
                }
            }
            prop_assert_eq!(table.len, there.len());
            for reference in 0..400 {
                let found = table.find(hash_of(reference), |it| it == reference);
                prop_assert_eq!(found.is_some(), there.contains(&reference));
            }
        }
    }
}
