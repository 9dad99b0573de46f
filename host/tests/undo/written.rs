// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a guest has written to what it shared, and what it gives up.

#![expect(unsafe_code, reason = "tells the engine where guest memory is")]

use crate::common::file;
use pagefusion_host::protocol::Undo;
use pagefusion_host::store::PAGE;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use crate::support::{PAGES, RUN, Shared};

/// The host's frames of pages; all 0 for whom the kernel does not tell.
fn host_frames(shared: &Shared, frames: &[usize]) -> Vec<u64> {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let frame = |frame: &usize| {
        let mut entry = [0; 8];
        let at = shared.vm.ram.at(*frame) / PAGE * 8;
        pagemap.read_exact_at(&mut entry, at as u64).unwrap();
        u64::from_ne_bytes(entry) & ((1 << 55) - 1)
    };
    frames.iter().map(frame).collect()
}

/// A device that was told to write into it before goes by the frame.
#[test]
fn what_a_guest_has_written_stays_in_its_frame_when_it_is_undone() {
    const WRITTEN: [usize; 6] = [0, 7, RUN - 1, RUN, 100, 2 * PAGES - 1];
    let shared = Shared::new();
    let flip = || {
        for frame in WRITTEN {
            shared.vm.ram.word(frame, 9).fetch_xor(5, Ordering::Relaxed);
        }
    };
    flip();
    let before = host_frames(&shared, &WRITTEN);
    if before.contains(&0) {
        println!("skipped: the kernel tells only root which frames these are");
        return;
    }
    shared.vm.sharing.undo_all().unwrap();
    assert!(shared.vm.sharing.memory().overlays().is_empty());
    assert_eq!(host_frames(&shared, &WRITTEN), before);
    flip();
    shared.check();
    // Shared anew, written anew and undone by files: the same.
    shared.share();
    flip();
    let before = host_frames(&shared, &WRITTEN);
    let files = Undo::Files(vec![file(1), file(2)]);
    shared.vm.sharing.undo(&files).unwrap();
    assert_eq!(host_frames(&shared, &WRITTEN), before);
    flip();
    shared.check();
}

#[test]
fn what_a_guest_has_written_outlives_the_page_of_the_store_beneath_it() {
    let mut shared = Shared::new();
    // Nobody else has them: with the undo their memory goes back to the host.
    shared.held.clear();
    let flip = |shared: &Shared| {
        for frame in [0, 9, 2 * RUN, 300] {
            shared.vm.ram.word(frame, 7).fetch_xor(3, Ordering::Relaxed);
        }
    };
    flip(&shared);
    shared.vm.sharing.undo_all().unwrap();
    assert_eq!(
        shared.vm.store.lock().unwrap().allocated_bytes().unwrap(),
        0
    );
    flip(&shared);
    shared.check();
}

/// Mappings of a guest's memory, and how many of these are of a store's file.
fn mappings(shared: &Shared) -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let of = |line: &&str| {
        let (start, _) = line.split_once('-').unwrap();
        let start = usize::from_str_radix(start, 16).unwrap();
        (shared.vm.ram.at(0)..shared.vm.ram.at(2 * PAGES)).contains(&start)
    };
    let is_of_store = |line: &str| line.split_ascii_whitespace().nth(4) != Some("0");
    let found: Vec<&str> = maps.lines().filter(of).collect();
    (
        found.len(),
        found.iter().filter(|it| is_of_store(it)).count(),
    )
}

#[test]
fn what_is_given_up_while_it_is_shared_is_ordinary_memory() {
    let shared = Shared::new();
    shared.vm.ram.word(3, 0).fetch_xor(1, Ordering::Relaxed);
    let before = mappings(&shared);
    // Two runs, one of them broken in part, and a part of a third.
    let given_up = 2 * RUN + 5;
    let range = shared.vm.ram.at(0)..shared.vm.ram.at(given_up);
    shared
        .vm
        .sharing
        .memory()
        .before_discard(&range, false)
        .unwrap();
    for frame in 0..2 * PAGES {
        let expected = shared.expected(frame);
        let expected = if frame < given_up {
            &[0; PAGE]
        } else {
            expected
        };
        assert_eq!(shared.vm.ram.read_page(frame), expected, "{frame}");
    }
    // Frame 3 has made three mappings of its run.
    assert!(
        mappings(&shared).1 <= before.1 - 2,
        "{:?}",
        mappings(&shared)
    );
    for frame in 0..given_up {
        shared.vm.ram.write_page(frame, shared.expected(frame));
    }
    shared.share();
    assert_eq!(shared.uses(), [256, 256]);
    shared.vm.sharing.undo_all().unwrap();
    assert_eq!(mappings(&shared), (1, 0));
    shared.check();
}

#[test]
fn memory_that_two_regions_have_is_undone_and_shared_like_any_other() {
    let shared = Shared::new();
    let region = shared.vm.ram.region();
    let other = pagefusion_host::engine::Region {
        gfn: 10_000,
        ..region
    };
    let insert = |key, region| {
        // SAFETY: the memory that it has anyway.
        unsafe { shared.vm.sharing.memory().insert_region(key, region) }.unwrap();
    };
    shared.vm.sharing.memory().remove_region(0).unwrap();
    insert(5, region);
    shared.share();
    // Found first from here on, and nothing is known of it.
    insert(0, other);
    shared.vm.sharing.undo_all().unwrap();
    assert_eq!(shared.uses(), [0, 0]);
    shared.check();
    // Known by both, and the one goes.
    shared.vm.sharing.memory().remove_region(0).unwrap();
    shared.share();
    insert(0, other);
    shared.share();
    shared.vm.sharing.memory().check(region.hva).unwrap();
    shared.vm.sharing.memory().remove_region(0).unwrap();
    shared.share();
    assert_eq!(shared.uses(), [256, 256]);
    shared.vm.ram.word(7, 0).fetch_xor(1, Ordering::Relaxed);
    assert_eq!(shared.uses(), [255, 256]);
    shared.vm.ram.word(7, 0).fetch_xor(1, Ordering::Relaxed);
    shared.check();
}

#[test]
fn what_a_guest_has_written_and_given_up_is_ordinary_memory() {
    let shared = Shared::new();
    for frame in [3, RUN + 3, 40] {
        shared.vm.ram.word(frame, 0).fetch_xor(1, Ordering::Relaxed);
    }
    shared.vm.sharing.undo_all().unwrap();
    // The runs of frames 3 and 19, and no more.
    let range = shared.vm.ram.at(0)..shared.vm.ram.at(2 * RUN);
    shared
        .vm
        .sharing
        .memory()
        .before_discard(&range, false)
        .unwrap();
    shared.vm.ram.discard(0..2 * RUN);
    assert!((0..2 * RUN).all(|frame| shared.vm.ram.word(frame, 0).load(Ordering::Relaxed) == 0));
    // That of frame 40.
    assert_eq!(mappings(&shared).1, 1);
    shared.vm.ram.word(40, 0).fetch_xor(1, Ordering::Relaxed);
    // Written, and shared again where it is.
    for frame in 0..2 * PAGES {
        shared.vm.ram.write_page(frame, shared.expected(frame));
    }
    shared.share();
    assert_eq!(shared.uses(), [256, 256]);
    shared.vm.sharing.undo_all().unwrap();
    assert_eq!(mappings(&shared), (1, 0));
    shared.check();
}
