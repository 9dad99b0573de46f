// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is too much: for a VM, for a group, in one request, for the file system.

use super::*;
use std::collections::HashSet;

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
fn what_is_new_and_what_is_found_in_one_publication_share_a_limit() {
    let mut group = group_of(3);
    let file = key(1, 10);
    share(&mut group, file, 0, &[1]);
    sight(&mut group, 1, file, 1, &[2]);
    // VM 2 is granted one page; there is room for one more.
    group.set_limits(100, 2);
    let answers = publish(&mut group, 3, key(2, 10), 0, &[2, 1]);
    assert_eq!(answers, [Some(1), None]);
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

#[test]
fn what_still_fitted_into_a_full_file_system_is_shared() {
    let mut group = group_of(2);
    let file = key(1, 5);
    let fd = rustix::fs::memfd_create(
        "nearly-full",
        rustix::fs::MemfdFlags::ALLOW_SEALING | rustix::fs::MemfdFlags::CLOEXEC,
    )
    .unwrap();
    rustix::fs::ftruncate(&fd, 3 * PAGE as u64).unwrap();
    rustix::fs::fcntl_add_seals(&fd, rustix::fs::SealFlags::GROW).unwrap();
    group.replace_file(StoreFile::from_descriptor(fd));
    for vm in [1, 2] {
        sight(&mut group, vm, file, 0, &[1, 2, 3, 4, 5]);
    }
    let answers = publish(&mut group, 2, file, 0, &[1, 2, 3, 4, 5]);
    assert_eq!(answers, [Some(0), Some(1), Some(2), None, None]);
    assert_eq!(group.statistics().store_full, 2);
    assert_eq!(group.statistics().store_pages, 3);
    assert_eq!(allocated_pages(&group), 3);
    // Their places are free again, and so is the whole file's with the last of its pages.
    assert_eq!(publish(&mut group, 2, file, 3, &[4]), [None]);
    group.end_vm(2);
    assert_eq!(group.statistics().store_pages, 0);
    assert_eq!(group.free_numbers(), u64::from(StorePage::MAX));
}
