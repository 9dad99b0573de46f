// SPDX-License-Identifier: GPL-2.0

use crate::pages::{Cursor, Pages};
use crate::ranges::Range;
use crate::sight::{Comparison, Sight};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug)]
struct Piece {
    gap: u64,
    pages: u64,
    choice: u64,
    unsettled: bool,
    refused: bool,
}

/// Pieces one behind the other; marks are seldom.
fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let gap = prop_oneof![3 => Just(0_u64), 1 => 1..9_u64];
    let pages = prop_oneof![1..4_u64, 1..40_u64];
    let piece = (
        gap,
        pages,
        prop_oneof![4 => Just(0_u64), 1 => 1..3_u64],
        0..20_u8,
    );
    let piece = piece.prop_map(|(gap, pages, choice, mark)| Piece {
        gap,
        pages,
        choice,
        unsettled: mark == 0,
        refused: mark == 1,
    });
    prop_oneof![
        2 => prop::collection::vec(piece, 0..60),
        1 => single_pages(),
    ]
}

/// As where memory is in pieces: many pages one behind the other, hardly two at frames that are.
fn single_pages() -> impl Strategy<Value = Vec<Piece>> {
    let gap = prop_oneof![200 => Just(0_u64), 1 => 1..9_u64];
    let pages = prop_oneof![50 => Just(1_u64), 1 => 2..9_u64];
    let piece = (gap, pages, 0..1000_u64, 0..200_u8);
    let piece = piece.prop_map(|(gap, pages, choice, mark)| Piece {
        gap,
        pages,
        choice,
        unsettled: mark == 0,
        refused: mark == 1,
    });
    prop::collection::vec(piece, 0..700)
}

fn frame_of(page: u64, choice: u64) -> u64 {
    page + 10_000 * choice + 5
}

proptest! {
    #[test]
    fn every_difference_is_found_and_nothing_else(
        seen in pieces(),
        reported in pieces(),
        copy in any::<bool>(),
        from in 0..300_u64,
        length in 0..900_u64,
        retry in any::<bool>(),
    ) {
        let range = Range { start: from, end: from + length };
        let (mut sights, mut in_cache) = (Vec::new(), BTreeMap::new());
        let mut page = 0;
        for piece in &seen {
            page += piece.gap;
            sights.push(Sight::new(page, piece.pages, frame_of(page, piece.choice), piece.unsettled));
            for p in page..page + piece.pages {
                in_cache.insert(p, (frame_of(p, piece.choice), piece.unsettled));
            }
            page += piece.pages;
        }
        // Often the same with one change, as in life.
        let mut reported = if copy { seen.clone() } else { reported };
        if let (true, Some(last)) = (copy, reported.last_mut()) {
            last.choice += 1;
        }
        let (mut pages, mut known) = (Pages::new(), BTreeMap::new());
        let mut page = 0;
        for piece in &reported {
            page += piece.gap;
            let range = Range { start: page, end: page + piece.pages };
            prop_assert_eq!(pages.record(range, frame_of(page, piece.choice)), Ok(()));
            for p in page..page + piece.pages {
                known.insert(p, frame_of(p, piece.choice));
            }
            page += piece.pages;
        }
        let mut refused = BTreeSet::new();
        let mut page = 0;
        for piece in &reported {
            page += piece.gap;
            if piece.refused {
                let range = Range { start: page, end: page + piece.pages };
                pages.refuse(range, frame_of(page, piece.choice));
            }
            page += piece.pages;
        }
        // Marks are per entry, and entries join.
        let mut walk = Cursor::default();
        let mut next = pages.seek(0, &mut walk);
        while let Some(entry) = next {
            if entry.refused {
                refused.extend(entry.page..entry.end());
            }
            next = pages.next(&entry, &mut walk);
        }

        let (mut differs, mut same) = (BTreeSet::new(), 0);
        for p in range.start..range.end {
            match (in_cache.get(&p), known.get(&p)) {
                (None, None) | (Some((_, true)), None) => {}
                (Some((frame, false)), Some(at)) if frame == at && !(retry && refused.contains(&p)) => same += 1,
                _ => {
                    differs.insert(p);
                }
            }
        }
        let mut comparison = Comparison::new(&sights, range, retry);
        let mut cursor = Cursor::default();
        let mut found = BTreeSet::new();
        while let Some(difference) = comparison.next_difference(&pages, &mut cursor) {
            prop_assert!(!difference.is_empty());
            for p in difference.start..difference.end {
                prop_assert!(found.insert(p), "page {} twice", p);
            }
        }
        prop_assert_eq!(found, differs);
        prop_assert_eq!(comparison.same, same);
    }
}
