// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The few operations that touch guest memory: compare, copy out, set attributes, map back. The
//! one that maps over it is [`super::store_view`]'s.
//!
//! Guest memory is never seen through a Rust reference: vCPUs and devices write to it while
//! we look. Every access here is a raw copy or comparison of whole pages.

#![expect(unsafe_code, reason = "guest memory and fixed mappings")]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::ptr;

use rustix::mm::{
    Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags, madvise, mmap_anonymous, mprotect,
    mremap_fixed, munmap,
};

use super::attributes::Attributes;
use super::uffd::Uffd;
use crate::store::PAGE;

/// Lowest `pages` bits.
pub(super) fn mask(pages: usize) -> u64 {
    if pages >= 64 {
        u64::MAX
    } else {
        (1 << pages) - 1
    }
}

/// Which of at most 64 pages at `address` are equal to those at `expected`: bit i is page i.
///
/// # Safety
///
/// As many pages at both must be readable memory of this process.
pub(super) unsafe fn compare(address: usize, expected: usize, pages: usize) -> u64 {
    debug_assert!(pages <= 64);
    // SAFETY: by contract.
    if unsafe { same(address, expected, pages * PAGE) } {
        return mask(pages);
    }
    let equal = |i: usize| {
        // SAFETY: as above, one page of it.
        u64::from(unsafe { same(address + i * PAGE, expected + i * PAGE, PAGE) }) << i
    };
    (0..pages).map(equal).sum()
}

/// Which of at most 64 pages at `address` are all zeros: bit i is page i.
///
/// # Safety
///
/// As many pages must be readable memory of this process.
pub(super) unsafe fn zeros(address: usize, pages: usize) -> u64 {
    static ZEROS: [u8; PAGE] = [0; PAGE];
    let expected = ZEROS.as_ptr() as usize;
    let is_zero = |i: usize| {
        // SAFETY: by contract, one page of it, and a page of our own.
        u64::from(unsafe { same(address + i * PAGE, expected, PAGE) }) << i
    };
    (0..pages).map(is_zero).sum()
}

/// # Safety
///
/// As many bytes at both addresses must be readable memory of this process.
unsafe fn same(address: usize, expected: usize, bytes: usize) -> bool {
    // SAFETY: by contract; memcmp has no requirement on concurrent writers beyond giving some
    // answer, and the answer counts only where the writers are stopped.
    let order = unsafe { libc::memcmp(address as *const c_void, expected as *const c_void, bytes) };
    order == 0
}

/// Copies guest memory at `address` out; what is written meanwhile arrives old, new or mixed.
///
/// # Safety
///
/// The range must be readable memory of this process.
pub(super) unsafe fn copy_out(address: usize, into: &mut [u8]) {
    // SAFETY: by contract, and `into` is our own.
    unsafe { ptr::copy_nonoverlapping(address as *const u8, into.as_mut_ptr(), into.len()) };
}

/// Gives an overlay what the VMM has set on the memory it lies over, as far as it concerns it.
/// Huge pages, KSM and policies would only concern pages the guest has broken out, of which none
/// is ever huge; a policy would besides be one of the store's file, for every VM of the group.
///
/// # Safety
///
/// The range must be an overlay.
pub(super) unsafe fn set_attributes_of_overlay(
    address: usize,
    pages: usize,
    attributes: &Attributes,
) {
    let attributes = Attributes {
        dont_fork: attributes.dont_fork,
        dont_dump: attributes.dont_dump,
        ..Attributes::default()
    };
    // SAFETY: by contract.
    unsafe { set_attributes(address as *mut c_void, pages * PAGE, &attributes) };
}

