// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The engine on real memory with real write protection, without a VM.

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{GuestRam, Random, Vm, file, fill, huge_kilobytes};
use pagefusion_abi::wire::reason;
use pagefusion_host::engine::{Memory, ReportedRun, Sharing, WINDOW_PAGES, audit};
use pagefusion_host::store::{Group, PAGE};

fn group() -> Arc<Mutex<Group>> {
    Arc::new(Mutex::new(Group::anonymous().unwrap()))
}

fn run(page: u64, gfn: usize, pages: usize) -> ReportedRun {
    ReportedRun {
        file: file(1),
        page,
        gfn: gfn as u64,
        pages: pages as u32,
    }
}

/// Permuted runs of a file over guest memory: (first page of the file, first guest frame).
fn permuted(random: &mut Random, pages: usize, run: usize) -> Vec<(usize, usize)> {
    let mut places: Vec<usize> = (0..pages / run).collect();
    for i in (1..places.len()).rev() {
        places.swap(i, random.below(i + 1));
    }
    places
        .iter()
        .enumerate()
        .map(|(i, place)| (i * run, place * run))
        .collect()
}

#[test]
fn equal_pages_are_shared_and_undone_without_a_trace() {
    let group = group();
    let bytes = Random(1).bytes(256 * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, 512, true);
    for page in 0..512 {
        vm.ram.write_page(page, &bytes[page % 256 * PAGE..][..PAGE]);
    }
    let maps_before = maps_of(&vm.ram);
    let outcomes = vm.sharing.share(&[run(0, 0, 256), run(0, 256, 256)]);
    assert!(
        outcomes
            .iter()
            .all(|o| o.shared == 256 && o.reason == reason::NONE),
        "{outcomes:?}"
    );
    assert_eq!(audit(&vm.sharing).unwrap().intact, 512);
    assert!(maps_of(&vm.ram).len() > maps_before.len());
    vm.sharing.undo_all().unwrap();
    assert_eq!(maps_of(&vm.ram), maps_before);
    for page in 0..512 {
        assert_eq!(
            vm.ram.read_page(page),
            &bytes[page % 256 * PAGE..][..PAGE],
            "page {page}"
        );
    }
    assert_eq!(vm.sharing.memory().overlays().pages(), 0);
}

#[test]
fn undoing_scattered_single_pages_leaves_one_mapping_again() {
    const PAGES: usize = 2048;
    let group = group();
    let mut random = Random(9);
    let bytes = random.bytes(PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, PAGES, true);
    let places = permuted(&mut random, PAGES, 1);
    for (from, to) in &places {
        vm.ram.write_page(*to, &bytes[from * PAGE..][..PAGE]);
    }
    let maps_before = maps_of(&vm.ram);
    // Every page but each eighth, so that ordinary memory lies between.
    let some = places.iter().filter(|(_, to)| to % 8 != 0);
    let runs: Vec<_> = some.map(|(from, to)| run(*from as u64, *to, 1)).collect();
    let shared: u16 = vm.sharing.share(&runs).iter().map(|o| o.shared).sum();
    assert_eq!(usize::from(shared), PAGES / 8 * 7);
    let cut = maps_of(&vm.ram).len();
    assert!(cut > PAGES / 2);
    assert_eq!(audit(&vm.sharing).unwrap().overlay_mappings, cut as u64 - 1);
    vm.sharing.undo_all().unwrap();
    assert_eq!(maps_of(&vm.ram), maps_before);
}

/// Start, end and permissions of every mapping in guest memory.
fn maps_of(ram: &GuestRam) -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let inside = |line: &&str| {
        let start = line.split('-').next().unwrap();
        let start = usize::from_str_radix(start, 16).unwrap();
        (ram.at(0)..ram.at(ram.pages)).contains(&start)
    };
    maps.lines()
        .filter(inside)
        .map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn a_difference_in_the_last_byte_of_a_page_is_found() {
    let group = group();
    let bytes = Random(2).bytes(64 * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, 64, false);
    for page in 0..64 {
        let mut content = bytes[page * PAGE..][..PAGE].to_vec();
        if page == 17 || page == 63 {
            content[PAGE - 1] ^= 1;
        }
        vm.ram.write_page(page, &content);
    }
    let outcome = vm.sharing.share(&[run(0, 0, 64)])[0];
    assert_eq!((outcome.shared, outcome.remembered), (62, 2));
    let overlays = vm
        .sharing
        .memory()
        .overlays()
        .iter()
        .map(|(_, o)| o.pages)
        .collect::<Vec<_>>();
    assert_eq!(overlays, [17, 45]);
    // Neither is left protected: this would hang.
    vm.ram.word(17, 0).store(1, Ordering::Relaxed);
    vm.ram.word(63, 0).store(1, Ordering::Relaxed);
}

