// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Huge pages of guest memory are split when the operator wants it, and only then.

mod common;

use std::sync::{Arc, Mutex};

use common::guest_side::Shared;
use common::{Random, Vm, file, fill, huge_kilobytes};
use pagefusion_abi::wire::{FileIdentity, Outcome, Record, Request, Run};
use pagefusion_host::engine::{Guest, ReportedRun, Tidier, WORTHWHILE_PAGES};
use pagefusion_host::protocol::{EngineStatus, SplitHugePages};
use pagefusion_host::store::{Group, LocalStore, PAGE};

/// Two huge pages.
const PAGES: usize = 1024;
const WORTHWHILE: usize = WORTHWHILE_PAGES as usize;

/// A VM in huge pages with the content of a file that others share; `None`, and said so, where
/// there are none to be had.
fn vm(choice: SplitHugePages, group: &Arc<Mutex<Group>>) -> Option<(Vm, [LocalStore; 2])> {
    numbered_vm(1, choice, group)
}

fn numbered_vm(
    number: u32,
    choice: SplitHugePages,
    group: &Arc<Mutex<Group>>,
) -> Option<(Vm, [LocalStore; 2])> {
    let bytes = Random(21).bytes(PAGES * PAGE);
    let held = fill(group, file(1), &bytes);
    let vm = Vm::new(group, number, PAGES, true);
    for page in 0..PAGES {
        vm.ram.write_page(page, &bytes[page * PAGE..][..PAGE]);
    }
    if huge_kilobytes(&vm.ram) * 1024 != (PAGES * PAGE) as u64 {
        eprintln!("skipped: this machine gives no huge pages");
        return None;
    }
    vm.sharing.memory().set_split_huge_pages(choice);
    Some((vm, held))
}

fn group() -> Arc<Mutex<Group>> {
    Arc::new(Mutex::new(Group::anonymous().unwrap()))
}

/// A run whose pages lie in guest memory as in the file.
fn run(first: usize, pages: usize) -> ReportedRun {
    ReportedRun {
        file: file(1),
        page: first as u64,
        gfn: first as u64,
        pages: pages as u32,
    }
}

fn shares(vm: &Vm, runs: &[ReportedRun]) -> Vec<(u16, u16)> {
    let counts = |it: Outcome| (it.shared, it.remembered);
    vm.sharing.share(runs).into_iter().map(counts).collect()
}

#[test]
fn never_leaves_huge_pages_whole_and_shares_what_is_in_small_ones() {
    let group = group();
    let Some((vm, _held)) = vm(SplitHugePages::Never, &group) else {
        return;
    };
    // Over the border between the two.
    assert_eq!(shares(&vm, &[run(500, 300)]), [(0, 300)]);
    assert_eq!(huge_kilobytes(&vm.ram), 4096);
    assert_eq!(vm.sharing.memory().take_spared().pages, 300);
    // What was granted and is not used goes back.
    assert_eq!(group.lock().unwrap().vm_statistics(1).granted, 0);

    vm.ram.split_huge_page(0);
    assert_eq!(shares(&vm, &[run(500, 300)]), [(12, 288)]);
    assert_eq!(huge_kilobytes(&vm.ram), 2048);
}

#[test]
fn worthwhile_splits_a_huge_page_of_which_an_eighth_can_be_shared() {
    let group = group();
    let Some((vm, _held)) = vm(SplitHugePages::Worthwhile, &group) else {
        return;
    };
    assert_eq!(
        shares(&vm, &[run(0, WORTHWHILE - 10), run(512, WORTHWHILE - 1)]),
        [(0, 54), (0, 63)]
    );
    assert_eq!(shares(&vm, &[run(200, 9)]), [(0, 9)]);
    assert_eq!(huge_kilobytes(&vm.ram), 4096);
    let spared = vm.sharing.memory().take_spared();
    assert_eq!((spared.pages, spared.again), (54 + 63 + 9, vec![]));

    assert_eq!(shares(&vm, &[run(300, 1)]), [(1, 0)]);
    assert_eq!(huge_kilobytes(&vm.ram), 2048);
    let mut again = vm.sharing.memory().take_spared().again;
    again.sort_by_key(|it| it.page);
    let again: Vec<_> = again.iter().map(|it| (it.page, it.pages)).collect();
    assert_eq!(again, [(0, 54), (200, 9)]);
    assert_eq!(shares(&vm, &[run(0, 54), run(200, 9)]), [(54, 0), (9, 0)]);
}

