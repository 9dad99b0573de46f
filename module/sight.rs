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
    page: usize,
    pages: usize,
    frame: usize,
    unsettled: usize,
}

impl Sight {
    #[cfg(test)]
    pub(crate) const fn new(page: u64, pages: u64, frame: u64, unsettled: bool) -> Self {
        Self {
            page: page as usize,
            pages: pages as usize,
            frame: frame as usize,
            unsettled: unsettled as usize,
        }
    }

    const fn page(&self) -> u64 {
        self.page as u64
    }

    /// Folios end before the last page there can be.
    const fn end(&self) -> u64 {
        self.page().wrapping_add(self.pages as u64)
    }

    /// How far frames are ahead of pages.
    const fn distance(&self) -> u64 {
        (self.frame as u64).wrapping_sub(self.page())
    }
}

/// Goes through the sights of a range and what was reported of it, side by side.
pub(crate) struct Comparison<'a> {
    sights: &'a [Sight],
    /// What has not been compared.
    rest: Range,
    retry: bool,
    /// Pages that are where they were reported.
    pub(crate) same: u64,
}

impl<'a> Comparison<'a> {
    /// `sights` is all there is in `range`, in ascending order. Refused pages are as good as
    /// not reported when they are to be tried again.
    pub(crate) const fn new(sights: &'a [Sight], range: Range, retry: bool) -> Self {
        Self {
            sights,
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
    /// not end before. This is all that happens in a guest in which nothing happens, and is kept
    /// apart so that the loop has all registers.
    #[inline(never)]
    fn skip_same(
        &mut self,
        start: u64,
        mut entry: Entry,
        pages: &Pages,
        cursor: &mut Cursor,
    ) -> (u64, Option<Entry>) {
        let (mut at, end) = (start, self.rest.end);
        let mut sights = self.sights;
        let known = loop {
            let [sight, rest @ ..] = sights else {
                break Some(entry);
            };
            let differs = sight.distance() != entry.distance()
                || sight.unsettled != 0
                || self.retry && entry.refused;
            if differs || sight.page() > at || entry.page > at {
                break Some(entry);
            }
            at = sight.end().min(entry.end());
            if at >= end {
                at = end;
                break Some(entry);
            }
            if sight.end() == at {
                sights = rest;
            }
            if entry.end() == at {
                match pages.next(&entry, cursor) {
                    Some(next) => entry = next,
                    None => break None,
                }
            }
        };
        self.sights = sights;
        self.same = self.same.wrapping_add(at.wrapping_sub(start));
        (at, known)
    }

    /// How the pages from `at` on compare, and up to where. Neither the first sight nor `known`
    /// may end before that.
    fn compare(&self, at: u64, known: Option<&Entry>) -> (u64, Like) {
        let sight = self.sights.first();
        if let (Some(sight), Some(entry)) = (sight, known) {
            if sight.page() <= at && entry.page <= at {
                let same = sight.distance() == entry.distance()
                    && sight.unsettled == 0
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
                let unsettled = sight.unsettled != 0;
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