/// Runs that touch each other in guest memory, each from somewhere else in the file.
#[test]
fn runs_that_share_a_window_are_answered_each_for_itself() {
    const PAGES: usize = 96;
    let group = group();
    let bytes = Random(11).bytes(PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, PAGES, false);
    // Of every third run the second page differs.
    let differs = |page: usize| page % 9 == 1;
    let mut runs = Vec::new();
    for place in (0..PAGES).step_by(3) {
        let from = PAGES - 3 - place;
        for i in 0..3 {
            let mut content = bytes[(from + i) * PAGE..][..PAGE].to_vec();
            content[PAGE - 1] ^= u8::from(differs(place + i));
            vm.ram.write_page(place + i, &content);
        }
        runs.push(run(from as u64, place, 3));
    }
    // A guest's order is not that of its memory.
    runs.sort_by_key(|run| run.page % 7);
    let windows = std::cell::Cell::new(0);
    let outcomes = vm.sharing.share_while(&runs, &|| {
        windows.set(windows.get() + 1);
        let held_up = protected(&vm.ram);
        assert!(!held_up.is_empty() && held_up.len() <= WINDOW_PAGES);
        true
    });
    assert!(windows.get() < runs.len());
    for (run, outcome) in runs.iter().zip(&outcomes) {
        let first = run.gfn as usize;
        let different = (first..first + 3).filter(|page| differs(*page)).count() as u16;
        assert_eq!(
            (outcome.shared, outcome.remembered),
            (3 - different, different)
        );
    }
    let shared: Vec<bool> = (0..PAGES)
        .map(|page| vm.sharing.memory().overlays().contains(vm.ram.at(page)))
        .collect();
    let expected: Vec<bool> = (0..PAGES).map(|page| !differs(page)).collect();
    assert_eq!(shared, expected);
    assert_eq!(protected(&vm.ram), Vec::<usize>::new());
}

/// Long runs are looked at before guest memory is changed in any way.
#[test]
fn a_long_run_that_differs_splits_no_huge_page_and_stops_no_writer() {
    const PAGES: usize = 1024;
    let group = group();
    let bytes = Random(12).bytes(PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, PAGES, true);
    for page in 0..PAGES {
        let own = page as u64 + 1;
        vm.ram.word(page, 0).store(own, Ordering::Relaxed);
    }
    let before = huge_kilobytes(&vm.ram);
    if before == 0 {
        eprintln!("not seen: this machine gives no huge pages");
        return;
    }
    let outcomes = vm
        .sharing
        .share_while(&[run(0, 100, 32), run(64, 700, 64)], &|| {
            panic!("a window was opened")
        });
    assert!(outcomes.iter().all(|o| o.shared == 0), "{outcomes:?}");
    assert_eq!(huge_kilobytes(&vm.ram), before);
}

/// What overlays hide of a huge page would stay with the part that is left of it, if that were not
/// split. `after` is called when several runs of it are shared.
fn huge_pages_are_split(prepare: impl Fn(&mut Memory), after: impl Fn(&Sharing)) {
    const PAGES: usize = 2048;
    let group = group();
    let bytes = Random(15).bytes(PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, PAGES, true);
    prepare(&mut vm.sharing.memory());
    for page in 0..PAGES {
        vm.ram.write_page(page, &bytes[page * PAGE..][..PAGE]);
    }
    const FRAME: u64 = (1 << 55) - 1;
    let frames = page_tables(&vm.ram).into_iter().map(|entry| entry & FRAME);
    let frames: Vec<u64> = frames.filter(|frame| *frame != 0).collect();
    let flags = match fs::File::open("/proc/kpageflags") {
        Ok(flags) if frames.len() == PAGES => flags,
        _ => {
            eprintln!("skipped: only root sees physical frames");
            return;
        }
    };
    let in_large_folios = || {
        let large = |&&frame: &&u64| {
            let mut entry = [0; 8];
            flags.read_exact_at(&mut entry, frame * 8).unwrap();
            // KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL, KPF_THP
            u64::from_ne_bytes(entry) & (1 << 15 | 1 << 16 | 1 << 22) != 0
        };
        frames.iter().filter(large).count()
    };
    if huge_kilobytes(&vm.ram) * 1024 != (PAGES * PAGE) as u64 || in_large_folios() != PAGES {
        eprintln!("not seen: this machine gives no huge pages");
        return;
    }
    // Three in the first, two of them at its ends, one across the border of the next two, and many in
    // the last.
    let mut runs = vec![
        run(0, 0, 16),
        run(200, 200, 9),
        run(500, 500, 12),
        run(1000, 1000, 60),
    ];
    runs.extend(
        (1550..2000)
            .step_by(30)
            .map(|page| run(page as u64, page, 12)),
    );
    let outcomes = vm.sharing.share(&runs);
    for (run, outcome) in runs.iter().zip(outcomes) {
        assert_eq!(u32::from(outcome.shared), run.pages, "{outcome:?}");
    }
    after(&vm.sharing);
    assert_eq!((huge_kilobytes(&vm.ram), in_large_folios()), (0, 0));
}

