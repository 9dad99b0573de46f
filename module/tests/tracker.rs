// SPDX-License-Identifier: GPL-2.0

use crate::list::deny;
use crate::ranges::Range;
use crate::tracker::{FileState, Tracker};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What a test remembers of a file.
#[derive(Default)]
struct Known {
    seen: u32,
    looked_at: BTreeSet<u64>,
    reported: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Look(Range),
    Touch,
    Report(Range),
    Retire,
    /// The next pass, after one that came to its end or did not.
    Pass(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..60_u64, 0..20_u64).prop_map(|(start, pages)| Range {
        start,
        end: start + pages,
    });
    prop_oneof![
        6 => range.clone().prop_map(Step::Look),
        1 => Just(Step::Touch),
        3 => range.prop_map(Step::Report),
        1 => Just(Step::Retire),
        1 => any::<bool>().prop_map(Step::Pass),
    ]
}

proptest! {
    /// In every pass each page is looked at once, or more than once where memory was short; and
    /// what was not looked at is known.
    #[test]
    fn a_pass_looks_at_every_page_once(
        steps in prop::collection::vec((step(), 0..4_usize), 0..200),
        denied in prop_oneof![Just(0), any::<u64>()],
    ) {
        let mut tracker = Tracker::new(10);
        let mut files: BTreeMap<u32, Known> = BTreeMap::new();
        let mut pass = 1;
        for (step, which) in steps {
            let key = 64 + 64 * which;
            let id = match tracker.find(key) {
                Some(id) => id,
                None => {
                    let id = tracker.add(key, 0).expect("room");
                    prop_assert!(files.insert(id, Known::default()).is_none());
                    id
                }
            };
            let file = files.get_mut(&id).expect("added");
            match step {
                Step::Look(mut range) => {
                    file.seen = pass;
                    let wanted: BTreeSet<u64> = (range.start..range.end).collect();
                    let mut now = BTreeSet::new();
                    deny(denied);
                    loop {
                        let part = tracker.uncovered(id, pass, range);
                        if part.is_empty() {
                            break;
                        }
                        prop_assert!(part.start >= range.start && part.end <= range.end);
                        for page in part.start..part.end {
                            prop_assert!(now.insert(page));
                            prop_assert!(denied != 0 || !file.looked_at.contains(&page));
                        }
                        tracker.cover(id, part);
                        range.start = part.end;
                    }
                    deny(0);
                    prop_assert!(wanted.iter().all(|p| now.contains(p) || file.looked_at.contains(p)));
                    file.looked_at.extend(now);
                }
                Step::Touch => {
                    file.seen = pass;
                    tracker.touch(id, pass);
                }
                Step::Report(range) => {
                    let tracked = tracker.get_mut(id).expect("in use");
                    prop_assert_eq!(tracked.pages.record(range, 1000 + range.start), Ok(()));
                    file.reported.extend(range.start..range.end);
                }
                Step::Retire => {
                    tracker.retire(id);
                    tracker.release(id);
                    files.remove(&id);
                }
                Step::Pass(ended) => {
                    if ended {
                        tracker.end_of_pass(pass);
                    }
                    pass += 1;
                    for file in files.values_mut() {
                        file.looked_at.clear();
                    }
                }
            }
            for (&id, file) in &files {
                let (mut strays, mut page) = (BTreeSet::new(), 0);
                while let Some(stray) = tracker.stray(id, pass, page) {
                    strays.extend(stray.start..stray.end);
                    page = stray.end;
                }
                let expected: BTreeSet<u64> = file.reported.difference(&file.looked_at).copied().collect();
                // What was looked at may be forgotten to have been.
                prop_assert!(strays.is_superset(&expected));
                prop_assert!(denied != 0 || strays == expected);
            }
            for since in [pass, pass.saturating_sub(2)] {
                let next = files.iter().find(|(_, file)| file.seen < since).map(|(id, _)| *id);
                prop_assert_eq!(tracker.next_missing(0, since), next);
            }
            let old = files.iter().find(|(_, file)| pass - file.seen > 3).map(|(id, _)| *id);
            prop_assert_eq!(tracker.next_unseen(0, pass, 3), old);
            let pages: usize = files.values().map(|file| file.reported.len()).sum();
            prop_assert_eq!(tracker.pages(), pages as u64);
        }
    }

    #[test]
    fn files_are_found_by_key(
        ops in prop::collection::vec((0..3_u8, 0..40_usize), 0..400),
        denied in prop_oneof![Just(0), any::<u64>()],
    ) {
        let mut tracker = Tracker::new(30);
        let mut model: HashMap<usize, u32> = HashMap::new();
        let mut retired: Vec<u32> = Vec::new();
        for (op, key) in ops {
            // Addresses as the kernel has them.
            let key = 0xffff_8880_0000_0000 + key * 1024;
            match (op, model.get(&key).copied()) {
                (0, None) => {
                    deny(denied.rotate_left(model.len() as u32));
                    let added = tracker.add(key, key as u64);
                    deny(0);
                    let has_room = model.len() + retired.len() < 30;
                    prop_assert!(added.is_none() || has_room);
                    prop_assert!(added.is_some() || !has_room || denied != 0);
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
fn a_file_in_one_piece_costs_less_than_120_bytes() {
    let mut tracker = Tracker::new(1 << 20);
    for key in 1..=10_000_usize {
        let id = tracker.add(key * 1024, 0).expect("room");
        let file = tracker.get_mut(id).expect("just added");
        let range = Range { start: 0, end: 3 };
        let recorded = file.pages.record(range, key as u64 * 100);
        recorded.expect("memory");
    }
    let per_file = tracker.bytes() as f64 / tracker.files() as f64;
    assert!(per_file < 120.0, "{per_file} bytes");
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

#[test]
fn what_was_reported_and_not_looked_at_is_a_stray() {
    let mut tracker = Tracker::new(10);
    let id = tracker.add(8, 0).expect("room");
    for (start, end) in [(0, 10), (20, 30), (30, 40)] {
        let file = tracker.get_mut(id).expect("just added");
        let recorded = file.pages.record(Range { start, end }, start * 7);
        assert_eq!(recorded, Ok(()));
    }
    let looked = Range { start: 5, end: 35 };
    assert_eq!(tracker.uncovered(id, 1, looked), looked);
    tracker.cover(id, looked);
    let strays = |tracker: &Tracker, pass| {
        let (mut strays, mut page) = (Vec::new(), 0);
        while let Some(stray) = tracker.stray(id, pass, page) {
            strays.push((stray.start, stray.end));
            page = stray.end;
        }
        strays
    };
    assert_eq!(strays(&tracker, 1), [(0, 5), (35, 40)]);
    // A later pass has not looked at anything.
    assert_eq!(strays(&tracker, 2), [(0, 10), (20, 30), (30, 40)]);
    tracker.touch(id, 2);
    assert_eq!(strays(&tracker, 2), [(0, 10), (20, 30), (30, 40)]);
}

/// Reports pages of a file, each at a frame of its own.
fn reported(tracker: &mut Tracker, key: usize, pages: u64) -> u32 {
    let id = tracker.add(key, 0).expect("room");
    for page in 0..pages {
        let range = Range {
            start: page,
            end: page + 1,
        };
        let file = tracker.get_mut(id).expect("just added");
        assert_eq!(file.pages.record(range, 5000 - 2 * page), Ok(()));
    }
    tracker.end_of_pass(1);
    id
}

#[test]
fn what_takes_no_memory_of_its_own_is_not_forgotten_for_memory() {
    let mut tracker = Tracker::new(1000);
    let large = reported(&mut tracker, 8, 500);
    let small: Vec<_> = (1..=100)
        .map(|i| reported(&mut tracker, 8 + 8 * i, 1))
        .collect();
    assert!(tracker.shrink(1) > 0);
    let mut pages = |id| tracker.get_mut(id).expect("in use").pages.pages();
    assert_eq!(pages(large), 0);
    assert!(small.iter().all(|&id| pages(id) == 1));
}

#[test]
fn files_that_are_not_found_are_compared_with_another_list_of_names() {
    let mut tracker = Tracker::new(1000);
    let [one, two, three] = [8, 16, 24].map(|key| reported(&mut tracker, key, 1));
    for (id, checked) in [(one, 4), (two, 5), (three, 4)] {
        let file = tracker.get_mut(id).expect("in use");
        file.state = FileState::Announced;
        file.checked = checked;
    }
    tracker.touch(three, 2);
    assert_eq!(tracker.next_unchecked(0, 2, 5), Some(one));
    assert_eq!(tracker.next_unchecked(one + 1, 2, 5), None);
}
