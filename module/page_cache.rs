// SPDX-License-Identifier: GPL-2.0

//! Folios in a file's page cache, and pins on those that are reported.

use crate::bindings as helpers;
use crate::file::{CachedFile, Facts};
use crate::ranges::Range;
use crate::runs::Pin;
use core::ptr::{addr_of, NonNull};
use kernel::bindings;

const fn flag(bit: bindings::pageflags) -> usize {
    1 << bit
}

const CLEAN: usize = flag(bindings::pageflags_PG_uptodate);

/// Flags that count. They must be [`CLEAN`]: uptodate and nothing else of these.
const fn mask(facts: &Facts) -> usize {
    let dirty = flag(bindings::pageflags_PG_dirty) | flag(bindings::pageflags_PG_writeback);
    let mask = CLEAN | flag(bindings::pageflags_PG_hwpoison);
    if facts.is_written_back {
        mask | dirty
    } else {
        mask
    }
}

/// Any of these says that a page was used more than once, in either kind of LRU.
const USED: usize = flag(bindings::pageflags_PG_active) | flag(bindings::pageflags_PG_workingset);
const REFERENCED: usize = flag(bindings::pageflags_PG_referenced);

/// Up to 31 folios with a reference to each.
///
/// # Invariants
///
/// The first `nr` entries are valid folios, and the batch owns a reference to each of them.
pub(crate) struct FolioBatch {
    raw: bindings::folio_batch,
}

// SAFETY: The references may be put by any thread.
unsafe impl Send for FolioBatch {}

impl FolioBatch {
    /// An empty batch.
    pub(crate) fn new() -> Self {
        let raw = bindings::folio_batch {
            // Our folios come from the page cache, not from this CPU's queues: nothing to drain.
            percpu_pvec_drained: true,
            ..Default::default()
        };
        // INVARIANT: It has no entries.
        Self { raw }
    }

    /// Replaces the batch by the next folios of `file` that have pages in `*next..end`, and
    /// moves `next` behind them. Returns whether there are any.
    pub(crate) fn fill(&mut self, file: &CachedFile<'_>, next: &mut u64, end: u64) -> bool {
        self.release();
        if *next >= end {
            return false;
        }
        let mut index = *next as usize;
        // SAFETY: The mapping is valid while the file is; the batch is empty.
        // INVARIANT: The call adds folios with a reference to each.
        unsafe {
            bindings::filemap_get_folios(
                file.mapping(),
                &mut index,
                (end - 1) as usize,
                &mut self.raw,
            )
        };
        *next = index as u64;
        self.raw.nr != 0
    }

    /// The folios.
    pub(crate) fn folios(&self) -> impl Iterator<Item = Folio<'_>> {
        let folios = self.raw.folios[..usize::from(self.raw.nr)].iter();
        folios
            .filter_map(|&folio| NonNull::new(folio))
            .map(|folio| Folio { folio, batch: self })
    }

    /// Lets go of all folios.
    pub(crate) fn release(&mut self) {
        if self.raw.nr != 0 {
            // SAFETY: By the invariants the batch owns these references; it is empty afterwards.
            unsafe { bindings::__folio_batch_release(&mut self.raw) };
        }
    }
}

impl Drop for FolioBatch {
    fn drop(&mut self) {
        self.release();
    }
}

/// A folio that a [`FolioBatch`] holds.
pub(crate) struct Folio<'a> {
    folio: NonNull<bindings::folio>,
    #[expect(dead_code, reason = "keeps the reference that makes the folio valid")]
    batch: &'a FolioBatch,
}

/// Where a folio lies in its file and in memory.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) range: Range,
    pub(crate) frame: u64,
}

