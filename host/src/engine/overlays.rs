// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which guest memory lies on which store pages. Pure bookkeeping.

use std::collections::BTreeMap;
use std::ops::Range;

use roaring::RoaringBitmap;

use crate::protocol::{StorePage, StoreSpan, spans};
use crate::store::PAGE;

/// A canonical range mapped over guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Length, pages.
    pub pages: u32,
    /// First page in the store.
    pub store: StorePage,
    /// The file it came from: its number, as [`Memory::file_number`](super::Memory::file_number) gives it.
    pub file: u32,
    /// First page in the file.
    pub page: u64,
}

impl Overlay {
    fn skip(self, pages: u32) -> Self {
        Self {
            pages: self.pages - pages,
            store: self.store + pages,
            file: self.file,
            page: self.page + u64::from(pages),
        }
    }

    fn take(self, pages: u32) -> Self {
        Self { pages, ..self }
    }

    /// At most `pages` pages of it from `first` on.
    pub(super) fn slice(self, first: u32, pages: u32) -> Self {
        let rest = self.skip(first);
        rest.take(pages.min(rest.pages))
    }

    fn is_followed_by(&self, next: &Self) -> bool {
        self.file == next.file
            && self.store + self.pages == next.store
            && self.page + u64::from(self.pages) == next.page
    }
}

/// All overlays of a process by address, and the store pages they hold.
#[derive(Debug, Default)]
pub struct Overlays {
    by_address: BTreeMap<usize, Overlay>,
    pages: u64,
    held: RoaringBitmap,
    /// How often beyond the first a store page is held; duplicates within a guest.
    more: BTreeMap<StorePage, u32>,
    /// Not held any more, and the store does not know yet.
    dropped: RoaringBitmap,
}

impl Overlays {
    /// Number of overlays; adjacent ones that continue each other are one.
    pub fn len(&self) -> usize {
        self.by_address.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_address.is_empty()
    }

    /// Pages on overlays.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether the page at `address` is on an overlay.
    pub fn contains(&self, address: usize) -> bool {
        self.at_or_before(address)
            .is_some_and(|(start, o)| address < end_of(start, &o))
    }

    /// Whether any page of `range` is on an overlay.
    pub fn intersects(&self, range: &Range<usize>) -> bool {
        let last = self.by_address.range(..range.end).next_back();
        !range.is_empty() && last.is_some_and(|(a, o)| end_of(*a, o) > range.start)
    }

    /// All of the overlay that `address` is in.
    pub(super) fn around(&self, address: usize) -> Option<Range<usize>> {
        let (start, overlay) = self.at_or_before(address)?;
        let end = end_of(start, &overlay);
        (address < end).then_some(start..end)
    }

    fn at_or_before(&self, address: usize) -> Option<(usize, Overlay)> {
        self.by_address
            .range(..=address)
            .next_back()
            .map(|(a, o)| (*a, *o))
    }

    /// The overlays within `range`, cut to it.
    pub fn in_range(&self, range: &Range<usize>) -> impl Iterator<Item = (usize, Overlay)> + '_ {
        let (start, end) = (range.start, range.end);
        let first = self
            .at_or_before(start)
            .filter(|(a, o)| *a < start && end_of(*a, o) > start)
            .map(|(a, o)| (start, o.skip(((start - a) / PAGE) as u32)));
        first
            .into_iter()
            .chain(
                self.by_address
                    .range(start..end.max(start))
                    .map(|(a, o)| (*a, *o)),
            )
            .map(move |(a, o)| {
                let most = (end - a) / PAGE;
                (
                    a,
                    o.take(o.pages.min(u32::try_from(most).unwrap_or(u32::MAX))),
                )
            })
            .filter(|(_, o)| o.pages > 0)
    }

    /// All overlays by address.
    pub fn iter(&self) -> impl Iterator<Item = (usize, Overlay)> + '_ {
        self.by_address.iter().map(|(a, o)| (*a, *o))
    }

    /// Notes an overlay; what it replaces is let go.
    pub fn insert(&mut self, address: usize, overlay: Overlay) {
        // Hold first: a page that is replaced by itself must not count as dropped.
        self.hold(overlay.store..overlay.store + overlay.pages);
        let range = address..end_of(address, &overlay);
        if self.intersects(&range) {
            self.remove(&range);
        }
        self.pages += u64::from(overlay.pages);
        // With nothing left in between, the neighbours are the last two up to its end.
        let mut neighbours = self.by_address.range_mut(..=range.end).rev();
        let (mut next, mut previous) = (None, neighbours.next());
        if previous
            .as_ref()
            .is_some_and(|(start, _)| **start == range.end)
        {
            next = previous.map(|(_, next)| *next);
            previous = neighbours.next();
        }
        next = next.filter(|next| overlay.is_followed_by(next));
        let pages = overlay.pages + next.map_or(0, |next| next.pages);
        match previous {
            Some((start, previous))
                if end_of(*start, previous) == address && previous.is_followed_by(&overlay) =>
            {
                previous.pages += pages;
            }
            _ => {
                let whole = Overlay { pages, ..overlay };
                self.by_address.insert(address, whole);
            }
        }
        if next.is_some() {
            self.by_address.remove(&range.end);
        }
    }

    /// Forgets what lies in `range`.
    pub fn remove(&mut self, range: &Range<usize>) {
        let gone: Vec<_> = self.in_range(range).collect();
        for (address, part) in gone {
            let (start, whole) = self.at_or_before(address).unwrap_or((address, part));
            self.by_address.remove(&start);
            let before = ((address - start) / PAGE) as u32;
            if before > 0 {
                self.by_address.insert(start, whole.take(before));
            }
            if before + part.pages < whole.pages {
                let rest = whole.skip(before + part.pages);
                self.by_address.insert(end_of(address, &part), rest);
            }
            self.pages -= u64::from(part.pages);
            self.let_go(part.store..part.store + part.pages);
        }
    }

    fn hold(&mut self, pages: Range<StorePage>) {
        if !self.dropped.is_empty() {
            self.dropped.remove_range(pages.clone());
        }
        if pages.len() == 1 {
            if !self.held.insert(pages.start) {
                *self.more.entry(pages.start).or_default() += 1;
            }
            return;
        }
        let held_already = self.held.range(pages.clone());
        for page in held_already {
            *self.more.entry(page).or_default() += 1;
        }
        self.held.insert_range(pages);
    }

    fn let_go(&mut self, mut pages: Range<StorePage>) {
        let mut single = Vec::new();
        for (&page, more) in self.more.range_mut(pages.clone()) {
            *more -= 1;
            if *more == 0 {
                single.push(page);
            }
            // What lies between the pages that somebody else holds too.
            let between = pages.start..page;
            self.held.remove_range(between.clone());
            self.dropped.insert_range(between);
            pages.start = page + 1;
        }
        self.held.remove_range(pages.clone());
        self.dropped.insert_range(pages);
        for page in single {
            self.more.remove(&page);
        }
    }

    /// Store pages this process still needs.
    pub fn held(&self) -> &RoaringBitmap {
        &self.held
    }

    /// Those of them that more than one of its pages lies on.
    pub fn held_twice(&self) -> RoaringBitmap {
        self.more.keys().copied().collect()
    }

    /// Of `granted` and what was dropped since the last call, what is not held, as spans.
    pub fn take_unneeded(&mut self, granted: &RoaringBitmap) -> Vec<StoreSpan> {
        let mut unneeded = std::mem::take(&mut self.dropped);
        unneeded |= granted;
        unneeded -= &self.held;
        spans(&unneeded)
    }

    /// Forgets what was dropped; the store it came from is gone.
    pub fn clear_dropped(&mut self) {
        self.dropped.clear();
    }
}

