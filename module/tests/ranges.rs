// SPDX-License-Identifier: GPL-2.0

use crate::ranges::{join, Range, Ranges};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

fn range() -> impl Strategy<Value = Range> {
    (0..100_u64, 0..20_u64).prop_map(|(start, len)| Range {
        start,
        end: start + len,
    })
}

proptest! {
    #[test]
    fn a_set_of_ranges_is_a_set_of_pages(list in prop::collection::vec(range(), 0..40), probe in range()) {
        let (mut ranges, mut model) = (Ranges::new(), BTreeSet::new());
        for range in list {
            prop_assert!(ranges.insert(range).is_ok());
            model.extend(range.start..range.end);
        }
        for pair in ranges.as_slice().windows(2) {
            prop_assert!(pair[0].end < pair[1].start);
        }
        let pages: BTreeSet<u64> =
            ranges.as_slice().iter().flat_map(|range| range.start..range.end).collect();
        prop_assert_eq!(&pages, &model);

        // Taking what is missing piece by piece gives exactly what the model lacks.
        let (mut rest, mut missing) = (probe, BTreeSet::new());
        loop {
            let part = ranges.first_missing(rest);
            if part.is_empty() {
                break;
            }
            prop_assert!(part.start >= rest.start && part.end <= rest.end);
            missing.extend(part.start..part.end);
            rest.start = part.end;
        }
        let expected: BTreeSet<u64> = (probe.start..probe.end).filter(|page| !model.contains(page)).collect();
        prop_assert_eq!(missing, expected);
    }

    #[test]
    fn joining_keeps_every_page_once(list in prop::collection::vec((0..5_usize, range()), 0..130)) {
        let mut model: BTreeMap<usize, BTreeSet<u64>> = BTreeMap::new();
        for (key, range) in &list {
            if !range.is_empty() {
                model.entry(*key).or_default().extend(range.start..range.end);
            }
        }
        let mut list = list;
        let kept = join(&mut list, |item| item.0, |item| &mut item.1);
        let mut joined: BTreeMap<usize, BTreeSet<u64>> = BTreeMap::new();
        for (key, range) in &list[..kept] {
            for page in range.start..range.end {
                prop_assert!(joined.entry(*key).or_default().insert(page));
            }
        }
        prop_assert_eq!(joined, model);
        for pair in list[..kept].windows(2) {
            prop_assert!(pair[0].0 < pair[1].0 || pair[0].1.end < pair[1].1.start);
        }
    }
}
