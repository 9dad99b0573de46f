// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What splitting huge pages brings and costs, by the operator's choice.
//!
//! A guest's memory lies in huge pages, a part of each of which can be shared, in runs of eight
//! pages. Measured is by how much the host's free memory grows when all of it is reported, and how
//! long a read takes that waits for the one before, at a random place in all of guest memory, after
//! against before: the worst that a guest can do. Medians of several guests, least and most beside
//! them; what never splits shows what the machine adds by itself.

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use common::{Random, Vm, file, fill, huge_kilobytes};
use pagefusion_host::engine::ReportedRun;
use pagefusion_host::protocol::SplitHugePages;
use pagefusion_host::store::{Group, PAGE};

/// 1 GiB.
const PAGES: usize = 1 << 18;
const HUGE_PAGES: usize = PAGES / 512;
const RUN: usize = 8;
const BATCH: usize = 256;
/// Reads that are timed together.
const READS: usize = 1 << 20;
/// Of which the fastest counts: what else runs on the machine only makes it slower.
const ROUNDS: usize = 9;
/// Guests for each line.
const GUESTS: usize = 5;

fn main() {
    println!(
        "| of 512 pages can be shared | choice | gained of what can be | huge pages left | a read, after : before |"
    );
    println!("|---|---|---|---|---|");
    for shareable in [16, 64, 256] {
        for choice in [
            SplitHugePages::Never,
            SplitHugePages::Worthwhile,
            SplitHugePages::Always,
        ] {
            let guests: Vec<Measured> = (0..GUESTS).map(|_| measure(shareable, choice)).collect();
            let column = |value: fn(&Measured) -> f64| {
                let mut values: Vec<f64> = guests.iter().map(value).collect();
                values.sort_by(f64::total_cmp);
                [values[GUESTS / 2], values[0], values[GUESTS - 1]]
            };
            let [gained, least, most] = column(|it| it.gained * 100.0);
            let [slower, quickest, slowest] = column(|it| it.slower);
            println!(
                "| {shareable} | {} | {gained:.0}% ({least:.0}–{most:.0}) | {:.0}% | {slower:.2} ({quickest:.2}–{slowest:.2}) |",
                format!("{choice:?}").to_lowercase(),
                column(|it| it.whole * 100.0)[0],
            );
        }
    }
}

struct Measured {
    /// Memory, of what can be shared.
    gained: f64,
    /// Huge pages, of those there were.
    whole: f64,
    /// A read, after against before.
    slower: f64,
}

fn measure(shareable: usize, choice: SplitHugePages) -> Measured {
    let group = Arc::new(Mutex::new(Group::anonymous().expect("a store")));
    let bytes = Random(3).bytes(HUGE_PAGES * shareable * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let vm = Vm::new(&group, 1, PAGES, true);
    let runs = write_guest(&vm, &bytes, shareable);
    drop(bytes);
    let all = huge_kilobytes(&vm.ram);
    assert_eq!(all as usize * 1024, PAGES * PAGE, "all is in huge pages");
    vm.sharing.memory().set_split_huge_pages(choice);
    let before = nanoseconds_per_read(&vm);
    let free = free_pages();
    // Twice, as a guest would that is asked for what waited.
    for _ in 0..2 {
        for batch in runs.chunks(BATCH) {
            vm.sharing.share(batch);
        }
    }
    vm.sharing.memory().look_away();
    let gained = (free_pages() - free) as f64;
    Measured {
        gained: gained / (HUGE_PAGES * shareable) as f64,
        whole: huge_kilobytes(&vm.ram) as f64 / all as f64,
        slower: nanoseconds_per_read(&vm) / before,
    }
}

/// Fills guest memory; its runs that others have as well, in the order of guest memory.
fn write_guest(vm: &Vm, bytes: &[u8], shareable: usize) -> Vec<ReportedRun> {
    let (mut runs, mut random) = (Vec::new(), Random(5));
    let mut content = bytes.chunks_exact(PAGE);
    let mut page = 0;
    // Evenly, as a file's pages lie among others.
    let every = 512 / (shareable / RUN);
    for first in (0..PAGES).step_by(every) {
        runs.push(ReportedRun {
            file: file(1),
            page,
            gfn: first as u64,
            pages: RUN as u32,
        });
        page += RUN as u64;
        for at in first..first + RUN {
            vm.ram.write_page(at, content.next().expect("a page"));
        }
        for at in first + RUN..first + every {
            vm.ram.word(at, 0).store(random.next(), Ordering::Relaxed);
        }
    }
    runs
}

fn nanoseconds_per_read(vm: &Vm) -> f64 {
    let round = || {
        let mut at = 1_u64;
        let begun = Instant::now();
        for _ in 0..READS {
            let place = (at >> 20) as usize;
            let word = vm.ram.word(place % PAGES, place / PAGES % 512);
            // Where the next one is depends on what this one found.
            let found = word.load(Ordering::Relaxed) & 1;
            at = (at ^ found)
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
        }
        black_box(at);
        begun.elapsed().as_secs_f64() * 1e9 / READS as f64
    };
    (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min)
}

/// Free pages, with those that each CPU keeps for itself, which `MemFree` does not count.
fn free_pages() -> i64 {
    let text = std::fs::read_to_string("/proc/zoneinfo").expect("procfs");
    let numbers = text.lines().filter_map(|line| {
        let (name, number) = line.trim().split_once(' ')?;
        matches!(name, "nr_free_pages" | "count:").then(|| number.trim().parse::<i64>().ok())?
    });
    numbers.sum()
}
