// SPDX-License-Identifier: GPL-2.0

//! What has been reported: (file, page) → frame, in eight bytes for up to 256 pages that are
//! contiguous in file and memory.
//!
//! Nothing here owns or touches a page; an entry is a memory of a report, no more.

use crate::list::{List, NoMemory};
use crate::ranges::{Range, Ranges};

/// Pages of a file at or beyond this index are not reported (256 GiB into a file).
pub(crate) const MAX_PAGE: u64 = 1 << PAGE_BITS;
/// Frames at or beyond this number are not reported (1 TiB of guest memory).
pub(crate) const MAX_FRAME: u64 = 1 << FRAME_BITS;

const PAGE_BITS: u32 = 26;
const FRAME_BITS: u32 = 28;
const COUNT_BITS: u32 = 8;
const MAX_COUNT: u64 = 1 << COUNT_BITS;

/// `page << 37 | frame << 9 | (count - 1) << 1 | refused`: ordered by page when ordered as a
/// number.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry(u64);

impl Entry {
    const fn new(page: u64, frame: u64, count: u64, refused: bool) -> Self {
        Self(
            page << (FRAME_BITS + COUNT_BITS + 1)
                | frame << (COUNT_BITS + 1)
                | (count - 1) << 1
                | refused as u64,
        )
    }

    const fn page(self) -> u64 {
        self.0 >> (FRAME_BITS + COUNT_BITS + 1)
    }

    const fn frame(self) -> u64 {
        self.0 >> (COUNT_BITS + 1) & (MAX_FRAME - 1)
    }

    const fn count(self) -> u64 {
        (self.0 >> 1 & (MAX_COUNT - 1)) + 1
    }

    const fn refused(self) -> bool {
        self.0 & 1 != 0
    }

    const fn end(self) -> u64 {
        self.page() + self.count()
    }

    /// The entry's part within `range`, which it must overlap.
    fn part(self, range: Range) -> Self {
        let start = self.page().max(range.start);
        let end = self.end().min(range.end);
        Self::new(
            start,
            self.frame() + (start - self.page()),
            end - start,
            self.refused(),
        )
    }
}

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
pub(crate) struct Pages {
    entries: List<Entry>,
    pages: u64,
}

impl Pages {
    pub(crate) const fn new() -> Self {
        Self {
            entries: List::new(),
            pages: 0,
        }
    }

    /// Number of pages.
    pub(crate) const fn pages(&self) -> u64 {
        self.pages
    }

    /// Index of the first entry that ends after `page`. `hint` is where it was last time.
    fn seek(&self, page: u64, hint: usize) -> usize {
        for i in [hint, hint + 1] {
            let before = i == 0 || self.entries.get(i - 1).is_some_and(|e| e.end() <= page);
            if before && self.entries.get(i).is_some_and(|e| e.end() > page) {
                return i;
            }
        }
        self.entries.partition_point(|entry| entry.end() <= page)
    }

