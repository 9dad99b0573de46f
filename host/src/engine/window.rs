// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Overlays are made in windows: writers to at most 64 pages are stopped, the pages are compared
//! once more, store pages are mapped over those that are equal, and writers go on.
//!
//! Whatever can be done before a window opens or after it has closed is done there. The pages of a
//! long window are looked at before: what differs is not write-protected at all, no huge page is
//! split for it, and what is equal is near the processor when it is compared for good.

#![expect(
    unsafe_code,
    reason = "gives guest memory ranges to the operations of `mapped`"
)]

use std::ops::Range;

use pagefusion_abi::wire::reason;

use super::attributes::Attributes;
use super::huge_pages::HUGE_PAGE;
use super::mapped::{self, mask};
use super::memory::{Memory, Refusal, Suitability, WINDOW_PAGES};
use super::overlays::Overlay;
use super::uffd::Uffd;
use crate::protocol::StorePage;
use crate::store::PAGE;

/// Most mappings made in one window. Two save half of the write protection and wake-ups of single
/// pages; each one more has whoever waits for the window wait some 20 µs longer.
pub const WINDOW_MAPPINGS: usize = 2;

/// Pages of a window that is so short that looking at them before it opens costs more than it
/// saves those who wait for it; runs share a window only as long as it stays that short.
const SHORT_PAGES: usize = 16;

/// Store pages, and where in guest memory they are to go.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Address of the first page.
    pub address: usize,
    /// At most [`WINDOW_PAGES`] pages, which the store has granted.
    pub overlay: Overlay,
}

impl Wanted {
    fn pages(&self) -> usize {
        self.overlay.pages as usize
    }

    fn range(&self) -> Range<usize> {
        self.address..self.address + self.pages() * PAGE
    }
}

/// Pages of one [`Wanted`] that are worth a window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Equal {
    /// Which one of those that are handled together.
    wanted: usize,
    /// First page within it.
    first: usize,
    pages: usize,
    address: usize,
    overlay: Overlay,
}

impl Equal {
    fn end(&self) -> usize {
        self.address + self.pages * PAGE
    }
}

impl Memory {
    /// Puts store pages over guest memory where the bytes are equal: those of the first of
    /// `wanted`, and of some after it, as many as one window takes. Those that continue each other
    /// in guest memory share one. Appends an answer for each that was handled; while there is none
    /// yet, this is a new batch. Bit i of an answer: page i is shared now. `pinned` says whether the
    /// guest still holds its pages.
    pub fn overlay(
        &mut self,
        wanted: &[Wanted],
        pinned: &dyn Fn() -> bool,
        answers: &mut Vec<Result<u64, Refusal>>,
    ) {
        let Some(first) = wanted.first() else { return };
        let begin = answers.len();
        if begin == 0 {
            // Huge pages may have come since.
            self.split = 0..0;
        }
        let (attributes, end) = match self.attributes_of(first) {
            Ok(found) => found,
            Err(why) => return answers.push(Err(why)),
        };
        let mut pieces = std::mem::take(&mut self.equal);
        pieces.clear();
        let together = together(wanted, end);
        let next = wanted.get(together.len()).map(|next| next.address);
        let look = together.iter().map(Wanted::pages).sum::<usize>() > SHORT_PAGES;
        for (index, one) in together.iter().enumerate() {
            answers.push(self.admit(one, index, look, &mut pieces));
        }
        for stretch in pieces.chunk_by(|a, b| a.end() == b.address) {
            let mapped = self.replace(stretch, &attributes, next, pinned);
            for piece in stretch {
                let answer = &mut answers[begin + piece.wanted];
                match (mapped, &answer) {
                    (Ok(mapped), Ok(before)) => {
                        let offset = (piece.address - stretch[0].address) / PAGE;
                        let here = mapped >> offset & mask(piece.pages);
                        *answer = Ok(before | here << piece.first);
                    }
                    (Err(why), Ok(0)) => *answer = Err(why),
                    _ => {}
                }
            }
        }
        self.equal = pieces;
        if let Some(store) = self.store.as_mut().filter(|it| it.has_looked_enough()) {
            store.look_away();
        }
    }

