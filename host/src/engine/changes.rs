// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the VMM does to guest memory while overlays lie over it.
//!
//! Whoever embeds the engine tells it before, and after: what is shared there becomes ordinary
//! memory first, nothing is shared meanwhile, and afterwards that memory is looked at anew.

use std::io;
use std::ops::Range;

use super::attributes::Unsuitable;
use super::memory::{Memory, Suitability};
use super::regions::Region;

/// Memory that is being changed, and memory that somebody else has.
#[derive(Debug, Default)]
pub(super) struct Changes {
    under_way: Vec<Range<usize>>,
    taken: Vec<Range<usize>>,
}

impl Changes {
    /// Whether `range` is being changed at this moment.
    pub(super) fn touch(&self, range: &Range<usize>) -> bool {
        self.under_way.iter().any(|it| intersect(it, range))
    }

    pub(super) fn begin(&mut self, range: &Range<usize>) {
        self.under_way.push(range.clone());
    }

    pub(super) fn end(&mut self, range: &Range<usize>) {
        if let Some(index) = self.under_way.iter().position(|it| it == range) {
            self.under_way.swap_remove(index);
        }
    }

    fn take(&mut self, range: &Range<usize>) {
        self.taken.push(range.clone());
    }

    fn give_back(&mut self, range: &Range<usize>) {
        let taken = std::mem::take(&mut self.taken);
        let rest = |it: Range<usize>| {
            let before = it.start..it.end.min(range.start.max(it.start));
            let after = it.start.max(range.end.min(it.end))..it.end;
            [before, after]
        };
        self.taken = taken.into_iter().flat_map(rest).collect();
        self.taken.retain(|it| !it.is_empty());
    }

    fn is_taken(&self, range: &Range<usize>) -> bool {
        self.taken.iter().any(|it| intersect(it, range))
    }
}

fn intersect(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

fn contains(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

impl Memory {
    /// Whether any of `range` is guest memory.
    pub fn concerns(&self, range: &Range<usize>) -> bool {
        self.regions
            .iter()
            .any(|region| intersect(&region.addresses(), range))
    }

    /// The VMM is about to change what `range` is made of: to lock it, to protect it, to give
    /// it advice. Regions it reaches into become ordinary memory, and stay so until
    /// [`Memory::end_change`], which must follow unless this fails.
    pub fn begin_change(&mut self, range: &Range<usize>) -> io::Result<()> {
        self.make_ordinary(range)?;
        self.changes.begin(range);
        Ok(())
    }

    /// Ends what [`Memory::begin_change`] began: the memory is looked at anew when a guest
    /// reports something there.
    pub fn end_change(&mut self, range: &Range<usize>) {
        self.changes.end(range);
    }

    /// The VMM is about to register `range` with a `userfaultfd` of its own, of which a mapping
    /// can have one only. Nothing is shared there until [`Memory::give_userfaultfd_back`].
    pub fn take_userfaultfd(&mut self, range: &Range<usize>) -> io::Result<()> {
        self.make_ordinary(range)?;
        self.changes.take(range);
        for (key, _) in self.keys_of(range) {
            let refused = Suitability::Refused(Unsuitable::Userfaultfd);
            self.suitability.insert(key, refused);
        }
        Ok(())
    }

    /// The VMM's `userfaultfd` has let go of `range`, or has not got it.
    pub fn give_userfaultfd_back(&mut self, range: &Range<usize>) {
        self.changes.give_back(range);
        for (key, region) in self.keys_of(range) {
            if !self.changes.is_taken(&region.addresses()) {
                self.suitability.remove(&key);
            }
        }
    }

    /// The VMM is about to unmap or to map over `range`. What of a region would be left becomes
    /// ordinary memory. The lock must be held until it has happened, and [`Memory::unmapped`]
    /// been called.
    pub fn before_unmap(&mut self, range: &Range<usize>) -> io::Result<()> {
        let cut = |(_, region): &(u64, Region)| !contains(range, &region.addresses());
        for (_, region) in self.keys_of(range).into_iter().filter(cut) {
            self.make_ordinary(&region.addresses())?;
        }
        Ok(())
    }

    /// The VMM is about to move `range`, or what of it is left after it was made shorter: overlays
    /// become ordinary memory. The lock must be held until it has happened, and
    /// [`Memory::unmapped`] been called. Fails where the guest has written to what was shared:
    /// that memory cannot be discarded any more without knowing where it is.
    pub fn before_move(&mut self, range: &Range<usize>) -> io::Result<()> {
        self.make_ordinary(range)?;
        if self.written.intersects(range) {
            return Err(io::Error::other(
                "guest memory cannot be moved that was shared and written since",
            ));
        }
        Ok(())
    }

    /// The memory at `range` is not there any more. Regions within are forgotten; a region of
    /// which a part is left is looked at anew.
    pub fn unmapped(&mut self, range: &Range<usize>) {
        self.overlays.remove(range);
        self.written.remove(range);
        for (key, region) in self.keys_of(range) {
            self.suitability.remove(&key);
            if contains(range, &region.addresses()) {
                self.regions.remove(key);
            }
        }
    }

    /// Turns all overlays of the regions in `range` into ordinary memory and lets go of them.
    fn make_ordinary(&mut self, range: &Range<usize>) -> io::Result<()> {
        for (key, region) in self.keys_of(range) {
            self.restore(&region.addresses())?;
            if let Some(Suitability::Ready(_)) = self.suitability.remove(&key) {
                let _ = self.uffd.unregister(&region.addresses());
            }
        }
        Ok(())
    }

    /// All of the regions that `range` reaches into.
    pub(super) fn regions_in(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let regions = self.keys_of(range).into_iter();
        regions.map(|(_, region)| region.addresses()).collect()
    }

    fn keys_of(&self, range: &Range<usize>) -> Vec<(u64, Region)> {
        let inside = |(_, region): &(u64, Region)| intersect(&region.addresses(), range);
        self.regions.with_keys().filter(inside).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_in_parts_stays_taken_until_the_last_one() {
        let mut changes = Changes::default();
        changes.take(&(100..200));
        changes.take(&(150..250));
        changes.give_back(&(120..160));
        assert_eq!(changes.taken, [100..120, 160..200, 160..250]);
        changes.give_back(&(0..190));
        assert!(changes.is_taken(&(190..191)) && !changes.is_taken(&(0..190)));
        changes.give_back(&(180..300));
        assert!(changes.taken.is_empty());
    }
}
