// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Who is granted what, and what is remembered, asked for and given back.

use super::*;
use crate::store::group::ALONE;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[test]
fn what_one_vm_has_takes_no_store_page() {
    let mut group = group_of(1);
    let file = key(1, 100);
    assert_eq!(
        sight(&mut group, 1, file, 0, &[1, 2, 3]),
        [Verdict::Remembered; 3]
    );
    assert_eq!(
        sight(&mut group, 1, file, 0, &[1, 2, 3]),
        [Verdict::Remembered; 3]
    );
    assert_eq!(publish(&mut group, 1, file, 0, &[1, 2, 3]), [None; 3]);
    assert_eq!(allocated_pages(&group), 0);
    assert_eq!(group.statistics().remembered, 3);
}

#[test]
fn the_second_reporter_publishes_and_the_first_is_asked_again() {
    let mut group = group_of(2);
    let file = key(1, 24);
    sight(&mut group, 1, file, 10, &[1, 2, 3]);
    assert_eq!(
        sight(&mut group, 2, file, 10, &[1, 2, 3]),
        [Verdict::Publish; 3]
    );
    let pages = publish(&mut group, 2, file, 10, &[1, 2, 3]);
    assert_eq!(pages, [Some(10), Some(11), Some(12)]);
    let reports = group.take_reports();
    assert_eq!(
        reports.into_iter().collect::<Vec<_>>(),
        [(1, vec![span(file, 10, 3)])]
    );
    assert!(group.take_reports().is_empty());
    assert_eq!(
        lookup(&mut group, 1, file, 8, 8),
        [
            Segment {
                pages: 2,
                store: None
            },
            Segment {
                pages: 3,
                store: Some(10)
            },
            Segment {
                pages: 3,
                store: None
            }
        ]
    );
    assert_eq!(group.statistics().remembered, 0);
}

#[test]
fn duplicates_within_one_vm_count_as_two_reporters() {
    let mut group = group_of(1);
    let (first, second) = (key(1, 1), key(2, 1));
    assert_eq!(sight(&mut group, 1, first, 0, &[1]), [Verdict::Remembered]);
    assert_eq!(sight(&mut group, 1, second, 0, &[1]), [Verdict::Publish]);
    assert!(publish(&mut group, 1, second, 0, &[1])[0].is_some());
    assert_eq!(group.take_reports_of(1), [span(first, 0, 1)]);
}

#[test]
fn the_same_content_under_two_names_is_stored_once() {
    let mut group = group_of(3);
    let pages = share(&mut group, key(1, 4), 0, &[1, 2, 3, 4]);
    let other = key(2, 4);
    let verdicts = sight(&mut group, 3, other, 0, &[1, 2]);
    assert_eq!(
        verdicts,
        [Verdict::Found(pages[0]), Verdict::Found(pages[1])]
    );
    assert_eq!(publish(&mut group, 3, other, 2, &[3]), [Some(pages[2])]);
    assert_eq!(allocated_pages(&group), 4);
    // From now on the other name is known.
    let found = lookup(&mut group, 1, other, 0, 3);
    assert_eq!(
        found,
        [Segment {
            pages: 3,
            store: Some(pages[0])
        }]
    );
}

#[test]
fn different_contents_under_one_name_live_side_by_side() {
    let mut group = group_of(4);
    let file = key(1, 8);
    let first = share(&mut group, file, 0, &[1, 2]);
    sight(&mut group, 3, file, 0, &[11, 12]);
    assert_eq!(
        sight(&mut group, 4, file, 0, &[11, 12]),
        [Verdict::Publish; 2]
    );
    let second = publish(&mut group, 4, file, 0, &[11, 12]);
    assert!(second.iter().flatten().all(|page| !first.contains(page)));
    assert_eq!(
        sight(&mut group, 3, file, 0, &[11]),
        [Verdict::Found(second[0].unwrap())]
    );
    // Two VMs are granted the second content and one the first: it is the likelier one.
    assert_eq!(lookup(&mut group, 2, file, 0, 1)[0].store, second[0]);
}

#[test]
fn memory_goes_back_when_the_last_vm_lets_go() {
    let mut group = group_of(2);
    let file = key(1, 100);
    let pages = share(&mut group, file, 0, &[1, 2, 3, 4]);
    lookup(&mut group, 1, file, 0, 4);
    group
        .release(
            2,
            &[StoreSpan {
                page: pages[0],
                pages: 4,
            }],
        )
        .unwrap();
    assert_eq!(allocated_pages(&group), 4);
    group
        .release(
            1,
            &[StoreSpan {
                page: pages[1],
                pages: 2,
            }],
        )
        .unwrap();
    assert_eq!(allocated_pages(&group), 2);
    group.end_vm(1);
    assert_eq!(allocated_pages(&group), 0);
    let statistics = group.statistics();
    assert_eq!((statistics.store_pages, statistics.files), (0, 0));
}