#[test]
fn huge_pages_are_split_when_several_runs_of_them_are_shared() {
    huge_pages_are_split(|_| {}, Sharing::split_all_cut);
}

#[test]
fn huge_pages_are_split_in_a_moment_without_overlays() {
    huge_pages_are_split(
        |_| {},
        |sharing| {
            assert!(sharing.split_cut(), "overlays may still come");
            let begun = Instant::now();
            while sharing.split_cut() {
                assert!(begun.elapsed() < Duration::from_secs(60));
                std::thread::yield_now();
            }
        },
    );
}

#[test]
fn huge_pages_are_split_when_sharing_is_undone_at_once() {
    huge_pages_are_split(|_| {}, |sharing| sharing.undo_all().unwrap());
}

#[test]
fn huge_pages_are_split_before_each_overlay_where_the_kernel_needs_it() {
    huge_pages_are_split(Memory::split_at_once, |_| {});
}

#[test]
fn a_window_that_is_given_up_leaves_nothing_protected() {
    const PAGES: usize = 80;
    let group = group();
    let bytes = Random(14).bytes(PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, PAGES, false);
    for page in 0..PAGES {
        vm.ram.write_page(page, &bytes[page * PAGE..][..PAGE]);
    }
    let outcome = vm.sharing.share_while(&[run(0, 0, PAGES)], &|| {
        assert!(!protected(&vm.ram).is_empty());
        false
    })[0];
    assert_eq!((outcome.shared, outcome.reason), (0, reason::REVOKED));
    assert!(protected(&vm.ram).is_empty());
}

/// Pages that are write-protected by `userfaultfd`.
fn protected(ram: &GuestRam) -> Vec<usize> {
    const UFFD_WP: u64 = 1 << 57;
    let protected = page_tables(ram)
        .into_iter()
        .enumerate()
        .filter(|(_, entry)| entry & UFFD_WP != 0);
    protected.map(|(page, _)| page).collect()
}

/// What `/proc/self/pagemap` says of each page.
fn page_tables(ram: &GuestRam) -> Vec<u64> {
    let pagemap = fs::File::open("/proc/self/pagemap").unwrap();
    let mut entries = vec![0; ram.pages * 8];
    pagemap
        .read_exact_at(&mut entries, (ram.at(0) / PAGE * 8) as u64)
        .unwrap();
    let entries = entries.chunks_exact(8);
    entries
        .map(|it| u64::from_ne_bytes(it.try_into().unwrap()))
        .collect()
}

#[test]
fn an_undo_leaves_no_mapping_of_the_store() {
    let group = group();
    let bytes = Random(13).bytes(64 * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, 64, false);
    for page in 0..64 {
        vm.ram.write_page(page, &bytes[page * PAGE..][..PAGE]);
    }
    let store = fs::File::from(group.lock().unwrap().read_only().unwrap());
    let inode = format!(" {} ", store.metadata().unwrap().ino());
    let mapped = || {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains(&inode)).count()
    };
    assert_eq!(vm.sharing.share(&[run(0, 0, 64)])[0].shared, 64);
    assert!(mapped() > 0);
    vm.sharing.undo_all().unwrap();
    assert_eq!(mapped(), 0);
}

#[test]
fn frames_outside_of_guest_memory_are_refused() {
    let group = group();
    let vm = Vm::new(&group, 1, 16, false);
    for page in 0..16 {
        vm.ram
            .word(page, 0)
            .store(page as u64 + 1, Ordering::Relaxed);
    }
    let outcomes = vm
        .sharing
        .share(&[run(0, 16, 4), run(0, 14, 4), run(0, usize::MAX - 8, 4)]);
    let reasons: Vec<u8> = outcomes.iter().map(|o| o.reason).collect();
    assert_eq!(reasons, [reason::OUTSIDE_MEMORY; 3]);
    assert_eq!(outcomes[1].remembered, 2, "the part inside is looked at");
}

