// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What VMMs do to memory, and hosts to VMMs, that an engine could trip over. Each test fails
//! without its guard.

#![expect(unsafe_code, reason = "does to its own memory what VMMs do to theirs")]

mod common;

use common::{GuestRam, Random, Vm, alone, file, fill};
use pagefusion_abi::wire::reason;
use pagefusion_host::engine::{ReportedRun, mappings_now};
use pagefusion_host::store::{Group, LocalStore, PAGE};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PAGES: usize = 128;

/// Waits for what has no event.
fn eventually(done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "not within ten seconds");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A guest whose memory is as the store has it.
struct Equal {
    vm: Vm,
    bytes: Vec<u8>,
    _held: [LocalStore; 2],
}

impl Equal {
    fn new() -> Self {
        Self::with(GuestRam::new(PAGES, false))
    }

    /// Memory that has been prepared somehow.
    fn with(ram: GuestRam) -> Self {
        let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
        let bytes = Random(1).bytes(ram.pages * PAGE);
        let held = fill(&group, file(1), &bytes);
        let vm = Vm::with_ram(&group, 1, ram);
        Self {
            vm,
            bytes,
            _held: held,
        }
    }

    fn write_all(&self) {
        for page in 0..self.vm.ram.pages {
            self.vm
                .ram
                .write_page(page, &self.bytes[page * PAGE..][..PAGE]);
        }
    }

    /// Pages shared of all, and why no more.
    fn share(&self) -> (usize, u8) {
        self.share_some(0, PAGES)
    }

    fn share_some(&self, first: usize, pages: usize) -> (usize, u8) {
        let run = ReportedRun {
            file: file(1),
            page: first as u64,
            gfn: first as u64,
            pages: pages as u32,
        };
        let outcome = self.vm.sharing.share(&[run])[0];
        (outcome.shared.into(), outcome.reason)
    }

    fn check(&self) {
        for page in 0..self.vm.ram.pages {
            let expected = &self.bytes[page * PAGE..][..PAGE];
            assert_eq!(self.vm.ram.read_page(page), expected, "page {page}");
        }
    }

    fn refusal(&self) -> String {
        self.vm.sharing.memory().disabled().unwrap_or_default()
    }

    fn range(&self) -> std::ops::Range<usize> {
        self.vm.ram.at(0)..self.vm.ram.at(self.vm.ram.pages)
    }

    /// `VmFlags` of the mapping of a page.
    fn flags(&self, page: usize) -> Vec<String> {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let address = self.vm.ram.at(page);
        let mut inside = false;
        for line in smaps.lines() {
            let bounds = line.split(' ').next().and_then(|it| it.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            if let Some((Some(start), Some(end))) = bounds.map(|(a, b)| (number(a), number(b))) {
                inside = (start..end).contains(&address);
            } else if let (true, Some(flags)) = (inside, line.strip_prefix("VmFlags:")) {
                return flags.split_ascii_whitespace().map(str::to_owned).collect();
            }
        }
        panic!("page {page} is not mapped");
    }
}

/// Maps `PAGES` of guest memory.
fn map(protection: i32, flags: i32, fd: i32) -> GuestRam {
    let bytes = PAGES * PAGE;
    // SAFETY: fresh memory where the kernel likes.
    let base = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, fd, 0) };
    assert_ne!(
        base,
        libc::MAP_FAILED,
        "{}",
        std::io::Error::last_os_error()
    );
    GuestRam {
        base: base as usize,
        pages: PAGES,
    }
}

