// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How long a guest's write waits for a window.
//!
//! A thread that stands for a vCPU waits for a window to open and writes at once to one of its
//! pages, so that it is held up from the beginning to the end. It writes what is there already:
//! the page stays equal, and is overlaid behind the writer's back. Beside it, to tell the engine
//! from the machine: how much longer than wanted the same thread spins for as long as its median
//! wait, while another one spins too; and, before all others, how long a write waits to a page
//! that is protected and let go as soon as the kernel says that somebody waits, which no window
//! can be shorter than; and one to a page that nothing is done with but what a window is for: it is
//! protected, compared with a page of a file, and mapped over.

#![expect(unsafe_code, reason = "maps over memory of its own")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{GuestRam, Random, Vm, file, fill};
use pagefusion_host::engine::{ReportedRun, Uffd, WINDOW_MAPPINGS};
use pagefusion_host::store::{Group, PAGE};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};

const PAGES: usize = 4096;
const BATCH: usize = 256;
/// Enough for ten beyond the 99.9th percentile.
const SAMPLES: usize = 10_000;

#[derive(Clone, Copy)]
struct Case {
    run: usize,
    huge: bool,
    /// Runs continue each other in guest memory, so that several share a window.
    touching: bool,
}

impl Case {
    fn runs_in_a_window(&self) -> usize {
        if self.touching {
            // Runs share a window that stays as short as 16 pages.
            (16 / self.run).clamp(1, WINDOW_MAPPINGS)
        } else {
            1
        }
    }

    fn stride(&self) -> usize {
        if self.touching {
            self.run
        } else {
            self.run + 1
        }
    }
}

/// One sample for each window of a guest that the writer was in time for.
fn round(group: &Arc<Mutex<Group>>, bytes: &[u8], case: &Case, samples: &mut Vec<Duration>) {
    let (run, stride) = (case.run, case.stride());
    let count = PAGES / run;
    let vm = Vm::new(group, 1, count * stride, case.huge);
    let mut runs = Vec::new();
    // Every second run of the store, so that no two of them are one mapping.
    for place in 0..count {
        let from = (place * 2 % count + place * 2 / count) * run;
        for page in 0..run {
            let content = &bytes[(from + page) * PAGE..][..PAGE];
            vm.ram.write_page(place * stride + page, content);
        }
        runs.push(ReportedRun {
            file: file(1),
            page: from as u64,
            gfn: (place * stride) as u64,
            pages: run as u32,
        });
    }
    let together = case.runs_in_a_window();
    let opened = AtomicUsize::new(0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (opened, done, vm) = (&opened, &done, &vm);
        let writer = scope.spawn(move || {
            let mut random = Random(1);
            write_when(opened, done, |now| {
                let place = (now - 1) * together + random.below(together);
                vm.ram.word(place * stride + random.below(run), 1)
            })
        });
        for batch in runs.chunks(BATCH) {
            // Asked while writers are stopped.
            let pinned = || {
                opened.fetch_add(1, Ordering::Release);
                true
            };
            let outcomes = vm.sharing.share_while(batch, &pinned);
            assert!(outcomes.iter().all(|o| usize::from(o.shared) == run));
        }
        done.store(true, Ordering::Release);
        samples.extend(writer.join().expect("the writer"));
    });
    assert_eq!(
        opened.into_inner(),
        count / together,
        "windows are as large as assumed"
    );
}

/// How long a write waits that the kernel tells us of and that nothing is done about but letting it go.
fn let_go_at_once() -> Vec<Duration> {
    let ram = GuestRam::new(1, false);
    ram.write_page(0, &Random(1).bytes(PAGE));
    let page = ram.at(0)..ram.at(1);
    let uffd = Uffd::open(None).expect("a userfaultfd");
    uffd.register(&page).expect("to register a page");
    let (protected, written) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (protected, written, ram) = (&protected, &written, &ram);
        let writer = scope.spawn(move || {
            let word = ram.word(0, 1);
            let waits = (1..=SAMPLES).map(|sample| {
                while protected.load(Ordering::Acquire) < sample {
                    std::hint::spin_loop();
                }
                let start = Instant::now();
                word.store(sample as u64, Ordering::Relaxed);
                let waited = start.elapsed();
                written.store(sample, Ordering::Release);
                waited
            });
            waits.collect()
        });
        for sample in 1..=SAMPLES {
            uffd.protect(&page).expect("to protect it");
            protected.store(sample, Ordering::Release);
            while uffd.next_event().expect("to be told").is_none() {
                std::hint::spin_loop();
            }
            uffd.unprotect(&page).expect("to let it go");
            while written.load(Ordering::Acquire) < sample {
                std::hint::spin_loop();
            }
        }
        writer.join().expect("the writer")
    })
}

