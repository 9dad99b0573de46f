// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory in the test's own process, and a store with something in it.

#![allow(dead_code, reason = "each test file uses a part of it")]
#![expect(
    unsafe_code,
    reason = "maps memory and reads and writes it like a vCPU"
)]

pub(crate) mod guest_side;

use std::os::fd::{AsFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use pagefusion_host::engine::{Memory, Region, Sharing, StoreView, Uffd, serve_faults};
use pagefusion_host::protocol::{FileKey, FileSpan, Sighting};
use pagefusion_host::store::{Group, LocalStore, PAGE, PageStore, hash_page};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// A file key that only differs by inode.
pub(crate) fn file(inode: u64) -> FileKey {
    FileKey {
        fs_uuid: [7; 16],
        inode,
        size: 1 << 30,
        mtime_ns: 1,
        generation: 1,
        kind: 0,
    }
}

/// Discards guest memory.
pub(crate) fn discard(address: usize, bytes: usize) {
    // SAFETY: memory of a guest of these tests, not seen through references for longer than a word.
    unsafe { madvise(address as *mut _, bytes, Advice::LinuxDontNeed) }.unwrap();
}

/// Anonymous memory that stands for a guest's.
pub(crate) struct GuestRam {
    pub(crate) base: usize,
    pub(crate) pages: usize,
}

impl GuestRam {
    pub(crate) fn new(pages: usize, huge: bool) -> Self {
        const HUGE: usize = 2 << 20;
        let bytes = pages * PAGE;
        let (read, write) = (ProtFlags::READ, ProtFlags::WRITE);
        // SAFETY: fresh memory.
        let raw = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                bytes + HUGE,
                read | write,
                MapFlags::PRIVATE,
            )
            .unwrap()
        } as usize;
        let base = raw.next_multiple_of(HUGE);
        let advice = if huge {
            Advice::LinuxHugepage
        } else {
            Advice::LinuxNoHugepage
        };
        // SAFETY: the memory just mapped.
        unsafe { madvise(base as *mut _, bytes, advice) }.unwrap();
        // The ends that alignment leaves over go.
        for (start, end) in [(raw, base), (base + bytes, raw + bytes + HUGE)] {
            if start < end {
                // SAFETY: part of the memory just mapped.
                unsafe { munmap(start as *mut _, end - start) }.unwrap();
            }
        }
        Self { base, pages }
    }

    /// Splits a huge page as whoever else may do it.
    pub(crate) fn split_huge_page(&self, page: usize) {
        // SAFETY: part of this memory; its content stays.
        unsafe { madvise(self.at(page) as *mut _, PAGE, Advice::LinuxCold) }.unwrap();
    }

    /// As a balloon does, after the engine was told.
    pub(crate) fn discard(&self, pages: std::ops::Range<usize>) {
        discard(self.at(pages.start), pages.len() * PAGE);
    }

    /// As QEMU sets its guests' memory up.
    pub(crate) fn dont_fork(&self) {
        // SAFETY: the memory that `new` mapped; its content stays.
        unsafe {
            madvise(
                self.base as *mut _,
                self.pages * PAGE,
                Advice::LinuxDontFork,
            )
        }
        .unwrap();
    }

    pub(crate) fn region(&self) -> Region {
        Region {
            gfn: 0,
            pages: self.pages as u64,
            hva: self.base,
        }
    }

    pub(crate) fn at(&self, page: usize) -> usize {
        assert!(page <= self.pages);
        self.base + page * PAGE
    }

    /// One word of guest memory, as a vCPU sees it.
    pub(crate) fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        assert!(page < self.pages && word < PAGE / 8);
        // SAFETY: mapped for the test's whole life and only reached through atomics.
        unsafe { &*((self.at(page) + word * 8) as *const AtomicU64) }
    }

    /// Whether any of it is registered for missing pages, as it is during an undo only.
    pub(crate) fn waits_for_missing_pages(&self) -> bool {
        self.mappings().iter().any(|(_, waits)| *waits)
    }

    /// Pages of each mapping that begins in it, and whether it is registered for missing pages.
    pub(crate) fn mappings(&self) -> Vec<(usize, bool)> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut found = Vec::new();
        let mut pages = None;
        for line in smaps.lines() {
            let bounds = line.split(' ').next().and_then(|it| it.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            if let Some((Some(start), Some(end))) = bounds.map(|(a, b)| (number(a), number(b))) {
                let inside = (self.at(0)..self.at(self.pages)).contains(&start);
                pages = inside.then_some((end - start) / PAGE);
            } else if let (Some(pages), Some(flags)) = (pages, line.strip_prefix("VmFlags:")) {
                found.push((pages, flags.split(' ').any(|flag| flag == "um")));
            }
        }
        found
    }

    /// Puts a page of a file in the place of a page, which a VMM would not do.
    pub(crate) fn replace_by_a_file(&self, page: usize) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE as u64).unwrap();
        let at = self.at(page) as *mut _;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: our memory, which is not seen through references for longer than a word.
        unsafe { mmap(at, PAGE, ProtFlags::READ, flags, &file, 0).unwrap() };
    }

    /// Fresh memory in the place of a page.
    pub(crate) fn replace_by_memory(&self, page: usize) {
        let at = self.at(page) as *mut _;
        let (rights, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED,
        );
        // SAFETY: as above.
        unsafe { mmap_anonymous(at, PAGE, rights, flags).unwrap() };
    }

    pub(crate) fn write_page(&self, page: usize, bytes: &[u8]) {
        for (i, word) in bytes.chunks_exact(8).enumerate() {
            let value = u64::from_ne_bytes(word.try_into().unwrap());
            self.word(page, i).store(value, Ordering::Relaxed);
        }
    }

    pub(crate) fn read_page(&self, page: usize) -> Vec<u8> {
        let word = |i| self.word(page, i).load(Ordering::Relaxed).to_ne_bytes();
        (0..PAGE / 8).flat_map(word).collect()
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: the memory that `new` mapped. Threads that use it end before, and `word`
        // does not outlive this value.
        let _ = unsafe { munmap(self.base as *mut _, self.pages * PAGE) };
    }
}

