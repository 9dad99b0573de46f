// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What one VM may cost the others of its group, whatever it asks.

use super::super::{PAGE, hash_page};
use super::*;

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
