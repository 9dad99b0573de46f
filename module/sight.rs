// SPDX-License-Identifier: GPL-2.0

//! What a look without references saw, compared with what was reported.
//!
//! It decides where a proper look is needed, and nothing else: nobody may report, hold or
//! withdraw a page because of a sight.

use crate::leaf::Entry;
use crate::pages::{Cursor, Pages};
use crate::ranges::Range;

/// Pages seen contiguous in the file and in memory, without a reference: they may be anywhere
/// else by now. The layout is that of `struct pagefusion_sight`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Sight {
    frame: u64,
    /// As [`extent`] has it, and the highest bit when they were dirty or under writeback.
    extent: u64,
}

const UNSETTLED: u64 = 1 << 63;

/// First page and number of pages, neither of which takes more than 31 bits.
const fn extent(page: u64, pages: u64) -> u64 {
    page | pages << 32
}

impl Sight {
    #[cfg(test)]
    pub(crate) const fn new(page: u64, pages: u64, frame: u64, unsettled: bool) -> Self {
        let mark = if unsettled { UNSETTLED } else { 0 };
        Self {
            frame,
            extent: extent(page, pages) | mark,
        }
    }

    const fn page(&self) -> u64 {
        self.extent & 0xffff_ffff
    }

    const fn end(&self) -> u64 {
        self.page() + (self.extent >> 32 & 0x7fff_ffff)
    }

    const fn is_unsettled(&self) -> bool {
        self.extent & UNSETTLED != 0
    }

    /// Whether it shows just the pages of `entry`, settled and where they were reported.
    #[inline(always)]
    fn is_exactly(&self, entry: &Entry) -> bool {
        self.frame == entry.frame && self.extent == extent(entry.page, entry.count)
    }

    /// How far frames are ahead of pages.
    const fn distance(&self) -> u64 {
        self.frame.wrapping_sub(self.page())
    }
}

/// Goes through the sights of a range and what was reported of it, side by side.
pub(crate) struct Comparison<'a> {
    sights: &'a [Sight],
    /// How many of them end behind the range.
    beyond: usize,
    /// What has not been compared.
    rest: Range,
    retry: bool,
    /// Pages that are where they were reported.
    pub(crate) same: u64,
}

impl<'a> Comparison<'a> {
    /// `sights` is all there is in `range`, in ascending order. Refused pages are as good as
    /// not reported when they are to be tried again.
    pub(crate) fn new(sights: &'a [Sight], range: Range, retry: bool) -> Self {
        let inside = sights.partition_point(|sight| sight.end() <= range.end);
        Self {
            sights,
            beyond: sights.len() - inside,
            rest: range,
            retry,
            same: 0,
        }
    }

    /// The next part that needs a proper look: something is new there, has moved, has gone, or
    /// is being written. `None` when all the rest is as it was reported.
    pub(crate) fn next_difference(&mut self, pages: &Pages, cursor: &mut Cursor) -> Option<Range> {
        let end = self.rest.end;
        let mut at = self.rest.start;
        let mut differs: Option<Range> = None;
        let mut known = pages.seek(at, cursor);
        while at < end {
            while self.sights.first().is_some_and(|sight| sight.end() <= at) {
                self.sights = &self.sights[1..];
            }
            while let Some(entry) = known.filter(|entry| entry.end() <= at) {
                known = pages.next(&entry, cursor);
            }
            if let (Some(entry), None) = (known, &differs) {
                (at, known) = self.skip_same(at, entry, pages, cursor);
                if at == end {
                    break;
                }
            }
            let (until, like) = self.compare(at, known.as_ref());
            match (&mut differs, like) {
                (None, Like::Same) => self.same = self.same.wrapping_add(until.wrapping_sub(at)),
                (None, Like::Nothing) => {}
                (None, Like::Differs) => {
                    differs = Some(Range {
                        start: at,
                        end: until,
                    });
                }
                (Some(range), Like::Differs) => range.end = until,
                (Some(_), _) => break,
            }
            at = until;
        }
        self.rest.start = at;
        differs
    }

    /// Skips what is where it was reported, from `at` on, where `entry` is the first that does
    /// not end before and `cursor` is at it. This is all that happens in a guest in which nothing
    /// happens, and is kept apart so that the loop has all registers.
    #[inline(never)]
    fn skip_same(
        &mut self,
        start: u64,
        entry: Entry,
        pages: &Pages,
        cursor: &mut Cursor,
    ) -> (u64, Option<Entry>) {
        let (end, retry) = (self.rest.end, self.retry);
        let (mut at, mut known) = (start, Some(entry));
        while at < end {
            let (Some(entry), [sight, rest @ ..]) = (known, self.sights) else {
                break;
            };
            let due = retry && entry.refused;
            if sight.is_exactly(&entry) && entry.page >= at && entry.end() <= end && !due {
                (at, known) = self.skip_exact(pages, cursor);
                continue;
            }
            let differs = sight.distance() != entry.distance() || sight.is_unsettled() || due;
            if differs || sight.page() > at || entry.page > at {
                break;
            }
            let until = sight.end().min(entry.end()).min(end);
            self.same = self.same.wrapping_add(until.wrapping_sub(at));
            at = until;
            if sight.end() == at {
                self.sights = rest;
            }
            if entry.end() == at {
                known = pages.next(&entry, cursor);
            }
        }
        (at, known)
    }

    /// Skips sights that are exactly what was reported, entry for entry, as nearly all are; the
    /// first must be. Returns where they end, and the entry that is there.
    #[inline(always)]
    fn skip_exact(&mut self, pages: &Pages, cursor: &mut Cursor) -> (u64, Option<Entry>) {
        let (seen, retry) = (self.sights, self.retry);
        let inside = seen.len().saturating_sub(self.beyond);
        let mut sights = seen.get(..inside).unwrap_or_default();
        let (same, known) = pages.pass_alike(cursor, &mut sights, |sight, entry| {
            sight.is_exactly(entry) && !(retry && entry.refused)
        });
        self.same = self.same.wrapping_add(same);
        let (passed, rest) = seen.split_at(inside - sights.len());
        self.sights = rest;
        (passed.last().map_or(0, Sight::end), known)
    }

    /// How the pages from `at` on compare, and up to where. Neither the first sight nor `known`
    /// may end before that.
    fn compare(&self, at: u64, known: Option<&Entry>) -> (u64, Like) {
        let sight = self.sights.first();
        if let (Some(sight), Some(entry)) = (sight, known) {
            if sight.page() <= at && entry.page <= at {
                let same = sight.distance() == entry.distance()
                    && !sight.is_unsettled()
                    && !(self.retry && entry.refused);
                let like = if same { Like::Same } else { Like::Differs };
                return (sight.end().min(entry.end()).min(self.rest.end), like);
            }
        }
        let end = self.rest.end;
        let seen_from = sight.map_or(end, |sight| sight.page().min(end));
        let known_from = known.map_or(end, |entry| entry.page.min(end));
        match (sight, known) {
            (Some(sight), _) if seen_from <= at => {
                // What is being written now could not be reported anyway.
                let unsettled = sight.is_unsettled();
                let like = if unsettled {
                    Like::Nothing
                } else {
                    Like::Differs
                };
                (sight.end().min(known_from), like)
            }
            (_, Some(entry)) if known_from <= at => (entry.end().min(seen_from), Like::Differs),
            _ => (seen_from.min(known_from), Like::Nothing),
        }
    }
}

/// How the pages of a piece compare.
enum Like {
    /// Seen where they were reported.
    Same,
    /// Not there and not reported, or of no use now.
    Nothing,
    /// None of these.
    Differs,
}
