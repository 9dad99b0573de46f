// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages that move in a guest, which takes one report back and makes another.

mod common;

use std::sync::{Arc, Mutex};

use common::guest_side::Shared;
use common::{Random, Vm};
use pagefusion_abi::wire::{FileIdentity, Record, Run, file_kind};
use pagefusion_host::engine::{Guest, ReportedRun};
use pagefusion_host::protocol::EngineStatus;
use pagefusion_host::store::{Group, PAGE};

const PAGES: u64 = 4;
const FILE: u32 = 3;

fn identity() -> FileIdentity {
    FileIdentity {
        fs_uuid: [7; 16],
        inode: 1,
        size: PAGES * PAGE as u64,
        mtime_ns: 1,
        generation: 1,
        kind: file_kind::REGULAR,
    }
}

fn run_at(gfn: u64) -> Record<'static> {
    Record::Run(Run {
        file: FILE,
        page: 0,
        gfn,
        pages: PAGES as u32,
    })
}

const RETRACT: Record<'static> = Record::Retract {
    file: FILE,
    page: 0,
    pages: PAGES,
    unshare: false,
};

fn filled(group: &Arc<Mutex<Group>>, vm: u32, bytes: &[u8]) -> Vm {
    let vm = Vm::new(group, vm, 4 * PAGES as usize, false);
    for (page, content) in bytes
        .chunks_exact(PAGE)
        .cycle()
        .take(vm.ram.pages)
        .enumerate()
    {
        vm.ram.write_page(page, content);
    }
    vm
}

/// How many pages the store remembers after a guest has reported its file and then, in one batch,
/// `records`; and how many another guest with the same file shares afterwards.
fn after(records: &[Record<'_>]) -> (u64, u16) {
    let bytes = Random(9).bytes(PAGES as usize * PAGE);
    let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
    let vm = filled(&group, 1, &bytes);
    let shared = Shared::new();
    let mut guest = Guest::new(&shared.words[..], shared.layout, 77, 1024);
    let mut work = || while guest.progress(&vm.sharing).busy {};
    shared.attach(5);
    work();
    shared.produce(&Record::File {
        file: FILE,
        identity: identity(),
        name: b"libc.so",
    });
    shared.produce(&run_at(0));
    work();
    assert_eq!(group.lock().unwrap().statistics().remembered, PAGES);
    for record in records {
        shared.produce(record);
    }
    work();
    let remembered = group.lock().unwrap().statistics().remembered;
    let other = filled(&group, 2, &bytes);
    let run = ReportedRun {
        file: identity().into(),
        page: 0,
        gfn: 0,
        pages: PAGES as u32,
    };
    (remembered, other.sharing.share(&[run])[0].shared)
}

#[test]
fn moved_pages_are_still_remembered() {
    assert_eq!(after(&[RETRACT, run_at(8)]), (PAGES, PAGES as u16));
}

#[test]
fn pages_that_move_and_go_are_forgotten() {
    assert_eq!(after(&[RETRACT, run_at(8), RETRACT]), (0, 0));
}

#[test]
fn pages_that_move_twice_are_still_remembered() {
    let records = [RETRACT, run_at(8), RETRACT, run_at(4)];
    assert_eq!(after(&records), (PAGES, PAGES as u16));
}

#[test]
fn a_file_that_goes_and_comes_back_is_still_remembered() {
    let gone = Record::Retract {
        file: FILE,
        page: 0,
        pages: 0,
        unshare: false,
    };
    let back = Record::File {
        file: FILE,
        identity: identity(),
        name: b"libc.so",
    };
    let records = [gone, back, run_at(8)];
    assert_eq!(after(&records), (PAGES, PAGES as u16));
}

/// What a guest is counted for that reports its file at frame 0, and with it these pages of it at these frames.
fn counted(others: &[(u64, u64, u32)]) -> EngineStatus {
    let bytes = Random(9).bytes(PAGES as usize * PAGE);
    let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
    let vm = filled(&group, 1, &bytes);
    let shared = Shared::new();
    let mut guest = Guest::new(&shared.words[..], shared.layout, 77, 1024);
    shared.attach(5);
    while guest.progress(&vm.sharing).busy {}
    shared.produce(&Record::File {
        file: FILE,
        identity: identity(),
        name: b"libc.so",
    });
    shared.produce(&run_at(0));
    for &(page, gfn, pages) in others {
        shared.produce(&Record::Run(Run {
            file: FILE,
            page,
            gfn,
            pages,
        }));
    }
    while guest.progress(&vm.sharing).busy {}
    let mut status = EngineStatus::default();
    guest.fill_status(&mut status);
    status
}

#[test]
fn a_frame_that_is_two_pages_at_once_is_refused_and_counted() {
    // The lie comes second; the last of the reports says again what the first but one has said.
    let believed_before_and_behind = &[(1, 8, 3), (7, 10, 1), (0, 7, 5)][..];
    for (others, lie) in [
        (&[(1, 2, 2)][..], 2),
        (&[(0, 3, 4)], 4),
        (&[(3, 0, 1)], 1),
        (&[(0, 8, 4), (1, 11, 1)], 1),
        (believed_before_and_behind, 1),
    ] {
        let status = counted(others);
        assert_eq!(status.guest_errors, 1, "{others:?}");
        assert_eq!(status.refusals["malformed"], lie, "{others:?}");
        assert_eq!(status.pages_refused, lie, "{others:?}");
    }
}

#[test]
fn what_is_said_twice_is_no_lie() {
    for others in [
        &[(0, 0, 4)][..],
        &[(2, 2, 2)],
        &[(1, 1, 2), (3, 3, 1), (0, 4, 4)],
    ] {
        let status = counted(others);
        assert_eq!(
            (status.guest_errors, status.pages_refused),
            (0, 0),
            "{others:?}"
        );
    }
}