/// How long a write waits that meets a window of one page with nothing in it but system calls and the
/// comparison. `pause` is how long the next one is waited with.
fn bare(pause: Duration) -> Vec<Duration> {
    let store = memfd_create("window", MemfdFlags::CLOEXEC).expect("a file");
    let bytes = Random(1).bytes(PAGES * PAGE);
    assert_eq!(rustix::io::pwrite(&store, &bytes, 0), Ok(bytes.len()));
    let mut samples = Vec::new();
    while samples.len() < SAMPLES {
        let ram = GuestRam::new(PAGES * 2, false);
        let uffd = Uffd::open(None).expect("a userfaultfd");
        uffd.register(&(ram.at(0)..ram.at(PAGES * 2)))
            .expect("to register it");
        for (page, content) in bytes.chunks(PAGE).enumerate() {
            ram.write_page(page * 2, content);
        }
        let (opened, done) = (AtomicUsize::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let writer =
                scope.spawn(|| write_when(&opened, &done, |now| ram.word((now - 1) * 2, 1)));
            for (page, content) in bytes.chunks(PAGE).enumerate() {
                let range = ram.at(page * 2)..ram.at(page * 2 + 1);
                uffd.protect(&range).expect("to protect it");
                opened.store(page + 1, Ordering::Release);
                assert!(ram.read_page(page * 2) == content);
                let (protection, flags) = (
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                );
                let at = range.start as *mut _;
                // SAFETY: over memory of our own, which is looked at through atomics only.
                unsafe { mmap(at, PAGE, protection, flags, &store, (page * PAGE) as u64) }
                    .expect("to map over it");
                uffd.wake(&range).expect("to let writers go");
                let closed = Instant::now();
                while closed.elapsed() < pause {
                    std::hint::spin_loop();
                }
            }
            done.store(true, Ordering::Release);
            samples.extend(writer.join().expect("the writer"));
        });
    }
    samples
}

/// Each time that `opened` has grown, writes to a word what is there: how long each of that takes.
fn write_when<'a>(
    opened: &AtomicUsize,
    done: &AtomicBool,
    mut word: impl FnMut(usize) -> &'a AtomicU64,
) -> Vec<Duration> {
    let mut waits = Vec::new();
    let mut seen = 0;
    loop {
        let now = opened.load(Ordering::Acquire);
        if now == seen {
            if done.load(Ordering::Acquire) {
                return waits;
            }
            std::hint::spin_loop();
            continue;
        }
        seen = now;
        let word = word(now);
        let value = word.load(Ordering::Relaxed);
        let start = Instant::now();
        word.store(value, Ordering::Relaxed);
        waits.push(start.elapsed());
    }
}

/// What the machine adds by itself to spinning for `length`.
fn machine_alone(length: Duration) -> Vec<Duration> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let samples = (0..SAMPLES)
            .map(|_| {
                let start = Instant::now();
                while start.elapsed() < length {
                    std::hint::spin_loop();
                }
                start.elapsed()
            })
            .collect();
        done.store(true, Ordering::Relaxed);
        samples
    })
}

fn percentiles(mut samples: Vec<Duration>) -> String {
    samples.sort_unstable();
    let at = |part: f64| {
        let index = (samples.len() as f64 * part) as usize;
        samples[index.min(samples.len() - 1)].as_secs_f64() * 1e6
    };
    let [median, p99, p999, most] = [0.5, 0.99, 0.999, 1.0].map(at);
    format!("{median:.1} | {p99:.1} | {p999:.1} | {most:.1}")
}

fn main() {
    let group = Arc::new(Mutex::new(Group::anonymous().expect("a store")));
    let bytes = Random(1).bytes(PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    println!(
        "| runs | in a window | writes | p50, µs | p99 | p99.9 | max | the machine alone: p50 | p99 | p99.9 | max |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    let mut alone = let_go_at_once();
    alone.sort_unstable();
    let median = alone[SAMPLES / 2];
    println!(
        "| let go at once | – | {SAMPLES} | {} | {} |",
        percentiles(alone),
        percentiles(machine_alone(median)),
    );
    for (what, pause) in [("one after the other", 0), ("100 µs apart", 100)] {
        let mut bare = bare(Duration::from_micros(pause));
        bare.sort_unstable();
        let median = bare[bare.len() / 2];
        println!(
            "| 1 page, system calls alone, {what} | 1 | {} | {} | {} |",
            bare.len(),
            percentiles(bare),
            percentiles(machine_alone(median)),
        );
    }
    for huge in [false, true] {
        for (run, touching) in [(1, false), (16, false), (64, false), (1, true), (8, true)] {
            let case = Case {
                run,
                huge,
                touching,
            };
            let mut samples = Vec::new();
            while samples.len() < SAMPLES {
                round(&group, &bytes, &case, &mut samples);
            }
            samples.sort_unstable();
            let median = samples[samples.len() / 2];
            println!(
                "| {run} {}, {} | {} | {} | {} | {} |",
                if run == 1 { "page" } else { "pages" },
                if huge { "huge" } else { "small" },
                case.runs_in_a_window(),
                samples.len(),
                percentiles(samples),
                percentiles(machine_alone(median)),
            );
        }
    }
}
