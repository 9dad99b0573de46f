// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is expected of a [`Group`], case by case. Random sequences are in `model.rs`.

use super::*;
use crate::protocol::FileKey;
use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

fn key(inode: u64, pages: u64) -> FileKey {
    FileKey {
        fs_uuid: [7; 16],
        inode,
        size: pages * PAGE as u64,
        mtime_ns: 1,
        generation: 0,
        kind: 1,
    }
}

fn span(file: FileKey, page: u64, pages: u32) -> FileSpan {
    FileSpan { file, page, pages }
}

fn content(number: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[..8].copy_from_slice(&number.to_le_bytes());
    page[PAGE - 8..].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    page
}

fn sighting(group: &Group, file: FileKey, page: u64, contents: &[u64]) -> Sighting {
    let hashes = contents
        .iter()
        .map(|&it| hash_page(group.hash_seed(), &content(it)))
        .collect();
    Sighting { file, page, hashes }
}

fn sight(group: &mut Group, vm: u32, file: FileKey, page: u64, contents: &[u64]) -> Vec<Verdict> {
    let mut out = Vec::new();
    let sighting = sighting(group, file, page, contents);
    group.sight(vm, &[sighting], &mut out).unwrap();
    out
}

fn publish(
    group: &mut Group,
    vm: u32,
    file: FileKey,
    page: u64,
    contents: &[u64],
) -> Vec<Option<StorePage>> {
    let bytes: Vec<u8> = contents.iter().flat_map(|&it| content(it)).collect();
    let mut out = Vec::new();
    group
        .publish(
            vm,
            &[span(file, page, contents.len() as u32)],
            &bytes,
            &mut out,
        )
        .unwrap();
    out
}

fn lookup(group: &mut Group, vm: u32, file: FileKey, page: u64, pages: u32) -> Vec<Segment> {
    let mut out = Vec::new();
    group
        .lookup(vm, &[span(file, page, pages)], &mut out)
        .unwrap();
    out
}

fn group_of(vms: u32) -> Group {
    let mut group = Group::anonymous().unwrap();
    for vm in 1..=vms {
        group.add_vm(vm);
    }
    group
}

/// Shares `contents` at `page` of `file` between VMs 1 and 2.
fn share(group: &mut Group, file: FileKey, page: u64, contents: &[u64]) -> Vec<StorePage> {
    sight(group, 1, file, page, contents);
    sight(group, 2, file, page, contents);
    publish(group, 2, file, page, contents)
        .into_iter()
        .map(Option::unwrap)
        .collect()
}

fn allocated_pages(group: &Group) -> u64 {
    group.allocated_bytes().unwrap() / PAGE as u64
}

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
    let file = key(1, 100);
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
fn limits_are_kept() {
    let limits = Limits {
        store_pages: 3,
        sightings_per_vm: 4,
        ..Limits::default()
    };
    let mut group = Group::new(StoreFile::anonymous().unwrap(), limits, HashSet::new()).unwrap();
    group.add_vm(1);
    group.add_vm(2);
    let file = key(1, 10);
    sight(&mut group, 1, file, 0, &[1, 2, 3, 4, 5, 6]);
    assert_eq!(group.statistics().remembered, 4);
    sight(&mut group, 2, file, 0, &[1, 2, 3, 4]);
    let pages = publish(&mut group, 2, file, 0, &[1, 2, 3, 4]);
    assert_eq!(pages, [Some(0), Some(1), Some(2), None]);
    assert_eq!(group.statistics().store_full, 1);
}

#[test]
fn no_request_gets_a_vm_beyond_its_limit() {
    let mut group = group_of(3);
    let (file, other) = (key(1, 10), key(2, 10));
    let hashes = [1, 2, 3, 4, 5, 6];
    sight(&mut group, 1, file, 0, &hashes);
    sight(&mut group, 2, file, 0, &hashes);
    publish(&mut group, 2, file, 0, &hashes);
    let limits = VmLimits {
        granted_pages: 3,
        ..VmLimits::default()
    };
    group.set_vm_limits(3, limits);

    // Page 1 first, so that what is granted already lies amidst what is not.
    let mut segments = Vec::new();
    group.lookup(3, &[span(file, 1, 1)], &mut segments).unwrap();
    segments.clear();
    group.lookup(3, &[span(file, 0, 6)], &mut segments).unwrap();
    let segment = |pages, store| Segment { pages, store };
    assert_eq!(segments, [segment(3, Some(0)), segment(3, None)]);
    assert_eq!(group.vm_statistics(3).limited, 3);

    let verdicts = sight(&mut group, 3, other, 0, &[4]);
    assert_eq!(verdicts, [Verdict::Remembered]);
    assert_eq!(publish(&mut group, 3, other, 0, &[4]), [None]);
    let holding = Holding {
        span: span(file, 0, 6),
        store: 0,
    };
    group.announce(3, &[holding], true).unwrap();
    assert_eq!(group.vm_statistics(3).granted, 3);

    // What it has it may have again, and what it gives back makes room.
    assert_eq!(publish(&mut group, 3, other, 1, &[2]), [Some(1)]);
    group
        .release(3, &[StoreSpan { page: 0, pages: 1 }])
        .unwrap();
    segments.clear();
    group.lookup(3, &[span(file, 3, 2)], &mut segments).unwrap();
    assert_eq!(segments, [segment(1, Some(3)), segment(1, None)]);
}

