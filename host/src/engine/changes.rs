// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the VMM does to guest memory while overlays lie over it.
//!
//! Whoever embeds the engine tells it before, and after: what is shared there becomes ordinary
//! memory first, nothing is shared meanwhile, and afterwards that memory is looked at anew.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::attributes::{Unsuitable, has_userfaultfd, read_smaps};
use super::memory::{Memory, Suitability};
use super::regions::Region;
use super::sharing::Sharing;

/// How long it is believed that a VMM which said so is about to register memory, or has.
const BELIEVED: Duration = Duration::from_secs(10);
/// Most times as long, after looks that found it registered: each reads about all mappings.
const MOST_TIMES: u32 = 16;

/// Memory that is being changed, and memory that somebody else has.
#[derive(Debug, Default)]
pub(super) struct Changes {
    under_way: Vec<Range<usize>>,
    taken: Vec<Taken>,
    /// Something was shared, or would have been, that may be again when all this has ended: the
    /// guest tells of it only once.
    untold: bool,
}

/// Memory that the VMM's `userfaultfd` has.
#[derive(Clone, Debug)]
struct Taken {
    range: Range<usize>,
    looked_at: Instant,
    /// How many times [`BELIEVED`] until it is looked at again.
    times: u32,
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

    /// Notes that the guest is to tell of everything once more.
    pub(super) fn lose(&mut self) {
        self.untold = true;
    }

    fn take(&mut self, range: &Range<usize>) {
        self.taken.push(Taken {
            range: range.clone(),
            looked_at: Instant::now(),
            times: 1,
        });
    }

    fn give_back(&mut self, range: &Range<usize>) {
        let taken = std::mem::take(&mut self.taken);
        let rest = |it: Taken| {
            let all = &it.range;
            let before = all.start..all.end.min(range.start.max(all.start));
            let after = all.start.max(range.end.min(all.end))..all.end;
            [before, after].map(|range| Taken {
                range,
                ..it.clone()
            })
        };
        self.taken = taken.into_iter().flat_map(rest).collect();
        self.taken.retain(|it| !it.range.is_empty());
    }

    fn is_taken(&self, range: &Range<usize>) -> bool {
        self.taken.iter().any(|it| intersect(&it.range, range))
    }

    fn is_taken_since(&self, range: &Range<usize>, moment: Instant) -> bool {
        let mut taken = self.taken.iter();
        taken.any(|it| it.looked_at >= moment && intersect(&it.range, range))
    }

    /// What is due to be looked at, `believed` being [`BELIEVED`].
    fn doubtful(&mut self, believed: Duration) -> Vec<Range<usize>> {
        let due = |it: &&mut Taken| it.looked_at.elapsed() >= believed * it.times;
        let mut due: Vec<_> = self.taken.iter_mut().filter(due).collect();
        for it in &mut due {
            it.looked_at = Instant::now();
            it.times = (it.times * 2).min(MOST_TIMES);
        }
        due.into_iter().map(|it| it.range.clone()).collect()
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
            let is_refused = matches!(
                self.suitability.get(&key),
                Some(Suitability::Refused(Unsuitable::Userfaultfd))
            );
            if is_refused && !self.changes.is_taken(&region.addresses()) {
                self.suitability.remove(&key);
                self.changes.lose();
            }
        }
    }

    /// Whether the guest is to be asked to report everything again: what was undone or refused
    /// because of the VMM may be shared again by now. True once.
    pub fn take_untold(&mut self) -> bool {
        let changes = &self.changes;
        let over = changes.under_way.is_empty() && changes.taken.is_empty();
        if !over || self.allowed().is_err() {
            return false;
        }
        std::mem::take(&mut self.changes.untold)
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
            let known = self.suitability.remove(&key);
            if let Some(Suitability::Ready(_)) = known {
                let _ = self.uffd.unregister(&region.addresses());
            }
            // What was refused may not be when this has ended.
            if known.is_some() {
                self.changes.lose();
            }
        }
        Ok(())
    }

    /// All of the regions that `range` reaches into.
    pub(super) fn regions_in(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let regions = self.keys_of(range).into_iter();
        regions.map(|(_, region)| region.addresses()).collect()
    }

    /// All regions but those that stay.
    pub(super) fn regions_but(&self, stays: impl Fn(&Region) -> bool) -> Vec<Range<usize>> {
        let gone = self.regions.iter().filter(|region| !stays(region));
        gone.map(Region::addresses).collect()
    }

    fn keys_of(&self, range: &Range<usize>) -> Vec<(u64, Region)> {
        let inside = |(_, region): &(u64, Region)| intersect(&region.addresses(), range);
        self.regions.with_keys().filter(inside).collect()
    }
}

impl Sharing {
    /// Looks whether a `userfaultfd` that has got memory is gone with it: a VMM that only tries
    /// whether it could have one closes it, and says nothing. To be called now and then.
    pub fn look_for_userfaultfds(&self) -> io::Result<()> {
        self.look_for_userfaultfds_after(BELIEVED)
    }

    /// The same, and says how long a VMM is believed.
    #[doc(hidden)]
    pub fn look_for_userfaultfds_after(&self, believed: Duration) -> io::Result<()> {
        let doubtful = self.memory().changes.doubtful(believed);
        if doubtful.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        // Without the lock: it takes as long as the process has memory.
        let smaps = read_smaps()?;
        for range in doubtful {
            let mut memory = self.memory();
            // Somebody may have taken it since.
            let is_new = memory.changes.is_taken_since(&range, began);
            if !is_new && !has_userfaultfd(&smaps, &range) {
                memory.give_userfaultfd_back(&range);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(changes: &Changes) -> Vec<Range<usize>> {
        changes.taken.iter().map(|it| it.range.clone()).collect()
    }

    #[test]
    fn what_is_taken_is_looked_at_less_and_less_often() {
        let mut changes = Changes::default();
        changes.take(&(100..200));
        assert!(changes.doubtful(BELIEVED).is_empty());
        assert_eq!(changes.doubtful(Duration::ZERO).len(), 1);
        for _ in 0..10 {
            changes.doubtful(Duration::ZERO);
        }
        assert_eq!(changes.taken[0].times, MOST_TIMES);
    }

    #[test]
    fn what_is_taken_again_while_it_is_looked_at_stays_taken() {
        let mut changes = Changes::default();
        changes.take(&(100..200));
        changes.doubtful(Duration::ZERO);
        let began = Instant::now();
        assert!(!changes.is_taken_since(&(100..200), began));
        changes.take(&(150..160));
        assert!(changes.is_taken_since(&(100..200), began));
        assert!(!changes.is_taken_since(&(170..200), began));
    }

    #[test]
    fn what_is_given_back_in_parts_stays_taken_until_the_last_one() {
        let mut changes = Changes::default();
        changes.take(&(100..200));
        changes.take(&(150..250));
        changes.give_back(&(120..160));
        assert_eq!(ranges(&changes), [100..120, 160..200, 160..250]);
        changes.give_back(&(0..190));
        assert!(changes.is_taken(&(190..191)) && !changes.is_taken(&(0..190)));
        changes.give_back(&(180..300));
        assert!(changes.taken.is_empty());
    }
}
