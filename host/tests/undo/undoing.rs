// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Overlays of some files and of some frames, looked at and undone while others stay.

use crate::common::{Random, Vm, file, fill};
use pagefusion_abi::wire::reason;
use pagefusion_host::engine::{ReportedRun, audit, file_uses};
use pagefusion_host::protocol::Undo;
use pagefusion_host::store::{Group, PAGE};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{PAGES, RUN, Shared};

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
    sharing
        .memory()
        .begin_undo(std::slice::from_ref(&(0..usize::MAX)))
        .unwrap();
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
    vm.sharing
        .memory()
        .begin_undo(std::slice::from_ref(&(0..usize::MAX)))
        .unwrap();
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

/// What is registered is mapped anew by KVM.
#[test]
fn an_undo_of_a_part_concerns_no_other_memory_and_leaves_no_mapping_behind() {
    const ALL: usize = 4096;
    let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
    let bytes = Random(3).bytes(16 * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, ALL, false);
    for frame in 0..ALL {
        vm.ram
            .write_page(frame, &bytes[frame % 16 * PAGE..][..PAGE]);
    }
    let share = |gfn| {
        let run = ReportedRun {
            file: file(1),
            page: 0,
            gfn,
            pages: 16,
        };
        assert_eq!(vm.sharing.share(&[run])[0].shared, 16);
    };
    share(3200);
    let before = vm.ram.mappings();
    share(160);
    let part = vm.ram.at(160)..vm.ram.at(176);
    vm.sharing
        .memory()
        .begin_undo(std::slice::from_ref(&part))
        .unwrap();
    let registered = vm.ram.mappings().into_iter().filter(|(_, waits)| *waits);
    assert_eq!(registered.map(|(pages, _)| pages).sum::<usize>(), 18);
    vm.sharing.memory().end_undo();
    vm.sharing.undo_range(part).unwrap();
    assert_eq!(vm.ram.mappings(), before);
    assert_eq!(vm.sharing.memory().overlays().pages(), 16);
    for frame in 0..ALL {
        let expected = &bytes[frame % 16 * PAGE..][..PAGE];
        assert_eq!(vm.ram.read_page(frame), expected);
    }
}