#[test]
fn a_group_has_a_limit_over_all_its_vms() {
    let mut group = group_of(3);
    let file = key(1, 10);
    sight(&mut group, 1, file, 0, &[1, 2]);
    sight(&mut group, 2, file, 0, &[1, 2]);
    publish(&mut group, 2, file, 0, &[1, 2]);
    group.set_limits(2, 3);
    let mut segments = Vec::new();
    group.lookup(1, &[span(file, 0, 2)], &mut segments).unwrap();
    assert_eq!(segments[0].pages, 1);
    group.end_vm(2);
    segments.clear();
    group.lookup(3, &[span(file, 0, 1)], &mut segments).unwrap();
    assert_eq!(segments[0].store, Some(0));
    // Full: what is new does not get in, and nothing that is in is taken away.
    sight(&mut group, 1, file, 5, &[5]);
    sight(&mut group, 3, file, 5, &[5]);
    assert_eq!(publish(&mut group, 3, file, 5, &[5]).len(), 1);
    group.set_limits(1, 100);
    sight(&mut group, 1, file, 6, &[6]);
    sight(&mut group, 3, file, 6, &[6]);
    assert_eq!(publish(&mut group, 3, file, 6, &[6]), [None]);
}

#[test]
fn a_vm_is_alone_with_what_no_other_has_had_twice_in_a_row() {
    let mut group = group_of(3);
    let file = key(1, 10);
    let pages = share(&mut group, file, 0, &[1, 2, 3, 4]);
    lookup(&mut group, 1, file, 0, 4);
    lookup(&mut group, 3, file, 1, 1);
    assert_eq!(group.take_alone(1), []);
    assert_eq!(group.take_alone(1), [], "2 has them as well");
    group.end_vm(2);
    assert_eq!(group.take_alone(1), [], "2 has only just gone");
    let span = |page, pages| StoreSpan { page, pages };
    assert_eq!(group.take_alone(1), [span(pages[0], 1), span(pages[2], 2)]);
    lookup(&mut group, 3, file, 2, 1);
    assert_eq!(group.take_alone(1), [span(pages[0], 1), span(pages[3], 1)]);
    assert_eq!(group.take_alone(3), []);
    assert_eq!(group.take_alone(9), [], "there is no such VM");
    group.end_vm(1);
    assert_eq!(group.take_alone(3), [], "1 has only just gone");
    assert_eq!(group.take_alone(3), [span(pages[1], 2)]);
}

#[test]
fn oversized_requests_are_refused() {
    let mut group = group_of(1);
    let file = key(1, 10);
    let mut segments = Vec::new();
    assert!(
        group
            .lookup(1, &[span(file, 0, u32::MAX)], &mut segments)
            .is_err()
    );
    let bytes = vec![0; 65 * PAGE];
    assert!(
        group
            .publish(1, &[span(file, 0, 65)], &bytes, &mut Vec::new())
            .is_err()
    );
    assert!(
        group
            .publish(1, &[span(file, 0, 2)], &bytes[..PAGE], &mut Vec::new())
            .is_err()
    );
    assert!(group.lookup(9, &[span(file, 0, 1)], &mut segments).is_err());
}

#[test]
fn spans_behind_the_last_page_there_can_be_are_refused() {
    let mut group = group_of(1);
    let file = key(1, 10);
    let behind = span(file, u64::MAX - 1, 3);
    let mut segments = Vec::new();
    assert!(group.lookup(1, &[behind], &mut segments).is_err());
    assert!(segments.is_empty());
    let sighting = sighting(&group, file, behind.page, &[1, 2, 3]);
    assert!(group.sight(1, &[sighting], &mut Vec::new()).is_err());
    let bytes = vec![0; 3 * PAGE];
    assert!(
        group
            .publish(1, &[behind], &bytes, &mut Vec::new())
            .is_err()
    );
}

