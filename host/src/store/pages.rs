// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is known of each page of a store, by its number.
//!
//! Pages get numbers side by side, and are asked for in their order: 64 of them lie in one piece,
//! which is there as long as one of them is. A page takes 16 bytes where its neighbours are there, and
//! about a quarter of itself at most.

use crate::protocol::StorePage;
use hashbrown::HashMap;

/// Pages of one segment.
const SEGMENT: u32 = u64::BITS;

/// What is known of one store page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Page {
    /// Its content hash.
    pub(super) hash: u64,
    /// VMs that it is granted to.
    pub(super) references: u32,
    /// The VM that published it.
    pub(super) publisher: u32,
}

#[derive(Debug)]
struct Segment {
    /// Bit i: page i is there.
    there: u64,
    pages: [Page; SEGMENT as usize],
}

/// Pages by their numbers.
#[derive(Debug, Default)]
pub(super) struct Pages {
    segments: HashMap<u32, Box<Segment>>,
    len: usize,
}

impl Pages {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn contains(&self, store: StorePage) -> bool {
        self.get(store).is_some()
    }

    pub(super) fn get(&self, store: StorePage) -> Option<&Page> {
        let segment = self.segments.get(&(store / SEGMENT))?;
        let slot = store % SEGMENT;
        (segment.there >> slot & 1 == 1).then(|| &segment.pages[slot as usize])
    }

    pub(super) fn get_mut(&mut self, store: StorePage) -> Option<&mut Page> {
        let segment = self.segments.get_mut(&(store / SEGMENT))?;
        let slot = store % SEGMENT;
        (segment.there >> slot & 1 == 1).then(|| &mut segment.pages[slot as usize])
    }

    /// Adds a page, or replaces it.
    pub(super) fn insert(&mut self, store: StorePage, page: Page) {
        let segment = self.segments.entry(store / SEGMENT).or_insert_with(|| {
            Box::new(Segment {
                there: 0,
                pages: [Page::default(); SEGMENT as usize],
            })
        });
        let slot = store % SEGMENT;
        self.len += usize::from(segment.there >> slot & 1 == 0);
        segment.there |= 1 << slot;
        segment.pages[slot as usize] = page;
    }

    pub(super) fn remove(&mut self, store: StorePage) -> Option<Page> {
        let number = store / SEGMENT;
        let segment = self.segments.get_mut(&number)?;
        let slot = store % SEGMENT;
        if segment.there >> slot & 1 == 0 {
            return None;
        }
        let page = segment.pages[slot as usize];
        segment.there &= !(1 << slot);
        if segment.there == 0 {
            self.segments.remove(&number);
        }
        self.len -= 1;
        Some(page)
    }

    /// Memory taken, bytes.
    pub(super) fn bytes(&self) -> usize {
        self.segments.allocation_size() + self.segments.len() * size_of::<Segment>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn the_memory_of_pages_that_have_gone_is_given_back() {
        let mut pages = Pages::default();
        let page = Page::default();
        (0..64_000).for_each(|store| pages.insert(store, page));
        assert!(pages.bytes() < 64_000 * 18, "{}", pages.bytes());
        (0..64_000).filter(|it| it % 64 != 63).for_each(|store| {
            pages.remove(store);
        });
        let left = pages.bytes();
        (63..64_000).step_by(64).for_each(|store| {
            pages.remove(store);
        });
        assert_eq!(pages.len(), 0);
        assert!(pages.bytes() * 20 < left, "{} of {left}", pages.bytes());
    }

    proptest! {
        #[test]
        fn pages_are_what_a_map_of_them_is(
            steps in prop::collection::vec((0..300_u32, any::<Option<u64>>()), 0..600)
        ) {
            let mut pages = Pages::default();
            let mut map = BTreeMap::new();
            // Up to the last number there is.
            for (store, hash) in steps.into_iter().map(|(it, hash)| (u32::MAX - it * 7, hash)) {
                if let Some(hash) = hash {
                    let page = Page { hash, references: store, publisher: 1 };
                    pages.insert(store, page);
                    map.insert(store, page);
                } else {
                    prop_assert_eq!(pages.remove(store), map.remove(&store));
                }
                prop_assert_eq!(pages.len(), map.len());
            }
            for store in (0..300).map(|it| u32::MAX - it * 7) {
                prop_assert_eq!(pages.get(store), map.get(&store));
                prop_assert_eq!(pages.get_mut(store).copied(), map.get(&store).copied());
                prop_assert_eq!(pages.contains(store), map.contains_key(&store));
            }
        }
    }
}