    /// Compares pages found at contiguous frames from `frame` with what was reported, and
    /// returns the first piece of one state. `cursor` starts at 0 and stays with the caller.
    pub(crate) fn compare(
        &self,
        range: Range,
        frame: u64,
        retry: bool,
        cursor: &mut usize,
    ) -> Piece {
        let i = self.seek(range.start, *cursor);
        *cursor = i;
        let Some(entry) = self.entries.get(i).filter(|entry| entry.page() < range.end) else {
            return Piece {
                range,
                state: PieceState::New,
            };
        };
        if entry.page() > range.start {
            let range = Range {
                start: range.start,
                end: entry.page(),
            };
            return Piece {
                range,
                state: PieceState::New,
            };
        }
        let state = if entry.frame() + (range.start - entry.page()) != frame {
            PieceState::Moved
        } else if retry && entry.refused() {
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

    /// Notes that `range` was reported at contiguous frames from `frame`. All must be below
    /// [`MAX_PAGE`] and [`MAX_FRAME`].
    pub(crate) fn record(&mut self, range: Range, frame: u64) -> Result<(), NoMemory> {
        // Two entries may remain of what is cut, and one per 256 pages is new.
        self.entries
            .reserve(3 + ((range.end - range.start) / MAX_COUNT) as usize)?;
        self.forget(range);
        let mut next = range.start;
        while next < range.end {
            let count = (range.end - next).min(MAX_COUNT);
            self.insert(Entry::new(next, frame + (next - range.start), count, false))?;
            next += count;
        }
        Ok(())
    }

    /// Inserts an entry where there is none, joining it with its neighbours.
    fn insert(&mut self, mut entry: Entry) -> Result<(), NoMemory> {
        let mut from = self.entries.partition_point(|e| e.page() < entry.page());
        let mut to = from;
        self.pages += entry.count();
        if from > 0 {
            if let Some(joined) = join(self.entries[from - 1], entry) {
                from -= 1;
                entry = joined;
            }
        }
        if let Some(joined) = self.entries.get(to).and_then(|&next| join(entry, next)) {
            to += 1;
            entry = joined;
        }
        self.entries.splice(from, to, &[entry])
    }

    /// Forgets what was reported of `range`; returns the number of pages forgotten.
    ///
    /// Without memory for the second half of a split entry that half is forgotten too, which
    /// costs a repeated report and nothing else.
    pub(crate) fn forget(&mut self, range: Range) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let from = self.seek(range.start, 0);
        let to = self
            .entries
            .partition_point(|entry| entry.page() < range.end);
        if from >= to {
            return 0;
        }
        let (first, last) = (self.entries[from], self.entries[to - 1]);
        let gone: u64 = self.entries[from..to]
            .iter()
            .map(|entry| entry.part(range).count())
            .sum();
        let mut rest = [first; 2];
        let mut count = 0;
        if first.page() < range.start {
            rest[count] = first.part(Range {
                start: first.page(),
                end: range.start,
            });
            count += 1;
        }
        if last.end() > range.end {
            rest[count] = last.part(Range {
                start: range.end,
                end: last.end(),
            });
            count += 1;
        }
        self.pages -= gone;
        if self.entries.splice(from, to, &rest[..count]).is_err() {
            self.pages -= rest[count - 1].count();
            let _ = self.entries.splice(from, to, &rest[..count - 1]);
        }
        gone
    }

    /// Whether anything was reported of `range`.
    pub(crate) fn has_any(&self, range: Range) -> bool {
        let next = self.entries.get(self.seek(range.start, 0));
        next.is_some_and(|entry| entry.page() < range.end)
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.pages = 0;
    }

    /// Marks what is still tracked of a refused run. Marking is per entry: an entry that is
    /// only partly refused is reported again as a whole.
    pub(crate) fn refuse(&mut self, range: Range, frame: u64) {
        let from = self.seek(range.start, 0);
        let to = self
            .entries
            .partition_point(|entry| entry.page() < range.end);
        for entry in self.entries.get_mut(from..to).unwrap_or_default() {
            let same = entry.frame() + range.start == frame + entry.page();
            if same {
                entry.0 |= 1;
            }
        }
    }
}

/// Joins two entries when the second continues the first.
fn join(first: Entry, second: Entry) -> Option<Entry> {
    let count = first.count() + second.count();
    let follows = first.end() == second.page()
        && first.frame() + first.count() == second.frame()
        && first.refused() == second.refused();
    (follows && count <= MAX_COUNT)
        .then(|| Entry::new(first.page(), first.frame(), count, first.refused()))
}

/// Life of a file id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileState {
    /// Free to be used.
    Free,
    /// A file has it; the host has not been told which.
    Unannounced,
    /// The host knows the file.
    Announced,
    /// Retracted; free when the host has acknowledged that.
    Retired,
}

/// One file that is or was mapped.
pub(crate) struct File {
    /// Address of the inode: finds the file, proves nothing.
    key: usize,
    /// Hash of its identity: tells a changed file or a reused address.
    stamp: u64,
    /// What was reported.
    pub(crate) pages: Pages,
    /// What was looked at in pass `seen`.
    covered: Ranges,
    /// Last pass that found it mapped.
    seen: u32,
    /// Refused pages are tried again in this pass.
    pub(crate) retry_at: u32,
    /// Doublings of the time between tries.
    pub(crate) backoff: u8,
    pub(crate) state: FileState,
}

const FREE: File = File {
    key: 0,
    stamp: 0,
    pages: Pages::new(),
    covered: Ranges::new(),
    seen: 0,
    retry_at: 0,
    backoff: 0,
    state: FileState::Free,
};

/// A slot of the hash index that holds no file.
const NONE: u32 = u32::MAX;

/// All files, by id; found by key.
pub(crate) struct Tracker {
    files: List<File>,
    free: List<u32>,
    index: List<u32>,
    live: usize,
    most: usize,
}

impl Tracker {
    /// A tracker for at most `most` files.
    pub(crate) const fn new(most: usize) -> Self {
        Self {
            files: List::new(),
            free: List::new(),
            index: List::new(),
            live: 0,
            most,
        }
    }

    /// The file with this id, if the id is in use.
    pub(crate) fn get_mut(&mut self, id: u32) -> Option<&mut File> {
        self.files
            .get_mut(id as usize)
            .filter(|file| file.state != FileState::Free)
    }

    /// Files that are tracked now.
    pub(crate) const fn files(&self) -> usize {
        self.live
    }

    /// One more than the largest id ever used.
    pub(crate) fn ids(&self) -> u32 {
        self.files.len() as u32
    }

    /// Pages that are tracked now.
    pub(crate) fn pages(&self) -> u64 {
        self.files.iter().map(|file| file.pages.pages()).sum()
    }

    /// Bytes of memory in use.
    pub(crate) fn bytes(&self) -> usize {
        let inner = |file: &File| file.pages.entries.bytes() + file.covered.bytes();
        self.files.bytes()
            + self.free.bytes()
            + self.index.bytes()
            + self.files.iter().map(inner).sum::<usize>()
    }

    /// Finds a file.
    pub(crate) fn find(&self, key: usize) -> Option<u32> {
        if self.index.is_empty() {
            return None;
        }
        match self.index[self.slot(key)] {
            NONE => None,
            id => Some(id),
        }
    }

