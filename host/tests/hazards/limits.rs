// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A process that may map no more.

#![expect(unsafe_code, reason = "does to its own memory what VMMs do to theirs")]

use crate::common::{GuestRam, alone};
use crate::support::{ANONYMOUS, Equal, PAGES};
use pagefusion_abi::wire::reason;
use pagefusion_host::engine::mappings_now;
use pagefusion_host::store::PAGE;
use std::fs;
use std::ptr;
use std::sync::atomic::Ordering;
use std::time::Duration;

#[test]
fn mappings_are_left_for_the_vmm_and_no_call_fails() {
    if !alone("limits::mappings_are_left_for_the_vmm_and_no_call_fails") {
        return;
    }
    let limit = mappings_limit();
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

#[test]
fn an_undo_between_written_pages_takes_no_mappings_that_are_the_vmms() {
    if !alone("limits::an_undo_between_written_pages_takes_no_mappings_that_are_the_vmms") {
        return;
    }
    let limit = mappings_limit();
    if limit > 1 << 20 {
        eprintln!("skipped: vm.max_map_count is too high to be reached");
        return;
    }
    const ALL: usize = 4096;
    let equal = Equal::with(GuestRam::new(ALL, false));
    equal.write_all();
    for page in (0..ALL).step_by(64) {
        assert_eq!(equal.share_some(page, 64), (64, reason::NONE));
    }
    // Each a page of its own, with the same content.
    for page in (0..ALL).step_by(2) {
        let word = equal.vm.ram.word(page, 0);
        word.store(word.load(Ordering::Relaxed), Ordering::Relaxed);
    }
    let ballast = Ballast::up_to(limit - limit / 8 - 100);
    std::thread::sleep(Duration::from_millis(1100));
    equal.vm.sharing.undo_all().unwrap();
    let mapped = mappings_now().unwrap();
    // A few of the process's own; without a guard it would be thousands.
    let most = limit - limit / 8 + 64;
    assert!(mapped <= most, "{mapped} of {limit} mappings");
    assert_eq!(equal.vm.sharing.memory().overlays().pages(), 0);
    drop(ballast);
    equal.check();
}

fn mappings_limit() -> usize {
    let limit = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    limit.trim().parse().unwrap()
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
fn an_undo_that_fails_says_so_and_changes_nothing() {
    if !alone("limits::an_undo_that_fails_says_so_and_changes_nothing") {
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