fn advise(ram: &GuestRam, pages: std::ops::Range<usize>, advice: i32) {
    let bytes = pages.len() * PAGE;
    // SAFETY: memory of a test, none of it seen through references to plain data.
    let result = unsafe { libc::madvise(ram.at(pages.start) as *mut _, bytes, advice) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn memfd() -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create("guest", flags).unwrap();
    rustix::fs::ftruncate(&fd, (PAGES * PAGE) as u64).unwrap();
    fd
}

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

#[track_caller]
fn is_refused(equal: &Equal, name: &str) {
    let before = maps_of(&equal.range());
    assert_eq!(equal.share(), (0, reason::UNSUITABLE_MEMORY));
    let refusal = equal.refusal();
    assert!(refusal.contains(name), "{refusal}");
    assert_eq!(maps_of(&equal.range()), before);
}

#[test]
fn memory_that_others_map_is_refused_by_name() {
    let fd = memfd();
    let equal = Equal::with(map(READ_WRITE, libc::MAP_SHARED, fd.as_raw_fd()));
    equal.write_all();
    is_refused(&equal, "share=on");
    // Without a file, as memory-backend-ram,share=on.
    let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let equal = Equal::with(map(READ_WRITE, shared, -1));
    equal.write_all();
    is_refused(&equal, "share=on");
}

#[test]
fn memory_from_a_file_is_refused_by_name() {
    let fd = memfd();
    let equal = Equal::with(map(READ_WRITE, libc::MAP_PRIVATE, fd.as_raw_fd()));
    equal.write_all();
    is_refused(&equal, "backed by a file");
}

#[test]
fn hugetlbfs_is_refused_by_name() {
    // A huge page nobody has reserved may not be there: it is mapped and never touched.
    let flags = ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
    let bytes = 2 << 20;
    // SAFETY: fresh memory where the kernel likes.
    let base = unsafe { libc::mmap(ptr::null_mut(), bytes, READ_WRITE, flags, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED);
    let ram = GuestRam {
        base: base as usize,
        pages: bytes / PAGE,
    };
    let equal = Equal::with(ram);
    is_refused(&equal, "hugetlbfs");
}

#[test]
fn locked_memory_is_refused_by_name() {
    let ram = GuestRam::new(PAGES, false);
    // SAFETY: memory of this test.
    let locked = unsafe { libc::mlock(ram.at(0) as *const _, PAGES * PAGE) };
    assert_eq!(locked, 0);
    let equal = Equal::with(ram);
    equal.write_all();
    is_refused(&equal, "mlock");
}

#[test]
fn memory_is_refused_when_overlays_would_be_locked() {
    if !alone("memory_is_refused_when_overlays_would_be_locked") {
        return;
    }
    let equal = Equal::new();
    equal.write_all();
    // SAFETY: locks what this process maps from now on.
    assert_eq!(unsafe { libc::mlockall(libc::MCL_FUTURE) }, 0);
    is_refused(&equal, "mlock");
}

#[test]
fn memory_with_other_protection_is_refused_by_name() {
    for protection in [libc::PROT_READ, READ_WRITE | libc::PROT_EXEC] {
        let equal = Equal::new();
        equal.write_all();
        let (at, bytes) = (equal.vm.ram.at(0) as *mut _, PAGES / 2 * PAGE);
        // SAFETY: memory of this test, which nobody writes to from here on.
        assert_eq!(unsafe { libc::mprotect(at, bytes, protection) }, 0);
        is_refused(&equal, "nothing else");
    }
}

#[test]
fn memory_that_is_wiped_on_fork_is_refused_by_name() {
    let equal = Equal::new();
    equal.write_all();
    advise(&equal.vm.ram, 0..PAGES, libc::MADV_WIPEONFORK);
    is_refused(&equal, "MADV_WIPEONFORK");
}

#[test]
fn memory_with_a_userfaultfd_of_the_vmm_is_refused_by_name() {
    let equal = Equal::new();
    equal.write_all();
    let foreign = pagefusion_host::engine::Uffd::open(None).unwrap();
    foreign.register(&equal.range()).unwrap();
    is_refused(&equal, "userfaultfd");
}

/// KSM puts a page in the place of another without its write protection.
#[test]
fn ksm_is_kept_from_memory_while_it_is_replaced() {
    let equal = Equal::new();
    equal.write_all();
    equal.vm.ram.word(5, 0).fetch_xor(1, Ordering::Relaxed);
    if !Path::new("/sys/kernel/mm/ksm").exists() {
        eprintln!("skipped: this kernel has no KSM");
        return;
    }
    advise(&equal.vm.ram, 0..PAGES, libc::MADV_MERGEABLE);
    let is_mergeable = |page: usize| {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|it| it.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            if let Some((Some(start), Some(end))) = range.map(|(s, e)| (number(s), number(e))) {
                inside = (start..end).contains(&equal.vm.ram.at(page));
            } else if inside && line.starts_with("VmFlags:") {
                return line.split(' ').any(|flag| flag == "mg");
            }
        }
        panic!("page {page} is not mapped");
    };
    let all = |pages: &[usize]| {
        pages
            .iter()
            .map(|&page| is_mergeable(page))
            .collect::<Vec<_>>()
    };
    assert_eq!(all(&[0, 5, 20]), [true, true, true]);
    let run = ReportedRun {
        file: file(1),
        page: 0,
        gfn: 0,
        pages: 16,
    };
    for protects in [false, true] {
        // Asked while the pages are protected.
        let seen = std::cell::RefCell::new(Vec::new());
        equal.vm.sharing.share_while(&[run], &|| {
            *seen.borrow_mut() = all(&[0, 15, 20]);
            protects
        });
        assert_eq!(*seen.borrow(), [false, false, true]);
        // What was not replaced, after all, is as it was.
        assert_eq!(all(&[5, 20]), [true, true]);
        assert_eq!(
            equal.vm.sharing.memory().overlays().pages(),
            if protects { 15 } else { 0 }
        );
    }
    equal.vm.sharing.undo_all().unwrap();
    assert_eq!(all(&[0, 5, 15, 20]), [true; 4]);
}

#[test]
fn nothing_is_shared_under_strict_overcommit() {
    if !alone("nothing_is_shared_under_strict_overcommit") {
        return;
    }
    use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
    const KNOB: &str = "/proc/sys/vm/overcommit_memory";
    // SAFETY: nothing in this process relies on its mounts.
    let unshared = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) };
    if unshared == Err(rustix::io::Errno::PERM) {
        eprintln!("skipped: mounting takes root");
        return;
    }
    unshared.unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    // What the kernel has there is the host's: everybody would feel it.
    let strict = tempfile::NamedTempFile::new().unwrap();
    fs::write(&strict, "2\n").unwrap();
    let flags = MountFlags::BIND;
    let none: Option<&std::ffi::CStr> = None;
    let set = || rustix::mount::mount(strict.path(), KNOB, "", flags, none).unwrap();
    set();

    let equal = Equal::new();
    equal.write_all();
    is_refused(&equal, "vm.overcommit_memory");
    rustix::mount::unmount(KNOB, UnmountFlags::empty()).unwrap();
    // It is looked at once a second.
    eventually(|| equal.share() == (PAGES, reason::NONE));
    assert_eq!(equal.refusal(), "");
    // Set while memory is shared: what is stays, and no more is.
    set();
    eventually(|| {
        equal.vm.sharing.undo_all().unwrap();
        equal.share() == (0, reason::UNSUITABLE_MEMORY)
    });
    is_refused(&equal, "vm.overcommit_memory");
}