/// # Safety
///
/// The range must be a mapping that the caller may change.
unsafe fn set_attributes(at: *mut c_void, bytes: usize, attributes: &Attributes) {
    let wanted = [
        (attributes.dont_fork, Advice::LinuxDontFork),
        (attributes.dont_dump, Advice::LinuxDontDump),
        (attributes.huge_page, Advice::LinuxHugepage),
        (attributes.no_huge_page, Advice::LinuxNoHugepage),
        (attributes.mergeable, Advice::LinuxMergeable),
    ];
    for (_, advice) in wanted.into_iter().filter(|(set, _)| *set) {
        // SAFETY: these advices do not change content. One that the kernel does not know
        // (no KSM, no huge pages) was not in force before either.
        let _ = unsafe { madvise(at, bytes, advice) };
    }
    if let Some(policy) = &attributes.policy {
        policy.set(&(at as usize..at as usize + bytes));
    }
}

/// Lets KSM merge what is in `range`, or keeps it from doing so: when this has returned, it is at
/// no page of it.
///
/// # Safety
///
/// The range must be mapped memory of this process.
pub(super) unsafe fn set_mergeable(range: &Range<usize>, mergeable: bool) -> io::Result<()> {
    let advice = if mergeable {
        Advice::LinuxMergeable
    } else {
        Advice::LinuxUnmergeable
    };
    // SAFETY: neither changes content.
    Ok(unsafe { madvise(range.start as *mut c_void, range.len(), advice) }?)
}

/// Whether memory of this process is locked, all or some of it: the kernel discards none then.
pub(super) fn is_locked(range: &Range<usize>) -> bool {
    let (at, bytes) = (range.start as *mut c_void, range.len());
    // SAFETY: keeps content, and is refused for locked memory.
    unsafe { madvise(at, bytes, Advice::LinuxCold) }.is_err()
}

/// Gives this process pages of its own in `range`, with the content that they have.
///
/// # Safety
///
/// The range must be a mapping that may be written to.
pub(super) unsafe fn fill(range: &Range<usize>) -> io::Result<()> {
    let advice = Advice::LinuxPopulateWrite;
    // SAFETY: keeps content.
    Ok(unsafe { madvise(range.start as *mut c_void, range.len(), advice) }?)
}

/// Splits huge pages that reach into `range`, so that what an overlay hides is freed.
///
/// # Safety
///
/// The range must be mapped memory of this process.
pub(super) unsafe fn split_huge_pages(range: &Range<usize>) {
    // SAFETY: MADV_COLD keeps content; it splits a huge page that it covers in part. Where it
    // cannot (locked or device memory) nothing changes.
    let _ = unsafe { madvise(range.start as *mut c_void, range.len(), Advice::LinuxCold) };
}

/// Turns `range` into ordinary anonymous memory with the same content, at once for everybody
/// who looks: whoever touches a page before it is filled waits for it.
///
/// # Safety
///
/// `range` must be a page-aligned overlay that belongs to the engine, of at most
/// `buffer.len()` bytes, and registered with `uffd` for missing pages like what surrounds it.
pub(super) unsafe fn map_back(
    uffd: &Uffd,
    range: &Range<usize>,
    attributes: &Attributes,
    buffer: &mut [u8],
) -> io::Result<()> {
    let buffer = &mut buffer[..range.len()];
    let mut fresh = Fresh::map(range.len(), attributes)?;
    uffd.register_missing(&fresh.range())?;
    uffd.protect(range)?;
    // SAFETY: the overlay is readable, and nobody can write to it now.
    unsafe { copy_out(range.start, buffer) };
    // SAFETY: the caller gives the overlay up. The empty mapping that takes its place keeps
    // its registration (remap events are on), so that its pages cannot be seen before they
    // are filled. Never touched, it also takes the address as its offset, and registered like
    // its neighbours it becomes one mapping with them again.
    let moved = unsafe {
        mremap_fixed(
            fresh.range().start as *mut c_void,
            range.len(),
            range.len(),
            MremapFlags::MAYMOVE,
            range.start as *mut c_void,
        )
    };
    if let Err(e) = moved {
        let _ = uffd.unprotect(range);
        return Err(e.into());
    }
    fresh.bytes = 0;
    // From here on there is no way back: a page that is not filled would hang the guest.
    let mut tries = 0;
    // SAFETY: guest memory, reached by nobody through a reference.
    while let Err(e) = unsafe { uffd.copy(range.start, buffer) } {
        tries += 1;
        if e == rustix::io::Errno::EXIST {
            // A part was filled by an earlier try; go on page by page.
            fill_page_by_page(uffd, range.start, buffer);
            break;
        }
        if matches!(e, rustix::io::Errno::NOENT | rustix::io::Errno::INVAL) {
            // Somebody replaced the mapping under us: what the guest had is gone, and running
            // on with zeros would be worse than not running.
            log::error!(
                "memory at {:#x} vanished while an overlay was undone",
                range.start
            );
            std::process::abort();
        }
        if tries == 1 {
            log::error!("no memory to undo an overlay ({e}); the guest waits for it");
        }
        std::thread::yield_now();
    }
    // Writers that waited for the protection of the old mapping.
    let _ = uffd.wake(range);
    Ok(())
}

