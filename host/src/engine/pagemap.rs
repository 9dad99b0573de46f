// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the page tables know of this process's own memory.

#![expect(unsafe_code, reason = "an ioctl that rustix does not have")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use super::mapped::mask;
use super::memory::WINDOW_PAGES;
use crate::store::PAGE;

/// Bits of an entry, `Documentation/admin-guide/mm/pagemap.rst`.
const FILE: u64 = 1 << 61;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;

const ENTRY: usize = 8;
/// Entries read at once: those of a huge page.
const READ: usize = 512;
/// Pages scanned at once. Longer scans save little, and look at much that nobody asked for.
const SCANNED: usize = 8 * READ;
/// Addresses end here, or higher where programs ask for more.
const LAST_PAGE: usize = (1 << 47) / PAGE - 1;

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

/// `PAGEMAP_SCAN`, Linux 6.7.
const SCAN: Opcode = opcode::read_write::<Scan>(b'f', 16);
/// Categories of pages: of a file or of shared memory; there; swapped out; mapped as a whole huge page.
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_HUGE: u64 = 1 << 6;

// The kernel's ABI, derived again: a wrong size would be a wrong ioctl number.
const _: () = {
    assert!(size_of::<Scan>() == 96);
    assert!(size_of::<Found>() == 24);
    assert!(SCAN == 0xc060_6610);
};

/// A scan, and the array that it fills; the answer is how much of that was filled, and the address up to which it
/// came.
struct Scanning<'a> {
    scan: Scan,
    _found: &'a mut [Found],
}

impl<'a> Scanning<'a> {
    /// For pages that are in all of `categories`.
    fn all_of(range: &Range<usize>, categories: u64, found: &'a mut [Found]) -> Self {
        Self::new(
            range,
            Scan {
                category_mask: categories,
                return_mask: categories,
                ..Scan::default()
            },
            found,
        )
    }

    /// For memory that is this process's alone.
    fn own(range: &Range<usize>, found: &'a mut [Found]) -> Self {
        Self::new(
            range,
            Scan {
                category_inverted: IS_FILE,
                category_mask: IS_FILE,
                category_anyof_mask: IS_PRESENT | IS_SWAPPED,
                return_mask: IS_SWAPPED,
                ..Scan::default()
            },
            found,
        )
    }

    fn new(range: &Range<usize>, what: Scan, found: &'a mut [Found]) -> Self {
        let scan = Scan {
            size: size_of::<Scan>() as u64,
            start: range.start as u64,
            end: range.end as u64,
            vec: found.as_mut_ptr() as u64,
            vec_len: found.len() as u64,
            ..what
        };
        Self {
            scan,
            _found: found,
        }
    }
}

// SAFETY: the opcode belongs to the structure, whose `vec` is the array borrowed here.
unsafe impl Ioctl for Scanning<'_> {
    type Output = (usize, u64);
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        SCAN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::from_mut(&mut self.scan).cast()
    }

    unsafe fn output_from_ptr(
        found: IoctlOutput,
        scan: *mut c_void,
    ) -> rustix::io::Result<(usize, u64)> {
        // SAFETY: the pointer is that of `as_ptr`.
        let end = unsafe { (*scan.cast::<Scan>()).walk_end };
        Ok((usize::try_from(found).unwrap_or_default(), end))
    }
}

/// Pages that are this process's alone.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Own {
    /// Page numbers.
    pages: Range<usize>,
    swapped: bool,
}

/// `/proc/self/pagemap`.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
    /// Page numbers of what was looked at last.
    seen: Range<usize>,
    /// What of that is this process's alone, in order.
    own: Vec<Own>,
    /// Whether the kernel can scan; known when it was asked once.
    scans: bool,
}

impl Pagemap {
    pub(super) fn open() -> io::Result<Self> {
        let file = File::open("/proc/self/pagemap")?;
        Ok(Self {
            file,
            seen: 0..0,
            own: Vec::new(),
            scans: true,
        })
    }

    /// Which of at most 64 pages at `address`, all of them on overlays, lie on store pages
    /// still: bit i is page i. As of this moment.
    pub(super) fn intact_now(&self, address: usize, pages: usize) -> io::Result<u64> {
        self.now(address, pages, |entry| !is_own(entry))
    }

    /// Which of at most 64 pages at `address` are memory of this process alone and in its page
    /// table now, as everything is that a device may write to. For pages that are protected: one
    /// that is not there, protected, looks swapped out.
    pub(super) fn present_own_now(&self, address: usize, pages: usize) -> io::Result<u64> {
        self.now(address, pages, |entry| entry & (FILE | PRESENT) == PRESENT)
    }

