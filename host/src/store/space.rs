// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which page numbers of the store file are free. Numbers cost nothing until written.

use crate::protocol::StorePage;
use std::collections::{BTreeMap, BTreeSet};

/// Free page numbers, as ranges that never touch each other.
///
/// Numbers are taken behind all that were ever taken, as long as there are any: a tmpfs with large
/// folios makes them as large as what is appended to a file, but 2 MiB for a page anywhere before its
/// end.
#[derive(Debug)]
pub(super) struct Space {
    by_start: BTreeMap<StorePage, u32>,
    by_length: BTreeSet<(u32, StorePage)>,
    free: u64,
    /// End of all that were ever taken.
    end: StorePage,
}

impl Space {
    /// Everything is free; the last number is never used, so that ends fit in 32 bits.
    pub(super) fn new() -> Self {
        let mut space = Self {
            by_start: BTreeMap::new(),
            by_length: BTreeSet::new(),
            free: 0,
            end: 0,
        };
        space.add(0, StorePage::MAX);
        space
    }

    /// How many numbers are free.
    pub(super) fn free_pages(&self) -> u64 {
        self.free
    }

    /// Takes `pages` numbers, out of the smallest range that has them once none are left behind the
    /// end.
    pub(super) fn take(&mut self, pages: u32) -> Option<StorePage> {
        if pages <= StorePage::MAX - self.end {
            let start = self.end;
            self.take_at(start, pages);
            return Some(start);
        }
        let &(length, start) = self.by_length.range((pages, 0)..).next()?;
        self.drop_range(start, length);
        if length > pages {
            self.add(start + pages, length - pages);
        }
        Some(start)
    }

    /// Takes what is free of `start .. start + pages`.
    pub(super) fn take_at(&mut self, start: StorePage, pages: u32) {
        let end = start.saturating_add(pages);
        self.end = self.end.max(end);
        let first = self
            .by_start
            .range(..=start)
            .next_back()
            .map_or(start, |(&at, _)| at);
        let touched: Vec<_> = self
            .by_start
            .range(first..end)
            .map(|(&at, &length)| (at, length))
            .collect();
        for (at, length) in touched {
            let range_end = at + length;
            if range_end <= start {
                continue;
            }
            self.drop_range(at, length);
            if at < start {
                self.add(at, start - at);
            }
            if range_end > end {
                self.add(end, range_end - end);
            }
        }
    }

    /// Gives back `start .. start + pages`, none of which is free.
    pub(super) fn give(&mut self, mut start: StorePage, mut pages: u32) {
        if let Some((&at, &length)) = self.by_start.range(..start).next_back() {
            if at + length == start {
                self.drop_range(at, length);
                start = at;
                pages += length;
            }
        }
        if let Some(&length) = self.by_start.get(&(start + pages)) {
            self.drop_range(start + pages, length);
            pages += length;
        }
        self.add(start, pages);
    }

    fn add(&mut self, start: StorePage, length: u32) {
        self.by_start.insert(start, length);
        self.by_length.insert((length, start));
        self.free += u64::from(length);
    }

    fn drop_range(&mut self, start: StorePage, length: u32) {
        self.by_start.remove(&start);
        self.by_length.remove(&(length, start));
        self.free -= u64::from(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_joins_its_neighbours() {
        let mut space = Space::new();
        let a = space.take(16).unwrap();
        let b = space.take(16).unwrap();
        let c = space.take(16).unwrap();
        assert_eq!((a, b, c), (0, 16, 32));
        space.give(a, 16);
        space.give(c, 16);
        space.give(b, 16);
        assert_eq!(space.by_start, BTreeMap::from([(0, StorePage::MAX)]));
        assert_eq!(space.free_pages(), u64::from(StorePage::MAX));
        assert_eq!(space.take(1), Some(48));
    }

    #[test]
    fn what_was_given_back_is_taken_again_when_nothing_else_is_left() {
        let mut space = Space::new();
        let all = StorePage::MAX;
        assert_eq!(space.take(all - 10), Some(0));
        space.give(100, 8);
        space.give(200, 20);
        assert_eq!(space.take(10), Some(all - 10));
        assert_eq!((space.take(8), space.take(10)), (Some(100), Some(200)));
        assert_eq!(space.take(11), None);
        assert_eq!(space.take(10), Some(210));
        assert_eq!((space.free_pages(), space.take(1)), (0, None));
    }

    #[test]
    fn a_taken_place_is_not_given_out() {
        let mut space = Space::new();
        space.take_at(10, 5);
        space.take_at(12, 10);
        assert_eq!(space.take(10), Some(22));
        assert_eq!(space.take(StorePage::MAX - 32), Some(32));
        assert_eq!(space.take(10), Some(0));
    }

    #[test]
    fn exhaustion_is_no_page() {
        let mut space = Space::new();
        assert_eq!(space.take(StorePage::MAX), Some(0));
        assert_eq!(space.take(1), None);
    }
}