    /// Adds a file that [`Tracker::find`] does not find. `None` when there is no room.
    pub(crate) fn add(&mut self, key: usize, stamp: u64) -> Option<u32> {
        // At most three quarters full, so that probing ends.
        if (self.live + 1) * 4 > self.index.len() * 3 {
            self.rehash().ok()?;
        }
        let id = match self.free.pop() {
            Some(id) => id,
            None if self.files.len() < self.most => {
                // Room to free every id, so that freeing cannot fail.
                self.free.reserve(self.files.len() + 1).ok()?;
                self.files.push(FREE).ok()?;
                self.files.len() as u32 - 1
            }
            None => return None,
        };
        self.files[id as usize] = File {
            key,
            stamp,
            state: FileState::Unannounced,
            ..FREE
        };
        let slot = self.slot(key);
        self.index[slot] = id;
        self.live += 1;
        Some(id)
    }

    /// Whether the file is the one that was added with this stamp.
    pub(crate) fn is_current(&self, id: u32, stamp: u64) -> bool {
        self.files[id as usize].stamp == stamp
    }

    /// Starts or goes on with a file in a pass and returns the first part of `range` that has
    /// not been looked at in it.
    pub(crate) fn uncovered(&mut self, id: u32, pass: u32, range: Range) -> Range {
        let file = &mut self.files[id as usize];
        if file.seen != pass {
            file.seen = pass;
            file.covered.clear();
        }
        file.covered.first_missing(range)
    }

    /// Notes that `range` has been looked at in this pass. Without memory it may be looked at
    /// twice.
    pub(crate) fn cover(&mut self, id: u32, range: Range) {
        let _ = self.files[id as usize].covered.insert(range);
    }

    /// A file that no pass has found for more than `passes`, from id `from` on.
    pub(crate) fn next_unseen(&mut self, from: u32, pass: u32, passes: u32) -> Option<u32> {
        (from..self.ids()).find(|&id| {
            let file = &mut self.files[id as usize];
            if file.seen != pass {
                file.covered.clear();
            }
            let live = matches!(file.state, FileState::Unannounced | FileState::Announced);
            live && pass.wrapping_sub(file.seen) > passes
        })
    }

    /// Drops what only the pass that has ended needed.
    pub(crate) fn end_of_pass(&mut self) {
        for file in self.files.iter_mut() {
            file.covered.clear();
        }
    }

    /// Forgets a file. Its id stays taken until [`Tracker::release`].
    pub(crate) fn retire(&mut self, id: u32) {
        let Some(file) = self.files.get_mut(id as usize) else {
            return;
        };
        if matches!(file.state, FileState::Free | FileState::Retired) {
            return;
        }
        let key = file.key;
        file.pages.clear();
        file.covered.clear();
        file.state = FileState::Retired;
        self.live -= 1;
        self.unindex(key);
    }

    /// Frees the id of a retired file.
    pub(crate) fn release(&mut self, id: u32) {
        if let Some(file) = self.files.get_mut(id as usize) {
            if file.state == FileState::Retired {
                file.state = FileState::Free;
                // Room was reserved when the id was made.
                let _ = self.free.push(id);
            }
        }
    }

    /// Forgets all that was reported and keeps the files.
    pub(crate) fn forget_pages(&mut self) {
        for file in self.files.iter_mut() {
            file.pages.clear();
            file.backoff = 0;
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.most);
    }

    /// Where `key` is in the index, or where it would go.
    fn slot(&self, key: usize) -> usize {
        let mask = self.index.len() - 1;
        let mut slot = hash(key) & mask;
        loop {
            match self.index[slot] {
                NONE => return slot,
                id if self.files[id as usize].key == key => return slot,
                _ => slot = (slot + 1) & mask,
            }
        }
    }

    /// Removes `key` and closes the gap it leaves.
    fn unindex(&mut self, key: usize) {
        let mask = self.index.len() - 1;
        let mut hole = self.slot(key);
        let mut next = hole;
        loop {
            self.index[hole] = NONE;
            loop {
                next = (next + 1) & mask;
                let id = self.index[next];
                if id == NONE {
                    return;
                }
                let home = hash(self.files[id as usize].key) & mask;
                // It may move into the hole when its home is not between the two.
                if next.wrapping_sub(home) & mask >= next.wrapping_sub(hole) & mask {
                    self.index[hole] = id;
                    hole = next;
                    break;
                }
            }
        }
    }

    fn rehash(&mut self) -> Result<(), NoMemory> {
        self.index
            .fill(((self.live + 1) * 2).next_power_of_two().max(16), NONE)?;
        for id in 0..self.ids() {
            let file = &self.files[id as usize];
            if matches!(file.state, FileState::Unannounced | FileState::Announced) {
                let slot = self.slot(file.key);
                self.index[slot] = id;
            }
        }
        Ok(())
    }
}

/// Spreads addresses, whose low bits are all alike.
const fn hash(key: usize) -> usize {
    (key as u64 >> 3)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_right(32) as usize
}
