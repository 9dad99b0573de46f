// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory that cannot be replaced page by page is refused by name.

#![expect(unsafe_code, reason = "does to its own memory what VMMs do to theirs")]

use crate::common::{GuestRam, alone};
use crate::support::{ANONYMOUS, Equal, PAGES, READ_WRITE, advise, is_refused};
use pagefusion_abi::wire::reason;
use pagefusion_host::store::PAGE;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::time::{Duration, Instant};

/// Waits for what has no event.
fn eventually(done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "not within ten seconds");
        std::thread::sleep(Duration::from_millis(20));
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

fn memfd() -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create("guest", flags).unwrap();
    rustix::fs::ftruncate(&fd, (PAGES * PAGE) as u64).unwrap();
    fd
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
    if !alone("refusals::memory_is_refused_when_overlays_would_be_locked") {
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

#[test]
fn nothing_is_shared_under_strict_overcommit() {
    if !alone("refusals::nothing_is_shared_under_strict_overcommit") {
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
