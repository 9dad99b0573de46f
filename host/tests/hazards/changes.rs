// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory that the VMM changes, unmaps or has a `userfaultfd` of its own for.

#![expect(unsafe_code, reason = "does to its own memory what VMMs do to theirs")]

use crate::common::{Random, Vm, file, fill};
use crate::support::{Equal, PAGES, READ_WRITE, is_refused, maps_of};
use pagefusion_abi::wire::reason;
use pagefusion_host::engine::ReportedRun;
use pagefusion_host::store::{Group, PAGE};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[test]
fn memory_that_is_being_changed_is_left_alone_and_looked_at_anew() {
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    let maps_shared = maps_of(&equal.range());
    let some = equal.vm.ram.at(3)..equal.vm.ram.at(5);
    let memory = || equal.vm.sharing.memory();
    memory().begin_change(&some).unwrap();
    memory().begin_change(&equal.range()).unwrap();
    assert_eq!(memory().overlays().pages(), 0);
    assert_ne!(maps_of(&equal.range()), maps_shared);
    assert_eq!(equal.share(), (0, reason::UNSUITABLE_MEMORY));
    // SAFETY: memory of this test.
    unsafe { libc::mlock(equal.vm.ram.at(0) as *const _, PAGE) };
    memory().end_change(&some);
    assert_eq!(equal.share(), (0, reason::UNSUITABLE_MEMORY));
    memory().end_change(&equal.range());
    is_refused(&equal, "mlock");
    assert!(memory().take_untold());
    // SAFETY: as above.
    unsafe { libc::munlock(equal.vm.ram.at(0) as *const _, PAGE) };
    memory().begin_change(&some).unwrap();
    memory().end_change(&some);
    assert!(
        memory().take_untold(),
        "it was refused, and is not any more"
    );
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    equal.check();
}

#[test]
fn a_userfaultfd_of_the_vmm_gets_the_memory_and_gives_it_back() {
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    let (memory, range) = (|| equal.vm.sharing.memory(), equal.range());
    memory().take_userfaultfd(&range).unwrap();
    is_refused(&equal, "userfaultfd");
    let foreign = pagefusion_host::engine::Uffd::open(None).unwrap();
    // All of it is one mapping that nobody has registered, or this would fail.
    foreign.register_missing(&range).unwrap();
    is_refused(&equal, "userfaultfd");
    foreign.unregister(&range).unwrap();
    let half = range.start..range.start + PAGES / 2 * PAGE;
    memory().give_userfaultfd_back(&half);
    assert_eq!(equal.share(), (0, reason::UNSUITABLE_MEMORY));
    memory().give_userfaultfd_back(&range);
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    equal.check();
}

#[test]
fn a_userfaultfd_that_is_closed_gives_the_memory_back() {
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    let (sharing, range) = (&equal.vm.sharing, equal.range());
    let look = || sharing.look_for_userfaultfds_after(Duration::ZERO).unwrap();
    sharing.memory().take_userfaultfd(&range).unwrap();
    let foreign = pagefusion_host::engine::Uffd::open(None).unwrap();
    foreign.register_missing(&range).unwrap();
    look();
    is_refused(&equal, "userfaultfd");
    assert!(!sharing.memory().take_untold());
    // As QEMU does that only looks whether it could make a snapshot.
    drop(foreign);
    sharing.look_for_userfaultfds().unwrap();
    is_refused(&equal, "userfaultfd");
    look();
    assert!(sharing.memory().take_untold(), "the guest is to tell again");
    assert!(!sharing.memory().take_untold());
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    equal.check();
}

#[test]
fn memory_that_somebody_lets_go_of_and_never_had_keeps_its_overlays() {
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    equal
        .vm
        .sharing
        .memory()
        .give_userfaultfd_back(&equal.range());
    assert!(!equal.vm.sharing.memory().take_untold());
    equal.vm.sharing.undo_all().unwrap();
    assert_eq!(equal.vm.sharing.memory().overlays().pages(), 0);
    equal.check();
}