    /// Which pages on overlays, written by the guest since, have the bytes of their store pages
    /// again: bit i is page i of `wanted`. Just now, as nobody is kept from writing, and a device
    /// may be about to: only what a guest reports, and holds, may be overlaid.
    pub(super) fn alike(&mut self, wanted: &Wanted) -> Result<u64, Refusal> {
        let (pages, overlay) = (wanted.pages(), wanted.overlay);
        if !self.is_on(wanted.address, &overlay) {
            return Ok(0);
        }
        self.fill_missing(&wanted.range());
        let store = self.store.as_mut().ok_or(reason::NO_STORE)?;
        store
            .look_at(overlay.store, pages)
            .map_err(|e| self.errors.refuse("looking at the store", &e))?;
        let expected = store.address_of(overlay.store).ok_or(reason::NO_STORE)?;
        // SAFETY: overlays are part of a region, which is mapped guest memory; the store is mapped.
        Ok(unsafe { mapped::compare(wanted.address, expected, pages) })
    }

    /// Attributes of the memory that `wanted` is to go over, and where they end.
    fn attributes_of(&mut self, wanted: &Wanted) -> Result<(Attributes, usize), Refusal> {
        assert!(
            wanted.pages() <= WINDOW_PAGES,
            "a window is at most {WINDOW_PAGES} pages"
        );
        self.allowed()?;
        let key = self.prepare(wanted.address)?;
        let region = self.regions.get(key).ok_or(reason::OUTSIDE_MEMORY)?;
        let region_end = region.addresses().end;
        if wanted.range().end > region_end {
            return Err(reason::OUTSIDE_MEMORY);
        }
        let Some(Suitability::Ready(known)) = self.suitability.get(&key) else {
            return Err(reason::UNSUITABLE_MEMORY);
        };
        // A window over a border between attributes is none of ours.
        let (attributes, end) = known.of(&wanted.range()).ok_or(reason::UNSUITABLE_MEMORY)?;
        Ok((*attributes, end.min(region_end)))
    }

    /// Appends the pages of `wanted` that may be overlaid to `pieces`, if asked to `look` only those
    /// that are equal; holds nobody up. The answer is what is shared already.
    fn admit(
        &mut self,
        wanted: &Wanted,
        index: usize,
        look: bool,
        pieces: &mut Vec<Equal>,
    ) -> Result<u64, Refusal> {
        let (pages, overlay) = (wanted.pages(), wanted.overlay);
        if self.is_shared_already(wanted.address, &overlay) {
            return Ok(mask(pages));
        }
        // In the worst case a run cuts one mapping into three.
        if !self.budget.admits(pages, 2) {
            return Err(reason::MAPPING_LIMIT);
        }
        self.fill_missing(&wanted.range());
        let store = self.store.as_mut().ok_or(reason::NO_STORE)?;
        store
            .look_at(overlay.store, pages)
            .map_err(|e| self.errors.refuse("looking at the store", &e))?;
        let expected = store.address_of(overlay.store).ok_or(reason::NO_STORE)?;
        let equal = if look {
            // SAFETY: part of a region, which is mapped guest memory, and of the mapped store.
            unsafe { mapped::compare(wanted.address, expected, pages) }
        } else {
            mask(pages)
        };
        for (first, pages) in ones(equal, pages) {
            pieces.push(Equal {
                wanted: index,
                first,
                pages,
                address: wanted.address + first * PAGE,
                overlay: Overlay {
                    pages: pages as u32,
                    store: overlay.store + first as u32,
                    file: overlay.file,
                    page: overlay.page + first as u64,
                },
            });
        }
        Ok(0)
    }