#[test]
fn mappings_are_left_for_the_vmm_and_no_call_fails() {
    if !alone("mappings_are_left_for_the_vmm_and_no_call_fails") {
        return;
    }
    let limit: usize = fs::read_to_string("/proc/sys/vm/max_map_count")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    if limit > 1 << 20 {
        eprintln!("skipped: vm.max_map_count is too high to be reached");
        return;
    }
    let equal = Equal::with(GuestRam::new(4096, false));
    equal.write_all();
    // The engine has counted before: the VMM maps all this afterwards.
    let ballast = Ballast::up_to(limit - limit / 8 - 100);
    std::thread::sleep(Duration::from_millis(1100));
    let mut refused = 0;
    // With ordinary memory between them: two mappings each.
    for page in (0..4096).step_by(32) {
        let (shared, why) = equal.share_some(page, 16);
        assert!(shared == 16 || why == reason::MAPPING_LIMIT, "reason {why}");
        refused += usize::from(shared == 0);
    }
    assert!(refused > 64, "{refused} refused");
    let mapped = mappings_now().unwrap();
    assert!(mapped <= limit - limit / 8, "{mapped} of {limit} mappings");
    drop(ballast);
    equal.check();
    equal.vm.sharing.undo_all().unwrap();
    equal.check();
}

/// Mappings that no neighbour joins.
struct Ballast {
    _ram: GuestRam,
}

