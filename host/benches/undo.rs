// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How long a guest waits while all of its overlays are undone.
//!
//! A thread that stands for a vCPU reads and writes guest memory at random places: pages on overlays,
//! ordinary pages beside them, and pages that were never touched before. Its longest waits are what
//! counts; beside them those of the same thread while nothing is undone, for as long.

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Random, Vm, file, fill};
use pagefusion_host::engine::ReportedRun;
use pagefusion_host::store::{Group, PAGE};

/// As in a guest whose files lie in small pieces.
const RUNS: usize = 8192;
const RUN: usize = 3;
const STRIDE: usize = 16;
/// Half of guest memory was never touched.
const USED: usize = RUNS * STRIDE;
const BATCH: usize = 256;

/// Where the thread goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Shared,
    Own,
    Untouched,
}

const PLACES: [Place; 3] = [Place::Shared, Place::Own, Place::Untouched];

fn main() {
    println!("| memory | meanwhile | s | place | touched | p50, µs | p99 | p99.9 | max |");
    println!("|---|---|---|---|---|---|---|---|---|");
    let group = Arc::new(Mutex::new(Group::anonymous().expect("a store")));
    let bytes = Random(3).bytes(RUNS * RUN * PAGE);
    let _held = fill(&group, file(1), &bytes);
    for huge in [false, true] {
        let vm = guest(&group, &bytes, huge);
        let undo = || vm.sharing.undo_all().expect("an undo");
        let mut next = 0;
        for (name, what) in [("nothing", None), ("undo", Some(&undo))] {
            let (waits, took) = touched_while(&vm, next, || match what {
                Some(undo) => undo(),
                None => std::thread::sleep(Duration::from_secs(1)),
            });
            next = waits[2].len();
            for (place, waits) in PLACES.into_iter().zip(waits) {
                println!(
                    "| {} | {name} | {:.2} | {} | {} | {} |",
                    if huge { "huge" } else { "small" },
                    took.as_secs_f64(),
                    format!("{place:?}").to_lowercase(),
                    waits.len(),
                    percentiles(waits),
                );
            }
        }
    }
}

/// A guest with every page of the store on an overlay.
fn guest(group: &Arc<Mutex<Group>>, bytes: &[u8], huge: bool) -> Vm {
    let vm = Vm::new(group, 1, 2 * USED, huge);
    let mut content = bytes.chunks_exact(PAGE);
    let mut runs = Vec::new();
    for first in (0..USED).step_by(STRIDE) {
        for page in first..first + RUN {
            vm.ram.write_page(page, content.next().expect("a page"));
        }
        for page in first + RUN..first + STRIDE {
            vm.ram.word(page, 0).store(page as u64, Ordering::Relaxed);
        }
        runs.push(ReportedRun {
            file: file(1),
            page: (first / STRIDE * RUN) as u64,
            gfn: first as u64,
            pages: RUN as u32,
        });
    }
    for batch in runs.chunks(BATCH) {
        let outcomes = vm.sharing.share(batch);
        assert!(outcomes.iter().all(|it| usize::from(it.shared) == RUN));
    }
    vm
}

/// How long each touch took, by place, while something was done, and how long that took. Untouched
/// pages are taken from the one numbered `next` on.
fn touched_while(vm: &Vm, next: usize, what: impl FnOnce()) -> ([Vec<Duration>; 3], Duration) {
    let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| {
            let mut random = Random(7);
            let mut waits = [Vec::new(), Vec::new(), Vec::new()];
            while !done.load(Ordering::Acquire) {
                begun.store(true, Ordering::Release);
                let run = random.below(RUNS) * STRIDE;
                let place = PLACES[random.below(3)];
                let page = match place {
                    Place::Shared => run + random.below(RUN),
                    Place::Own => run + RUN + random.below(STRIDE - RUN),
                    // One in each piece of memory that may be a huge page.
                    Place::Untouched => USED + (next + waits[2].len()) * 7919 % USED,
                };
                let start = Instant::now();
                let word = vm.ram.word(page, 1);
                if place == Place::Shared {
                    word.load(Ordering::Relaxed);
                } else {
                    word.store(1, Ordering::Relaxed);
                }
                waits[place as usize].push(start.elapsed());
                // A guest does other things, too.
                while start.elapsed() < Duration::from_micros(50) {
                    std::hint::spin_loop();
                }
            }
            waits
        });
        while !begun.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        what();
        let took = start.elapsed();
        done.store(true, Ordering::Release);
        (toucher.join().expect("the toucher"), took)
    })
}

fn percentiles(mut waits: Vec<Duration>) -> String {
    waits.sort_unstable();
    let at = |part: f64| {
        let index = (waits.len() as f64 * part) as usize;
        waits
            .get(index.min(waits.len().saturating_sub(1)))
            .map_or(0.0, |it| it.as_secs_f64() * 1e6)
    };
    let [median, p99, p999, most] = [0.5, 0.99, 0.999, 1.0].map(at);
    format!("{median:.1} | {p99:.1} | {p999:.1} | {most:.1}")
}