    fn now(&self, address: usize, pages: usize, wanted: fn(u64) -> bool) -> io::Result<u64> {
        let mut entries = [0; WINDOW_PAGES * ENTRY];
        let entries = &mut entries[..pages * ENTRY];
        self.file
            .read_exact_at(entries, (address / PAGE * ENTRY) as u64)?;
        let mut found = 0;
        for (i, entry) in each(entries).enumerate() {
            found |= u64::from(wanted(entry)) << i;
        }
        Ok(found)
    }

    /// As [`Self::intact_now`], but what is near those asked for before may be as old as the
    /// first question about it: for counting many overlays in order.
    pub(super) fn intact_lately(&mut self, address: usize, pages: usize) -> io::Result<u64> {
        let own = self.own_lately(address, pages, |_| true)?;
        Ok(!own & mask(pages))
    }

    /// Which of at most 64 pages at `address`, all of them on overlays, are memory of the guest's
    /// own now, and not swapped out; as old as [`Self::intact_lately`].
    pub(super) fn written_lately(&mut self, address: usize, pages: usize) -> io::Result<u64> {
        self.own_lately(address, pages, |own| !own.swapped)
    }

    /// How many of at most 64 pages at `range` belong to huge pages that are mapped as a whole.
    /// Linux before 6.7 cannot tell.
    pub(super) fn huge_now(&self, range: &Range<usize>) -> io::Result<usize> {
        let mut found = [Found::default(); WINDOW_PAGES];
        // SAFETY: by the implementation of `Ioctl`; without a flag this changes no page.
        let (count, _) =
            unsafe { ioctl(&self.file, Scanning::all_of(range, IS_HUGE, &mut found)) }?;
        let pages = |it: &Found| it.end.saturating_sub(it.start) as usize / PAGE;
        Ok(found.iter().take(count).map(pages).sum())
    }

    /// Whether the kernel can tell what [`Self::huge_now`] asks.
    pub(super) fn tells_huge_pages(&self) -> bool {
        self.huge_now(&(PAGE..2 * PAGE)).is_ok()
    }

