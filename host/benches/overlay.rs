// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What sharing a page costs, beside what it costs at least: the floor is the same system
//! calls in plain C (`overlay_floor.c`), built and run here, in turns with the engine.
//!
//! The engine's figure is that of the whole path: checking, asking the store, write
//! protection, comparison, mapping, bookkeeping. Not in it is what happens once in the life of
//! a region, before the first overlay: looking it up in `smaps` and registering it, which the
//! floor has behind it as well. Guest memory is filled from the store, as the floor's is, so that
//! both find it as near to the processor. Every store page is looked at for the first time by the
//! engine's process, as in real use; the floor has its store mapped and populated, but where it
//! is called `floor-unseen`.
//!
//! Time is for all pages. Criterion shows it as it passes; the table in the end has the ratios of
//! pairs measured one after the other, by the time of the processor as well: other programs take
//! that from neither.

#[path = "../tests/common/mod.rs"]
mod common;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Random, Vm, file, fill};
use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use pagefusion_host::engine::{ReportedRun, mappings_now};
use pagefusion_host::store::{Group, PAGE};
use rustix::time::{ClockId, clock_gettime};

/// 32 MiB: with other memory between single pages, a quarter of the mappings the kernel lets a
/// process have.
const PAGES: usize = 8192;
/// As many runs as a guest's batch has.
const BATCH: usize = 256;

/// How runs lie in guest memory, and in which order they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// One after the other by address, each beginning where the last one ends.
    Touching,
    /// By address, with a run's worth of other memory behind each.
    Apart,
    /// In the order of the file, as a guest reports them: anywhere in guest memory.
    Scattered,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    layout: Layout,
    huge: bool,
    /// As QEMU sets guest memory up.
    dont_fork: bool,
    run: usize,
}

impl Case {
    fn stride(&self) -> usize {
        match self.layout {
            Layout::Apart => 2 * self.run,
            Layout::Touching | Layout::Scattered => self.run,
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layout = match self.layout {
            Layout::Touching => "touching",
            Layout::Apart => "apart",
            Layout::Scattered => "scattered",
        };
        let kind = if self.huge { "huge" } else { "small" };
        let fork = if self.dont_fork { "-dontfork" } else { "" };
        write!(f, "{layout}/{kind}-pages{fork}/run-{}", self.run)
    }
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    wall: Duration,
    cpu: Duration,
}

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
fn floor(program: &Path, case: &Case, unseen: bool) -> Sample {
    // Huge pages are split in the end, as the engine does.
    let (huge, split) = if case.huge { ("1", "2") } else { ("0", "0") };
    let mib = ((PAGES * PAGE) >> 20).to_string();
    let mut command = Command::new(program);
    command.args([&mib, &case.run.to_string(), "0", huge, split]);
    match case.layout {
        Layout::Touching => {}
        Layout::Apart => _ = command.arg("apart"),
        Layout::Scattered => _ = command.arg("scattered"),
    }
    if case.dont_fork {
        command.arg("dontfork");
    }
    if unseen {
        command.arg("unseen");
    }
    let output = command.output().expect("the floor runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut micros = text.split(" us/page").filter_map(|part| {
        let number = part.rsplit(' ').next()?;
        number.parse::<f64>().ok()
    });
    let mut next = || {
        let micros = micros.next().expect("the floor prints us/page twice");
        Duration::from_secs_f64(micros * PAGES as f64 / 1e6)
    };
    Sample {
        wall: next(),
        cpu: next(),
    }
}

fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Time for sharing all pages of a guest, in permuted runs.
fn engine(group: &Arc<Mutex<Group>>, case: &Case) -> Sample {
    let Case { run, huge, .. } = *case;
    let stride = case.stride();
    let vm = Vm::new(group, 1, PAGES / run * stride, huge);
    if case.dont_fork {
        vm.ram.dont_fork();
    }
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
    let other = vec![1; PAGE];
    let mut runs = Vec::new();
    for (i, place) in places.iter().enumerate() {
        let offset = (i * run * PAGE) as u64;
        store.read_exact_at(&mut content, offset).expect("a run");
        for (page, bytes) in content.chunks_exact(PAGE).enumerate() {
            vm.ram.write_page(place * stride + page, bytes);
        }
        for page in run..stride {
            vm.ram.write_page(place * stride + page, &other);
        }
        let (page, gfn) = ((i * run) as u64, (place * stride) as u64);
        runs.push(ReportedRun {
            file: file(1),
            page,
            gfn,
            pages: run as u32,
        });
    }
    if case.layout != Layout::Scattered {
        runs.sort_by_key(|run| run.gfn);
    }
    let prepared = vm.sharing.memory().check(vm.ram.base);
    prepared.expect("memory that can be shared");
    let (start, cpu) = (Instant::now(), cpu_time());
    let mut shared = 0;
    for batch in runs.chunks(BATCH) {
        shared += vm
            .sharing
            .share(batch)
            .iter()
            .map(|o| usize::from(o.shared))
            .sum::<usize>();
    }
    vm.sharing.split_all_cut();
    let sample = Sample {
        wall: start.elapsed(),
        cpu: cpu_time() - cpu,
    };
    assert_eq!(
        shared,
        PAGES,
        "{:?}, {} mappings",
        vm.sharing.memory().budget(),
        mappings_now().expect("/proc/self/maps")
    );
    sample
}

