// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The functions that stand before libc's where memory is concerned.
//!
//! glibc's own calls (`malloc`, stacks of threads) do not come by here, and neither do the
//! engine's, which are system calls.

#![expect(unsafe_code, reason = "symbols of libc, called by C")]

use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::ops::Range;
use std::sync::OnceLock;

use crate::interpose::{Outcome, find_next, next, refuse};
use crate::runtime::{self, Certainty};

const PAGE: usize = 4096;

/// Declares a function that finds the next definition of a symbol after ours.
macro_rules! next {
    ($function:ident, $symbol:literal, $type:ty) => {
        fn $function() -> $type {
            static NEXT: OnceLock<$type> = OnceLock::new();
            // SAFETY: the type is that of the C library's headers.
            *NEXT.get_or_init(|| unsafe { next($symbol) })
        }
    };
}

type Advise = unsafe extern "C" fn(*mut c_void, usize, c_int) -> c_int;
type Lock = unsafe extern "C" fn(*const c_void, usize) -> c_int;
type Lock2 = unsafe extern "C" fn(*const c_void, usize, c_uint) -> c_int;
type LockAll = unsafe extern "C" fn(c_int) -> c_int;
type UnlockAll = unsafe extern "C" fn() -> c_int;
type Unmap = unsafe extern "C" fn(*mut c_void, usize) -> c_int;
type Map = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, c_int, i64) -> *mut c_void;
type Remap = unsafe extern "C" fn(*mut c_void, usize, usize, c_int, *mut c_void) -> *mut c_void;
type Bind =
    unsafe extern "C" fn(*mut c_void, c_ulong, c_int, *const c_ulong, c_ulong, c_uint) -> i64;

next!(next_madvise, c"madvise", Advise);
next!(next_mprotect, c"mprotect", Advise);
next!(next_mlock, c"mlock", Lock);
next!(next_munlock, c"munlock", Lock);
next!(next_mlock2, c"mlock2", Lock2);
next!(next_mlockall, c"mlockall", LockAll);
next!(next_munlockall, c"munlockall", UnlockAll);
next!(next_munmap, c"munmap", Unmap);
next!(next_mmap, c"mmap", Map);
next!(next_mremap, c"mremap", Remap);

/// What a call on so many bytes reaches, as the kernel counts: whole pages.
fn whole_pages(address: *const c_void, length: usize) -> Range<usize> {
    let start = address as usize & !(PAGE - 1);
    let end = (address as usize).saturating_add(length);
    start..end.checked_next_multiple_of(PAGE).unwrap_or(usize::MAX)
}

/// A call that changes what memory is made of.
fn change(range: Range<usize>, call: impl FnOnce() -> c_int) -> c_int {
    if !runtime::is_active() {
        return call();
    }
    runtime::change(&range, || Outcome::of(call)).map_or_else(|error| refuse(&error), Outcome::give)
}

/// What an advice does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Advice {
    /// Memory is given back: on an overlay it would turn into the canonical bytes instead of
    /// zeros.
    Discards(Certainty),
    /// An attribute changes, which overlays or what takes their place must have.
    Changes,
    /// None of ours.
    Other,
}

impl From<c_int> for Advice {
    fn from(advice: c_int) -> Self {
        const DONTNEED_LOCKED: c_int = 24;
        const GUARD_INSTALL: c_int = 102;
        match advice {
            libc::MADV_DONTNEED | libc::MADV_FREE => Self::Discards(Certainty::Unlocked),
            DONTNEED_LOCKED => Self::Discards(Certainty::Always),
            // The one is for shared mappings, the other needs Linux 6.13.
            libc::MADV_REMOVE | GUARD_INSTALL => Self::Discards(Certainty::Unknown),
            libc::MADV_DONTFORK
            | libc::MADV_DOFORK
            | libc::MADV_DONTDUMP
            | libc::MADV_DODUMP
            | libc::MADV_HUGEPAGE
            | libc::MADV_NOHUGEPAGE
            | libc::MADV_MERGEABLE
            | libc::MADV_UNMERGEABLE
            | libc::MADV_WIPEONFORK
            | libc::MADV_KEEPONFORK => Self::Changes,
            _ => Self::Other,
        }
    }
}

/// Sees memory that the VMM gives back for a balloon, and attributes that it sets. (glibc's
/// `posix_madvise` never discards.)
///
/// # Safety
///
/// As `madvise(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn madvise(
    address: *mut c_void,
    length: usize,
    advice: c_int,
) -> c_int {
    // SAFETY: passed on as it came.
    let pass_on = || unsafe { next_madvise()(address, length, advice) };
    match Advice::from(advice) {
        Advice::Discards(certainty) if runtime::is_active() => {
            let range = whole_pages(address, length);
            // The kernel refuses any other range.
            let is_valid = address as usize % PAGE == 0 && range.end != usize::MAX;
            let certainty = if is_valid {
                certainty
            } else {
                Certainty::Unknown
            };
            runtime::discard(&range, certainty, pass_on, |result| *result == 0)
                .unwrap_or_else(|error| refuse(&error))
        }
        Advice::Changes => change(whole_pages(address, length), pass_on),
        _ => pass_on(),
    }
}

/// # Safety
///
/// As `mprotect(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mprotect(
    address: *mut c_void,
    length: usize,
    protection: c_int,
) -> c_int {
    // SAFETY: passed on as it came.
    let pass_on = || unsafe { next_mprotect()(address, length, protection) };
    change(whole_pages(address, length), pass_on)
}

