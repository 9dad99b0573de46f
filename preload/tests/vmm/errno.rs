// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What VMMs find in `errno`: as if the library were not there.

use crate::machine::{Machine, PAGE, PAGES, in_vmm};

/// No call that is made here sets it.
const MARK: i32 = libc::EDOM;

/// What a call has returned and left in `errno`.
fn outcome(call: impl FnOnce() -> i32) -> (i32, i32) {
    // SAFETY: where this thread's own errno is.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { *errno = MARK };
    let result = call();
    // SAFETY: as above.
    (result, unsafe { *errno })
}

/// To be made at the beginning of guest memory.
type Call = fn(usize) -> i32;

/// Makes each call while all of guest memory is shared.
#[track_caller]
fn expect(vmm: &mut Machine, expected: (i32, i32), calls: &[(&str, Call)]) {
    for (name, call) in calls {
        // The call before this one has undone it.
        vmm.load();
        vmm.share_all();
        let at = vmm.ram.base;
        assert_eq!(outcome(|| call(at)), expected, "{name}");
    }
}

const BYTES: usize = PAGES * PAGE;

fn protect(at: usize, protection: i32) -> i32 {
    // SAFETY: guest memory, which nothing refers to but atomics.
    unsafe { libc::mprotect(at as *mut _, BYTES, protection) }
}

fn advise(at: usize, advice: i32) -> i32 {
    // SAFETY: as above.
    unsafe { libc::madvise(at as *mut _, BYTES, advice) }
}

fn lock(at: usize, bytes: usize) -> i32 {
    // SAFETY: as above.
    unsafe { libc::mlock(at as *const _, bytes) }
}

fn unlock(at: usize) -> i32 {
    // SAFETY: as above.
    unsafe { libc::munlock(at as *const _, BYTES) }
}

fn unmap(at: usize) -> i32 {
    // SAFETY: as above.
    unsafe { libc::munmap(at as *mut _, BYTES) }
}

#[test]
fn a_call_that_succeeds_leaves_it_alone() {
    in_vmm("errno::a_call_that_succeeds_leaves_it_alone", |vmm| {
        vmm.load();
        vmm.boot();
        let read_write = |at| protect(at, libc::PROT_READ | libc::PROT_WRITE);
        let calls: [(&str, Call); 5] = [
            ("mlock and munlock", |at| lock(at, BYTES) | unlock(at)),
            ("mprotect", read_write),
            ("an attribute", |at| advise(at, libc::MADV_DONTFORK)),
            ("a discard", |at| advise(at, libc::MADV_DONTNEED)),
            ("munmap", unmap),
        ];
        expect(vmm, (0, MARK), &calls);
    });
}

#[test]
fn a_call_that_fails_leaves_there_why() {
    in_vmm("errno::a_call_that_fails_leaves_there_why", |vmm| {
        vmm.load();
        vmm.boot();
        let invalid: [(&str, Call); 4] = [
            ("mprotect", |at| protect(at, 1 << 20)),
            ("an attribute", |at| advise(at + 8, libc::MADV_DONTFORK)),
            ("a discard", |at| advise(at + 8, libc::MADV_DONTNEED)),
            ("munmap", |at| unmap(at + 8)),
        ];
        expect(vmm, (-1, libc::EINVAL), &invalid);
        // Behind it is a page that cannot be touched.
        let beyond: [(&str, Call); 1] = [("mlock", |at| lock(at, BYTES + PAGE))];
        expect(vmm, (-1, libc::ENOMEM), &beyond);
    });
}
