// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a page that only one VM has takes of the daemon's memory, as the allocator counts it,
//! files and all. The only test of this program: others would allocate meanwhile.

#![expect(unsafe_code, reason = "counts allocations")]

use pagefusion_host::protocol::{FileKey, Sighting, Verdict};
use pagefusion_host::store::{Group, PAGE};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What one page may take.
const MOST: f64 = 24.0;

/// Live allocations, with what the allocator adds to each. Asking the allocator itself
/// (`mallinfo2`) would count what it keeps in its caches too, which is not the same in each run.
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

struct Counted;

/// What an allocation takes: what can be used of it, and the size in front of it.
///
/// # Safety
///
/// The allocation must be one of [`System`] that lives.
unsafe fn taken(memory: *mut u8) -> usize {
    // SAFETY: `System` is malloc, and the allocation lives by the contract.
    unsafe { libc::malloc_usable_size(memory.cast()) + size_of::<usize>() }
}

// SAFETY: hands on to `System`, and counts.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: our caller's contract is that of `System`.
        let memory = unsafe { System.alloc(layout) };
        if !memory.is_null() {
            // SAFETY: has just been allocated.
            ALLOCATED.fetch_add(unsafe { taken(memory) }, Ordering::Relaxed);
        }
        memory
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: lives until the next line, by our caller's contract.
        ALLOCATED.fetch_sub(unsafe { taken(memory) }, Ordering::Relaxed);
        // SAFETY: our caller's contract is that of `System`.
        unsafe { System.dealloc(memory, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

fn allocated() -> usize {
    ALLOCATED.load(Ordering::Relaxed)
}

/// Small deterministic random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.next() % (most - least + 1)
    }
}

/// How the pages that a guest reports lie in their files.
struct Shape {
    name: &'static str,
    files: u64,
    /// Pages of a file, drawn so that small files are the more frequent ones.
    file_pages: (u64, u64),
    /// Lengths of runs, and of what lies between them.
    runs: (u64, u64),
    gaps: (u64, u64),
}

const SHAPES: [Shape; 6] = [
    Shape {
        name: "whole files of 1 to 64 pages",
        files: 1000,
        file_pages: (1, 64),
        runs: (64, 64),
        gaps: (1, 1),
    },
    Shape {
        name: "few large files, whole",
        files: 6,
        file_pages: (2000, 6000),
        runs: (6000, 6000),
        gaps: (1, 1),
    },
    Shape {
        name: "runs of 1 to 16 pages, a half of each file",
        files: 100,
        file_pages: (64, 1024),
        runs: (1, 16),
        gaps: (1, 16),
    },
    Shape {
        name: "runs of 1 to 16 pages, a tenth of each file",
        files: 50,
        file_pages: (512, 8192),
        runs: (1, 16),
        gaps: (1, 150),
    },
    Shape {
        name: "single pages all over large files",
        files: 10,
        file_pages: (20_000, 60_000),
        runs: (1, 1),
        gaps: (8, 40),
    },
    Shape {
        name: "runs of 1 to 16 pages, parts of 4 to 128 pages",
        files: 1000,
        file_pages: (4, 128),
        runs: (1, 16),
        gaps: (0, 8),
    },
];

/// Reports all files of a shape, as a guest does, and returns how many pages that were.
fn report(group: &mut Group, vm: u32, shape: &Shape, random: &mut Random) -> u64 {
    let mut reported = 0;
    for inode in 0..shape.files {
        let (least, most) = shape.file_pages;
        // Twice, for more small files than large ones.
        let upper = random.between(least, most);
        let pages = random.between(least, upper);
        let file = FileKey {
            fs_uuid: [9; 16],
            inode: inode << 8 | u64::from(vm),
            size: pages * PAGE as u64,
            mtime_ns: random.next(),
            generation: 3,
            kind: 0,
        };
        let mut page = 0;
        while page < pages {
            let run = random.between(shape.runs.0, shape.runs.1).min(pages - page);
            let hashes = (0..run).map(|_| random.next()).collect();
            let mut verdicts = Vec::new();
            let sighting = Sighting { file, page, hashes };
            group.sight(vm, &[sighting], &mut verdicts).unwrap();
            assert!(verdicts.iter().all(|it| *it == Verdict::Remembered));
            reported += run;
            page += run + random.between(shape.gaps.0, shape.gaps.1);
        }
    }
    reported
}

#[test]
fn a_page_that_only_one_vm_has_takes_at_most_24_bytes() {
    let mut failed = Vec::new();
    println!("bytes a page, allocated / as the daemon says");
    for shape in &SHAPES {
        let mut random = Random(42);
        let mut group = Group::anonymous().unwrap();
        (1..=4).for_each(|vm| group.add_vm(vm));
        let before = allocated();
        let pages: u64 = (1..=4)
            .map(|vm| report(&mut group, vm, shape, &mut random))
            .sum();
        let each = (allocated() - before) as f64 / pages as f64;
        let statistics = group.statistics();
        assert_eq!(statistics.remembered, pages);
        let said = statistics.index_bytes as f64 / pages as f64;
        println!(
            "{each:5.1} / {said:5.1}  {} ({pages} pages of {} files)",
            shape.name, statistics.files
        );
        if each > MOST || (said - each).abs() > each / 10.0 {
            failed.push(shape.name);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}
