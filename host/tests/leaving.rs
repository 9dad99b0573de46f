// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guests that withdraw what they reported, or just go: nothing of them stays shared.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::guest_side::Shared;
use common::{Random, Vm, fill};
use pagefusion_abi::wire::{FileIdentity, Record, Run, guest_area, guest_state, host_area};
use pagefusion_host::engine::Guest;
use pagefusion_host::store::{Group, LocalStore, PAGE};

/// More than are undone in one call: each is a window of its own.
const PAGES: usize = 300;
const EPOCH: u64 = 5;

/// A guest whose every other page is shared, and its host.
struct Scene<'a> {
    shared: &'a Shared,
    guest: Guest<&'a [AtomicU64]>,
    vm: Vm,
    bytes: Vec<u8>,
    group: Arc<Mutex<Group>>,
    /// Others that have the same pages.
    others: Option<[LocalStore; 2]>,
}

impl<'a> Scene<'a> {
    fn new(shared: &'a Shared) -> Self {
        let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
        let bytes = Random(7).bytes(PAGES * PAGE);
        // As the wire says it: what a guest leaves out is zero.
        let identity = identity();
        let others = fill(&group, identity.into(), &bytes);
        let vm = Vm::new(&group, 1, 2 * PAGES, true);
        for page in 0..PAGES {
            vm.ram.write_page(2 * page, &bytes[page * PAGE..][..PAGE]);
        }
        let guest = Guest::new(&shared.words[..], shared.layout, 77, 1024);
        let mut this = Self {
            shared,
            guest,
            vm,
            bytes,
            group,
            others: Some(others),
        };
        this.report(EPOCH);
        assert_eq!(this.overlaid(), PAGES as u64);
        this
    }

    /// Attaches and reports every page.
    fn report(&mut self, epoch: u64) {
        self.shared.attach(epoch);
        self.work();
        let identity = identity();
        self.shared.produce(&Record::File {
            file: 3,
            identity,
            name: b"libc.so",
        });
        for page in 0..PAGES as u64 {
            self.shared.produce(&Record::Run(Run {
                file: 3,
                page,
                gfn: 2 * page,
                pages: 1,
            }));
            // The smallest ring is smaller than that.
            if page % 32 == 0 {
                self.work();
            }
        }
        self.work();
    }

    /// As the engine's thread does once it was rung.
    fn work(&mut self) {
        while self.guest.progress(&self.vm.sharing).busy {}
    }

    fn say_goodbye(&mut self) -> u64 {
        self.shared.produce(&Record::Goodbye);
        self.shared.head()
    }

    fn leave(&self) {
        let state = self.shared.guest(guest_area::STATE);
        state.store(guest_state::ABSENT, Ordering::SeqCst);
    }

    fn acknowledged(&self) -> u64 {
        self.shared.host_word(host_area::ACK)
    }

    fn overlaid(&self) -> u64 {
        self.vm.sharing.memory().overlays().pages()
    }

    fn content_is_right(&self) {
        for page in 0..PAGES {
            let expected = &self.bytes[page * PAGE..][..PAGE];
            assert_eq!(self.vm.ram.read_page(2 * page), expected, "page {page}");
        }
    }

    /// Nothing is shared, and nothing held that only this guest would need.
    fn nothing_is_left(&mut self) {
        assert_eq!(self.overlaid(), 0);
        assert_eq!(self.shared.host_word(host_area::PAGES_SHARED), 0);
        self.content_is_right();
        self.others = None;
        assert_eq!(self.group.lock().unwrap().statistics().store_pages, 0);
    }
}

fn identity() -> FileIdentity {
    FileIdentity {
        inode: 9,
        size: 1 << 30,
        ..FileIdentity::default()
    }
}

#[test]
fn goodbye_is_answered_when_nothing_is_shared_and_not_before() {
    let shared = Shared::new();
    let mut scene = Scene::new(&shared);
    let end = scene.say_goodbye();
    let mut calls = 0;
    while scene.guest.progress(&scene.vm.sharing).busy {
        calls += 1;
        let undone = scene.overlaid() == 0;
        assert_eq!(scene.acknowledged() == end, undone, "call {calls}");
    }
    assert!(calls > 2, "others must get hold of the guest meanwhile");
    scene.nothing_is_left();
    // It may go on in the same epoch: reported files are not known any more, new ones are.
    scene.shared.produce(&Record::Run(Run {
        file: 3,
        page: 0,
        gfn: 0,
        pages: 1,
    }));
    scene.work();
    assert_eq!(scene.overlaid(), 0);
}

