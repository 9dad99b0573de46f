// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Overlays of some files and of some frames, looked at and undone while others stay.

mod common;

use common::{Random, Vm, file, fill};
use pagefusion_abi::wire::reason;
use pagefusion_host::engine::{ReportedRun, Tidier, audit, file_uses, tidy};
use pagefusion_host::protocol::{StoreSpan, Undo};
use pagefusion_host::store::{Group, LocalStore, PAGE};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Of each file.
const PAGES: usize = 256;
const RUN: usize = 16;

struct Shared {
    vm: Vm,
    content: [Vec<u8>; 2],
    /// Others who have the same pages.
    held: Vec<[LocalStore; 2]>,
}

impl Shared {
    /// A guest in which runs of two files take turns, all of them shared.
    fn new() -> Self {
        let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
        let content = [3, 4].map(|seed| Random(seed).bytes(PAGES * PAGE));
        let held = [1, 2].map(|number| fill(&group, file(number), &content[number as usize - 1]));
        let vm = Vm::new(&group, 1, 2 * PAGES, true);
        let this = Self {
            vm,
            content,
            held: held.into(),
        };
        for frame in 0..2 * PAGES {
            this.vm.ram.write_page(frame, this.expected(frame));
        }
        this.share();
        this
    }

    fn share(&self) {
        let run = |turn: usize| ReportedRun {
            file: file(turn as u64 % 2 + 1),
            page: (turn / 2 * RUN) as u64,
            gfn: (turn * RUN) as u64,
            pages: RUN as u32,
        };
        let runs: Vec<_> = (0..2 * PAGES / RUN).map(run).collect();
        let outcomes = self.vm.sharing.share(&runs);
        assert!(outcomes.iter().all(|it| usize::from(it.shared) == RUN));
    }

    fn expected(&self, frame: usize) -> &[u8] {
        let turn = frame / RUN;
        let page = turn / 2 * RUN + frame % RUN;
        &self.content[turn % 2][page * PAGE..][..PAGE]
    }

    /// Pages shared by file 1 and by file 2.
    fn uses(&self) -> [u64; 2] {
        let uses = file_uses(&self.vm.sharing, None, 10, |_| Some("x")).unwrap();
        [1, 2].map(|number| {
            let found = uses.iter().find(|it| it.file == file(number));
            found.map_or(0, |it| it.pages_shared)
        })
    }

    fn check(&self) {
        for frame in 0..2 * PAGES {
            assert_eq!(
                self.vm.ram.read_page(frame),
                self.expected(frame),
                "{frame}"
            );
        }
    }
}

#[test]
fn files_are_told_in_order_and_in_parts() {
    let shared = Shared::new();
    let first = file_uses(&shared.vm.sharing, None, 1, |_| Some("x")).unwrap();
    assert_eq!((first.len(), first[0].file), (1, file(1)));
    assert_eq!((first[0].name.as_str(), first[0].pages_shared), ("x", 256));
    // Written by the guest: not shared any more.
    shared.vm.ram.word(RUN, 0).fetch_add(1, Ordering::Relaxed);
    let second = file_uses(&shared.vm.sharing, Some(file(1)), 10, |_| None).unwrap();
    assert_eq!((second.len(), second[0].file), (1, file(2)));
    assert_eq!((second[0].pages_shared, second[0].pages_broken), (255, 1));
}

#[test]
fn one_file_is_undone_and_the_other_stays() {
    let shared = Shared::new();
    let sharing = &shared.vm.sharing;
    sharing.undo(&Undo::Files(vec![file(1)])).unwrap();
    assert_eq!(shared.uses(), [0, 256]);
    shared.check();
    // The store has been told: these can be granted anew.
    shared.share();
    assert_eq!(shared.uses(), [256, 256]);
    sharing.undo(&Undo::All).unwrap();
    let audit = audit(sharing).unwrap();
    assert_eq!((audit.overlays, audit.overlay_mappings), (0, 0));
    shared.check();
}

