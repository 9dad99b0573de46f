// SPDX-License-Identifier: GPL-2.0

use crate::list::deny;
use crate::pages::{Cursor, Pages, PieceState};
use crate::ranges::Range;
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
enum Op {
    Record(u64, u64, u64),
    Forget(u64, u64),
    Refuse(u64, u64, u64),
    Compare(u64, u64, u64, bool),
    Pack,
}

/// Of large files, and of small ones.
fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    prop_oneof![
        prop::collection::vec(op(1200, 600), 0..most),
        prop::collection::vec(op(12, 8), 0..most),
    ]
}

fn op(file: u64, most: u64) -> impl Strategy<Value = Op> {
    // Few frames and offsets, so that things meet.
    let (page, pages, frame) = (0..file, prop_oneof![1..4_u64, 1..most], 0..4_u64);
    prop_oneof![
        1 => Just(Op::Pack),
        2 => (page.clone(), pages.clone(), frame.clone()).prop_map(|(p, n, f)| Op::Record(p, n, f)),
        2 => (page.clone(), pages.clone()).prop_map(|(p, n)| Op::Forget(p, n)),
        2 => (page.clone(), pages.clone(), frame.clone()).prop_map(|(p, n, f)| Op::Refuse(p, n, f)),
        2 => (page, pages, frame, any::<bool>()).prop_map(|(p, n, f, r)| Op::Compare(p, n, f, r)),
    ]
}

/// Frames that keep the distance to their page, so that entries join.
fn frame_of(page: u64, choice: u64) -> u64 {
    page + 10_000 * choice + 5
}

proptest! {
    #[test]
    fn pages_are_a_map(ops in ops(200)) {
        let mut pages = Pages::new();
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        let mut refused: BTreeMap<u64, bool> = BTreeMap::new();
        let mut cursor = Cursor::default();
        for op in ops {
            match op {
                Op::Record(page, n, choice) => {
                    let range = Range { start: page, end: page + n };
                    let recorded = pages.record(range, frame_of(page, choice));
                    prop_assert_eq!(recorded, Ok(()));
                    for p in page..page + n {
                        model.insert(p, frame_of(p, choice));
                        refused.insert(p, false);
                    }
                }
                Op::Forget(page, n) => {
                    let range = Range { start: page, end: page + n };
                    let gone = (page..page + n).filter(|p| model.remove(p).is_some()).count();
                    prop_assert_eq!(pages.has_any(range), gone != 0);
                    prop_assert_eq!(pages.forget(range), gone as u64);
                }
                Op::Refuse(page, n, choice) => {
                    pages.refuse(Range { start: page, end: page + n }, frame_of(page, choice));
                    // At least those; whole entries may be marked.
                    for p in page..page + n {
                        if model.get(&p) == Some(&frame_of(p, choice)) {
                            refused.insert(p, true);
                        }
                    }
                }
                Op::Pack => pages.pack(),
                Op::Compare(page, n, choice, retry) => {
                    let mut rest = Range { start: page, end: page + n };
                    while !rest.is_empty() {
                        let piece = pages.compare(rest, frame_of(rest.start, choice), retry, &mut cursor);
                        prop_assert!(piece.range.start == rest.start && !piece.range.is_empty());
                        for p in piece.range.start..piece.range.end {
                            let known = model.get(&p).copied();
                            let same = known == Some(frame_of(p, choice));
                            match piece.state {
                                PieceState::Known => {
                                    prop_assert!(same);
                                    prop_assert!(!(retry && refused[&p]));
                                }
                                PieceState::New => prop_assert!(known.is_none() || (same && retry)),
                                PieceState::Moved => prop_assert!(known.is_some() && !same),
                            }
                        }
                        rest.start = piece.range.end;
                    }
                }
            }
            prop_assert_eq!(pages.pages(), model.len() as u64);
        }
        pages.pack();
        let all = all(&pages);
        for (p, (_, is_refused)) in &all {
            prop_assert!(*is_refused >= refused[p]);
        }
        let walked: BTreeMap<u64, u64> = all.into_iter().map(|(p, (frame, _))| (p, frame)).collect();
        prop_assert_eq!(walked, model);
    }
}

/// All that is tracked, page by page: frame and whether it was refused.
fn all(pages: &Pages) -> BTreeMap<u64, (u64, bool)> {
    let (mut all, mut cursor) = (BTreeMap::new(), Cursor::default());
    let mut next = pages.seek(0, &mut cursor);
    while let Some(entry) = next {
        for p in entry.page..entry.end() {
            let before = all.insert(p, (entry.frame_of(p), entry.refused));
            assert_eq!(before, None, "page {p} twice");
        }
        next = pages.next(&entry, &mut cursor);
    }
    all
}

