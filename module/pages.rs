// SPDX-License-Identifier: GPL-2.0

//! What was reported of one file: page → frame.
//!
//! Nothing here owns or touches a page; an entry is a memory of a report, no more. Where memory
//! for the memory is short, entries are forgotten, which costs a repeated report and nothing else.

use crate::leaf::{Entry, MAX_COUNT};
use crate::leaves::Leaves;
use crate::list::NoMemory;
use crate::ranges::{Range, Ranges};

pub(crate) use crate::leaves::Cursor;

/// How a range of pages relates to what was reported of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) range: Range,
    pub(crate) state: PieceState,
}

/// State of a [`Piece`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PieceState {
    /// Reported at this very frame.
    Known,
    /// Not reported, or refused and due again.
    New,
    /// Reported at another frame.
    Moved,
}

/// What was reported of one file.
pub(crate) enum Pages {
    /// All of it is one entry, as with most small files: it takes no memory of its own.
    One(Single),
    Many(Leaves),
}

impl Pages {
    pub(crate) const fn new() -> Self {
        Self::Many(Leaves::new(1))
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> u64 {
        match self {
            Self::One(single) => u64::from(single.count),
            Self::Many(leaves) => leaves.pages(),
        }
    }

    /// Bytes of memory behind this.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::One(_) => 0,
            Self::Many(leaves) => leaves.bytes(),
        }
    }

    /// The first entry that ends after `page`.
    pub(crate) fn seek(&self, page: u64, cursor: &mut Cursor) -> Option<Entry> {
        match self {
            Self::One(single) => {
                let entry = single.entry();
                *cursor = Cursor::of_single(entry.end() <= page);
                (entry.end() > page).then_some(entry)
            }
            Self::Many(leaves) => leaves.seek(page, cursor),
        }
    }

    /// The entry behind `entry`, which must be what the last call with this cursor returned.
    #[inline(always)]
    pub(crate) fn next(&self, entry: &Entry, cursor: &mut Cursor) -> Option<Entry> {
        match self {
            Self::One(_) => {
                *cursor = Cursor::of_single(true);
                None
            }
            Self::Many(leaves) => leaves.next(entry, cursor),
        }
    }

    /// Goes through entries, from what the last call with this cursor returned, and `things`, side
    /// by side, for as long as one is like the other, and takes out what it has passed by. Returns
    /// how many pages that was, and the entry that is next.
    #[inline(always)]
    pub(crate) fn pass_alike<T>(
        &self,
        cursor: &mut Cursor,
        things: &mut &[T],
        are_alike: impl Fn(&T, &Entry) -> bool,
    ) -> (u64, Option<Entry>) {
        let single = match self {
            Self::One(single) => single,
            Self::Many(leaves) => return leaves.pass_alike(cursor, things, are_alike),
        };
        if cursor.is_past_single() {
            return (0, None);
        }
        let entry = single.entry();
        match *things {
            [thing, rest @ ..] if are_alike(thing, &entry) => {
                *things = rest;
                *cursor = Cursor::of_single(true);
                (entry.count, None)
            }
            _ => (0, Some(entry)),
        }
    }

    /// Compares pages found at contiguous frames from `frame` with what was reported, and
    /// returns the first piece of one state.
    pub(crate) fn compare(
        &self,
        range: Range,
        frame: u64,
        retry: bool,
        cursor: &mut Cursor,
    ) -> Piece {
        let entry = self.seek(range.start, cursor);
        let Some(entry) = entry.filter(|entry| entry.page < range.end) else {
            return Piece {
                range,
                state: PieceState::New,
            };
        };
        if entry.page > range.start {
            let range = Range {
                start: range.start,
                end: entry.page,
            };
            return Piece {
                range,
                state: PieceState::New,
            };
        }
        let state = if entry.frame_of(range.start) != frame {
            PieceState::Moved
        } else if retry && entry.refused {
            PieceState::New
        } else {
            PieceState::Known
        };
        Piece {
            range: Range {
                start: range.start,
                end: range.end.min(entry.end()),
            },
            state,
        }
    }

    /// Whether anything was reported of `range`.
    pub(crate) fn has_any(&self, range: Range) -> bool {
        let entry = self.seek(range.start, &mut Cursor::default());
        entry.is_some_and(|entry| entry.page < range.end)
    }

    /// The first part of what was reported from `page` on that lies in none of `ranges`.
    pub(crate) fn first_outside(&self, page: u64, ranges: &Ranges) -> Option<Range> {
        let mut cursor = Cursor::default();
        let mut next = self.seek(page, &mut cursor);
        while let Some(entry) = next {
            let missing = ranges.first_missing(Range {
                start: entry.page.max(page),
                end: entry.end(),
            });
            if !missing.is_empty() {
                return Some(missing);
            }
            next = self.next(&entry, &mut cursor);
        }
        None
    }

    /// Notes that `range` was reported at contiguous frames from `frame`. All must be below
    /// [`crate::leaf::MAX_PAGE`] and [`crate::leaf::MAX_FRAME`].
    pub(crate) fn record(&mut self, range: Range, frame: u64) -> Result<(), NoMemory> {
        if range.is_empty() {
            return Ok(());
        }
        if let Some(single) = self.as_one_with(range, frame) {
            *self = Self::One(single);
            return Ok(());
        }
        self.leaves()?.record(range, frame)
    }

    /// What this is with `range` recorded, if that is one entry again.
    fn as_one_with(&self, range: Range, frame: u64) -> Option<Single> {
        let count = range.end - range.start;
        if count > MAX_COUNT {
            return None;
        }
        let fresh = Entry {
            page: range.start,
            count,
            frame,
            refused: false,
        };
        let (entry, version) = match self {
            Self::Many(leaves) => (leaves.is_empty().then_some(fresh)?, leaves.version()),
            Self::One(single) => {
                let before = single.entry();
                let covers = range.start <= before.page && before.end() <= range.end;
                let entry = if covers { fresh } else { before.join(&fresh)? };
                (entry, single.version)
            }
        };
        Some(Single::new(&entry, version))
    }

    /// Forgets what was reported of `range`; returns the number of pages forgotten, which may be
    /// more than those of `range`.
    pub(crate) fn forget(&mut self, range: Range) -> u64 {
        if !self.has_any(range) {
            return 0;
        }
        let before = self.pages();
        if let Self::One(single) = self {
            let (entry, version) = (single.entry(), single.version);
            let head = Range {
                start: entry.page,
                end: range.start.max(entry.page),
            };
            let tail = Range {
                start: range.end.min(entry.end()),
                end: entry.end(),
            };
            match (head.is_empty(), tail.is_empty()) {
                (true, true) => self.clear(),
                (false, true) => *self = Self::One(Single::new(&entry.part(head), version)),
                (true, false) => *self = Self::One(Single::new(&entry.part(tail), version)),
                (false, false) => {}
            }
            if self.pages() != before {
                return before - self.pages();
            }
        }
        // Without memory all of it is gone.
        if let Ok(leaves) = self.leaves() {
            leaves.forget(range);
        }
        before - self.pages()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        match self {
            Self::One(single) => *self = Self::Many(Leaves::new(single.version)),
            Self::Many(leaves) => leaves.clear(),
        }
    }

    /// Marks what is still tracked of a refused run. Marking is per entry: an entry that is
    /// only partly refused is reported again as a whole.
    pub(crate) fn refuse(&mut self, range: Range, frame: u64) {
        match self {
            Self::One(single) => {
                let entry = single.entry();
                let overlaps = entry.page < range.end && range.start < entry.end();
                single.refused |= overlaps && entry.frame + range.start == frame + entry.page;
            }
            Self::Many(leaves) => leaves.refuse(range, frame),
        }
    }

    /// Whether anything that is tracked was refused.
    pub(crate) fn has_refused(&self) -> bool {
        let mut cursor = Cursor::default();
        let mut next = self.seek(0, &mut cursor);
        while let Some(entry) = next {
            if entry.refused {
                return true;
            }
            next = self.next(&entry, &mut cursor);
        }
        false
    }

    /// Fills leaves that changes have left half empty. Best done when many changes have been
    /// made and no more follow soon.
    pub(crate) fn pack(&mut self) {
        let Self::Many(leaves) = self else {
            return;
        };
        leaves.pack();
        if let Some(entry) = leaves.only() {
            *self = Self::One(Single::new(&entry, leaves.version()));
        }
    }

    /// The same as leaves. Without memory for that, everything is forgotten.
    fn leaves(&mut self) -> Result<&mut Leaves, NoMemory> {
        if let Self::One(single) = self {
            let (entry, version) = (single.entry(), single.version);
            *self = Self::Many(Leaves::new(version));
            if let Self::Many(leaves) = self {
                leaves.begin(&entry)?;
            }
        }
        match self {
            Self::One(_) => Err(NoMemory),
            Self::Many(leaves) => Ok(leaves),
        }
    }
}

/// The only entry of a file.
#[derive(Clone, Copy)]
pub(crate) struct Single {
    page: u32,
    frame: u32,
    count: u16,
    refused: bool,
    /// What the version of leaves goes on from, so that no cursor of earlier ones fits later ones.
    version: u32,
}

impl Single {
    const fn new(entry: &Entry, version: u32) -> Self {
        Self {
            page: entry.page as u32,
            frame: entry.frame as u32,
            count: entry.count as u16,
            refused: entry.refused,
            version,
        }
    }

    const fn entry(&self) -> Entry {
        Entry {
            page: self.page as u64,
            count: self.count as u64,
            frame: self.frame as u64,
            refused: self.refused,
        }
    }
}