/// # Safety
///
/// As `mlock(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mlock(address: *const c_void, length: usize) -> c_int {
    // SAFETY: passed on as it came.
    let pass_on = || unsafe { next_mlock()(address, length) };
    change(whole_pages(address, length), pass_on)
}

/// # Safety
///
/// As `mlock2(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mlock2(
    address: *const c_void,
    length: usize,
    flags: c_uint,
) -> c_int {
    // SAFETY: passed on as it came.
    let pass_on = || unsafe { next_mlock2()(address, length, flags) };
    change(whole_pages(address, length), pass_on)
}

/// # Safety
///
/// As `munlock(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn munlock(address: *const c_void, length: usize) -> c_int {
    // SAFETY: passed on as it came.
    let pass_on = || unsafe { next_munlock()(address, length) };
    change(whole_pages(address, length), pass_on)
}

/// # Safety
///
/// As `mlockall(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mlockall(flags: c_int) -> c_int {
    // SAFETY: passed on as it came.
    change(0..usize::MAX, || unsafe { next_mlockall()(flags) })
}

/// # Safety
///
/// As `munlockall(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn munlockall() -> c_int {
    // SAFETY: passed on as it came.
    change(0..usize::MAX, || unsafe { next_munlockall()() })
}

/// Comes from libnuma, which need not be there.
///
/// # Safety
///
/// As `mbind(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mbind(
    address: *mut c_void,
    length: c_ulong,
    mode: c_int,
    nodes: *const c_ulong,
    most_nodes: c_ulong,
    flags: c_uint,
) -> i64 {
    static NEXT: OnceLock<Option<Bind>> = OnceLock::new();
    // SAFETY: the type is that of libnuma's header.
    let next = *NEXT.get_or_init(|| unsafe { find_next(c"mbind") });
    let range = whole_pages(address, length as usize);
    let pass_on = || match next {
        // SAFETY: passed on as it came.
        Some(next) => unsafe { next(address, length, mode, nodes, most_nodes, flags) as c_int },
        // SAFETY: the same as a system call.
        None => unsafe {
            let number = libc::SYS_mbind;
            libc::syscall(number, address, length, mode, nodes, most_nodes, flags) as c_int
        },
    };
    change(range, pass_on).into()
}

/// # Safety
///
/// As `munmap(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn munmap(address: *mut c_void, length: usize) -> c_int {
    // SAFETY: passed on as it came.
    let pass_on = || unsafe { next_munmap()(address, length) };
    if !runtime::is_active() {
        return pass_on();
    }
    let range = whole_pages(address, length);
    runtime::unmap(&[range], pass_on, |result| *result == 0).unwrap_or_else(|error| refuse(&error))
}

/// # Safety
///
/// As `mmap(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: passed on as it came.
    let pass_on = || unsafe { next_mmap()(address, length, protection, flags, fd, offset) };
    if flags & libc::MAP_FIXED == 0 || !runtime::is_active() {
        return pass_on();
    }
    let range = whole_pages(address, length);
    runtime::unmap(&[range], pass_on, |result| *result != libc::MAP_FAILED).unwrap_or_else(
        |error| {
            refuse(&error);
            libc::MAP_FAILED
        },
    )
}

/// The same under the name for large files.
///
/// # Safety
///
/// As `mmap(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: by contract.
    unsafe { mmap(address, length, protection, flags, fd, offset) }
}

/// # Safety
///
/// As `mremap(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_length: usize,
    new_length: usize,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    // SAFETY: passed on as it came; the kernel looks at `new` when `flags` say so.
    let pass_on = || unsafe { next_mremap()(old, old_length, new_length, flags, new) };
    if !runtime::is_active() {
        return pass_on();
    }
    let moved = whole_pages(old, old_length);
    let mut ranges = vec![moved.clone()];
    if flags & libc::MREMAP_FIXED != 0 {
        ranges.push(whole_pages(new, new_length));
    }
    // What grew where it was is looked at anew as well.
    let succeeded = |result: &*mut c_void| *result != libc::MAP_FAILED;
    runtime::unmap_and_move(&ranges, &moved, pass_on, succeeded).unwrap_or_else(|error| {
        refuse(&error);
        libc::MAP_FAILED
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_reach_whole_pages() {
        let pages = |address: usize, length| whole_pages(address as *const c_void, length);
        assert_eq!(pages(0x1000, 1), 0x1000..0x2000);
        assert_eq!(pages(0x1000, 0x1000), 0x1000..0x2000);
        assert_eq!(pages(0x1800, 0x1000), 0x1000..0x3000);
        assert_eq!(pages(0x1000, 0), 0x1000..0x1000);
        assert_eq!(pages(0x1000, usize::MAX), 0x1000..usize::MAX);
    }

    #[test]
    fn what_brings_back_other_bytes_is_a_discard() {
        // MADV_DONTNEED, FREE, DONTNEED_LOCKED; REMOVE, GUARD_INSTALL.
        for (advice, certainty) in [
            (4, Certainty::Unlocked),
            (8, Certainty::Unlocked),
            (24, Certainty::Always),
            (9, Certainty::Unknown),
            (102, Certainty::Unknown),
        ] {
            assert_eq!(
                Advice::from(advice),
                Advice::Discards(certainty),
                "{advice}"
            );
        }
        // MADV_WILLNEED, COLD, PAGEOUT, POPULATE_READ, POPULATE_WRITE.
        for advice in [3, 20, 21, 22, 23] {
            assert_eq!(Advice::from(advice), Advice::Other, "{advice}");
        }
    }
}