#[test]
fn releasing_what_was_not_granted_changes_nothing() {
    let mut group = group_of(3);
    let pages = share(&mut group, key(1, 4), 0, &[1, 2]);
    group
        .release(
            3,
            &[StoreSpan {
                page: 0,
                pages: u32::MAX,
            }],
        )
        .unwrap();
    group
        .release(
            3,
            &[StoreSpan {
                page: u32::MAX,
                pages: u32::MAX,
            }],
        )
        .unwrap();
    group
        .release(
            1,
            &[StoreSpan {
                page: pages[0],
                pages: 2,
            }],
        )
        .unwrap();
    assert_eq!(allocated_pages(&group), 2);
}

#[test]
fn forgotten_pages_are_not_asked_for() {
    let mut group = group_of(2);
    let file = key(1, 200);
    sight(&mut group, 1, file, 60, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    group.forget(1, span(file, 62, 4)).unwrap();
    let verdicts = sight(&mut group, 2, file, 60, &[1, 2, 3, 4, 5, 6, 7]);
    let (publish, remembered) = (Verdict::Publish, Verdict::Remembered);
    assert_eq!(
        verdicts,
        [
            publish, publish, remembered, remembered, remembered, remembered, publish
        ]
    );
    group.forget(1, span(file, 0, 0)).unwrap();
    group.end_vm(2);
    assert_eq!(group.statistics().remembered, 0);
    assert_eq!(group.statistics().files, 0);
}

#[test]
fn changed_content_replaces_the_sighting_of_its_page() {
    let mut group = group_of(2);
    let file = key(1, 1);
    sight(&mut group, 1, file, 0, &[1]);
    sight(&mut group, 1, file, 0, &[2]);
    assert_eq!(group.statistics().remembered, 1);
    assert_eq!(sight(&mut group, 2, file, 0, &[1]), [Verdict::Remembered]);
}

#[test]
fn a_huge_file_costs_only_what_is_published() {
    let mut group = group_of(2);
    let file = key(1, 1 << 50);
    share(&mut group, file, 1 << 49, &[1]);
    share(&mut group, file, u64::MAX - 1, &[2]);
    assert_eq!(allocated_pages(&group), 2);
    group.end_vm(1);
    group.end_vm(2);
    assert_eq!(allocated_pages(&group), 0);
}

#[test]
fn a_vm_is_alone_with_what_no_other_has_had_for_a_while() {
    let mut group = group_of(3);
    let file = key(1, 10);
    let pages = share(&mut group, file, 0, &[1, 2, 3, 4]);
    lookup(&mut group, 1, file, 0, 4);
    lookup(&mut group, 3, file, 1, 1);
    let start = Instant::now();
    let alone = |group: &mut Group, vm, times| group.take_alone_at(vm, start + ALONE * times);
    let span = |page, pages| StoreSpan { page, pages };
    assert_eq!(alone(&mut group, 1, 1), []);
    assert_eq!(alone(&mut group, 1, 2), [], "2 has them as well");
    group.end_vm(2);
    assert_eq!(alone(&mut group, 1, 3), [], "2 has only just gone");
    let found = alone(&mut group, 1, 4);
    assert_eq!(found, [span(pages[0], 1), span(pages[2], 2)]);
    lookup(&mut group, 3, file, 2, 1);
    let found = alone(&mut group, 1, 5);
    assert_eq!(found, [span(pages[0], 1), span(pages[3], 1)]);
    assert_eq!(alone(&mut group, 3, 5), []);
    assert_eq!(alone(&mut group, 9, 5), [], "there is no such VM");
    group.end_vm(1);
    assert_eq!(alone(&mut group, 3, 6), [], "1 has only just gone");
    assert_eq!(alone(&mut group, 3, 7), [span(pages[1], 2)]);
}

/// Who is asked to share a page may take five seconds to come.
#[test]
fn looking_often_makes_nobody_alone_sooner() {
    let mut group = group_of(2);
    let file = key(1, 10);
    let pages = share(&mut group, file, 0, &[1, 2]);
    let start = Instant::now();
    let mut told = Vec::new();
    for second in 0..=15 {
        let now = start + Duration::from_secs(second);
        if second == 8 {
            lookup(&mut group, 1, file, 0, 1);
        }
        told.push(group.take_alone_at(2, now));
    }
    let last = told.pop();
    assert!(told.iter().all(Vec::is_empty), "{told:?}");
    let (page, pages) = (pages[1], 1);
    assert_eq!(last, Some(vec![StoreSpan { page, pages }]));
}

#[test]
fn a_dropped_local_store_ends_its_vm() {
    let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
    let file = key(1, 1);
    let mut first = LocalStore::new(group.clone(), 1);
    let mut second = LocalStore::new(group.clone(), 2);
    let sighting = sighting(&group.lock().unwrap(), file, 0, &[1]);
    let mut verdicts = Vec::new();
    first.sight(vec![sighting.clone()], &mut verdicts).unwrap();
    second.sight(vec![sighting], &mut verdicts).unwrap();
    assert_eq!(verdicts, [Verdict::Remembered, Verdict::Publish]);
    let mut pages = Vec::new();
    second
        .publish(&[span(file, 0, 1)], &content(1), &mut pages)
        .unwrap();
    assert_eq!(first.take_reports(), [span(file, 0, 1)]);
    assert_eq!(allocated_pages(&group.lock().unwrap()), 1);
    drop(second);
    assert_eq!(allocated_pages(&group.lock().unwrap()), 0);
}

#[test]
fn the_descriptor_for_engines_cannot_write() {
    let group = Group::anonymous().unwrap();
    let fd = group.read_only().unwrap();
    assert_eq!(
        rustix::io::pwrite(&fd, &[1], 0),
        Err(rustix::io::Errno::BADF)
    );
}

#[test]
fn a_forecast_is_what_sharing_would_bring() {
    let mut group = group_of(3);
    let (file, other) = (key(1, 10), key(2, 10));
    group.set_learning(true);
    let forecast = |group: &Group| group.statistics().would_share.unwrap();
    for vm in [1, 2, 3] {
        let verdicts = sight(&mut group, vm, file, 0, &[1, 2, 3]);
        assert!(verdicts.iter().all(|it| *it == Verdict::Remembered));
    }
    assert_eq!(forecast(&group), (9, 3));
    // Twice in one VM, and under another name.
    sight(&mut group, 1, other, 5, &[3]);
    assert_eq!(forecast(&group), (10, 3));
    // Changed, forgotten, ended.
    sight(&mut group, 1, file, 0, &[9]);
    assert_eq!(forecast(&group), (9, 3));
    group.forget(2, span(file, 1, 1)).unwrap();
    assert_eq!(forecast(&group), (8, 3));
    group.forget(2, span(file, 0, 0)).unwrap();
    group.end_vm(3);
    assert_eq!(forecast(&group), (2, 1));
    assert_eq!(publish(&mut group, 1, file, 0, &[9]), [None]);
    assert_eq!(group.statistics().store_pages, 0);
    group.set_learning(false);
    assert_eq!(group.statistics().would_share, None);
}

#[test]
fn content_that_is_twice_in_one_publication_is_stored_once() {
    let mut group = group_of(2);
    let file = key(1, 4);
    for vm in [1, 2] {
        sight(&mut group, vm, file, 0, &[5, 6, 5, 7]);
    }
    let answers = publish(&mut group, 2, file, 0, &[5, 6, 5, 7]);
    assert_eq!(answers[0], answers[2]);
    assert_eq!(group.statistics().store_pages, 3);
    assert!(answers.iter().all(Option::is_some));
}

#[test]
fn two_contents_under_one_page_of_one_publication_have_two_places() {
    let mut group = group_of(2);
    let file = key(1, 4);
    for vm in [1, 2] {
        sight(&mut group, vm, file, 0, &[5]);
        sight(&mut group, vm, file, 1, &[6]);
    }
    let bytes = [content(5), content(6)].concat();
    let mut answers = Vec::new();
    let twice = [span(file, 0, 1), span(file, 0, 1)];
    group.publish(2, &twice, &bytes, &mut answers).unwrap();
    assert!(answers[0].is_some() && answers[1].is_some(), "{answers:?}");
    assert_ne!(answers[0], answers[1]);
    for (answer, number) in answers.into_iter().zip([5, 6]) {
        let mut stored = [0; PAGE];
        let view = group.read_only().unwrap();
        let at = u64::from(answer.unwrap()) * PAGE as u64;
        rustix::io::pread(&view, &mut stored, at).unwrap();
        assert_eq!(stored, content(number));
    }
}
