// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is turned back because it is worth nothing, and what is reported again.

use crate::common::file;
use pagefusion_host::engine::{ReportedRun, Tidier, audit, tidy};
use pagefusion_host::protocol::{StoreSpan, Undo};
use pagefusion_host::store::PAGE;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::support::{RUN, Shared};

fn store_span(page: u32, pages: u32) -> StoreSpan {
    StoreSpan { page, pages }
}

/// Where the store has the two files; each is there as a whole, in the order of its pages.
fn store_of(shared: &Shared, number: u64) -> u32 {
    let memory = shared.vm.sharing.memory();
    let mut holdings = memory.holdings().into_iter();
    let first = holdings.find(|it| it.span.file == file(number) && it.span.page == 0);
    first.unwrap().store
}

#[test]
fn what_a_guest_has_written_goes_from_mostly_broken_overlays_and_from_ends() {
    let shared = Shared::new();
    let before = audit(&shared.vm.sharing).unwrap();
    // All but two pages of three runs, and the end of another.
    let broken = || (2..3 * RUN).chain(4 * RUN + 12..5 * RUN);
    for frame in broken() {
        shared.vm.ram.word(frame, 0).fetch_xor(1, Ordering::Relaxed);
    }
    let again = tidy(&shared.vm.sharing, &[]).unwrap();
    let after = audit(&shared.vm.sharing).unwrap();
    // What was not broken stays, and nothing is cut.
    assert_eq!(after.intact, before.intact - 3 * RUN as u64 + 2 - 4);
    assert_eq!(after.overlay_mappings, before.overlay_mappings);
    // An end between two overlays stays.
    assert_eq!(after.broken, 4);
    assert_eq!(again, []);
    for frame in broken() {
        shared.vm.ram.word(frame, 0).fetch_xor(1, Ordering::Relaxed);
    }
    shared.check();
}

#[test]
fn a_hole_that_a_guest_has_written_into_an_overlay_cuts_nothing() {
    let shared = Shared::new();
    let before = audit(&shared.vm.sharing).unwrap();
    for frame in 3..9 {
        shared.vm.ram.word(frame, 0).fetch_xor(1, Ordering::Relaxed);
    }
    assert_eq!(tidy(&shared.vm.sharing, &[]).unwrap(), []);
    let after = audit(&shared.vm.sharing).unwrap();
    assert_eq!((after.intact, after.broken), (before.intact - 6, 6));
    assert_eq!(after.overlay_mappings, before.overlay_mappings);
}

/// As when a guest evicts a page and reads it again into the same frame.
#[test]
fn pages_written_with_what_they_were_are_reported_again() {
    let shared = Shared::new();
    let before = audit(&shared.vm.sharing).unwrap();
    // Most of the first run of file 1, and one page of the first of file 2, beside another that
    // is written for good.
    for frame in (1..RUN).chain([RUN + 4]) {
        shared.vm.ram.write_page(frame, shared.expected(frame));
    }
    shared
        .vm
        .ram
        .word(RUN + 5, 511)
        .fetch_xor(1, Ordering::Relaxed);
    let again = tidy(&shared.vm.sharing, &[]).unwrap();
    let wanted: Vec<_> = again
        .iter()
        .map(|it| (it.file, it.page, it.pages))
        .collect();
    assert_eq!(wanted, [(file(1), 1, 15), (file(2), 4, 1)]);
    let after = audit(&shared.vm.sharing).unwrap();
    assert_eq!((after.intact, after.broken), (before.intact - 17, 17));
    let run = |span: &(_, u64, u32)| ReportedRun {
        file: span.0,
        page: span.1,
        gfn: span.1 + if span.0 == file(2) { RUN as u64 } else { 0 },
        pages: span.2,
    };
    let runs: Vec<_> = wanted.iter().map(run).collect();
    for (outcome, run) in shared.vm.sharing.share(&runs).iter().zip(&runs) {
        assert_eq!(u32::from(outcome.shared), run.pages);
    }
    let after = audit(&shared.vm.sharing).unwrap();
    assert_eq!((after.intact, after.broken), (before.intact - 1, 1));
    assert_eq!(tidy(&shared.vm.sharing, &[]).unwrap(), []);
    shared
        .vm
        .ram
        .word(RUN + 5, 511)
        .fetch_xor(1, Ordering::Relaxed);
    shared.check();
}