proptest! {
    /// A page may be forgotten, but never be remembered where it was not reported last.
    #[test]
    fn without_memory_pages_are_forgotten_and_nothing_else_happens(
        ops in ops(150),
        denials in prop::collection::vec(prop_oneof![1 => Just(0), 1 => any::<u64>()], 150),
    ) {
        let mut pages = Pages::new();
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        for (op, denied) in ops.into_iter().zip(denials) {
            let before = pages.pages();
            match op {
                Op::Record(page, n, choice) => {
                    deny(denied);
                    let recorded = pages.record(Range { start: page, end: page + n }, frame_of(page, choice));
                    deny(0);
                    prop_assert!(recorded.is_ok() || denied != 0);
                    model.extend((page..page + n).map(|p| (p, frame_of(p, choice))));
                }
                Op::Forget(page, n) => {
                    deny(denied);
                    let forgotten = pages.forget(Range { start: page, end: page + n });
                    deny(0);
                    prop_assert_eq!(forgotten, before - pages.pages());
                    model.retain(|p, _| !(page..page + n).contains(p));
                }
                Op::Refuse(page, n, choice) => {
                    deny(denied);
                    pages.refuse(Range { start: page, end: page + n }, frame_of(page, choice));
                    deny(0);
                    // What cannot be marked is forgotten, so that it is tried again all the same.
                    let all = all(&pages);
                    for (p, (frame, is_refused)) in all.range(page..page + n) {
                        prop_assert!(*is_refused || *frame != frame_of(*p, choice));
                    }
                }
                Op::Compare(..) | Op::Pack => {
                    deny(denied);
                    pages.pack();
                    deny(0);
                    prop_assert_eq!(pages.pages(), before);
                }
            }
            let all = all(&pages);
            prop_assert_eq!(pages.pages(), all.len() as u64);
            for (p, (frame, _)) in all {
                prop_assert_eq!(model.get(&p), Some(&frame));
            }
        }
    }
}

/// Some order of `count` frames in which none follows the one before, within `memory` frames.
fn scattered(count: u64, memory: u64) -> impl Iterator<Item = u64> {
    let step = memory / 2 + 12_345;
    (0..count).map(move |i| (i * (step | 1) + i * i * 7) % memory)
}

fn record(pages: &mut Pages, page: u64, count: u64, frame: u64) {
    let range = Range {
        start: page,
        end: page + count,
    };
    assert_eq!(pages.record(range, frame), Ok(()));
}

fn bytes_per_page(pages: &Pages) -> f64 {
    pages.bytes() as f64 / pages.pages() as f64
}

#[test]
fn scattered_single_pages_cost_less_than_four_and_a_half_bytes() {
    // 1 TiB, 64 GiB and 4 GiB of guest memory.
    for (memory, most) in [(1 << 28, 4.1), (1 << 24, 3.6), (1 << 20, 3.1)] {
        for gap in [0, 1, 9] {
            let mut pages = Pages::new();
            for (i, frame) in scattered(20_000, memory).enumerate() {
                record(&mut pages, i as u64 * (1 + gap), 1, frame);
            }
            let per_page = bytes_per_page(&pages);
            assert!(
                per_page < 4.5,
                "{per_page} with gaps of {gap} in {memory} frames"
            );
            assert!(gap != 0 || per_page < most, "{per_page} in {memory} frames");
        }
    }
}

#[test]
fn what_came_in_any_order_is_packed() {
    let (count, memory) = (20_011, 1 << 28);
    let mut pages = Pages::new();
    for (i, frame) in scattered(count, memory).enumerate() {
        // A prime number of pages: every one is met once.
        record(&mut pages, i as u64 * 7919 % count, 1, frame);
    }
    pages.pack();
    assert_eq!(pages.pages(), count);
    assert!(bytes_per_page(&pages) < 4.5, "{}", bytes_per_page(&pages));
}

