// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the page tables know of this process's own memory.

#![expect(unsafe_code, reason = "an ioctl that rustix does not have")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use super::memory::WINDOW_PAGES;
use crate::store::PAGE;

/// Bits of an entry, `Documentation/admin-guide/mm/pagemap.rst`.
const FILE: u64 = 1 << 61;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;

/// Entries read at once when many are wanted: those of a huge page.
const CHUNK: usize = 512;
const ENTRY: usize = 8;

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
/// `PAGE_IS_HUGE`: mapped as a whole huge page.
const HUGE: u64 = 1 << 6;
/// No more ranges than a window has pages.
const MOST_FOUND: usize = WINDOW_PAGES;

// The kernel's ABI, derived again: a wrong size would be a wrong ioctl number.
const _: () = {
    assert!(size_of::<Scan>() == 96);
    assert!(size_of::<Found>() == 24);
    assert!(SCAN == 0xc060_6610);
};

/// A scan, and the array that it fills; the answer is how much of that was filled.
struct Scanning<'a> {
    scan: Scan,
    _found: &'a mut [Found; MOST_FOUND],
}

impl<'a> Scanning<'a> {
    fn new(range: &Range<usize>, categories: u64, found: &'a mut [Found; MOST_FOUND]) -> Self {
        let scan = Scan {
            size: size_of::<Scan>() as u64,
            start: range.start as u64,
            end: range.end as u64,
            vec: found.as_mut_ptr() as u64,
            vec_len: found.len() as u64,
            category_mask: categories,
            return_mask: categories,
            ..Scan::default()
        };
        Self {
            scan,
            _found: found,
        }
    }
}

// SAFETY: the opcode belongs to the structure, whose `vec` is the array borrowed here.
unsafe impl Ioctl for Scanning<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        SCAN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::from_mut(&mut self.scan).cast()
    }

    unsafe fn output_from_ptr(found: IoctlOutput, _: *mut c_void) -> rustix::io::Result<usize> {
        Ok(usize::try_from(found).unwrap_or_default())
    }
}

/// `/proc/self/pagemap`.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
    /// Pages whose entries are in `entries`.
    chunk: Range<usize>,
    entries: Box<[u8; CHUNK * ENTRY]>,
}

impl Pagemap {
    pub(super) fn open() -> io::Result<Self> {
        let file = File::open("/proc/self/pagemap")?;
        Ok(Self {
            file,
            chunk: 0..0,
            entries: Box::new([0; CHUNK * ENTRY]),
        })
    }

    /// Which of at most 64 pages at `address`, all of them on overlays, lie on store pages
    /// still: bit i is page i. As of this moment.
    pub(super) fn intact_now(&self, address: usize, pages: usize) -> io::Result<u64> {
        let mut entries = [0; WINDOW_PAGES * ENTRY];
        let wanted = &mut entries[..pages * ENTRY];
        self.file
            .read_exact_at(wanted, (address / PAGE * ENTRY) as u64)?;
        Ok(intact(wanted))
    }

    /// As [`Self::intact_now`], but entries near those asked for before may be as old as the
    /// first question about them: for counting many overlays in order.
    pub(super) fn intact_lately(&mut self, address: usize, pages: usize) -> io::Result<u64> {
        Ok(intact(self.entries_lately(address, pages)?))
    }

    /// Which of at most 64 pages at `address`, all of them on overlays, are memory of the guest's
    /// own now, and not swapped out; as old as [`Self::intact_lately`].
    pub(super) fn written_lately(&mut self, address: usize, pages: usize) -> io::Result<u64> {
        let entries = self.entries_lately(address, pages)?;
        Ok(which(entries, |entry| {
            entry & PRESENT != 0 && entry & FILE == 0
        }))
    }

    /// How many of at most 64 pages at `range` belong to huge pages that are mapped as a whole.
    /// Linux before 6.7 cannot tell.
    pub(super) fn huge_now(&self, range: &Range<usize>) -> io::Result<usize> {
        let mut found = [Found::default(); MOST_FOUND];
        // SAFETY: by the implementation of `Ioctl`; without a flag this changes no page.
        let count = unsafe { ioctl(&self.file, Scanning::new(range, HUGE, &mut found)) }?;
        let pages = |it: &Found| it.end.saturating_sub(it.start) as usize / PAGE;
        Ok(found.iter().take(count).map(pages).sum())
    }

    fn entries_lately(&mut self, address: usize, pages: usize) -> io::Result<&[u8]> {
        let wanted = address / PAGE..address / PAGE + pages;
        if wanted.start < self.chunk.start || wanted.end > self.chunk.end {
            self.chunk = wanted.start..wanted.start;
            let mut read = 0;
            // The end of the address space may come first.
            while read < self.entries.len() {
                let at = (wanted.start * ENTRY + read) as u64;
                match self.file.read_at(&mut self.entries[read..], at)? {
                    0 => break,
                    n => read += n,
                }
            }
            self.chunk.end += read / ENTRY;
            if self.chunk.end < wanted.end {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
        }
        let first = (wanted.start - self.chunk.start) * ENTRY;
        Ok(&self.entries[first..first + pages * ENTRY])
    }
}

fn intact(entries: &[u8]) -> u64 {
    // A page that was never read through the overlay is not present, and still intact.
    which(entries, |entry| {
        (entry & PRESENT == 0 || entry & FILE != 0) && entry & SWAPPED == 0
    })
}

/// Bit i: whether entry i is so.
fn which(entries: &[u8], is: impl Fn(u64) -> bool) -> u64 {
    let mut found = 0;
    for (i, entry) in entries.chunks_exact(ENTRY).enumerate() {
        let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
        found |= u64::from(is(entry)) << i;
    }
    found
}