#[test]
fn pages_that_nobody_else_has_become_ordinary_memory_and_are_reported_again() {
    let shared = Shared::new();
    let at = store_of(&shared, 2);
    // Two runs, a half of one between overlays, and the half of one at the end of memory.
    let alone = [(0, 32), (40, 8), (248, 8)].map(|(page, pages)| store_span(at + page, pages));
    let again = tidy(&shared.vm.sharing, &alone).unwrap();
    assert_eq!(shared.uses(), [256, 256 - 40]);
    let pages: Vec<_> = again.iter().map(|it| (it.page, it.pages)).collect();
    assert_eq!(pages, [(0, 16), (16, 16), (248, 8)]);
    shared.check();
}

/// How many rounds it takes until what the guest breaks now is no overlay any more.
fn rounds_until_tidied(shared: &Shared, tidier: &mut Tidier, frames: Range<usize>) -> usize {
    let overlays = || shared.vm.sharing.memory().overlays().pages();
    let before = overlays();
    for frame in frames {
        shared.vm.ram.word(frame, 0).fetch_xor(1, Ordering::Relaxed);
    }
    let tidied = |_: &usize| {
        assert_eq!(tidier.round(&shared.vm.sharing, &[]).unwrap(), []);
        overlays() < before
    };
    (1..100).find(tidied).unwrap()
}

#[test]
fn a_guest_at_rest_is_looked_at_less_and_less_until_something_changes() {
    let shared = Shared::new();
    let at = store_of(&shared, 2);
    let mut tidier = Tidier::default();
    let rest = |tidier: &mut Tidier, rounds| {
        for _ in 0..rounds {
            assert_eq!(tidier.round(&shared.vm.sharing, &[]).unwrap(), []);
        }
    };
    // Looks at the first two, then at one in two, four, eight, sixteen, and in sixteen for ever.
    rest(&mut tidier, 2 + 2 + 4 + 8);
    assert_eq!(rounds_until_tidied(&shared, &mut tidier, 0..RUN), 16);
    assert_eq!(rounds_until_tidied(&shared, &mut tidier, RUN..2 * RUN), 1);
    rest(&mut tidier, 100);
    let found = rounds_until_tidied(&shared, &mut tidier, 2 * RUN..3 * RUN);
    assert!((2..=16).contains(&found), "{found}");

    // More is shared, or less; or others have left.
    rest(&mut tidier, 100);
    let some = Undo::Pages { gfn: 0, pages: 100 };
    shared.vm.sharing.undo(&some).unwrap();
    assert_eq!(
        rounds_until_tidied(&shared, &mut tidier, 10 * RUN..11 * RUN),
        1
    );
    rest(&mut tidier, 100);
    let alone = [store_span(at + 128, 16)];
    let again = tidier.round(&shared.vm.sharing, &alone).unwrap();
    assert_eq!(again.iter().map(|it| it.pages).sum::<u32>(), 16);
}

#[test]
fn pages_that_a_guest_has_twice_stay_shared_though_nobody_else_has_them() {
    let shared = Shared::new();
    let at = store_of(&shared, 2);
    // The first run of file 2 once more, where the first run of file 1 was.
    for page in 0..RUN {
        shared
            .vm
            .ram
            .write_page(page, &shared.content[1][page * PAGE..][..PAGE]);
    }
    let again = ReportedRun {
        file: file(2),
        page: 0,
        gfn: 0,
        pages: RUN as u32,
    };
    assert_eq!(shared.vm.sharing.share(&[again])[0].shared, RUN as u16);
    assert_eq!(tidy(&shared.vm.sharing, &[store_span(at, 16)]).unwrap(), []);
    assert_eq!(shared.uses(), [240, 272]);
}
