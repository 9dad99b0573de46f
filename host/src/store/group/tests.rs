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

/// Shares a page that two VMs have: the second one is granted it.
fn share(group: &mut Group, [one, other]: [u32; 2], page: u64) -> StorePage {
    sight(group, one, page, page);
    sight(group, other, page, page);
    let mut stores = Vec::new();
    group
        .publish(other, &[span(page)], &content(page), &mut stores)
        .unwrap();
    stores[0].unwrap()
}

/// A VM knows the seed, and can find what takes two pages for one in a matter of seconds.
#[test]
fn two_pages_that_one_sighting_stands_for_can_be_published_at_once() {
    let mut group = Group::anonymous().unwrap();
    group.seed = 0;
    group.add_vm(1);
    // Their hashes differ in the last sixteen bits alone, which no sighting keeps.
    let alike = [3_576_054, 6_509_010];
    let [one, other] = alike.map(|it| hash_page(0, &content(it)));
    assert!(one != other && one >> 16 == other >> 16);
    let seen = Sighting {
        file: key(2),
        page: 0,
        hashes: vec![one],
    };
    group.sight(1, &[seen], &mut Vec::new()).unwrap();
    let bytes = alike.map(content).concat();
    let span = FileSpan {
        pages: 2,
        ..span(0)
    };
    let mut stores = Vec::new();
    group.publish(1, &[span], &bytes, &mut stores).unwrap();
    assert!(stores.iter().all(Option::is_some), "{stores:?}");
    let seen = FileSpan {
        file: key(2),
        ..self::span(0)
    };
    assert_eq!(group.take_reports_of(1), [seen], "once");
    assert!(group.files.find(&key(2)).is_none(), "nothing refers to it");
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

#[test]
fn what_is_touched_between_pages_goes_though_a_vm_never_says_what_it_maps() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("pages");
    let open = |waiting: &[u32]| {
        let file = StoreFile::open(&path).unwrap();
        let waiting = waiting.iter().copied().collect();
        Group::new(file, Limits::default(), waiting).unwrap()
    };
    let taken = |group: &Group| group.allocated_bytes().unwrap() / PAGE as u64;
    let mut group = open(&[]);
    (1..=2).for_each(|vm| group.add_vm(vm));
    let mut used: BTreeMap<_, _> = (0..40)
        .map(|it| (share(&mut group, [1, 2], 3 * it), 3 * it))
        .collect();
    drop(group);

    let mut group = open(&[1, 2]);
    let announced: Vec<_> = used
        .iter()
        .take(20)
        .map(|(&store, &page)| Holding {
            span: span(page),
            store,
        })
        .collect();
    group.announce(2, &announced, true).unwrap();
    group.add_vm(3);
    used.insert(share(&mut group, [2, 3], 1000), 1000);
    // What a mapping does when it is read there.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let touch = |used: &BTreeMap<StorePage, u64>| {
        for page in (0..4000).filter(|page| !used.contains_key(page)) {
            rustix::io::pwrite(&file, &[0; PAGE], u64::from(page) * PAGE as u64).unwrap();
        }
    };
    let check = |group: &mut Group, used: &BTreeMap<StorePage, u64>| {
        while group.clear_strays() {}
        assert_eq!(taken(group), used.len() as u64);
        for (&store, &page) in used {
            let mut stored = [0; PAGE];
            group.file.read(store, &mut stored).unwrap();
            assert!(stored == content(page), "page {page}");
        }
    };
    touch(&used);
    assert!(taken(&group) >= 4000);
    check(&mut group, &used);
    assert!(group.statistics().adopting);

    // Now what only that one may have mapped is nobody's.
    group.end_vm(1);
    used.retain(|store, page| *page == 1000 || announced.iter().any(|it| it.store == *store));
    assert_eq!(used.len(), 21);
    touch(&used);
    check(&mut group, &used);
}