    /// One window over pieces that continue each other. Bit i of the answer: page i of it is
    /// shared now. What is handled after it is at `next`.
    fn replace(
        &mut self,
        stretch: &[Equal],
        attributes: &Attributes,
        next: Option<usize>,
        pinned: &dyn Fn() -> bool,
    ) -> Result<u64, Refusal> {
        let result = self.replace_apart(stretch, attributes, next, pinned);
        if attributes.mergeable {
            let (start, end) = (stretch[0].address, stretch[stretch.len() - 1].end());
            let (pages, mapped) = ((end - start) / PAGE, *result.as_ref().unwrap_or(&0));
            for (first, count) in ones(!mapped & mask(pages), pages) {
                let at = start + first * PAGE;
                // SAFETY: guest memory.
                let _ = unsafe { mapped::set_mergeable(&(at..at + count * PAGE), true) };
            }
        }
        result
    }

    /// The same, and leaves memory that KSM may merge kept from it.
    fn replace_apart(
        &mut self,
        stretch: &[Equal],
        attributes: &Attributes,
        next: Option<usize>,
        pinned: &dyn Fn() -> bool,
    ) -> Result<u64, Refusal> {
        let (start, end) = (stretch[0].address, stretch[stretch.len() - 1].end());
        let (range, pages) = (start..end, (end - start) / PAGE);
        if self.is_cut(&range) {
            // An overlay is a mapping of its own, which lost the registration.
            self.uffd
                .register(&range)
                .map_err(|e| self.errors.refuse("registering an overlay", &e.into()))?;
        }
        if !attributes.no_huge_page && !self.splits_by_rest {
            self.split_huge_pages(&range, next);
        }
        if attributes.mergeable {
            // A page that KSM merges loses its protection, and who writes to it then stops nowhere.
            // SAFETY: guest memory.
            unsafe { mapped::set_mergeable(&range, false) }
                .map_err(|e| self.errors.refuse("keeping memory from KSM", &e))?;
        }
        let store = self.store.as_ref().ok_or(reason::NO_STORE)?;
        self.uffd
            .protect(&range)
            .map_err(|e| self.errors.refuse("write-protecting", &e.into()))?;
        // Whoever restores the machine writes its memory, and waits for us to end.
        if !pinned() {
            lift(&self.uffd, &range);
            let _ = self.uffd.wake(&range);
            return Err(reason::REVOKED);
        }
        let mut mapped = 0;
        let mut failure = None;
        for piece in stretch {
            let Some(expected) = store.address_of(piece.overlay.store) else {
                continue;
            };
            // SAFETY: as when it was looked at; the store is still mapped.
            let mut equal = unsafe { mapped::compare(piece.address, expected, piece.pages) };
            if self.zeros_lose_protection {
                // SAFETY: as above; nobody writes to what the store has.
                equal &= !unsafe { mapped::zeros(expected, piece.pages) };
            }
            for (first, count) in ones(equal, piece.pages) {
                let at = piece.address + first * PAGE;
                let from = piece.overlay.store + first as StorePage;
                // SAFETY: writers are stopped and the bytes are equal; guest memory is not seen
                // through references.
                match unsafe { store.map_over(at, from, count) } {
                    Ok(()) => mapped |= mask(count) << ((at - start) / PAGE),
                    Err(e) => failure = Some(e),
                }
            }
        }
        for (first, count) in ones(!mapped & mask(pages), pages) {
            let at = start + first * PAGE;
            lift(&self.uffd, &(at..at + count * PAGE));
        }
        let _ = self.uffd.wake(&range);
        // From here on nobody waits.
        for (first, count) in ones(mapped, pages) {
            let at = start + first * PAGE;
            // SAFETY: overlays made just now.
            unsafe { mapped::set_attributes_of_overlay(at, count, attributes) };
        }
        self.note(stretch, mapped);
        if mapped != 0 && !attributes.no_huge_page && self.splits_by_rest {
            self.unsplit.note(&range);
        }
        match failure {
            Some(e) if mapped == 0 => Err(self.errors.refuse("mapping over guest memory", &e)),
            _ => Ok(mapped),
        }
    }

