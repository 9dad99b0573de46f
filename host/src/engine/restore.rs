// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Overlays become ordinary memory again, window by window.

#![expect(
    unsafe_code,
    reason = "gives guest memory ranges to the operations of `mapped`"
)]

use std::io;
use std::ops::Range;

use super::attributes::Attributes;
use super::mapped;
use super::memory::{Memory, Suitability, WINDOW_PAGES};
use super::window::{lift, ones};
use crate::store::PAGE;

impl Memory {
    /// The VMM discards `range` next, which cannot fail but for locked memory, unless that is discarded
    /// as well: what lies there is nobody's any more, no device's either, and all of it becomes
    /// ordinary memory.
    pub fn before_discard(&mut self, range: &Range<usize>, locked_too: bool) -> io::Result<()> {
        let overlays = self.overlays.in_range(range);
        let mut parts: Vec<_> = overlays
            .map(|(at, overlay)| (at..at + overlay.pages as usize * PAGE, None))
            .collect();
        let written = self.written.in_range(range);
        parts.extend(
            written
                .into_iter()
                .map(|(part, before)| (part, Some(before))),
        );
        for (part, before) in parts {
            let mut start = part.start;
            while start < part.end {
                let known = self.known_at(start);
                let before = before.map(|attributes| (attributes, part.end));
                let Some((attributes, end)) = known.or(before) else {
                    return Err(stray_overlay());
                };
                let piece = start..end.min(part.end);
                start = piece.end;
                // What may be shared is not locked.
                if known.is_none() && !locked_too && mapped::is_locked(&piece) {
                    continue;
                }
                // SAFETY: guest memory that the VMM gives up.
                unsafe { mapped::map_empty(&piece, &attributes) }?;
                self.overlays.remove(&piece);
                self.written.remove(&piece);
                if known.is_some() {
                    self.register_as_before(&piece)?;
                }
            }
        }
        Ok(())
    }

    /// What memory at `address` is made of, and up to where, if it may be shared.
    fn known_at(&self, address: usize) -> Option<(Attributes, usize)> {
        // Two regions may have the same memory: KVM's slots of video memory do.
        self.regions.all_at(address).find_map(|key| {
            let Some(Suitability::Ready(known)) = self.suitability.get(&key) else {
                return None;
            };
            known
                .at(address)
                .map(|(attributes, end)| (*attributes, end))
        })
    }