#[test]
fn a_file_in_one_piece_costs_nothing_beside_the_file() {
    let mut pages = Pages::new();
    record(&mut pages, 0, 3, 700);
    assert_eq!((pages.pages(), pages.bytes()), (3, 0));
    // It moved, and grew.
    record(&mut pages, 0, 3, 900);
    record(&mut pages, 3, 1, 903);
    assert_eq!((pages.pages(), pages.bytes()), (4, 0));
    // In two pieces, and in one again.
    record(&mut pages, 4, 1, 100);
    assert!(pages.bytes() > 0);
    assert_eq!(pages.forget(Range { start: 4, end: 5 }), 1);
    pages.pack();
    assert_eq!((pages.pages(), pages.bytes()), (4, 0));
    assert_eq!(pages.forget(Range { start: 0, end: 3 }), 3);
    assert_eq!((pages.pages(), pages.bytes()), (1, 0));
}

fn one(page: u64) -> Range {
    Range {
        start: page,
        end: page + 1,
    }
}

#[test]
fn a_file_in_one_piece_is_passed_once_and_refused_where_it_is() {
    let mut pages = Pages::new();
    record(&mut pages, 0, 2, 700);
    let mut cursor = Cursor::default();
    assert!(pages.seek(0, &mut cursor).is_some());
    let mut things = &[(); 2][..];
    assert_eq!(
        pages.pass_alike(&mut cursor, &mut things, |_, _| true),
        (2, None)
    );
    assert_eq!(
        pages.pass_alike(&mut cursor, &mut things, |_, _| true),
        (0, None)
    );
    assert_eq!(things.len(), 1);

    pages.refuse(one(1), 702);
    assert_eq!(
        pages.compare(one(1), 701, true, &mut cursor).state,
        PieceState::Known
    );
    pages.refuse(one(1), 701);
    assert_eq!(
        pages.compare(one(1), 701, true, &mut cursor).state,
        PieceState::New
    );
}

#[test]
fn a_cursor_from_before_a_file_was_in_one_piece_finds_its_place() {
    let mut pages = Pages::new();
    let mut cursors = Vec::new();
    for page in 0..50 {
        record(&mut pages, 2 * page, 1, 5_000 - page);
        let mut cursor = Cursor::default();
        assert!(pages.seek(page, &mut cursor).is_some());
        cursors.push(cursor);
    }
    pages.forget(Range { start: 1, end: 200 });
    pages.pack();
    assert_eq!((pages.pages(), pages.bytes()), (1, 0));
    for page in 1..100 {
        record(&mut pages, page, 1, 9_000 - page);
        for cursor in &cursors {
            for sought in 0..=page {
                let found = pages.seek(sought, &mut { *cursor });
                assert_eq!(found.map(|entry| entry.page), Some(sought));
            }
        }
    }
}

#[test]
fn large_folios_cost_next_to_nothing() {
    let mut pages = Pages::new();
    for (i, frame) in scattered(4000, 1 << 16).enumerate() {
        record(&mut pages, i as u64 * 16, 16, frame * 16);
    }
    assert!(bytes_per_page(&pages) < 0.3, "{}", bytes_per_page(&pages));
}

#[test]
fn memory_is_given_back() {
    let mut pages = Pages::new();
    for (i, frame) in scattered(20_000, 1 << 24).enumerate() {
        record(&mut pages, i as u64, 1, frame);
    }
    let full = pages.bytes();
    for i in (0..20_000).filter(|i| i % 16 != 0) {
        pages.forget(Range {
            start: i,
            end: i + 1,
        });
    }
    pages.pack();
    assert_eq!(pages.pages(), 1250);
    assert!(pages.bytes() * 6 < full, "{} of {full}", pages.bytes());
    pages.clear();
    assert_eq!((pages.pages(), pages.bytes()), (0, 0));
}

#[test]
fn a_refusal_marks_what_is_still_where_it_was_reported() {
    let mut pages = Pages::new();
    for (i, frame) in scattered(1000, 1 << 24).enumerate() {
        record(&mut pages, i as u64, 1, frame);
    }
    let frames: Vec<u64> = scattered(1000, 1 << 24).collect();
    for (i, frame) in frames.iter().enumerate().filter(|(i, _)| i % 3 == 0) {
        let range = Range {
            start: i as u64,
            end: i as u64 + 1,
        };
        // Every other one has moved since.
        pages.refuse(range, frame + (i as u64 % 2));
    }
    let mut cursor = Cursor::default();
    for (i, frame) in frames.iter().enumerate() {
        let range = Range {
            start: i as u64,
            end: i as u64 + 1,
        };
        let due = i % 6 == 0;
        let state = pages.compare(range, *frame, true, &mut cursor).state;
        assert_eq!(state == PieceState::New, due, "page {i}");
        let state = pages.compare(range, *frame, false, &mut cursor).state;
        assert_eq!(state, PieceState::Known, "page {i}");
    }
}