#[test]
fn frames_are_undone_and_those_around_them_stay() {
    let shared = Shared::new();
    let frames = |gfn, pages| Undo::Pages { gfn, pages };
    shared.vm.sharing.undo(&frames(4, 1)).unwrap();
    assert_eq!(shared.uses(), [255, 256]);
    shared.vm.sharing.undo(&frames(24, 16)).unwrap();
    assert_eq!(shared.uses(), [247, 248]);
    // Frames that do not exist are none.
    shared
        .vm
        .sharing
        .undo(&frames(u64::MAX - 1, u64::MAX))
        .unwrap();
    assert_eq!(shared.uses(), [247, 248]);
    shared.check();
}

#[test]
fn an_undo_under_load_loses_no_write() {
    let shared = Shared::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|writer: usize| {
                let (ram, stop) = (&shared.vm.ram, &stop);
                scope.spawn(move || {
                    let mut written = vec![0_u64; 2 * PAGES];
                    let mut random = Random(writer as u64);
                    while !stop.load(Ordering::Relaxed) {
                        let frame = random.below(2 * PAGES);
                        // A word of its own in each page.
                        ram.word(frame, 7 + writer).fetch_add(1, Ordering::Relaxed);
                        written[frame] += 1;
                        std::thread::sleep(std::time::Duration::from_micros(50));
                    }
                    written
                })
            })
            .collect();
        for _ in 0..3 {
            shared.vm.sharing.undo(&Undo::Files(vec![file(2)])).unwrap();
            let some = Undo::Pages { gfn: 0, pages: 100 };
            shared.vm.sharing.undo(&some).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        for (writer, written) in writers.into_iter().enumerate() {
            let written = written.join().unwrap();
            for (frame, count) in written.into_iter().enumerate() {
                let word = 7 + writer;
                let before = &shared.expected(frame)[word * 8..][..8];
                let before = u64::from_ne_bytes(before.try_into().unwrap());
                let now = shared.vm.ram.word(frame, word).load(Ordering::Relaxed);
                assert_eq!(now, before.wrapping_add(count), "frame {frame}");
            }
        }
    });
    assert_eq!(shared.uses()[1], 0);
}

/// However little time there is between two windows of an undo.
#[test]
fn a_page_that_was_never_touched_is_there_before_an_undo_ends() {
    let shared = Shared::new();
    let untouched = Vm::new(&shared.vm.store, 2, 2 * PAGES, false);
    let sharing = &untouched.sharing;
    let some = fill(&shared.vm.store, file(9), &shared.content[0][..PAGE]);
    untouched.ram.write_page(0, &shared.content[0][..PAGE]);
    let run = ReportedRun {
        file: file(9),
        page: 0,
        gfn: 0,
        pages: 1,
    };
    assert_eq!(sharing.share(&[run])[0].shared, 1);
    sharing.memory().begin_undo().unwrap();
    std::thread::scope(|scope| {
        let mut memory = sharing.memory();
        let touch = || untouched.ram.word(PAGES, 0).fetch_add(1, Ordering::Relaxed);
        let touched = scope.spawn(touch);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !touched.is_finished() {
            assert!(Instant::now() < deadline, "it waits for the undo's end");
            drop(memory);
            memory = sharing.memory();
            // A window.
            let end = Instant::now() + Duration::from_millis(5);
            while Instant::now() < end && !touched.is_finished() {
                std::hint::spin_loop();
            }
        }
        drop(memory);
        assert_eq!(touched.join().unwrap(), 0);
    });
    sharing.memory().end_undo();
    drop(some);
}