    /// Splits huge pages that reach into `range`, with more to come at `next`, on kernels that cannot
    /// do so afterwards ([`super::unsplit`]). Splitting looks at every page, even where nothing is left to split: the rest of a batch goes without it in huge
    /// pages that were whole, and are not any more.
    fn split_huge_pages(&mut self, range: &Range<usize>, next: Option<usize>) {
        if self.split.start <= range.start && range.end <= self.split.end {
            return;
        }
        let around = range.start / HUGE_PAGE * HUGE_PAGE..range.end.next_multiple_of(HUGE_PAGE);
        // An overlay is a mapping of its own: around it, nothing is mapped as a whole.
        let repays = next.is_some_and(|next| around.contains(&next)) && !self.is_cut(&around);
        let whole = |this: &Self| this.pagemap.huge_now(range).ok();
        // What is mapped page by page may be of smaller large folios, of which this shows nothing.
        let was_whole = repays && whole(self) == Some(range.len() / PAGE);
        // SAFETY: part of a region, which is mapped guest memory.
        unsafe { mapped::split_huge_pages(range) };
        // One whose memory somebody uses just now stays whole.
        if was_whole && whole(self) == Some(0) {
            self.split = around;
        }
    }

    /// Notes which pages of a window are overlays now.
    fn note(&mut self, stretch: &[Equal], mapped: u64) {
        for piece in stretch {
            let offset = (piece.address - stretch[0].address) / PAGE;
            for (first, count) in ones(mapped >> offset & mask(piece.pages), piece.pages) {
                let part = Overlay {
                    pages: count as u32,
                    store: piece.overlay.store + first as u32,
                    file: piece.overlay.file,
                    page: piece.overlay.page + first as u64,
                };
                let address = piece.address + first * PAGE;
                self.written.remove(&(address..address + count * PAGE));
                self.overlays.insert(address, part);
                self.budget.add(2);
            }
        }
    }

    /// Whether any of `range` is or was an overlay, which are mappings of their own.
    pub(super) fn is_cut(&self, range: &Range<usize>) -> bool {
        self.overlays.intersects(range) || self.written.intersects(range)
    }

    /// Whether these very store pages lie there, unbroken: then the bytes are equal, and a
    /// guest that reports everything again costs next to nothing.
    fn is_shared_already(&self, address: usize, overlay: &Overlay) -> bool {
        let pages = overlay.pages as usize;
        self.is_on(address, overlay)
            && self
                .pagemap
                .intact_now(address, pages)
                .is_ok_and(|intact| intact == mask(pages))
    }

    /// Whether these very store pages were laid there, broken or not.
    fn is_on(&self, address: usize, overlay: &Overlay) -> bool {
        let range = address..address + overlay.pages as usize * PAGE;
        let (mut at, mut store) = (address, overlay.store);
        for (start, part) in self.overlays.in_range(&range) {
            if start != at || part.store != store {
                return false;
            }
            at += part.pages as usize * PAGE;
            store += part.pages;
        }
        at == range.end
    }
}

/// What of `wanted` is handled at once: no more than fits one window, by ascending address, in
/// memory of the same kind, which reaches to `end`.
fn together(wanted: &[Wanted], end: usize) -> &[Wanted] {
    let mut count = 0;
    let mut pages = 0;
    let mut least = 0;
    for one in wanted.iter().take(WINDOW_MAPPINGS) {
        let range = one.range();
        pages += one.pages();
        if range.start < least || range.end > end || (count > 0 && pages > SHORT_PAGES) {
            break;
        }
        least = range.end;
        count += 1;
    }
    &wanted[..count]
}

/// A page that stays protected would stop the guest for ever: this must not fail.
pub(super) fn lift(uffd: &Uffd, range: &Range<usize>) {
    if let Err(e) = uffd.unprotect(range) {
        log::error!("cannot lift write protection of {range:x?}: {e}");
    }
}

/// Consecutive one bits of `bits`, as (first, count).
pub(super) fn ones(bits: u64, pages: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < pages && bits >> at & 1 == 0 {
            at += 1;
        }
        if at >= pages {
            return None;
        }
        let first = at;
        while at < pages && bits >> at & 1 == 1 {
            at += 1;
        }
        Some((first, at - first))
    })
}