fn end_of(address: usize, overlay: &Overlay) -> usize {
    address + overlay.pages as usize * PAGE
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: usize = 0x10_0000;

    fn at(page: usize) -> usize {
        BASE + page * PAGE
    }

    #[test]
    fn continuing_overlays_become_one() {
        let mut table = Overlays::default();
        table.insert(
            at(4),
            Overlay {
                pages: 4,
                store: 104,
                file: 0,
                page: 4,
            },
        );
        table.insert(
            at(0),
            Overlay {
                pages: 4,
                store: 100,
                file: 0,
                page: 0,
            },
        );
        assert_eq!(table.len(), 1);
        table.insert(
            at(8),
            Overlay {
                pages: 4,
                store: 200,
                file: 0,
                page: 8,
            },
        );
        assert_eq!((table.len(), table.pages()), (2, 12));
    }

    #[test]
    fn a_page_is_found_wherever_it_lies() {
        let everything = 0..usize::MAX;
        for address in [1 << 44, 2 << 44, 7 << 44].map(|it: usize| it - PAGE) {
            let mut table = Overlays::default();
            let overlay = Overlay {
                pages: 1,
                store: 100,
                file: 0,
                page: 0,
            };
            table.insert(address, overlay);
            let found: Vec<_> = table.in_range(&everything).collect();
            assert_eq!(found, [(address, overlay)]);
            table.remove(&everything);
            assert!(table.is_empty());
        }
    }

    #[test]
    fn a_page_replaced_by_itself_is_not_given_back() {
        let mut table = Overlays::default();
        let overlay = Overlay {
            pages: 4,
            store: 100,
            file: 0,
            page: 0,
        };
        table.insert(at(0), overlay);
        table.insert(at(0), overlay);
        assert_eq!(table.take_unneeded(&RoaringBitmap::new()), []);
        table.remove(&(at(1)..at(2)));
        assert_eq!(
            table.take_unneeded(&RoaringBitmap::new()),
            [StoreSpan {
                page: 101,
                pages: 1
            }]
        );
    }

    proptest! {
        /// The table against one store page per guest page.
        #[test]
        fn the_table_agrees_with_a_plain_array(
            steps in prop::collection::vec((0_usize..64, 1_u32..16, 0_u32..32, any::<bool>()), 1..80)
        ) {
            let mut table = Overlays::default();
            let mut model: [Option<StorePage>; 96] = [None; 96];
            let mut given_back = RoaringBitmap::new();
            for (first, pages, store, insert) in steps {
                let range = at(first)..at(first + pages as usize);
                if insert {
                    let page = u64::from(store);
                    table.insert(range.start, Overlay { pages, store, file: 0, page });
                    for i in 0..pages {
                        model[first + i as usize] = Some(store + i);
                        given_back.remove(store + i);
                    }
                } else {
                    table.remove(&range);
                    model[first..first + pages as usize].fill(None);
                }
                for span in table.take_unneeded(&RoaringBitmap::new()) {
                    given_back.insert_range(span.page..span.page + span.pages);
                }
            }
            let held: RoaringBitmap = model.iter().flatten().copied().collect();
            prop_assert_eq!(table.held(), &held);
            prop_assert!(given_back.is_disjoint(&held));
            prop_assert_eq!(table.pages(), model.iter().flatten().count() as u64);
            for (i, expected) in model.iter().enumerate() {
                let found = table.in_range(&(at(i)..at(i + 1))).next().map(|(_, o)| o.store);
                prop_assert_eq!(found, *expected);
                prop_assert_eq!(table.contains(at(i)), expected.is_some());
            }
        }
    }
}