#[test]
fn a_guest_that_does_not_wait_for_the_answer_is_undone_all_the_same() {
    let shared = Shared::new();
    let mut scene = Scene::new(&shared);
    scene.say_goodbye();
    for _ in 0..2 {
        assert!(scene.guest.progress(&scene.vm.sharing).busy);
    }
    assert!((1..PAGES as u64).contains(&scene.overlaid()));
    scene.leave();
    scene.work();
    scene.nothing_is_left();
}

#[test]
fn a_guest_that_goes_without_goodbye_is_undone_all_the_same() {
    let shared = Shared::new();
    let mut scene = Scene::new(&shared);
    scene.leave();
    scene.work();
    scene.nothing_is_left();
}

#[test]
fn a_goodbye_that_was_not_looked_at_in_time_does_no_harm() {
    let shared = Shared::new();
    let mut scene = Scene::new(&shared);
    scene.say_goodbye();
    scene.leave();
    scene.work();
    scene.nothing_is_left();
}

#[test]
fn a_guest_that_comes_back_keeps_what_was_not_undone_yet() {
    let shared = Shared::new();
    let mut scene = Scene::new(&shared);
    scene.leave();
    assert!(scene.guest.progress(&scene.vm.sharing).busy);
    let left = scene.overlaid();
    assert!((1..PAGES as u64).contains(&left));
    assert!(scene.vm.ram.waits_for_missing_pages());
    scene.shared.attach(EPOCH + 1);
    scene.work();
    assert_eq!(scene.overlaid(), left);
    // No undo is under way any more.
    assert!(!scene.vm.ram.waits_for_missing_pages());
    scene.report(EPOCH + 2);
    assert_eq!(scene.overlaid(), PAGES as u64);
    scene.content_is_right();
}

#[test]
fn an_undo_that_fails_is_tried_again_before_the_guest_has_its_answer() {
    let shared = Shared::new();
    let mut scene = Scene::new(&shared);
    // Memory that cannot be registered, where nothing is shared.
    scene.vm.ram.replace_by_a_file(1);
    let end = scene.say_goodbye();
    scene.work();
    for _ in 0..2 {
        let done = scene.guest.progress(&scene.vm.sharing);
        assert!(done.retry && !done.busy && scene.acknowledged() < end);
    }
    assert_eq!(scene.overlaid(), PAGES as u64);
    scene.vm.ram.replace_by_memory(1);
    scene.work();
    assert_eq!(scene.acknowledged(), end);
    scene.nothing_is_left();
}

#[test]
fn a_guest_that_goes_and_cannot_ring_is_found_to_have_gone() {
    let shared = Shared::new();
    let mut scene = Scene::new(&shared);
    assert!(!scene.guest.has_news());
    scene.leave();
    assert!(scene.guest.has_news());
    scene.work();
    scene.nothing_is_left();
    assert!(!scene.guest.has_news());
}

fn retract(page: u64, pages: u64, unshare: bool) -> Record<'static> {
    Record::Retract {
        file: 3,
        page,
        pages,
        unshare,
    }
}

#[test]
fn of_what_is_withdrawn_only_what_must_not_stay_shared_is_undone() {
    let shared = Shared::new();
    let mut scene = Scene::new(&shared);
    shared.produce(&retract(0, 40, false));
    scene.work();
    assert_eq!(scene.overlaid(), PAGES as u64);
    shared.produce(&retract(10, 20, true));
    scene.work();
    assert_eq!(scene.overlaid(), PAGES as u64 - 20);
    scene.content_is_right();
    let said = scene.shared.host_word(host_area::PAGES_SHARED);
    assert_eq!(said, PAGES as u64 - 20);
    // All of the file.
    shared.produce(&retract(0, 0, true));
    scene.work();
    scene.nothing_is_left();
}

#[test]
fn what_is_reported_behind_an_undo_is_shared() {
    let shared = Shared::new();
    let mut scene = Scene::new(&shared);
    shared.produce(&retract(10, 20, true));
    shared.produce(&Record::Run(Run {
        file: 3,
        page: 12,
        gfn: 24,
        pages: 1,
    }));
    scene.work();
    assert_eq!(scene.overlaid(), PAGES as u64 - 19);
    scene.content_is_right();
}