/// Samples of one case, taken in turns, and handed out to criterion one kind after the other.
struct Rounds<'a> {
    case: Case,
    group: &'a Arc<Mutex<Group>>,
    program: Option<&'a Path>,
    all: Vec<[Sample; 3]>,
    waiting: [VecDeque<Sample>; 3],
}

const FLOOR: usize = 0;
const UNSEEN: usize = 1;
const ENGINE: usize = 2;

impl Rounds<'_> {
    fn next(&mut self, which: usize) -> Duration {
        if self.waiting[which].is_empty() {
            self.measure();
        }
        self.waiting[which]
            .pop_front()
            .expect("measured just now")
            .wall
    }

    fn measure(&mut self) {
        let mut samples = [None; 3];
        for i in 0..3 {
            let which = (i + self.all.len()) % 3;
            samples[which] = Some(match (which, self.program) {
                (ENGINE, _) | (_, None) => engine(self.group, &self.case),
                (_, Some(program)) => floor(program, &self.case, which == UNSEEN),
            });
        }
        let samples = samples.map(|sample| sample.expect("each was measured"));
        for (waiting, sample) in self.waiting.iter_mut().zip(samples) {
            waiting.push_back(sample);
        }
        self.all.push(samples);
    }

    /// A row of the table: microseconds of the processor for a page, and ratios.
    fn row(&self) -> String {
        let page = |which: usize| {
            let of = |round: &[Sample; 3]| round[which].cpu.as_secs_f64() * 1e6 / PAGES as f64;
            Spread::of(self.all.iter().map(of))
        };
        let ratio = |to: usize, time: fn(&Sample) -> Duration| {
            let of = |round: &[Sample; 3]| {
                time(&round[ENGINE]).as_secs_f64() / time(&round[to]).as_secs_f64()
            };
            Spread::of(self.all.iter().map(of))
        };
        format!(
            "| {} | {:.2} | {:.2} | {} | {} | {} | {} |",
            self.case,
            page(FLOOR).median,
            page(ENGINE).median,
            ratio(FLOOR, |s| s.cpu),
            ratio(FLOOR, |s| s.wall),
            ratio(UNSEEN, |s| s.cpu),
            self.all.len(),
        )
    }
}

struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        Self {
            least: values[0],
            median: values[values.len() / 2],
            most: values[values.len() - 1],
        }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} ({:.2}–{:.2})", self.median, self.least, self.most)
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |layout, huge, dont_fork| {
        for run in [1, 16, 64] {
            cases.push(Case {
                layout,
                huge,
                dont_fork,
                run,
            });
        }
    };
    for layout in [Layout::Touching, Layout::Apart, Layout::Scattered] {
        add(layout, false, false);
        add(layout, true, false);
    }
    add(Layout::Scattered, true, true);
    cases
}

fn overlay(c: &mut Criterion) {
    let group = Arc::new(Mutex::new(Group::anonymous().expect("a store")));
    let bytes = Random(1).bytes(PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let program = build_floor();
    let mut rows = Vec::new();
    for case in cases() {
        let rounds = RefCell::new(Rounds {
            case,
            group: &group,
            program: program.as_deref(),
            all: Vec::new(),
            waiting: Default::default(),
        });
        let mut bench = c.benchmark_group(format!("overlay/{case}"));
        bench.throughput(Throughput::Elements(PAGES as u64));
        bench.sample_size(10).warm_up_time(Duration::from_millis(1));
        bench.measurement_time(Duration::from_millis(1));
        bench.sampling_mode(SamplingMode::Flat);
        for (which, name) in [
            (FLOOR, "floor"),
            (UNSEEN, "floor-unseen"),
            (ENGINE, "engine"),
        ] {
            if which == ENGINE || program.is_some() {
                bench.bench_function(BenchmarkId::from_parameter(name), |b| {
                    b.iter_custom(|n| (0..n).map(|_| rounds.borrow_mut().next(which)).sum());
                });
            }
        }
        bench.finish();
        let rounds = rounds.into_inner();
        if !rounds.all.is_empty() && program.is_some() {
            // What was measured is not lost when this is interrupted.
            println!("{}", rounds.row());
            rows.push(rounds.row());
        }
    }
    println!(
        "| overlay | floor, µs CPU a page | engine | ratio, CPU | ratio, wall | \
         ratio to a floor with an unseen store, CPU | rounds |"
    );
    println!("|---|---|---|---|---|---|---|");
    for row in rows {
        println!("{row}");
    }
}

criterion_group!(benches, overlay);
criterion_main!(benches);