#[test]
fn what_was_spared_is_asked_for_when_somebody_else_has_split_the_huge_page() {
    let group = group();
    let Some((vm, _held)) = vm(SplitHugePages::Worthwhile, &group) else {
        return;
    };
    shares(&vm, &[run(7, 5), run(600, 9)]);
    // At once, though hardly any round looks at overlays by now.
    let mut tidier = Tidier::default();
    for _ in 0..20 {
        assert_eq!(tidier.round(&vm.sharing, &[]).unwrap(), []);
    }
    vm.ram.split_huge_page(700);
    let wanted = tidier.round(&vm.sharing, &[]).unwrap();
    let wanted: Vec<_> = wanted.iter().map(|it| (it.page, it.pages)).collect();
    assert_eq!(wanted, [(600, 9)]);
    assert_eq!(tidier.round(&vm.sharing, &[]).unwrap(), []);
}

/// What two VMs have, and neither may share, is not copied either.
#[test]
fn pages_that_are_spared_are_not_put_into_the_store() {
    let group = group();
    let Some((vm, held)) = vm(SplitHugePages::Never, &group) else {
        return;
    };
    drop(held);
    assert_eq!(group.lock().unwrap().statistics().store_pages, 0);
    let Some((other, held)) = numbered_vm(2, SplitHugePages::Never, &group) else {
        return;
    };
    drop(held);
    for vm in [&vm, &other] {
        assert_eq!(shares(vm, &[run(0, 100)]), [(0, 100)]);
    }
    assert_eq!(group.lock().unwrap().statistics().store_pages, 0);
    let mut memory = other.sharing.memory();
    assert!(!memory.set_split_huge_pages(SplitHugePages::Never));
    assert!(memory.set_split_huge_pages(SplitHugePages::Always));
    drop(memory);
    assert_eq!(shares(&other, &[run(0, 100)]), [(100, 0)]);
    assert_eq!(group.lock().unwrap().statistics().store_pages, 100);
}

#[test]
fn a_guest_is_asked_for_what_it_reported_before_and_still_has() {
    let group = group();
    let Some((vm, _held)) = vm(SplitHugePages::Worthwhile, &group) else {
        return;
    };
    let shared = Shared::new();
    let mut guest = Guest::new(&shared.words[..], shared.layout, 77, 1 << 20);
    let work = |guest: &mut Guest<_>| while guest.progress(&vm.sharing).busy {};
    shared.attach(5);
    work(&mut guest);
    let key = file(1);
    shared.produce(&Record::File {
        file: 3,
        identity: FileIdentity {
            fs_uuid: key.fs_uuid,
            inode: key.inode,
            size: key.size,
            mtime_ns: key.mtime_ns,
            generation: key.generation,
            kind: key.kind,
        },
        name: b"libc.so",
    });
    let report = |first: u64, pages: u32| {
        shared.produce(&Record::Run(Run {
            file: 3,
            page: first,
            gfn: first,
            pages,
        }))
    };
    report(0, 40);
    report(100, 20);
    // The guest does not have these any more, so they do not count, and nobody asks for them.
    shared.produce(&Record::Retract {
        file: 3,
        page: 100,
        pages: 20,
        unshare: false,
    });
    let last = report(200, 23);
    work(&mut guest);
    assert_eq!(shared.outcome(last).unwrap().remembered, 23);
    let mut status = EngineStatus::default();
    guest.fill_status(&mut status);
    assert_eq!((status.pages_spared, status.pages_remembered), (83, 0));
    assert_eq!(shared.take_request(), None);
    let last = report(300, 1);
    work(&mut guest);
    assert_eq!(shared.outcome(last).unwrap().shared, 1);
    let expected = Request::Report {
        file: 3,
        page: 0,
        pages: 223,
    };
    assert_eq!(shared.take_request(), Some(expected));
}
