// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guests that report many files.

mod common;

use std::sync::{Arc, Mutex};

use common::{Random, Vm, file, fill};
use pagefusion_abi::wire::{Outcome, reason};
use pagefusion_host::engine::{ReportedRun, file_uses};
use pagefusion_host::protocol::{FileKey, FileSpan, Undo};
use pagefusion_host::store::{Group, PAGE};

const MOST: u32 = 4;

fn run(file: FileKey, gfn: u64) -> ReportedRun {
    ReportedRun {
        file,
        page: 0,
        gfn,
        pages: 1,
    }
}

/// A VM with the page of a file at its first frames, which others have as well.
fn vm_with(bytes: &[u8], keys: impl Iterator<Item = FileKey>) -> (Vm, impl Sized) {
    let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
    let others: Vec<_> = keys.map(|key| fill(&group, key, bytes)).collect();
    let vm = Vm::new(&group, 1, 16, false);
    for page in 0..vm.ram.pages {
        vm.ram.write_page(page, bytes);
    }
    vm.sharing.memory().limit_files(MOST);
    (vm, others)
}

const SHARED: Outcome = Outcome {
    reason: reason::NONE,
    shared: 1,
    remembered: 0,
};

#[test]
fn a_guest_may_have_any_number_of_files_one_after_the_other() {
    let bytes = Random(3).bytes(PAGE);
    let (vm, _others) = vm_with(&bytes, std::iter::once(file(1)));
    let sharing = &vm.sharing;
    assert_eq!(sharing.share(&[run(file(1), 0)]), [SHARED]);
    for inode in 2..10 * u64::from(MOST) {
        // Two in a batch, of which the first must not lose its number to the second.
        let (one, two) = (file(2 * inode), file(2 * inode + 1));
        let shared = sharing.share(&[run(one, 1), run(two, 2)]);
        assert_eq!(shared, [SHARED; 2], "file {inode}");
        let mut uses = file_uses(sharing, None, 10, |_| None).unwrap();
        uses.sort_by_key(|it| it.file.inode);
        let files: Vec<_> = uses.iter().map(|it| it.file).collect();
        assert_eq!(files, [file(1), one, two]);
        for file in [one, two] {
            sharing.undo(&Undo::Files(vec![file])).unwrap();
            sharing.forget(FileSpan {
                file,
                page: 0,
                pages: 0,
            });
        }
    }
    let holdings = sharing.memory().holdings();
    assert_eq!(holdings.len(), 1);
    assert_eq!(holdings[0].span.file, file(1));
}

#[test]
fn more_files_at_a_time_than_there_may_be_are_refused() {
    let bytes = Random(4).bytes(PAGE);
    let (vm, _others) = vm_with(&bytes, std::iter::once(file(1)));
    let runs: Vec<_> = (0..=u64::from(MOST))
        .map(|it| run(file(10 + it), it))
        .collect();
    let outcomes = vm.sharing.share(&runs);
    let (last, shared) = outcomes.split_last().unwrap();
    assert_eq!(shared, [SHARED; MOST as usize]);
    assert_eq!(last.reason, reason::TOO_MANY_FILES);
    vm.sharing.undo(&Undo::Files(vec![file(12)])).unwrap();
    assert_eq!(vm.sharing.share(&runs[MOST as usize..]), [SHARED]);
}