    /// Turns the overlays in `range` back into ordinary memory with the same content. What the
    /// guest has written stays where it is, in a mapping of the store's file: a device may be
    /// writing to it, by its physical address.
    pub fn restore(&mut self, range: &Range<usize>) -> io::Result<()> {
        if !self.overlays.intersects(range) {
            return Ok(());
        }
        self.begin_undo(std::slice::from_ref(range))?;
        let result = loop {
            match self.restore_some(range) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        self.end_undo();
        result
    }

    /// Prepares for [`Memory::restore_some`]; [`Memory::end_undo`] must follow.
    ///
    /// Mappings become one again only if their registration is the same when their first page
    /// is filled, so everything from the first to the last of `ranges` in each region is
    /// registered for missing pages while an undo is under way, and what is around it, up to a page
    /// of ordinary memory. Whoever serves events fills what a guest touches first meanwhile. All of
    /// guest memory would do, but what is registered is mapped anew by KVM, page by page.
    pub fn begin_undo(&mut self, ranges: &[Range<usize>]) -> io::Result<()> {
        for region in self.ready_ranges() {
            let here = |it: &&Range<usize>| it.start < region.end && region.start < it.end;
            let start = ranges.iter().filter(here).map(|it| it.start).min();
            let end = ranges.iter().filter(here).map(|it| it.end).max();
            let (Some(start), Some(end)) = (start, end) else {
                continue;
            };
            let reached = self.with_borders(start..end, &region);
            if let Err(e) = self.register_missing(reached) {
                if self.undoing == 0 {
                    // Whoever touches a missing page would take a detour for ever.
                    self.register_again();
                }
                return Err(e);
            }
        }
        self.undoing += 1;
        Ok(())
    }

    /// `range` within `region`, with all mappings of ours that follow each other on either side of
    /// it, which would be cut otherwise, and a page beyond.
    fn with_borders(&self, range: Range<usize>, region: &Range<usize>) -> Range<usize> {
        // By whole overlays: they may be large, and the lock is held.
        let ours = |at| self.overlays.around(at).or_else(|| self.written.around(at));
        let (mut start, mut end) = (range.start.max(region.start), range.end.min(region.end));
        while start > region.start {
            let Some(before) = ours(start - PAGE) else {
                start -= PAGE;
                break;
            };
            start = before.start.max(region.start);
        }
        while end < region.end {
            let Some(after) = ours(end) else {
                end += PAGE;
                break;
            };
            end = after.end.min(region.end);
        }
        start..end
    }

    /// Until the undos that are under way have ended.
    fn register_missing(&mut self, range: Range<usize>) -> io::Result<()> {
        let registered = self.uffd.register_missing(&range);
        self.undone.push(range);
        Ok(registered?)
    }

    /// New memory at `range` is registered as what was there: where undos under way reach it.
    pub(super) fn register_as_before(&self, range: &Range<usize>) -> io::Result<()> {
        self.uffd.register(range)?;
        for undone in &self.undone {
            let both = range.start.max(undone.start)..range.end.min(undone.end);
            if !both.is_empty() {
                self.uffd.register_missing(&both)?;
            }
        }
        Ok(())
    }

    /// Ends what [`Memory::begin_undo`] began.
    pub fn end_undo(&mut self) {
        self.undoing -= 1;
        if self.undoing == 0 {
            self.register_again();
        }
    }

    fn register_again(&mut self) {
        let ready = self.ready_ranges();
        let undone = std::mem::take(&mut self.undone);
        let both = |a: &Range<usize>, b: &Range<usize>| a.start.max(b.start)..a.end.min(b.end);
        let parts = undone
            .iter()
            .flat_map(|it| ready.iter().map(|of| both(it, of)));
        for range in parts.filter(|part| !part.is_empty()) {
            // To register for less changes nothing: the kernel passes over what has all that is
            // asked for. No window is open, so nothing is protected meanwhile, and whoever
            // waits is woken.
            let _ = self.uffd.unregister(&range);
            if let Err(e) = self.uffd.register(&range) {
                log::error!("cannot register guest memory again: {e}");
            }
        }
    }

    pub(super) fn ready_ranges(&self) -> Vec<Range<usize>> {
        let ready = self
            .suitability
            .iter()
            .filter(|(_, s)| matches!(s, Suitability::Ready(_)));
        ready
            .filter_map(|(key, _)| self.regions.get(*key))
            .map(|r| r.addresses())
            .collect()
    }

    /// Turns at most [`WINDOW_PAGES`] pages in `range` back into ordinary memory, from the
    /// lowest address on; whether there was something to do. Only while an undo is under way.
    /// Pages that the guest has written are overlays no more, and stay where they are.
    pub fn restore_some(&mut self, range: &Range<usize>) -> io::Result<bool> {
        let Some((address, overlay)) = self.overlays.in_range(range).next() else {
            return Ok(false);
        };
        let Some((attributes, end)) = self.known_at(address) else {
            return Err(stray_overlay());
        };
        let pages = (overlay.pages as usize).min(WINDOW_PAGES);
        let part = address..end.min(address + pages * PAGE);
        // An overlay made after the undo began is registered for less.
        let reached = |it: &Range<usize>| it.start <= part.start && part.end <= it.end;
        if self.undone.iter().any(reached) {
            self.uffd.register_missing(&part)?;
        } else {
            self.register_missing(part.clone())?;
        }
        let result = self.restore_part(&part, &attributes);
        // After an error.
        for (at, overlay) in self.overlays.in_range(&part) {
            let left = at..at + overlay.pages as usize * PAGE;
            lift(&self.uffd, &left);
            let _ = self.uffd.wake(&left);
        }
        result.map(|()| true)
    }

    /// A window of an undo. After an error the caller lifts the protection of what is left.
    fn restore_part(&mut self, part: &Range<usize>, attributes: &Attributes) -> io::Result<()> {
        let pages = part.len() / PAGE;
        let before = self.pagemap.intact_now(part.start, pages)?;
        // From here on no page is written that lies on the store still, by no device either: who
        // wants to write to it by its physical address must first have a copy of it made.
        self.uffd.protect(part)?;
        let intact = before & !self.pagemap.present_own_now(part.start, pages)?;
        let range = |(first, count): (usize, usize)| {
            part.start + first * PAGE..part.start + (first + count) * PAGE
        };
        for run in ones(!intact & mapped::mask(pages), pages).map(range) {
            self.written.insert(&run, *attributes);
            self.overlays.remove(&run);
            lift(&self.uffd, &run);
            let _ = self.uffd.wake(&run);
        }
        for run in ones(intact, pages).map(range) {
            // Between two that stay it is a mapping more, and both of them are.
            let is_enclosed = self.is_cut(&(run.start - PAGE..run.start))
                && self.is_cut(&(run.end..run.end + PAGE));
            if is_enclosed {
                if !self.budget.has_room(2) {
                    self.fill_in_place(&run, attributes)?;
                    continue;
                }
                self.budget.add(2);
            }
            // SAFETY: an overlay of ours, registered by our caller, as long as the buffer at most.
            unsafe { mapped::map_back(&self.uffd, &run, attributes, &mut self.buffer) }?;
            self.overlays.remove(&run);
        }
        Ok(())
    }

    /// Has all pages of an overlay, which are protected, be of this process alone, as if the guest
    /// had written to them: where another mapping would be one too many.
    fn fill_in_place(&mut self, run: &Range<usize>, attributes: &Attributes) -> io::Result<()> {
        // Filling writes, and would wait for us.
        lift(&self.uffd, run);
        let _ = self.uffd.wake(run);
        // SAFETY: an overlay of ours, which its owner may write to.
        unsafe { mapped::fill(run) }?;
        if self.pagemap.intact_now(run.start, run.len() / PAGE)? != 0 {
            return Err(io::Error::other("a page of an overlay could not be filled"));
        }
        self.written.insert(run, *attributes);
        self.overlays.remove(run);
        Ok(())
    }

    pub(super) fn restore_all(&mut self) -> io::Result<()> {
        self.restore(&(0..usize::MAX))?;
        self.unregister_all();
        Ok(())
    }

    /// Without overlays and while paused, guest memory is as the VMM made it.
    pub fn unregister_all(&mut self) {
        if !self.overlays.is_empty() || self.undoing > 0 {
            return;
        }
        for range in self.ready_ranges() {
            let _ = self.uffd.unregister(&range);
        }
        self.suitability
            .retain(|_, s| matches!(s, Suitability::Refused(_)));
        self.look_away();
    }
}

fn stray_overlay() -> io::Error {
    io::Error::other("an overlay outside of guest memory")
}