/// A device comes that holds on to pages, say.
#[test]
fn what_needs_all_memory_ordinary_lets_others_in_between_and_nothing_be_shared() {
    const TIMES: usize = 64;
    let shared = Shared::new();
    let vm = Vm::new(&shared.vm.store, 2, TIMES * PAGES, false);
    let content = &shared.content[0];
    for frame in 0..TIMES * PAGES {
        vm.ram
            .write_page(frame, &content[frame % PAGES * PAGE..][..PAGE]);
    }
    let run = |time: usize| ReportedRun {
        file: file(1),
        page: 0,
        gfn: (time * PAGES) as u64,
        pages: PAGES as u32,
    };
    let runs: Vec<_> = (0..TIMES).map(run).collect();
    let sharing = &vm.sharing;
    let all = (TIMES * PAGES) as u64;
    let share = || {
        let outcomes = sharing.share(&runs);
        assert_eq!(
            outcomes.iter().map(|it| u64::from(it.shared)).sum::<u64>(),
            all
        );
    };
    let pages = || sharing.memory().overlays().pages();
    let check = || {
        for frame in 0..TIMES * PAGES {
            assert_eq!(
                vm.ram.read_page(frame),
                &content[frame % PAGES * PAGE..][..PAGE]
            );
        }
    };
    share();
    let address = vm.ram.word(0, 0).as_ptr() as usize;
    let mut between = 0;
    std::thread::scope(|scope| {
        let memory = sharing.memory();
        let making = scope.spawn(|| sharing.make_ordinary(&(address..address + 1)));
        drop(memory);
        while !making.is_finished() {
            let mut memory = sharing.memory();
            if (1..all).contains(&memory.overlays().pages()) {
                between += 1;
                assert_eq!(memory.check(address), Err(reason::UNSUITABLE_MEMORY));
            }
        }
    });
    assert!(between > 0, "nobody came in between");
    assert_eq!(pages(), 0);
    check();
    // Nothing is left of it.
    share();
    sharing.memory().disable("a device").unwrap();
    assert_eq!(pages(), 0);
    check();
}

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

#[test]
fn memory_that_was_never_touched_is_there_after_an_undo_of_something_else() {
    let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
    let bytes = Random(5).bytes(2 * RUN * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, 4 * RUN, false);
    for (frame, page) in bytes.chunks(PAGE).enumerate() {
        vm.ram.write_page(frame, page);
    }
    let run = |page: usize| ReportedRun {
        file: file(1),
        page: page as u64,
        gfn: page as u64,
        pages: RUN as u32,
    };
    vm.sharing.share(&[run(0), run(RUN)]);
    let some = Undo::Pages { gfn: 0, pages: 1 };
    vm.sharing.undo(&some).unwrap();
    let (done, waits) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let ram = &vm.ram;
        scope.spawn(move || {
            let _ = done.send(ram.word(3 * RUN, 0).load(Ordering::Relaxed));
        });
        let touched = waits.recv_timeout(std::time::Duration::from_secs(10));
        if touched.is_err() {
            // Lets it go, so that the test can end.
            vm.sharing.undo_all().unwrap();
        }
        assert_eq!(touched, Ok(0));
    });
    assert!(!vm.ram.waits_for_missing_pages());
}

/// Whoever touches a page that was never there meanwhile waits for the thread that serves events,
/// and that one for whoever works on guest memory.
#[test]
fn untouched_pages_are_shared_while_an_undo_is_under_way() {
    let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
    let _held = fill(&group, file(1), &vec![0; 64 * PAGE]);
    let vm = Vm::new(&group, 1, 128, false);
    vm.sharing.memory().check(vm.ram.at(0)).unwrap();
    vm.sharing.memory().begin_undo().unwrap();
    let sharing = vm.sharing.clone();
    let (done, outcome) = std::sync::mpsc::channel();
    let worker = std::thread::spawn(move || {
        let run = ReportedRun {
            file: file(1),
            page: 0,
            gfn: 0,
            pages: 64,
        };
        done.send(sharing.share(&[run])[0].shared).unwrap();
    });
    let limit = std::time::Duration::from_secs(20);
    let Ok(shared) = outcome.recv_timeout(limit) else {
        // Nor would anything else return that takes the lock, the end of this test included.
        eprintln!("the engine waits for itself");
        std::process::abort();
    };
    assert_eq!(shared, 64);
    worker.join().unwrap();
    vm.sharing.memory().end_undo();
}

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
    {
        let mut memory = shared.vm.sharing.memory();
        memory.remove_region(0).unwrap();
        memory.insert_region(5, region).unwrap();
    }
    shared.share();
    // Found first from here on, and nothing is known of it.
    shared.vm.sharing.memory().insert_region(0, other).unwrap();
    shared.vm.sharing.undo_all().unwrap();
    assert_eq!(shared.uses(), [0, 0]);
    shared.check();
    // Known by both, and the one goes.
    shared.vm.sharing.memory().remove_region(0).unwrap();
    shared.share();
    shared.vm.sharing.memory().insert_region(0, other).unwrap();
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
