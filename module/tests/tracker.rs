// SPDX-License-Identifier: GPL-2.0

use crate::ranges::Range;
use crate::tracker::{FileState, Pages, PieceState, Tracker};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};

#[derive(Clone, Debug)]
enum Op {
    Record(u64, u64, u64),
    Forget(u64, u64),
    Refuse(u64, u64, u64),
    Compare(u64, u64, u64, bool),
}

fn op() -> impl Strategy<Value = Op> {
    // Few frames and offsets, so that things meet.
    let (page, pages, frame) = (0..1200_u64, 1..600_u64, 0..4_u64);
    prop_oneof![
        (page.clone(), pages.clone(), frame.clone()).prop_map(|(p, n, f)| Op::Record(p, n, f)),
        (page.clone(), pages.clone()).prop_map(|(p, n)| Op::Forget(p, n)),
        (page.clone(), pages.clone(), frame.clone()).prop_map(|(p, n, f)| Op::Refuse(p, n, f)),
        (page, pages, frame, any::<bool>()).prop_map(|(p, n, f, r)| Op::Compare(p, n, f, r)),
    ]
}

/// Frames that keep the distance to their page, so that entries join.
fn frame_of(page: u64, choice: u64) -> u64 {
    page + 10_000 * choice + 5
}

proptest! {
    #[test]
    fn pages_are_a_map(ops in prop::collection::vec(op(), 0..60)) {
        let mut pages = Pages::new();
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        let mut refused: BTreeMap<u64, bool> = BTreeMap::new();
        let mut cursor = 0;
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
    }

    #[test]
    fn files_are_found_by_key(ops in prop::collection::vec((0..3_u8, 0..40_usize), 0..400)) {
        let mut tracker = Tracker::new(30);
        let mut model: HashMap<usize, u32> = HashMap::new();
        let mut retired: Vec<u32> = Vec::new();
        for (op, key) in ops {
            // Addresses as the kernel has them.
            let key = 0xffff_8880_0000_0000 + key * 1024;
            match (op, model.get(&key).copied()) {
                (0, None) => {
                    let added = tracker.add(key, key as u64);
                    prop_assert_eq!(added.is_some(), model.len() + retired.len() < 30);
                    if let Some(id) = added {
                        prop_assert!(!retired.contains(&id));
                        prop_assert!(model.values().all(|other| *other != id));
                        model.insert(key, id);
                    }
                }
                (1, Some(id)) => {
                    tracker.retire(id);
                    model.remove(&key);
                    retired.push(id);
                }
                (2, _) => {
                    if let Some(id) = retired.pop() {
                        tracker.release(id);
                        prop_assert!(tracker.get_mut(id).is_none());
                    }
                }
                _ => {}
            }
            for key in (0..40).map(|key| 0xffff_8880_0000_0000 + key * 1024) {
                prop_assert_eq!(tracker.find(key), model.get(&key).copied());
            }
            prop_assert_eq!(tracker.files(), model.len());
        }
    }
}

#[test]
fn runs_of_eight_cost_less_than_three_bytes_a_page() {
    let mut tracker = Tracker::new(1 << 20);
    for key in 1..=200_usize {
        let id = tracker.add(key * 1024, 0).expect("room for 200 files");
        let file = tracker.get_mut(id).expect("just added");
        file.state = FileState::Announced;
        for i in 0..64 {
            let range = Range {
                start: i * 8,
                end: i * 8 + 8,
            };
            file.pages
                .record(range, (key as u64 * 64 + i) * 100)
                .expect("memory");
        }
    }
    let per_page = tracker.bytes() as f64 / tracker.pages() as f64;
    assert!(per_page < 3.0, "{per_page} bytes a page");
}

#[test]
fn ten_scattered_pages_in_each_file_cost_less_than_28_bytes_a_page() {
    let mut tracker = Tracker::new(1 << 20);
    for key in 1..=1000_usize {
        let id = tracker.add(key * 1024, 0).expect("room");
        let file = tracker.get_mut(id).expect("just added");
        for i in 0..10 {
            let range = Range {
                start: i,
                end: i + 1,
            };
            file.pages
                .record(range, (key as u64 * 64 + i) * 100)
                .expect("memory");
        }
    }
    let per_page = tracker.bytes() as f64 / tracker.pages() as f64;
    assert!(per_page < 28.0, "{per_page} bytes a page");
}

#[test]
fn files_that_are_not_seen_any_more_are_found() {
    let mut tracker = Tracker::new(10);
    let (a, b) = (
        tracker.add(8, 0).expect("room"),
        tracker.add(16, 0).expect("room"),
    );
    let all = Range { start: 0, end: 10 };
    for pass in 1..=5 {
        assert_eq!(tracker.uncovered(a, pass, all), all);
        tracker.cover(a, all);
        assert!(tracker.uncovered(a, pass, all).is_empty());
    }
    assert_eq!(tracker.uncovered(b, 2, all), all);
    assert_eq!(tracker.next_unseen(0, 5, 3), None);
    assert_eq!(tracker.next_unseen(0, 5, 2), Some(b));
    assert_eq!(tracker.next_unseen(b + 1, 5, 2), None);
}
