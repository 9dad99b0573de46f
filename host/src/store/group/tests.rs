// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What one VM may cost the others of its group, whatever it asks.

use super::super::{PAGE, hash_page};
use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn key(inode: u64) -> FileKey {
    FileKey {
        fs_uuid: [3; 16],
        inode,
        size: u64::MAX,
        mtime_ns: 0,
        generation: 0,
        kind: 1,
    }
}

fn content(number: u64) -> [u8; PAGE] {
    let mut page = [7; PAGE];
    page[..8].copy_from_slice(&number.to_le_bytes());
    page
}

fn sight(group: &mut Group, vm: u32, page: u64, number: u64) -> Verdict {
    let mut verdicts = Vec::new();
    let sighting = Sighting {
        file: key(1),
        page,
        hashes: vec![hash_page(group.hash_seed(), &content(number))],
    };
    group.sight(vm, &[sighting], &mut verdicts).unwrap();
    verdicts[0]
}

fn span(page: u64) -> FileSpan {
    FileSpan {
        file: key(1),
        page,
        pages: 1,
    }
}

#[test]
fn pages_far_from_each_other_are_noted_up_to_a_limit_of_their_own() {
    let limits = Limits {
        leaves_per_vm: 3,
        ..Limits::default()
    };
    let mut group = Group::new(StoreFile::anonymous().unwrap(), limits, HashSet::new()).unwrap();
    (1..=2).for_each(|vm| group.add_vm(vm));
    let noted = |group: &Group, vm| group.vm_statistics(vm).remembered;
    for window in 0..6 {
        sight(&mut group, 1, window << 16, window);
    }
    assert_eq!((noted(&group, 1), noted(&group, 2)), (3, 0));
    // Others have theirs, and what is forgotten makes room.
    sight(&mut group, 2, 5 << 16, 5);
    assert_eq!(noted(&group, 2), 1);
    let file = FileSpan {
        pages: 0,
        ..span(2 << 16)
    };
    group.forget(1, file).unwrap();
    for window in [6, 7] {
        sight(&mut group, 1, window << 16, window);
    }
    assert_eq!(noted(&group, 1), 3);
    assert_eq!(sight(&mut group, 2, 6 << 16, 6), Verdict::Publish);
}

#[test]
fn a_release_of_very_many_spans_looks_once_at_what_is_granted() {
    let worked = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime).tv_sec;
    let mut group = Group::anonymous().unwrap();
    group.add_vm(1);
    // Far from each other, as single pages are where the store is nearly full.
    let granted: RoaringBitmap = (0..60_000).map(|it| it << 16).collect();
    group.granted = granted.len();
    group.vms.entry(1).or_default().granted = granted;
    let mut spans: Vec<_> = (0..1 << 18)
        .rev()
        .map(|it| StoreSpan {
            page: it << 14 | 1,
            pages: 7,
        })
        .collect();
    spans.extend((0..60_000).step_by(2).map(|it| StoreSpan {
        page: it << 16,
        pages: 1,
    }));
    let begin = worked();
    group.release(1, &spans).unwrap();
    assert!(worked() - begin < 10, "all that is granted, for each span");
    assert_eq!(group.vm_statistics(1).granted, 30_000);
    assert_eq!(group.granted, 30_000);
}

proptest! {
    #[test]
    fn spans_are_released_however_they_lie(
        granted in prop::collection::btree_set(prop_oneof![0..100_u32, u32::MAX - 50..u32::MAX], 0..80),
        spans in prop::collection::vec(
            (prop_oneof![0..110_u32, u32::MAX - 60..=u32::MAX], prop_oneof![0..9_u32, Just(u32::MAX)]),
            0..12,
        ),
    ) {
        let mut group = Group::anonymous().unwrap();
        group.add_vm(1);
        group.granted = granted.len() as u64;
        group.vms.entry(1).or_default().granted = granted.iter().copied().collect();
        let spans: Vec<_> = spans.into_iter().map(|(page, pages)| StoreSpan { page, pages }).collect();
        group.release(1, &spans).unwrap();
        let is_in = |page: u32, span: &StoreSpan| page >= span.page && page - span.page < span.pages;
        let left = granted.into_iter().filter(|&page| !spans.iter().any(|span| is_in(page, span)));
        let left: BTreeSet<_> = left.collect();
        prop_assert_eq!(group.granted, left.len() as u64);
        let granted: BTreeSet<_> = group.vms[&1].granted.iter().collect();
        prop_assert_eq!(granted, left);
    }
}
