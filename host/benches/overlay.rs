// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What sharing a page costs, beside what it costs at least: the floor is the same system
//! calls in plain C (`overlay_floor.c`), built and run here, in turns with the engine.
//!
//! The engine's figure is that of the whole path: checking, asking the store, write
//! protection, comparison, mapping, bookkeeping. Not in it is what happens once in the life of
//! a region, before the first overlay: looking it up in `smaps` and registering it, which the
//! floor has behind it as well. Guest memory is filled from the store, as the floor's is, so that
//! both find it as near to the processor. Every store page is looked at for the first time by the
//! engine's process, as in real use, while the floor has its store mapped and populated.
//! Time is for all pages.

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Random, Vm, file, fill};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pagefusion_host::engine::{ReportedRun, mappings_now};
use pagefusion_host::store::{Group, PAGE};

/// 64 MiB: half as many single-page runs as the kernel lets a process have mappings.
const PAGES: usize = 16384;
/// As many runs as a guest's batch has.
const BATCH: usize = 256;

fn build_floor() -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/overlay_floor.c");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("overlay_floor");
    let compiled = Command::new("cc")
        .args(["-O2", "-Wno-unused-result", "-pthread", "-o"])
        .args([&program, &source])
        .status();
    match compiled {
        Ok(status) if status.success() => Some(program),
        other => {
            eprintln!(
                "no floor to compare with: cc cannot build {}: {other:?}",
                source.display()
            );
            None
        }
    }
}

/// Time for all pages, as the floor prints it per page.
fn floor(program: &Path, run: usize, huge: bool) -> Duration {
    let huge = if huge { "1" } else { "0" };
    let mib = ((PAGES * PAGE) >> 20).to_string();
    let output = Command::new(program)
        .args([&mib, &run.to_string(), "0", huge, huge])
        .output()
        .expect("the floor runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let micros = text
        .split(" us/page")
        .next()
        .and_then(|t| t.rsplit(' ').next());
    let micros: f64 = micros
        .and_then(|m| m.parse().ok())
        .expect("the floor prints us/page");
    Duration::from_secs_f64(micros * PAGES as f64 / 1e6)
}

/// Time for sharing all pages of a guest, in permuted runs.
fn engine(group: &Arc<Mutex<Group>>, run: usize, huge: bool) -> Duration {
    let vm = Vm::new(group, 1, PAGES, huge);
    // From the store, which so is as near to the processor as that of the floor.
    let store = File::from(
        group
            .lock()
            .expect("a store")
            .read_only()
            .expect("the store"),
    );
    let mut content = vec![0; run * PAGE];
    let mut random = Random(3);
    let mut places: Vec<usize> = (0..PAGES / run).collect();
    for i in (1..places.len()).rev() {
        places.swap(i, random.below(i + 1));
    }
    let mut runs = Vec::new();
    for (i, place) in places.iter().enumerate() {
        let offset = (i * run * PAGE) as u64;
        store.read_exact_at(&mut content, offset).expect("a run");
        for (page, bytes) in content.chunks_exact(PAGE).enumerate() {
            vm.ram.write_page(place * run + page, bytes);
        }
        let (page, gfn) = ((i * run) as u64, (place * run) as u64);
        runs.push(ReportedRun {
            file: file(1),
            page,
            gfn,
            pages: run as u32,
        });
    }
    // A guest's frames come in no order that the store knows of.
    runs.sort_by_key(|run| run.gfn);
    let prepared = vm.sharing.memory().check(vm.ram.base);
    prepared.expect("memory that can be shared");
    let start = Instant::now();
    let mut shared = 0;
    for batch in runs.chunks(BATCH) {
        shared += vm
            .sharing
            .share(batch)
            .iter()
            .map(|o| usize::from(o.shared))
            .sum::<usize>();
    }
    let time = start.elapsed();
    assert_eq!(
        shared,
        PAGES,
        "{:?}, {} mappings",
        vm.sharing.memory().budget(),
        mappings_now().expect("/proc/self/maps")
    );
    time
}

fn overlay(c: &mut Criterion) {
    let group = Arc::new(Mutex::new(Group::anonymous().expect("a store")));
    let bytes = Random(1).bytes(PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let program = build_floor();
    for (kind, huge) in [("small", false), ("huge", true)] {
        for run in [1, 16, 64] {
            let mut bench = c.benchmark_group(format!("overlay/{kind}-pages/run-{run}"));
            bench.throughput(Throughput::Elements(PAGES as u64));
            bench.sample_size(10).warm_up_time(Duration::from_millis(1));
            bench.measurement_time(Duration::from_millis(1));
            let repeat = |n: u64, once: &dyn Fn() -> Duration| (0..n).map(|_| once()).sum();
            if let Some(program) = &program {
                bench.bench_function(BenchmarkId::from_parameter("floor"), |b| {
                    b.iter_custom(|n| repeat(n, &|| floor(program, run, huge)));
                });
            }
            bench.bench_function(BenchmarkId::from_parameter("engine"), |b| {
                b.iter_custom(|n| repeat(n, &|| engine(&group, run, huge)));
            });
            bench.finish();
        }
    }
}

criterion_group!(benches, overlay);
criterion_main!(benches);