#[test]
fn a_full_file_system_is_no_page_and_no_crash() {
    // The size limit of the process stands in for a full tmpfs: both fail in `pwrite`.
    let mut group = group_of(2);
    let file = key(1, 1);
    let sealed = rustix::fs::SealFlags::GROW;
    let fd = rustix::fs::memfd_create(
        "full",
        rustix::fs::MemfdFlags::ALLOW_SEALING | rustix::fs::MemfdFlags::CLOEXEC,
    )
    .unwrap();
    rustix::fs::fcntl_add_seals(&fd, sealed).unwrap();
    group.replace_file(StoreFile::from_descriptor(fd));
    sight(&mut group, 1, file, 0, &[1]);
    sight(&mut group, 2, file, 0, &[1]);
    assert_eq!(publish(&mut group, 2, file, 0, &[1]), [None]);
    assert_eq!(group.statistics().store_full, 1);
    assert_eq!(group.statistics().store_pages, 0);
    assert_eq!(
        lookup(&mut group, 1, file, 0, 1),
        [Segment {
            pages: 1,
            store: None
        }]
    );
}

fn reopened(path: &Path, waiting: &[u32]) -> Group {
    let waiting = waiting.iter().copied().collect();
    Group::new(StoreFile::open(path).unwrap(), Limits::default(), waiting).unwrap()
}

fn holding(file: FileKey, page: u64, pages: u32, store: StorePage) -> Holding {
    Holding {
        span: span(file, page, pages),
        store,
    }
}

#[test]
fn a_new_daemon_keeps_what_is_mapped_and_only_that() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("group.pages");
    let file = key(1, 100);
    let mut old = reopened(&path, &[]);
    old.add_vm(1);
    old.add_vm(2);
    let pages = share(&mut old, file, 20, &[1, 2, 3, 4, 5, 6]);
    drop(old);

    let mut group = reopened(&path, &[1, 2]);
    group
        .announce(1, &[holding(file, 20, 2, pages[0])], true)
        .unwrap();
    // Nobody has named the fourth page yet; still it is neither lost nor stored twice.
    group.add_vm(3);
    assert_eq!(
        sight(&mut group, 3, key(9, 9), 0, &[4]),
        [Verdict::Found(pages[3])]
    );
    assert_eq!(allocated_pages(&group), 6);
    group
        .announce(2, &[holding(file, 22, 1, pages[2])], false)
        .unwrap();
    group.announce(2, &[], true).unwrap();
    assert_eq!(allocated_pages(&group), 4);
    // The layout is back: a new page of the file goes to its own place.
    sight(&mut group, 1, file, 26, &[7]);
    sight(&mut group, 2, file, 26, &[7]);
    assert_eq!(publish(&mut group, 2, file, 26, &[7]), [Some(pages[0] + 6)]);
    for vm in 1..=3 {
        group.end_vm(vm);
    }
    assert_eq!(allocated_pages(&group), 0);
    assert_eq!(group.statistics().files, 0);
}

#[test]
fn what_an_engine_does_not_announce_after_connecting_again_is_given_back() {
    let mut group = group_of(3);
    let file = key(1, 100);
    let pages = share(&mut group, file, 0, &[1, 2, 3, 4, 5]);
    let granted = |group: &Group| group.vm_statistics(2).granted;
    // Without a new connection nothing is known to be lost.
    group.announce(2, &[], true).unwrap();
    assert_eq!(granted(&group), 5);

    group.begin_announcement(2);
    group
        .announce(2, &[holding(file, 0, 2, pages[0])], false)
        .unwrap();
    // Granted before the announcement is over, by name and by content.
    lookup(&mut group, 2, file, 2, 1);
    let found = sight(&mut group, 2, file, 60, &[4]);
    assert_eq!(found, [Verdict::Found(pages[3])]);
    assert_eq!(granted(&group), 5);
    group.announce(2, &[], true).unwrap();
    assert_eq!(granted(&group), 4);
    assert_eq!(
        (group.statistics().store_pages, allocated_pages(&group)),
        (4, 4)
    );
    // That was all.
    group.announce(2, &[], true).unwrap();
    assert_eq!(granted(&group), 4);

    // What others have stays, and what could not be announced is not taken for lost.
    lookup(&mut group, 3, file, 0, 4);
    group.begin_announcement(2);
    group.announce(2, &[], true).unwrap();
    assert_eq!((granted(&group), allocated_pages(&group)), (0, 4));
    group.begin_announcement(3);
    let rubbish = holding(file, 0, MAX_REQUEST_PAGES as u32 + 1, pages[0]);
    group.announce(3, &[rubbish], false).unwrap_err();
    group.announce(3, &[], true).unwrap();
    assert_eq!(group.vm_statistics(3).granted, 4);
}

