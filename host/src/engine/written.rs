// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory whose overlay was undone after the guest had written it.
//!
//! Such a page is memory of this process alone, and a device may have it pinned and be about to
//! write it: a disk that is read without the page cache writes into guest memory by physical
//! address. Copied elsewhere, the page would lose what arrives later; the kernel says of no page
//! whether it is pinned, and only what the guest reports does it hold. So it stays where it is,
//! in a mapping of the store's file of which nothing is seen any more, until the VMM discards
//! it, unmaps it, or the guest reports it again.

use std::collections::BTreeMap;
use std::ops::Range;

use super::attributes::Attributes;

/// Ranges of such pages, none of which meets another of the same attributes.
#[derive(Clone, Debug, Default)]
pub(super) struct Written {
    /// Ends, and what the memory around was like, by start.
    by_address: BTreeMap<usize, (usize, Attributes)>,
}

impl Written {
    /// Whether any page of `range` is one.
    pub(super) fn intersects(&self, range: &Range<usize>) -> bool {
        let last = self.by_address.range(..range.end).next_back();
        !range.is_empty() && last.is_some_and(|(_, (end, _))| *end > range.start)
    }

    /// Whether the page at `address` is one.
    pub(super) fn contains(&self, address: usize) -> bool {
        self.intersects(&(address..address + 1))
    }

    /// All of the memory of one kind that `address` is in.
    pub(super) fn around(&self, address: usize) -> Option<Range<usize>> {
        let (start, (end, _)) = self.by_address.range(..=address).next_back()?;
        (address < *end).then_some(*start..*end)
    }

    /// Those in `range`, cut to it.
    pub(super) fn in_range(&self, range: &Range<usize>) -> Vec<(Range<usize>, Attributes)> {
        let first = self.by_address.range(..=range.start).next_back();
        let from = first.map_or(range.start, |(start, _)| *start);
        self.by_address
            .range(from..range.end.max(from))
            .map(|(start, (end, attributes))| {
                (
                    (*start).max(range.start)..(*end).min(range.end),
                    *attributes,
                )
            })
            .filter(|(part, _)| !part.is_empty())
            .collect()
    }

    /// Notes `range`.
    pub(super) fn insert(&mut self, range: &Range<usize>, attributes: Attributes) {
        if range.is_empty() {
            return;
        }
        self.remove(range);
        let mut whole = range.clone();
        let before = self.by_address.range(..range.start).next_back();
        if let Some((&start, &(end, of))) = before {
            if end == range.start && of == attributes {
                whole.start = start;
            }
        }
        if let Some(&(end, of)) = self.by_address.get(&range.end) {
            if of == attributes {
                self.by_address.remove(&range.end);
                whole.end = end;
            }
        }
        self.by_address.insert(whole.start, (whole.end, attributes));
    }

    /// Forgets what of `range` there is.
    pub(super) fn remove(&mut self, range: &Range<usize>) {
        for (part, attributes) in self.in_range(range) {
            let (&start, &(end, _)) = self
                .by_address
                .range(..=part.start)
                .next_back()
                .expect("just found");
            self.by_address.remove(&start);
            if start < part.start {
                self.by_address.insert(start, (part.start, attributes));
            }
            if part.end < end {
                self.by_address.insert(part.end, (end, attributes));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::PAGE;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_agree_with_a_plain_array(
            steps in prop::collection::vec((0_usize..40, 0_usize..12, 0_u8..3), 0..60)
        ) {
            let mut written = Written::default();
            let mut model = [None; 64];
            for (first, pages, what) in steps {
                let range = first * PAGE..(first + pages) * PAGE;
                let attributes = Attributes { dont_dump: what == 1, ..Attributes::default() };
                if what == 2 {
                    written.remove(&range);
                } else {
                    written.insert(&range, attributes);
                }
                model[first..first + pages].fill((what != 2).then_some(attributes));
            }
            for (page, expected) in model.iter().enumerate() {
                prop_assert_eq!(written.contains(page * PAGE), expected.is_some());
            }
            let range = 5 * PAGE..30 * PAGE;
            let mut found = [None; 64];
            let parts = written.in_range(&range);
            prop_assert_eq!(parts.is_empty(), !written.intersects(&range));
            for (part, attributes) in parts {
                found[part.start / PAGE..part.end / PAGE].fill(Some(attributes));
            }
            prop_assert_eq!(&found[5..30], &model[5..30]);
            prop_assert!(found[..5].iter().chain(&found[30..]).all(Option::is_none));
            let all = written.in_range(&(0..64 * PAGE));
            prop_assert!(all.windows(2).all(|two| two[0].0.end < two[1].0.start || two[0].1 != two[1].1));
        }
    }
}
