// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory of the file that is no page's.

use super::*;

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
    let file = key(1, 8);
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
    // So many that these parts of the file have places for all of their pages.
    for part in 0..5 {
        let dense: Vec<u64> = (0..16).map(|it| 10_000 + part * 16 + it).collect();
        share(&mut group, file, part * 512, &dense);
    }
    // More runs than are cleared at once.
    let pages: Vec<_> = (0..1200)
        .map(|it| share(&mut group, file, it / 240 * 512 + 17 + it % 240 * 2, &[it])[0])
        .collect();
    let read = |page: StorePage| {
        let mut bytes = [0; PAGE];
        rustix::io::pread(&strays, &mut bytes, u64::from(page) * PAGE as u64).unwrap();
        bytes
    };
    // A few do not matter.
    touch(&strays, 2600..2700);
    assert!(!group.clear_strays());
    assert_eq!(allocated_pages(&group), 1380);
    for page in &pages {
        touch(&strays, page + 1..page + 2);
    }
    touch(&strays, 2700..3200);
    assert!(group.clear_strays());
    assert!(!group.clear_strays());
    assert_eq!(allocated_pages(&group), 1280);
    touch(&strays, 2700..3200);
    group.end_vm(1);
    group.clear_strays();
    assert_eq!(allocated_pages(&group), 1280);
    for (page, number) in pages.into_iter().zip(0..) {
        assert_eq!(read(page), content(number));
    }
}