#[test]
fn a_vm_that_ends_is_not_waited_for() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("group.pages");
    let mut old = reopened(&path, &[]);
    old.add_vm(1);
    old.add_vm(2);
    share(&mut old, key(1, 4), 0, &[1, 2]);
    drop(old);
    let mut group = reopened(&path, &[1, 2]);
    group.end_vm(1);
    assert_eq!(allocated_pages(&group), 2);
    group.end_vm(2);
    assert_eq!(allocated_pages(&group), 0);
}

#[test]
fn announced_rubbish_is_passed_over() {
    let mut group = group_of(3);
    let file = key(1, 4);
    let pages = share(&mut group, file, 0, &[1, 2]);
    let rubbish = [
        holding(key(5, 4), 0, 1, 3),
        holding(key(5, 4), u64::MAX, 7, u32::MAX - 2),
        holding(key(6, 1 << 40), 9, 1000, 1_000_000),
    ];
    group.announce(3, &rubbish, true).unwrap();
    assert_eq!(group.vm_statistics(3).granted, 0);
    assert_eq!(group.statistics().files, 1);
    // Even a true page under a false name only gives a wrong hint.
    group
        .announce(3, &[holding(file, 1, 1, pages[0])], true)
        .unwrap();
    group.end_vm(3);
    group.end_vm(2);
    group.end_vm(1);
    assert_eq!(group.statistics().files, 0);
    assert_eq!(allocated_pages(&group), 0);
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

/// A group and a descriptor that writes to its file.
fn group_with_file() -> (Group, std::os::fd::OwnedFd) {
    let mut group = group_of(2);
    let file = rustix::fs::memfd_create("strays", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    group.replace_file(StoreFile::from_descriptor(file.try_clone().unwrap()));
    (group, file)
}

/// What touching a hole in a mapping does: the page takes memory.
fn touch(file: &std::os::fd::OwnedFd, pages: std::ops::Range<StorePage>) {
    for page in pages {
        rustix::io::pwrite(file, &[0; PAGE], u64::from(page) * PAGE as u64).unwrap();
    }
}

#[test]
fn a_page_is_not_written_into_memory_that_was_touched_before() {
    let (mut group, strays) = group_with_file();
    let file = key(1, 100);
    let first = share(&mut group, file, 0, &[1])[0];
    touch(&strays, first + 1..first + 6);
    assert_eq!(allocated_pages(&group), 6);
    for vm in [1, 2] {
        sight(&mut group, vm, file, 1, &[2, 3]);
        sight(&mut group, vm, file, 4, &[5]);
    }
    // Nobody else has the third. Its place was cleared with those around it.
    let pages = publish(&mut group, 2, file, 1, &[2, 3, 4, 5]);
    let expected = [1, 2, 4].map(|at| Some(first + at));
    assert_eq!(pages, [expected[0], expected[1], None, expected[2]]);
    assert_eq!(allocated_pages(&group), 4 + 1);
}

#[test]
fn memory_that_belongs_to_no_page_is_given_back() {
    let (mut group, strays) = group_with_file();
    let file = key(1, 4000);
    // More runs than are cleared at once.
    let pages: Vec<_> = (0..1200)
        .map(|it| share(&mut group, file, 2 * it, &[it])[0])
        .collect();
    let read = |page: StorePage| {
        let mut bytes = [0; PAGE];
        rustix::io::pread(&strays, &mut bytes, u64::from(page) * PAGE as u64).unwrap();
        bytes
    };
    // A few do not matter.
    touch(&strays, 2400..2500);
    assert!(!group.clear_strays());
    assert_eq!(allocated_pages(&group), 1300);
    for page in &pages {
        touch(&strays, page + 1..page + 2);
    }
    touch(&strays, 2500..3000);
    assert!(group.clear_strays());
    assert!(!group.clear_strays());
    assert_eq!(allocated_pages(&group), 1200);
    touch(&strays, 2500..3000);
    group.end_vm(1);
    group.clear_strays();
    assert_eq!(allocated_pages(&group), 1200);
    for (page, number) in pages.into_iter().zip(0..) {
        assert_eq!(read(page), content(number));
    }
}