/// Runs the rest of a test in a process of its own, which it may spoil: the answer is whether
/// this is that process. `test` is its full name.
pub(crate) fn alone(test: &str) -> bool {
    const ALONE: &str = "PAGEFUSION_TEST_ALONE";
    if std::env::var_os(ALONE).is_some_and(|it| it == test) {
        return true;
    }
    // One of another name would be no test, which is no failure.
    let thread = std::thread::current();
    let name = thread.name().filter(|name| *name != "main");
    assert!(name.is_none_or(|name| name == test), "this is not {test}");
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ALONE, test)
        .status()
        .unwrap();
    assert!(status.success(), "{test} in a process of its own: {status}");
    false
}

/// Memory, sharing and the thread that reads events.
pub(crate) struct Vm {
    pub(crate) ram: GuestRam,
    pub(crate) sharing: Arc<Sharing>,
    pub(crate) store: Arc<Mutex<Group>>,
    stop: Option<OwnedFd>,
    faults: Option<JoinHandle<()>>,
}

impl Vm {
    pub(crate) fn new(group: &Arc<Mutex<Group>>, vm: u32, pages: usize, huge: bool) -> Self {
        Self::with_ram(group, vm, GuestRam::new(pages, huge))
    }

    pub(crate) fn with_ram(group: &Arc<Mutex<Group>>, vm: u32, ram: GuestRam) -> Self {
        let uffd = Uffd::open(None).expect("userfaultfd (root, or vm.unprivileged_userfaultfd)");
        let events = uffd.try_clone().unwrap();
        let mut memory = Memory::new(uffd).unwrap();
        // SAFETY: `Vm` owns the memory, has all of it ordinary before it goes, and reaches it
        // through atomics.
        unsafe { memory.insert_region(0, ram.region()) }.unwrap();
        let sharing = Arc::new(Sharing::new(memory));
        let local = LocalStore::new(group.clone(), vm);
        let view = StoreView::new(local.read_only().unwrap()).unwrap();
        let seed = local.hash_seed();
        sharing.connect(Box::new(local), view, seed).unwrap();
        let (stop_read, stop) = rustix::pipe::pipe().unwrap();
        let faults = std::thread::spawn({
            let sharing = sharing.clone();
            move || serve_faults(&events, &sharing, stop_read.as_fd()).unwrap()
        });
        Self {
            ram,
            sharing,
            store: group.clone(),
            stop: Some(stop),
            faults: Some(faults),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.sharing.undo_all();
        self.sharing.disconnect();
        drop(self.stop.take());
        if let Some(faults) = self.faults.take() {
            faults.join().unwrap();
        }
    }
}

/// Puts pages into the store as two VMs that nobody else is would: keep the answer alive as
/// long as the pages shall stay.
pub(crate) fn fill(group: &Arc<Mutex<Group>>, file: FileKey, bytes: &[u8]) -> [LocalStore; 2] {
    let mut stores = [
        LocalStore::new(group.clone(), 1000),
        LocalStore::new(group.clone(), 1001),
    ];
    let seed = stores[0].hash_seed();
    let hashes: Vec<u64> = bytes
        .chunks_exact(PAGE)
        .map(|p| hash_page(seed, p.try_into().unwrap()))
        .collect();
    for (first, some) in (0_u64..).step_by(64).zip(hashes.chunks(64)) {
        for store in &mut stores {
            let sighting = Sighting {
                file,
                page: first,
                hashes: some.to_vec(),
            };
            store.sight(vec![sighting], &mut Vec::new()).unwrap();
        }
        let from = first as usize * PAGE;
        let span = FileSpan {
            file,
            page: first,
            pages: some.len() as u32,
        };
        let mut at = Vec::new();
        stores[1]
            .publish(&[span], &bytes[from..from + some.len() * PAGE], &mut at)
            .unwrap();
        assert!(at.iter().all(Option::is_some), "the store took every page");
    }
    stores
}

/// How much of guest memory is in huge pages that are mapped as a whole.
pub(crate) fn huge_kilobytes(ram: &GuestRam) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    let mut sum = 0;
    for line in smaps.lines() {
        let start = line.split_once('-').map(|(start, _)| start);
        if let Some(Ok(start)) = start.map(|start| usize::from_str_radix(start, 16)) {
            inside = (ram.at(0)..ram.at(ram.pages)).contains(&start);
        } else if let (true, Some(size)) = (inside, line.strip_prefix("AnonHugePages:")) {
            sum += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    sum
}

/// Small deterministic random numbers (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len / 8)
            .flat_map(|_| self.next().to_ne_bytes())
            .collect()
    }
}