impl Ballast {
    fn up_to(mappings: usize) -> Self {
        let pages = mappings - mappings_now().unwrap();
        let ram = {
            let bytes = pages * PAGE;
            // SAFETY: fresh memory where the kernel likes.
            let base =
                unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ, ANONYMOUS, -1, 0) };
            assert_ne!(base, libc::MAP_FAILED);
            GuestRam {
                base: base as usize,
                pages,
            }
        };
        for page in (0..pages).step_by(2) {
            // SAFETY: as above.
            let result = unsafe { libc::mprotect(ram.at(page) as *mut _, PAGE, libc::PROT_NONE) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        }
        Self { _ram: ram }
    }
}

#[test]
fn what_the_vmm_has_set_is_set_on_overlays_and_on_what_takes_their_place() {
    let equal = Equal::new();
    equal.write_all();
    // Not the same everywhere: the second half is in dumps.
    advise(&equal.vm.ram, 0..PAGES, libc::MADV_DONTFORK);
    advise(&equal.vm.ram, 0..PAGES / 2, libc::MADV_DONTDUMP);
    let mergeable = has_ksm();
    if mergeable {
        advise(&equal.vm.ram, 0..PAGES, libc::MADV_MERGEABLE);
    }
    let maps_before = maps_of(&equal.range());
    let before = [equal.flags(0), equal.flags(PAGES - 1)];
    let has = |page, flag: &str| equal.flags(page).iter().any(|it| it == flag);

    // What reaches over the border would be wrong on one side.
    let over = equal.share_some(PAGES / 2 - 8, 16);
    assert_eq!(over, (0, reason::UNSUITABLE_MEMORY));
    assert_eq!(equal.share_some(0, PAGES / 2), (PAGES / 2, reason::NONE));
    assert_eq!(
        equal.share_some(PAGES / 2, PAGES / 2),
        (PAGES / 2, reason::NONE)
    );
    assert!(maps_of(&equal.range()) != maps_before);
    for page in [0, PAGES - 1] {
        assert!(has(page, "dc"), "page {page} would be there after a fork");
        assert_eq!(has(page, "dd"), page == 0, "page {page} in a core dump");
        assert!(!has(page, "mg"), "an overlay that KSM looks at");
    }
    equal.vm.sharing.undo_all().unwrap();
    assert_eq!(maps_of(&equal.range()), maps_before);
    let after = [equal.flags(0), equal.flags(PAGES - 1)];
    let set = |flags: &[Vec<String>; 2]| {
        let set = ["dc", "dd", "mg", "nh", "hg", "nr"];
        flags.clone().map(|it| {
            it.into_iter()
                .filter(|flag| set.contains(&flag.as_str()))
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(set(&after), set(&before));
    equal.check();
}

fn has_ksm() -> bool {
    fs::metadata("/sys/kernel/mm/ksm").is_ok()
}

#[test]
fn memory_bound_to_a_node_is_bound_again_after_an_undo_and_the_store_never_is() {
    let equal = Equal::new();
    equal.write_all();
    if !bind(&equal.range()) {
        eprintln!("skipped: no NUMA in this kernel");
        return;
    }
    let maps_before = maps_of(&equal.range());
    let policies_before = policies(&equal.range());
    assert!(policies_before.iter().all(|it| it.starts_with("bind")));
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    // A policy of an overlay is one of the store's file, which is everybody's.
    let shared = policies(&equal.range());
    assert_eq!(shared, ["default"]);
    equal.vm.sharing.undo_all().unwrap();
    assert_eq!(maps_of(&equal.range()), maps_before);
    assert_eq!(policies(&equal.range()), policies_before);
    equal.check();
}

/// Binds memory to node 0; false without NUMA.
fn bind(range: &std::ops::Range<usize>) -> bool {
    const MPOL_BIND: i32 = 2;
    let nodes = [1_u64];
    // SAFETY: says where pages are to come from, and reads 64 bits.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            range.start,
            range.len(),
            MPOL_BIND,
            nodes.as_ptr(),
            64,
            0,
        )
    };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "{error}");
    }
    result == 0
}