    fn own_lately(
        &mut self,
        address: usize,
        pages: usize,
        wanted: impl Fn(&Own) -> bool,
    ) -> io::Result<u64> {
        let asked = address / PAGE..address / PAGE + pages;
        if asked.start < self.seen.start || asked.end > self.seen.end {
            self.look(asked.start)?;
            if self.seen.end < asked.end {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
        }
        let first = self.own.partition_point(|own| own.pages.end <= asked.start);
        let behind = self.own[first..]
            .iter()
            .take_while(|own| own.pages.start < asked.end);
        let mut found = 0;
        for own in behind.filter(|own| wanted(own)) {
            for page in own.pages.start.max(asked.start)..own.pages.end.min(asked.end) {
                found |= 1 << (page - asked.start);
            }
        }
        Ok(found)
    }

    /// Looks at pages from `first` on, at no fewer than a window has.
    fn look(&mut self, first: usize) -> io::Result<()> {
        self.seen = first..first;
        self.own.clear();
        if self.scans {
            match self.scan(first) {
                Ok(()) => return Ok(()),
                // As of Linux before 6.7, or as of a filter of system calls.
                Err(Errno::NOTTY | Errno::INVAL | Errno::PERM | Errno::NOSYS) => {
                    self.scans = false;
                }
                Err(e) => return Err(e.into()),
            }
        }
        self.read(first)
    }

    fn scan(&mut self, first: usize) -> rustix::io::Result<()> {
        // As many ranges as a read has entries. A window has fewer, so that one call sees all of it.
        let mut found = [Found::default(); READ];
        let range = first * PAGE..(first + SCANNED).min(LAST_PAGE) * PAGE;
        // SAFETY: by the implementation of `Ioctl`; without a flag this changes no page.
        let (count, end) = unsafe { ioctl(&self.file, Scanning::own(&range, &mut found)) }?;
        let own = |it: &Found| Own {
            pages: it.start as usize / PAGE..it.end as usize / PAGE,
            swapped: it.categories & IS_SWAPPED != 0,
        };
        self.own.extend(found.iter().take(count).map(own));
        self.seen.end = end as usize / PAGE;
        Ok(())
    }

    /// The same where the kernel cannot scan.
    fn read(&mut self, first: usize) -> io::Result<()> {
        let mut entries = [0; READ * ENTRY];
        let mut read = 0;
        // The end of the address space may come first.
        while read < entries.len() {
            let at = (first * ENTRY + read) as u64;
            match self.file.read_at(&mut entries[read..], at)? {
                0 => break,
                n => read += n,
            }
        }
        for (i, entry) in each(&entries[..read]).enumerate() {
            if !is_own(entry) {
                continue;
            }
            let (page, swapped) = (first + i, entry & SWAPPED != 0);
            match self.own.last_mut() {
                Some(last) if last.pages.end == page && last.swapped == swapped => {
                    last.pages.end = page + 1;
                }
                _ => self.own.push(Own {
                    pages: page..page + 1,
                    swapped,
                }),
            }
        }
        self.seen.end = first + read / ENTRY;
        Ok(())
    }
}

/// A page that was never read through its overlay is not there, and still intact; one of the store
/// that is being moved looks swapped out.
fn is_own(entry: u64) -> bool {
    entry & FILE == 0 && entry & (PRESENT | SWAPPED) != 0
}

fn each(entries: &[u8]) -> impl Iterator<Item = u64> + '_ {
    entries
        .chunks_exact(ENTRY)
        .map(|entry| u64::from_ne_bytes(entry.try_into().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};

    use super::*;

    /// Windows of shared memory of which some pages, chosen by `seed`, were written since
    /// and others were never touched.
    fn memory(seed: u64) -> (usize, Vec<bool>) {
        let pages = 16 * WINDOW_PAGES;
        let store = rustix::fs::memfd_create("store", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&store, (pages * PAGE) as u64).unwrap();
        let (length, prot) = (pages * PAGE, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: new memory, at a place that the kernel chooses.
        let address = unsafe {
            let nowhere = ptr::null_mut();
            mmap(nowhere, length, prot, MapFlags::PRIVATE, store.as_fd(), 0)
        };
        let address = address.unwrap() as usize;
        let mut random = seed;
        let written = (0..pages).map(|page| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let at = (address + page * PAGE) as *mut u8;
            match random >> 61 {
                // SAFETY: inside the memory just made, which nobody else has.
                0 | 1 => unsafe { at.write_volatile(1) },
                // SAFETY: as above.
                2 | 3 => drop(unsafe { at.read_volatile() }),
                _ => {}
            }
            random >> 61 < 2
        });
        (address, written.collect())
    }

    fn masks(of: &[bool]) -> Vec<u64> {
        let bits = |window: &[bool]| {
            let bits = window.iter().enumerate();
            bits.fold(0, |mask, (i, bit)| mask | u64::from(*bit) << i)
        };
        of.chunks(WINDOW_PAGES).map(bits).collect()
    }

    #[test]
    fn whether_it_scans_or_reads_what_was_written_is_found() {
        for seed in 0..20 {
            let (address, written) = memory(seed);
            let wanted = masks(&written);
            for scans in [true, false] {
                let mut pagemap = Pagemap::open().unwrap();
                pagemap.scans = scans;
                for (window, wanted) in wanted.iter().enumerate() {
                    let at = address + window * WINDOW_PAGES * PAGE;
                    let found = pagemap.written_lately(at, WINDOW_PAGES).unwrap();
                    assert_eq!(found, *wanted, "seed {seed}, window {window}, {scans}");
                    let intact = pagemap.intact_lately(at, WINDOW_PAGES).unwrap();
                    assert_eq!(intact, !wanted, "seed {seed}, window {window}, {scans}");
                    assert_eq!(pagemap.intact_now(at, WINDOW_PAGES).unwrap(), intact);
                    let some = pagemap.intact_lately(at + 3 * PAGE, 5).unwrap();
                    assert_eq!(some, intact >> 3 & 0b11111);
                }
            }
        }
    }

    #[test]
    fn ordinary_memory_is_ones_own() {
        let length = 2 * WINDOW_PAGES * PAGE;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: new memory, at a place that the kernel chooses.
        let address = unsafe { mmap_anonymous(ptr::null_mut(), length, prot, MapFlags::PRIVATE) };
        let address = address.unwrap();
        // SAFETY: nobody else has it.
        unsafe { madvise(address, length, Advice::LinuxNoHugepage) }.unwrap();
        // SAFETY: inside of it.
        unsafe { address.cast::<u8>().write_volatile(1) };
        for scans in [true, false] {
            let mut pagemap = Pagemap::open().unwrap();
            pagemap.scans = scans;
            let written = pagemap.written_lately(address as usize, WINDOW_PAGES);
            assert_eq!(written.unwrap(), 1, "{scans}");
        }
    }
}