impl Folio<'_> {
    /// Where the folio is, if it belongs to `file` and holds exactly what is on disk, or all there
    /// is of a file that is on none.
    pub(crate) fn place(&self, file: &CachedFile<'_>, facts: &Facts) -> Option<Place> {
        let folio = self.folio.as_ptr();
        // SAFETY: The batch holds a reference. Flags and mapping change at any time and are read
        // once; the index is constant while the folio is in a page cache.
        let (flags, mapping, index) = unsafe {
            let inner = addr_of!((*folio).__bindgen_anon_1.__bindgen_anon_1);
            (
                addr_of!((*inner).flags.f).read_volatile(),
                addr_of!((*inner).mapping).read_volatile(),
                addr_of!((*inner).__bindgen_anon_2.index).read_volatile(),
            )
        };
        if flags & mask(facts) != CLEAN || mapping != file.mapping() {
            return None;
        }
        // SAFETY: We hold a reference, so the folio is not split or freed.
        let (pages, frame) = unsafe {
            (
                helpers::pagefusion_folio_nr_pages(folio),
                helpers::pagefusion_folio_pfn(folio),
            )
        };
        let start = index as u64;
        let range = Range {
            start,
            end: start + pages as u64,
        };
        Some(Place {
            range,
            frame: frame as u64,
        })
    }

    /// Whether the folio is mapped or was accessed more than once since it was read. What has only
    /// passed through the page cache was not: the first access by `read` sets `PG_referenced`
    /// alone; a further one sets `PG_active`, or, with the multi-generational LRU, counts up and
    /// then sets `PG_workingset`. Reading ahead sets nothing.
    pub(crate) fn is_used(&self) -> bool {
        let folio = self.folio.as_ptr();
        // SAFETY: The batch holds a reference; flags change at any time and are read once.
        let (flags, is_mapped, counter) = unsafe {
            let inner = addr_of!((*folio).__bindgen_anon_1.__bindgen_anon_1);
            (
                addr_of!((*inner).flags.f).read_volatile(),
                helpers::pagefusion_folio_mapped(folio),
                helpers::pagefusion_lru_refs_mask(),
            )
        };
        // The counter means something else without the flag.
        let is_counted = flags & REFERENCED != 0 && flags & counter != 0;
        is_mapped || flags & USED != 0 || is_counted
    }

    /// Whether a device may be writing to the folio, or a page of it is broken.
    pub(crate) fn is_unfit(&self) -> bool {
        // SAFETY: The batch holds a reference.
        unsafe { is_unfit(self.folio.as_ptr()) }
    }

    /// Holds `pages` frames from `frame` on, all of which must be this folio's.
    pub(crate) fn pin(&self, frame: u64, pages: u64) -> PinnedFrames {
        // SAFETY: The batch holds a reference, so the count is not zero.
        unsafe { helpers::pagefusion_folio_get(self.folio.as_ptr()) };
        // INVARIANT: One reference to the one folio these frames belong to was just taken.
        PinnedFrames { frame, pages }
    }
}

/// Contiguous frames that stay what they are: neither freed, nor reused, nor moved.
///
/// # Invariants
///
/// Owns one reference to every folio that has a frame in `frame..frame + pages`, unless `pages`
/// is zero. The references keep those folios from being split, so that the frames tell which
/// folios they are.
pub(crate) struct PinnedFrames {
    frame: u64,
    pages: u64,
}

impl PinnedFrames {
    /// A pin that holds nothing.
    pub(crate) const fn none() -> Self {
        Self { frame: 0, pages: 0 }
    }
}

/// Whether a device may be writing to a folio, or a page of it is broken.
///
/// # Safety
///
/// The caller must hold a reference to `folio`.
unsafe fn is_unfit(folio: *mut bindings::folio) -> bool {
    // SAFETY: By this function's requirements.
    unsafe {
        helpers::pagefusion_folio_maybe_dma_pinned(folio)
            || helpers::pagefusion_folio_contain_hwpoisoned_page(folio)
    }
}

impl PinnedFrames {
    /// Whether a device may be writing to any of them, or a page of their folios is broken.
    pub(crate) fn are_unfit(&self) -> bool {
        let mut folios = Folios::of(self);
        // SAFETY: We hold a reference to each.
        folios.any(|folio| unsafe { is_unfit(folio) })
    }
}

/// The folios of [`PinnedFrames`].
struct Folios {
    frame: u64,
    end: u64,
}

impl Folios {
    const fn of(pin: &PinnedFrames) -> Self {
        Self {
            frame: pin.frame,
            end: pin.frame + pin.pages,
        }
    }
}

impl Iterator for Folios {
    type Item = *mut bindings::folio;

    fn next(&mut self) -> Option<Self::Item> {
        if self.frame >= self.end {
            return None;
        }
        // SAFETY: Whoever has this holds the folio of each frame that is to come, so the frame has
        // a valid `struct page`, and the folio is what it was.
        let (folio, first, pages) = unsafe {
            let folio = helpers::pagefusion_pfn_folio(self.frame as usize);
            let first = helpers::pagefusion_folio_pfn(folio);
            (folio, first, helpers::pagefusion_folio_nr_pages(folio))
        };
        self.frame = first as u64 + pages as u64;
        Some(folio)
    }
}

impl Pin for PinnedFrames {
    fn join(&mut self, next: Self) {
        if self.pages == 0 {
            *self = next;
            return;
        }
        if next.pages != 0 {
            let last = self.frame + self.pages - 1;
            // SAFETY: Both frames belong to folios that are held by the invariants.
            let (last, first) = unsafe {
                (
                    helpers::pagefusion_pfn_folio(last as usize),
                    helpers::pagefusion_pfn_folio(next.frame as usize),
                )
            };
            if last == first {
                // SAFETY: Both pins own a reference to this folio, and one is to remain.
                unsafe { helpers::pagefusion_folio_put(first) };
            }
        }
        // INVARIANT: The references of `next` move here.
        self.pages += next.pages;
        core::mem::forget(next);
    }
}

impl Drop for PinnedFrames {
    fn drop(&mut self) {
        for folio in Folios::of(self) {
            // SAFETY: By the invariants we own one reference to this folio, given up here; the
            // next one is another.
            unsafe { helpers::pagefusion_folio_put(folio) };
        }
    }
}