/// Memory policies of the mappings in `range`.
fn policies(range: &std::ops::Range<usize>) -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/numa_maps").unwrap();
    let policy = |line: &str| {
        let mut words = line.split(' ');
        let start = usize::from_str_radix(words.next()?, 16).ok()?;
        range
            .contains(&start)
            .then(|| words.next().map(str::to_owned))?
    };
    maps.lines().filter_map(policy).collect()
}

/// Start, end, permissions and file of every mapping that begins in `range`.
fn maps_of(range: &std::ops::Range<usize>) -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let inside = |line: &&str| {
        let start = line.split('-').next().unwrap();
        range.contains(&usize::from_str_radix(start, 16).unwrap())
    };
    maps.lines()
        .filter(inside)
        .map(|line| {
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            [words[0], words[4], words[1]].join(" ")
        })
        .collect()
}

#[test]
fn a_child_of_the_vmm_has_its_own_copy_or_none() {
    if !alone("a_child_of_the_vmm_has_its_own_copy_or_none") {
        return;
    }
    for dont_fork in [false, true] {
        let equal = Equal::new();
        equal.write_all();
        if dont_fork {
            advise(&equal.vm.ram, 0..PAGES, libc::MADV_DONTFORK);
        }
        assert_eq!(equal.share(), (PAGES, reason::NONE));
        let (read, write) = rustix::pipe::pipe().unwrap();
        // SAFETY: the child makes system calls only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let mut byte = 0_u8;
            // The parent has written when it says so.
            // SAFETY: a byte of this stack.
            unsafe { libc::read(read.as_raw_fd(), (&raw mut byte).cast(), 1) };
            // A write of the child's own must not reach the parent or the store.
            equal.vm.ram.word(1, 0).store(0x77, Ordering::Relaxed);
            let sees = equal.vm.ram.word(0, 0).load(Ordering::Relaxed);
            let original = u64::from_ne_bytes(equal.bytes[..8].try_into().unwrap());
            // SAFETY: ends this process and nothing else.
            unsafe { libc::_exit(i32::from(sees != original)) };
        }
        equal.vm.ram.word(0, 0).store(0x55, Ordering::Relaxed);
        rustix::io::write(&write, b"x").unwrap();
        let mut status = 0;
        // SAFETY: a status of this stack.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        if dont_fork {
            assert!(libc::WIFSIGNALED(status), "the child has the memory");
            assert_eq!(libc::WTERMSIG(status), libc::SIGSEGV);
        } else {
            assert!(libc::WIFEXITED(status), "status {status:#x}");
            assert_eq!(
                libc::WEXITSTATUS(status),
                0,
                "the child saw what came later"
            );
        }
        assert_eq!(equal.vm.ram.word(0, 0).load(Ordering::Relaxed), 0x55);
        assert_eq!(equal.vm.ram.read_page(1), &equal.bytes[PAGE..2 * PAGE]);
    }
}

#[test]
fn an_undo_that_fails_says_so_and_changes_nothing() {
    if !alone("an_undo_that_fails_says_so_and_changes_nothing") {
        return;
    }
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    let sharing = &equal.vm.sharing;
    let limit = Limit::no_new_memory();
    assert!(sharing.memory().restore(&equal.range()).is_err());
    assert!(sharing.memory().begin_change(&equal.range()).is_err());
    assert!(sharing.memory().take_userfaultfd(&equal.range()).is_err());
    assert!(sharing.memory().disable("a device").is_err());
    assert!(sharing.undo_all().is_err());
    drop(limit);
    assert_eq!(sharing.memory().overlays().pages(), PAGES as u64);
    equal.check();
    sharing.memory().restore(&equal.range()).unwrap();
    assert_eq!(sharing.memory().overlays().pages(), 0);
    equal.check();
}

/// Until it is dropped, this process gets no more memory than a little.
struct Limit(libc::rlimit);

impl Limit {
    fn no_new_memory() -> Self {
        let mut old = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: reads the limit into this stack.
        assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut old) }, 0);
        // Enough for what is small, and not for a window.
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        let none = libc::rlimit {
            rlim_cur: (pages + 48) * PAGE as u64,
            ..old
        };
        // SAFETY: makes large mappings fail, which everything here can stand.
        let set = unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const none) };
        assert_eq!(set, 0);
        Self(old)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // SAFETY: as it was.
        unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const self.0) };
    }
}