#[test]
fn what_a_change_has_ended_is_told_again_when_all_changes_are_over() {
    let equal = Equal::new();
    equal.write_all();
    let memory = || equal.vm.sharing.memory();
    let some = equal.vm.ram.at(3)..equal.vm.ram.at(5);
    memory().begin_change(&some).unwrap();
    memory().end_change(&some);
    assert!(!memory().take_untold(), "there was nothing");
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    memory().begin_change(&some).unwrap();
    memory().begin_change(&equal.range()).unwrap();
    memory().end_change(&some);
    assert!(!memory().take_untold(), "one is under way");
    memory().end_change(&equal.range());
    assert!(memory().take_untold());
    assert!(!memory().take_untold(), "once");
    // Refused meanwhile, though nothing was shared.
    memory().begin_change(&some).unwrap();
    assert_eq!(equal.share(), (0, reason::UNSUITABLE_MEMORY));
    memory().end_change(&some);
    assert!(memory().take_untold());
}

#[test]
fn zeros_are_left_alone_where_the_kernel_may_lift_their_protection() {
    const ZERO: usize = 7;
    let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
    let mut bytes = Random(1).bytes(PAGES * PAGE);
    bytes[ZERO * PAGE..][..PAGE].fill(0);
    let _held = fill(&group, file(1), &bytes);
    for distrusts in [false, true] {
        let vm = Vm::new(&group, 5 + u32::from(distrusts), PAGES, false);
        if distrusts {
            vm.sharing.memory().distrust_zeros();
        }
        for (page, bytes) in bytes.chunks_exact(PAGE).enumerate() {
            vm.ram.write_page(page, bytes);
        }
        let run = ReportedRun {
            file: file(1),
            page: 0,
            gfn: 0,
            pages: PAGES as u32,
        };
        let shared = usize::from(vm.sharing.share(&[run])[0].shared);
        assert_eq!(shared, PAGES - usize::from(distrusts));
        assert_eq!(vm.ram.read_page(ZERO), bytes[ZERO * PAGE..][..PAGE]);
    }
}

#[test]
fn memory_that_is_unmapped_is_forgotten() {
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    let range = equal.range();
    let tail = equal.vm.ram.at(PAGES - 8)..range.end;
    {
        // A part of it: what is left becomes ordinary memory.
        let mut memory = equal.vm.sharing.memory();
        memory.before_unmap(&tail).unwrap();
        assert_eq!(memory.overlays().pages(), 0);
        remap(&tail);
        memory.unmapped(&tail);
    }
    // Memory that is something else now, which an undo would have made private.
    is_refused(&equal, "share=on");
    equal.vm.sharing.undo_all().unwrap();
    assert!(maps_of(&range)[1].ends_with("rw-s"));
    {
        let mut memory = equal.vm.sharing.memory();
        memory.before_unmap(&range).unwrap();
        remap(&range);
        memory.unmapped(&range);
        assert!(!memory.concerns(&range));
        assert_eq!(memory.bytes(), 0);
    }
    assert_eq!(equal.share(), (0, reason::OUTSIDE_MEMORY));
    assert!(maps_of(&range)[0].ends_with("rw-s"));
}

/// Maps memory of another kind over `range`.
fn remap(range: &std::ops::Range<usize>) {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: memory of a test that nobody looks at any more.
    let base = unsafe { libc::mmap(range.start as *mut _, range.len(), READ_WRITE, flags, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED);
}

#[test]
fn memory_that_has_overlays_when_it_is_unmapped_leaves_none_behind() {
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    let range = equal.range();
    let mut memory = equal.vm.sharing.memory();
    memory.before_unmap(&range).unwrap();
    // Nothing is copied back only to be thrown away.
    assert_eq!(memory.overlays().pages(), PAGES as u64);
    remap(&range);
    memory.unmapped(&range);
    assert_eq!(memory.overlays().pages(), 0);
    memory.restore(&(0..usize::MAX)).unwrap();
    drop(memory);
    assert!(maps_of(&range)[0].ends_with("rw-s"));
}
