// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a page costs with up to 1,000 VMs, which have 1 TiB of pages in common, and another TiB of
//! which each page belongs to one VM alone.
//!
//! The store is asked what 1,000 engines would ask of it; there is no guest memory. Pages in common
//! are in it with their bytes; of the others there is nothing but a hash, as in a daemon. Engines are
//! looked at after that: so many in one process, with less memory each. An engine reads about all
//! mappings of its process once, which here are those of all others as well.

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Random, Vm, file, fill};
use pagefusion_host::engine::ReportedRun;
use pagefusion_host::protocol::{FileKey, FileSpan, Sighting, Verdict};
use pagefusion_host::store::{Group, LocalStore, PAGE, PageStore};
use rustix::process::{Resource, getrlimit, setrlimit};

/// How many VMs there are when it is looked.
const VMS: [usize; 4] = [1, 10, 100, 1000];
/// So many VMs that came last are looked at; the median is shown.
const LAST: usize = 5;
const FILES: u64 = 16;
const FILE_PAGES: u64 = 1 << 14;
/// A GiB in common, and a GiB of its own, for each VM.
const VM_PAGES: u64 = FILES * FILE_PAGES;
const RUN: u32 = 16;
/// Spans and pages that are asked for at once.
const SPANS: usize = 256;
const HASHES: usize = 4096;
/// Pages of one engine.
const ENGINE_PAGES: usize = 1 << 12;

fn main() {
    println!(
        "| VMs | in common, µs a page | bytes a page | own, µs a page | bytes a page \
         | longest call, ms | who alone has what, ms | end of a VM, ms |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    store();
    println!("\n| engines | µs a page |\n|---|---|");
    engines();
}

/// What a VM that joins has cost.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    common: Duration,
    common_bytes: f64,
    own: Duration,
    own_bytes: f64,
    /// How long others had to wait for the store at most.
    longest: Duration,
}

fn store() {
    let group = Arc::new(Mutex::new(Group::anonymous().expect("a store")));
    let publishers: Vec<_> = (0..FILES)
        .map(|inode| {
            let bytes = Random(inode).bytes(FILE_PAGES as usize * PAGE);
            fill(&group, file(inode), &bytes)
        })
        .collect();
    let mut vms = Vec::new();
    let mut costs = Vec::new();
    for all in VMS {
        while vms.len() < all {
            let (vm, cost) = join(&group, vms.len() as u32);
            vms.push(vm);
            costs.push(cost);
        }
        let of_last = |of: fn(&Cost) -> Duration| median(costs.iter().rev().take(LAST).map(of));
        let [common, own, longest] = [
            of_last(|it| it.common),
            of_last(|it| it.own),
            of_last(|it| it.longest),
        ];
        let mean = |of: fn(&Cost) -> f64| costs.iter().map(of).sum::<f64>() / costs.len() as f64;
        let (common_bytes, own_bytes) = (mean(|it| it.common_bytes), mean(|it| it.own_bytes));
        let alone = median(
            (0..LAST.min(all))
                .map(|vm| took(|| group.lock().expect("no panic").take_alone(vm as u32)).1),
        );
        let end = median((0..LAST.min(all)).map(|_| {
            let end = took(|| drop(vms.pop())).1;
            vms.push(join(&group, vms.len() as u32).0);
            end
        }));
        println!(
            "| {all} | {:.3} | {common_bytes:.2} | {:.3} | {own_bytes:.2} | {:.2} | {:.2} | {:.1} |",
            micros(common) / VM_PAGES as f64,
            micros(own) / VM_PAGES as f64,
            micros(longest) / 1e3,
            micros(alone) / 1e3,
            micros(end) / 1e3,
        );
    }
    drop(vms);
    drop(publishers);
}

/// A VM joins, is granted what all have, and tells of what only it has.
fn join(group: &Arc<Mutex<Group>>, number: u32) -> (LocalStore, Cost) {
    let mut vm = LocalStore::new(group.clone(), number);
    let mut cost = Cost::default();
    let before = own_memory();
    for inode in 0..FILES {
        let spans: Vec<_> = (0..FILE_PAGES)
            .step_by(RUN as usize)
            .map(|page| FileSpan {
                file: file(inode),
                page,
                pages: RUN,
            })
            .collect();
        for spans in spans.chunks(SPANS) {
            let mut found = Vec::new();
            let (done, time) = took(|| vm.lookup(spans, &mut found));
            done.expect("the store answers");
            assert!(
                found.iter().all(|it| it.store.is_some()),
                "all of it is there"
            );
            cost.common += time;
            cost.longest = cost.longest.max(time);
        }
    }
    let between = own_memory();
    let mut random = Random(1 << 32 | u64::from(number));
    for inode in 0..FILES {
        for page in (0..FILE_PAGES).step_by(HASHES) {
            let sighting = Sighting {
                file: own_file(number, inode),
                page,
                hashes: (0..HASHES).map(|_| random.next()).collect(),
            };
            let mut verdicts = Vec::new();
            let (done, time) = took(|| vm.sight(vec![sighting], &mut verdicts));
            done.expect("the store answers");
            // Of so many, a few are taken for equal by what is kept of their hashes.
            let remembered = verdicts.iter().filter(|it| **it == Verdict::Remembered);
            assert!(remembered.count() > HASHES - HASHES / 100);
            cost.own += time;
            cost.longest = cost.longest.max(time);
        }
    }
    let pages = VM_PAGES as f64;
    cost.common_bytes = (between - before) / pages;
    cost.own_bytes = (own_memory() - between) / pages;
    (vm, cost)
}

fn own_file(vm: u32, inode: u64) -> FileKey {
    file((u64::from(vm) + 1) << 32 | inode)
}

/// Engines one after the other, each with the same pages as all others, which stay.
fn engines() {
    // Each has descriptors of its own.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("more descriptors");
    let group = Arc::new(Mutex::new(Group::anonymous().expect("a store")));
    let bytes = Random(1).bytes(ENGINE_PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let mut vms = Vec::new();
    let mut costs = Vec::new();
    for all in VMS {
        while vms.len() < all {
            let vm = Vm::new(&group, vms.len() as u32, ENGINE_PAGES, false);
            for (page, bytes) in bytes.chunks_exact(PAGE).enumerate() {
                vm.ram.write_page(page, bytes);
            }
            let runs: Vec<_> = (0..ENGINE_PAGES as u64)
                .step_by(RUN as usize)
                .map(|page| ReportedRun {
                    file: file(1),
                    page,
                    gfn: page,
                    pages: RUN,
                })
                .collect();
            costs.push(
                took(|| {
                    for batch in runs.chunks(SPANS) {
                        let outcomes = vm.sharing.share(batch);
                        assert!(outcomes.iter().all(|it| u32::from(it.shared) == RUN));
                    }
                })
                .1,
            );
            vms.push(vm);
        }
        let cost = median(costs.iter().rev().take(LAST).copied());
        println!("| {all} | {:.2} |", micros(cost) / ENGINE_PAGES as f64);
    }
}

fn took<T>(what: impl FnOnce() -> T) -> (T, Duration) {
    let begin = Instant::now();
    let done = what();
    (done, begin.elapsed())
}

fn median(times: impl Iterator<Item = Duration>) -> Duration {
    let mut times: Vec<_> = times.collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Memory of this process that is in no file, bytes.
fn own_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|it| it.trim().strip_suffix(" kB"));
    kilobytes
        .and_then(|it| it.parse::<f64>().ok())
        .expect("RssAnon")
        * 1024.0
}