#[test]
fn what_one_guest_has_costs_no_memory_until_a_second_one_reports_it() {
    let group = group();
    let bytes = Random(3).bytes(32 * PAGE);
    let vms = [Vm::new(&group, 1, 64, false), Vm::new(&group, 2, 64, false)];
    for vm in &vms {
        for page in 0..32 {
            vm.ram.write_page(page + 8, &bytes[page * PAGE..][..PAGE]);
        }
    }
    let first = vms[0].sharing.share(&[run(0, 8, 32)])[0];
    assert_eq!((first.shared, first.remembered), (0, 32));
    assert_eq!(group.lock().unwrap().allocated_bytes().unwrap(), 0);
    let second = vms[1].sharing.share(&[run(0, 8, 32)])[0];
    assert_eq!((second.shared, second.remembered), (32, 0));
    let reports = group.lock().unwrap().take_reports();
    assert_eq!(reports[&1].iter().map(|s| s.pages).sum::<u32>(), 32);
    let again = vms[0].sharing.share(&[run(0, 8, 32)])[0];
    assert_eq!(again.shared, 32);
    assert_eq!(
        group.lock().unwrap().allocated_bytes().unwrap(),
        32 * PAGE as u64
    );
    // A write of one is seen by it alone.
    vms[0].ram.word(8, 0).store(42, Ordering::Relaxed);
    assert_eq!(vms[1].ram.read_page(8), &bytes[..PAGE]);
    assert_eq!(audit(&vms[0].sharing).unwrap().broken, 1);
    drop(vms);
    assert_eq!(
        group.lock().unwrap().allocated_bytes().unwrap(),
        0,
        "all memory went back"
    );
}

#[test]
fn scattered_runs_published_at_once_are_shared_each_with_its_own_bytes() {
    let group = group();
    let pages = 150;
    let bytes = Random(11).bytes(pages * PAGE);
    let vms = [1, 2].map(|number| Vm::new(&group, number, 256, false));
    let mut random = Random(12);
    let shared = vms.each_ref().map(|vm| {
        let mut runs = Vec::new();
        let (mut page, mut gfn) = (0, 1);
        while page < pages {
            let length = (random.below(9) + 1).min(pages - page);
            for i in 0..length {
                vm.ram
                    .write_page(gfn + i, &bytes[(page + i) * PAGE..][..PAGE]);
            }
            runs.push(run(page as u64, gfn, length));
            page += length;
            gfn += length + random.below(2);
        }
        let outcomes = vm.sharing.share(&runs);
        outcomes.iter().map(|it| u32::from(it.shared)).sum::<u32>()
    });
    assert_eq!(shared, [0, pages as u32]);
    assert_eq!(group.lock().unwrap().statistics().store_pages, pages as u64);
}

