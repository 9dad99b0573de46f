// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a daemon makes of the pages that engines announce.

use super::*;
use std::path::Path;

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