#[test]
fn memory_that_is_being_changed_is_left_alone_and_looked_at_anew() {
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    let maps_shared = maps_of(&equal.range());
    let some = equal.vm.ram.at(3)..equal.vm.ram.at(5);
    let memory = || equal.vm.sharing.memory();
    memory().begin_change(&some).unwrap();
    memory().begin_change(&equal.range()).unwrap();
    assert_eq!(memory().overlays().pages(), 0);
    assert_ne!(maps_of(&equal.range()), maps_shared);
    assert_eq!(equal.share(), (0, reason::UNSUITABLE_MEMORY));
    // SAFETY: memory of this test.
    unsafe { libc::mlock(equal.vm.ram.at(0) as *const _, PAGE) };
    memory().end_change(&some);
    assert_eq!(equal.share(), (0, reason::UNSUITABLE_MEMORY));
    memory().end_change(&equal.range());
    is_refused(&equal, "mlock");
    // SAFETY: as above.
    unsafe { libc::munlock(equal.vm.ram.at(0) as *const _, PAGE) };
    memory().begin_change(&some).unwrap();
    memory().end_change(&some);
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    equal.check();
}

#[test]
fn a_userfaultfd_of_the_vmm_gets_the_memory_and_gives_it_back() {
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    let (memory, range) = (|| equal.vm.sharing.memory(), equal.range());
    memory().take_userfaultfd(&range).unwrap();
    is_refused(&equal, "userfaultfd");
    let foreign = pagefusion_host::engine::Uffd::open(None).unwrap();
    // All of it is one mapping that nobody has registered, or this would fail.
    foreign.register_missing(&range).unwrap();
    is_refused(&equal, "userfaultfd");
    foreign.unregister(&range).unwrap();
    let half = range.start..range.start + PAGES / 2 * PAGE;
    memory().give_userfaultfd_back(&half);
    assert_eq!(equal.share(), (0, reason::UNSUITABLE_MEMORY));
    memory().give_userfaultfd_back(&range);
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    equal.check();
}

#[test]
fn memory_that_is_unmapped_is_forgotten() {
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    let range = equal.range();
    let tail = equal.vm.ram.at(PAGES - 8)..range.end;
    {
        // A part of it: what is left becomes ordinary memory.
        let mut memory = equal.vm.sharing.memory();
        memory.before_unmap(&tail).unwrap();
        assert_eq!(memory.overlays().pages(), 0);
        remap(&tail);
        memory.unmapped(&tail);
    }
    // Memory that is something else now, which an undo would have made private.
    is_refused(&equal, "share=on");
    equal.vm.sharing.undo_all().unwrap();
    assert!(maps_of(&range)[1].ends_with("rw-s"));
    {
        let mut memory = equal.vm.sharing.memory();
        memory.before_unmap(&range).unwrap();
        remap(&range);
        memory.unmapped(&range);
        assert!(!memory.concerns(&range));
        assert_eq!(memory.bytes(), 0);
    }
    assert_eq!(equal.share(), (0, reason::OUTSIDE_MEMORY));
    assert!(maps_of(&range)[0].ends_with("rw-s"));
}

/// Maps memory of another kind over `range`.
fn remap(range: &std::ops::Range<usize>) {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: memory of a test that nobody looks at any more.
    let base = unsafe { libc::mmap(range.start as *mut _, range.len(), READ_WRITE, flags, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED);
}

#[test]
fn memory_that_has_overlays_when_it_is_unmapped_leaves_none_behind() {
    let equal = Equal::new();
    equal.write_all();
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    let range = equal.range();
    let mut memory = equal.vm.sharing.memory();
    memory.before_unmap(&range).unwrap();
    // Nothing is copied back only to be thrown away.
    assert_eq!(memory.overlays().pages(), PAGES as u64);
    remap(&range);
    memory.unmapped(&range);
    assert_eq!(memory.overlays().pages(), 0);
    memory.restore(&(0..usize::MAX)).unwrap();
    drop(memory);
    assert!(maps_of(&range)[0].ends_with("rw-s"));
}