/// Puts empty ordinary memory in the place of `range`.
///
/// # Safety
///
/// `range` must be page-aligned guest memory whose content nobody needs any more; no Rust
/// reference may point into it.
pub(super) unsafe fn map_empty(range: &Range<usize>, attributes: &Attributes) -> io::Result<()> {
    let mut flags = MapFlags::PRIVATE | MapFlags::FIXED;
    flags.set(MapFlags::NORESERVE, attributes.no_reserve);
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let at = range.start as *mut c_void;
    // SAFETY: by contract.
    unsafe { mmap_anonymous(at, range.len(), protection, flags) }?;
    // SAFETY: mapped just now.
    unsafe { set_attributes(at, range.len(), attributes) };
    Ok(())
}

/// Anonymous memory that was never touched and is no neighbour of any other.
///
/// What is mapped next to memory of the same kind becomes one mapping with it, and so takes
/// over its history; memory with a history keeps its old offset when it is moved, and could
/// not join its new neighbours. So it is mapped with a protection that nothing else has, and
/// only the middle is made ordinary.
struct Fresh {
    base: usize,
    /// Bytes between the two guard pages.
    middle: usize,
    /// How many of them are still here.
    bytes: usize,
}

impl Fresh {
    fn map(bytes: usize, attributes: &Attributes) -> io::Result<Self> {
        let mut flags = MapFlags::PRIVATE;
        flags.set(MapFlags::NORESERVE, attributes.no_reserve);
        let all = bytes + 2 * PAGE;
        // SAFETY: fresh memory where the kernel likes.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), all, ProtFlags::WRITE, flags) }?;
        let fresh = Self {
            base: base as usize,
            middle: bytes,
            bytes,
        };
        let middle = fresh.range().start as *mut c_void;
        // SAFETY: part of the memory just mapped.
        unsafe { mprotect(middle, bytes, MprotectFlags::READ | MprotectFlags::WRITE) }?;
        // SAFETY: as above.
        unsafe { set_attributes(middle, bytes, attributes) };
        Ok(fresh)
    }

    fn range(&self) -> Range<usize> {
        self.base + PAGE..self.base + PAGE + self.middle
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // The middle only if it is still here: once moved away, its address may be another's.
        if self.bytes > 0 {
            // SAFETY: part of our mapping.
            let _ = unsafe { munmap(self.range().start as *mut c_void, self.bytes) };
        }
        let last = self.base + PAGE + self.middle;
        // SAFETY: the first page of our mapping.
        let _ = unsafe { munmap(self.base as *mut c_void, PAGE) };
        // SAFETY: its last page.
        let _ = unsafe { munmap(last as *mut c_void, PAGE) };
    }
}

fn fill_page_by_page(uffd: &Uffd, address: usize, bytes: &[u8]) {
    for (i, page) in bytes.chunks(PAGE).enumerate() {
        // SAFETY: guest memory, reached by nobody through a reference.
        while let Err(e) = unsafe { uffd.copy(address + i * PAGE, page) } {
            if e == rustix::io::Errno::EXIST {
                break;
            }
            std::thread::yield_now();
        }
    }
}