/// Writers hammer random pages while the same pages are overlaid and undone, round after
/// round. Each word has one writer; a lost write shows as an older value.
fn no_write_is_lost(huge: bool, run_pages: usize, touching: bool) {
    const PAGES: usize = 1024;
    const ROUNDS: usize = 12;
    let group = group();
    let mut random = Random(0x5eed + run_pages as u64);
    let bytes = random.bytes(PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, PAGES, huge);
    let mut places = permuted(&mut random, PAGES, run_pages);
    if touching {
        places.sort_by_key(|(_, to)| *to);
    }
    let mut source = vec![0; PAGES];
    for (from, to) in &places {
        for i in 0..run_pages {
            source[to + i] = from + i;
            vm.ram
                .write_page(to + i, &bytes[(from + i) * PAGE..][..PAGE]);
        }
    }
    let stop = AtomicBool::new(false);
    let original: Vec<u64> = (0..PAGES)
        .map(|page| vm.ram.word(page, 1).load(Ordering::Relaxed))
        .collect();
    let expected: Vec<AtomicU64> = original.iter().map(|word| AtomicU64::new(*word)).collect();
    let writes = AtomicU64::new(0);
    let mut shared = 0;
    std::thread::scope(|scope| {
        let mut writers = Vec::new();
        for writer in 0..2_usize {
            let (vm, stop, expected, writes) = (&vm, &stop, &expected, &writes);
            let original = &original;
            writers.push(scope.spawn(move || {
                let mut random = Random(writer as u64);
                let mut last = original.clone();
                while !stop.load(Ordering::Relaxed) {
                    // The last quarter is never written to.
                    let page = random.below(PAGES / 8 * 3) * 2 + writer;
                    let word = vm.ram.word(page, 1);
                    assert_eq!(word.load(Ordering::Relaxed), last[page], "page {page}");
                    // Back to what the store has every other time: only a page that is equal
                    // when it is compared can lose the write that comes next.
                    last[page] = if last[page] == original[page] {
                        random.next() | 1
                    } else {
                        original[page]
                    };
                    word.store(last[page], Ordering::Relaxed);
                    expected[page].store(last[page], Ordering::Relaxed);
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        for round in 0..ROUNDS {
            for batch in places.chunks(16) {
                let runs: Vec<_> = batch
                    .iter()
                    .map(|(from, to)| run(*from as u64, *to, run_pages))
                    .collect();
                let outcomes = vm.sharing.share(&runs);
                shared += outcomes.iter().map(|o| u64::from(o.shared)).sum::<u64>();
            }
            if round % 3 == 2 {
                vm.sharing.undo_all().unwrap();
            }
        }
        // Overlay work must meet writes, and writes must meet overlays, by the million.
        let lost = || {
            writers
                .iter()
                .any(std::thread::ScopedJoinHandle::is_finished)
        };
        while writes.load(Ordering::Relaxed) < 2_000_000 && !lost() {
            for (from, to) in &places {
                vm.sharing.share(&[run(*from as u64, *to, run_pages)]);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        shared >= (PAGES / 4 * ROUNDS) as u64,
        "only {shared} pages were ever shared"
    );
    for page in 0..PAGES {
        let mut content = bytes[source[page] * PAGE..][..PAGE].to_vec();
        let written = expected[page].load(Ordering::Relaxed);
        content[8..16].copy_from_slice(&written.to_ne_bytes());
        assert_eq!(vm.ram.read_page(page), content, "page {page}");
    }
}

#[test]
fn no_write_is_lost_in_single_pages() {
    no_write_is_lost(false, 1, false);
}

#[test]
fn no_write_is_lost_in_runs_out_of_huge_pages() {
    no_write_is_lost(true, 16, false);
}

#[test]
fn no_write_is_lost_where_several_runs_share_a_window() {
    no_write_is_lost(true, 2, true);
}

/// Pages that nobody ever touched have no page-table entry: without the kernel's help they
/// are not protected, and a first write in the window would be lost.
#[test]
fn a_first_write_to_an_untouched_page_is_never_lost() {
    const PAGES: usize = 64;
    let group = group();
    let zeros = vec![0; PAGES * PAGE];
    let _held = fill(&group, file(1), &zeros);
    for round in 0..400_u64 {
        let vm = Vm::new(&group, 1, PAGES, false);
        let go = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (ram, go) = (&vm.ram, &go);
            let writer = scope.spawn(move || {
                let mut random = Random(round);
                while !go.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                for _ in 0..random.below(200) {
                    std::hint::spin_loop();
                }
                for page in 0..PAGES {
                    ram.word(page, 5).store(round + 1, Ordering::Relaxed);
                }
            });
            go.store(true, Ordering::Release);
            vm.sharing.share(&[run(0, 0, PAGES)]);
            writer.join().unwrap();
        });
        for page in 0..PAGES {
            let found = vm.ram.word(page, 5).load(Ordering::Relaxed);
            assert_eq!(found, round + 1, "page {page}, round {round}");
        }
    }
}

#[test]
fn untouched_pages_are_covered_and_saved() {
    let group = group();
    let _held = fill(&group, file(1), &vec![0; 128 * PAGE]);
    let vm = Vm::new(&group, 1, 128, false);
    let outcome = vm.sharing.share(&[run(0, 0, 128)])[0];
    assert_eq!(outcome.shared, 128);
    assert_eq!(vm.ram.read_page(127), vec![0; PAGE]);
}

#[test]
fn nothing_is_shared_while_paused_and_undo_gives_the_store_its_pages_back() {
    let group = group();
    let bytes = Random(5).bytes(16 * PAGE);
    let held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, 16, false);
    for page in 0..16 {
        vm.ram.write_page(page, &bytes[page * PAGE..][..PAGE]);
    }
    assert_eq!(vm.sharing.share(&[run(0, 0, 16)])[0].shared, 16);
    drop(held);
    assert_eq!(
        group.lock().unwrap().allocated_bytes().unwrap(),
        16 * PAGE as u64
    );
    vm.sharing.memory().set_paused(true);
    vm.sharing.undo_all().unwrap();
    assert_eq!(group.lock().unwrap().allocated_bytes().unwrap(), 0);
    let outcome = vm.sharing.share(&[run(0, 0, 16)])[0];
    assert_eq!((outcome.shared, outcome.reason), (0, reason::PAUSED));
    assert_eq!(vm.ram.read_page(7), &bytes[7 * PAGE..][..PAGE]);
}
