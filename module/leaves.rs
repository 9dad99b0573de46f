// SPDX-License-Identifier: GPL-2.0

//! Entries of one file, in packed leaves.

use crate::leaf::{Entry, Leaf, Spot, MAX_COUNT, MOST_ENTRIES};
use crate::list::{List, NoMemory};
use crate::ranges::Range;

/// A place among the entries of a file, for those who go through them in order. Any may be used at any
/// time; one that was left behind by a change finds its place again.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cursor {
    version: u32,
    leaf: usize,
    spot: Spot,
}

impl Cursor {
    /// At a single entry, or behind it. No leaves take it for their own.
    pub(crate) fn of_single(is_past: bool) -> Self {
        Self {
            leaf: usize::from(is_past),
            ..Self::default()
        }
    }

    /// Whether it is behind a single entry.
    pub(crate) const fn is_past_single(&self) -> bool {
        self.leaf != 0
    }
}

/// Any number of entries.
pub(crate) struct Leaves {
    /// In ascending order; none is empty.
    leaves: List<Leaf>,
    pages: u32,
    /// Counts changes.
    version: u32,
    /// The version that was packed last.
    packed: u32,
}

impl Leaves {
    /// None yet; the version goes on from one that cursors have seen.
    pub(crate) const fn new(version: u32) -> Self {
        let version = version.wrapping_add(1);
        Self {
            leaves: List::new(),
            pages: 0,
            version,
            packed: version,
        }
    }

    /// Changes with the entries.
    pub(crate) const fn version(&self) -> u32 {
        self.version
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// The first entry of all.
    pub(crate) fn begin(&mut self, entry: &Entry) -> Result<(), NoMemory> {
        self.push(entry)?;
        self.pages = entry.count as u32;
        Ok(())
    }

    /// The entry, if there is but one.
    pub(crate) fn only(&self) -> Option<Entry> {
        match &self.leaves[..] {
            [leaf] if leaf.len() == 1 => leaf.entries().next(),
            _ => None,
        }
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> u64 {
        u64::from(self.pages)
    }

    /// Bytes of memory behind this.
    pub(crate) fn bytes(&self) -> usize {
        self.leaves.bytes() + self.leaves.iter().map(Leaf::bytes).sum::<usize>()
    }

    /// The first entry that ends after `page`.
    pub(crate) fn seek(&self, page: u64, cursor: &mut Cursor) -> Option<Entry> {
        let near = cursor.version == self.version
            && cursor.spot.after() <= page
            && self
                .leaves
                .get(cursor.leaf)
                .is_some_and(|leaf| page < leaf.end());
        if !near {
            let leaf = self.leaves.partition_point(|leaf| leaf.end() <= page);
            *cursor = Cursor {
                version: self.version,
                leaf,
                ..Cursor::default()
            };
            cursor.spot = self.leaves.get(leaf)?.start();
        }
        let leaf = self.leaves.get(cursor.leaf)?;
        loop {
            let entry = leaf.get(&cursor.spot)?;
            if entry.end() > page {
                return Some(entry);
            }
            cursor.spot.pass(&entry);
        }
    }

    /// The entry behind `entry`, which must be what the last call with this cursor returned.
    #[inline(always)]
    pub(crate) fn next(&self, entry: &Entry, cursor: &mut Cursor) -> Option<Entry> {
        cursor.spot.pass(entry);
        if let Some(next) = self.leaves.get(cursor.leaf)?.get(&cursor.spot) {
            return Some(next);
        }
        cursor.leaf += 1;
        let leaf = self.leaves.get(cursor.leaf)?;
        cursor.spot = leaf.start();
        leaf.get(&cursor.spot)
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
        let mut pages = 0_u64;
        while let Some(leaf) = self.leaves.get(cursor.leaf) {
            let passed = leaf.pass_alike(&mut cursor.spot, things, &are_alike);
            pages = pages.wrapping_add(passed);
            let entry = leaf.get(&cursor.spot);
            if entry.is_some() {
                return (pages, entry);
            }
            cursor.leaf += 1;
            if let Some(next) = self.leaves.get(cursor.leaf) {
                cursor.spot = next.start();
            }
        }
        (pages, None)
    }

    /// Notes that `range` was reported at contiguous frames from `frame`. All must be below
    /// [`crate::leaf::MAX_PAGE`] and [`crate::leaf::MAX_FRAME`].
    pub(crate) fn record(&mut self, range: Range, frame: u64) -> Result<(), NoMemory> {
        if self
            .leaves
            .last()
            .is_none_or(|leaf| leaf.end() <= range.start)
        {
            return self.append(range, frame);
        }
        self.replace(range, Some(frame)).map(drop)
    }

    /// Forgets what was reported of `range`; returns the number of pages forgotten, which may be
    /// more than those of `range`.
    pub(crate) fn forget(&mut self, range: Range) -> u64 {
        let next = self.seek(range.start, &mut Cursor::default());
        if next.is_none_or(|entry| entry.page >= range.end) {
            return 0;
        }
        let before = self.pages;
        // Without memory all of the leaves concerned are gone.
        let _ = self.replace(range, None);
        u64::from(before - self.pages)
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.leaves.clear();
        self.pages = 0;
        self.version = self.version.wrapping_add(1);
    }

    /// Marks what is still tracked of a refused run. Marking is per entry: an entry that is
    /// only partly refused is reported again as a whole.
    pub(crate) fn refuse(&mut self, range: Range, frame: u64) {
        let mut at = range.start;
        while at < range.end {
            let mut cursor = Cursor::default();
            let entry = self.seek(at, &mut cursor);
            let Some(entry) = entry.filter(|entry| entry.page < range.end) else {
                return;
            };
            let same = entry.frame + range.start == frame + entry.page;
            if same && !entry.refused {
                self.mark(&entry, &cursor);
            }
            at = entry.end();
        }
    }

    fn mark(&mut self, entry: &Entry, cursor: &Cursor) {
        let leaf = self.leaves.get_mut(cursor.leaf);
        if leaf.is_some_and(|leaf| leaf.refuse(&cursor.spot)) {
            return;
        }
        let (from, to) = (cursor.leaf, cursor.leaf + 1);
        let refused = Entry {
            refused: true,
            ..*entry
        };
        let marked = self.decode(from, to).and_then(|mut entries| {
            if let Some(slot) = entries.iter_mut().find(|known| **known == *entry) {
                *slot = refused;
            }
            self.put(from, to, &entries)
        });
        if marked.is_err() {
            self.drop_leaves(from, to);
        }
    }

    fn append(&mut self, range: Range, frame: u64) -> Result<(), NoMemory> {
        let mut next = range.start;
        while next < range.end {
            let entry = Entry {
                page: next,
                count: (range.end - next).min(MAX_COUNT),
                frame: frame + (next - range.start),
                refused: false,
            };
            self.push(&entry)?;
            self.pages += entry.count as u32;
            next += entry.count;
        }
        Ok(())
    }

    /// Adds an entry behind all others.
    fn push(&mut self, entry: &Entry) -> Result<(), NoMemory> {
        self.version = self.version.wrapping_add(1);
        let Some(last) = self.leaves.last_mut() else {
            return self.leaves.push(Leaf::encode(&[*entry], 1)?.0);
        };
        if last.push(entry)? {
            return Ok(());
        }
        let from = self.leaves.len() - 1;
        let mut entries = self.decode(from, from + 1)?;
        push_joined(&mut entries, entry)?;
        let (leaf, taken) = Leaf::encode(&entries, MOST_ENTRIES)?;
        let rest = &entries[taken..];
        if !rest.is_empty() {
            self.leaves.push(Leaf::encode(rest, MOST_ENTRIES)?.0)?;
        }
        self.leaves[from] = leaf;
        Ok(())
    }

    /// Puts pages at contiguous frames, or none, in the place of what was reported of `range`.
    fn replace(&mut self, range: Range, frame: Option<u64>) -> Result<(), NoMemory> {
        // Neighbours that merely touch the range may join with it.
        let mut from = self.leaves.partition_point(|leaf| leaf.end() < range.start);
        let mut to = self
            .leaves
            .partition_point(|leaf| leaf.first() <= range.end);
        if from == to {
            // Between two leaves, of which one takes it.
            to = (to + 1).min(self.leaves.len());
            from = to.saturating_sub(1).min(from);
        }
        let changed = self.spliced(from, to, range, frame);
        let put = changed.and_then(|entries| self.absorb(from, to, entries));
        if put.is_err() {
            self.drop_leaves(from, to.min(self.leaves.len()));
        }
        put
    }

    /// The entries of some leaves, with `range` replaced.
    fn spliced(
        &self,
        from: usize,
        to: usize,
        range: Range,
        frame: Option<u64>,
    ) -> Result<List<Entry>, NoMemory> {
        let mut entries = List::new();
        let most = |index: usize| self.leaves.get(index).map_or(0, Leaf::len);
        let pages = frame.map_or(0, |_| range.end - range.start);
        let fresh = pages.div_ceil(MAX_COUNT) as usize;
        entries.reserve(most(from) + fresh + to.checked_sub(1).map_or(0, most))?;
        let before = Range {
            start: 0,
            end: range.start,
        };
        let after = Range {
            start: range.end,
            end: u64::MAX,
        };
        // What lies between the first and the last leaf is all within `range`.
        if let Some(leaf) = self.leaves.get(from).filter(|_| from < to) {
            let kept = leaf.entries().take_while(|entry| entry.page < range.start);
            for entry in kept {
                entries.push(entry.part(before))?;
            }
        }
        if let Some(frame) = frame {
            let mut next = range.start;
            while next < range.end {
                let entry = Entry {
                    page: next,
                    count: (range.end - next).min(MAX_COUNT),
                    frame: frame + (next - range.start),
                    refused: false,
                };
                push_joined(&mut entries, &entry)?;
                next += entry.count;
            }
        }
        if let Some(leaf) = to.checked_sub(1).and_then(|last| self.leaves.get(last)) {
            for entry in leaf.entries().skip_while(|entry| entry.end() <= range.end) {
                push_joined(&mut entries, &entry.part(after))?;
            }
        }
        Ok(entries)
    }

    /// Puts `entries` in the place of some leaves, together with the next leaf if one can hold
    /// both.
    fn absorb(
        &mut self,
        from: usize,
        mut to: usize,
        mut entries: List<Entry>,
    ) -> Result<(), NoMemory> {
        let few = |leaf: &&Leaf| entries.len() + leaf.len() <= MOST_TOGETHER;
        if let Some(next) = self.leaves.get(to).filter(few) {
            for entry in next.entries() {
                push_joined(&mut entries, &entry)?;
            }
            to += 1;
        }
        self.put(from, to, &entries)
    }

    fn decode(&self, from: usize, to: usize) -> Result<List<Entry>, NoMemory> {
        let mut entries = List::new();
        for leaf in &self.leaves[from..to] {
            entries.reserve(leaf.len())?;
            for entry in leaf.entries() {
                entries.push(entry)?;
            }
        }
        Ok(entries)
    }

    /// Puts `entries` in the place of some leaves. On failure nothing has changed.
    fn put(&mut self, from: usize, to: usize, entries: &[Entry]) -> Result<(), NoMemory> {
        let mut fresh = encode_all(entries, MOST_ENTRIES)?;
        if fresh.len() > 1 && fresh.len() > to - from {
            // Some room in each, as more may follow.
            let most = entries.len().div_ceil(fresh.len());
            fresh = encode_all(entries, most)?;
        }
        let more = fresh.len().saturating_sub(to - from);
        self.leaves.reserve(more)?;
        let old: u64 = count(&self.leaves[from..to]);
        let new: u64 = entries.iter().map(|entry| entry.count).sum();
        self.leaves.replace(from, to, fresh)?;
        self.pages = (self.pages() - old + new) as u32;
        self.version = self.version.wrapping_add(1);
        Ok(())
    }

    fn drop_leaves(&mut self, from: usize, to: usize) {
        self.pages -= count(&self.leaves[from..to]) as u32;
        self.leaves.remove(from, to);
        self.version = self.version.wrapping_add(1);
    }

    /// Fills leaves that changes have left half empty. Best done when many changes have been
    /// made and no more follow soon.
    pub(crate) fn pack(&mut self) {
        if self.packed == self.version {
            return;
        }
        let used: usize = self.leaves.iter().map(Leaf::used_bits).sum();
        let held: usize = self.leaves.iter().map(|leaf| leaf.bytes() * 8).sum();
        if self.leaves.len() > 1 && held - held / 8 > used {
            self.repack();
        }
        self.leaves.shrink();
        self.packed = self.version;
    }

    fn repack(&mut self) {
        let mut at = 0;
        while at + 1 < self.leaves.len() {
            let packed = self
                .decode(at, at + 2)
                .and_then(|entries| encode_all(&entries, MOST_ENTRIES))
                .and_then(|fresh| {
                    // Two that fit into one have become one, which the next may fill.
                    let step = fresh.len().min(2) - 1;
                    if fresh.len() <= 2 {
                        self.leaves.replace(at, at + 2, fresh)?;
                    }
                    Ok(step)
                });
            match packed {
                Ok(step) => at += step,
                Err(NoMemory) => break,
            }
        }
        self.version = self.version.wrapping_add(1);
    }
}

/// Leaves with fewer entries than this together become one.
const MOST_TOGETHER: usize = 64;

fn count(leaves: &[Leaf]) -> u64 {
    let entries = leaves.iter().flat_map(Leaf::entries);
    entries.map(|entry| entry.count).sum()
}

fn encode_all(mut entries: &[Entry], most: usize) -> Result<List<Leaf>, NoMemory> {
    let mut leaves = List::new();
    while !entries.is_empty() {
        let (leaf, taken) = Leaf::encode(entries, most)?;
        leaves.push(leaf)?;
        entries = &entries[taken..];
    }
    Ok(leaves)
}

/// Appends an entry, joining it with the last.
fn push_joined(entries: &mut List<Entry>, entry: &Entry) -> Result<(), NoMemory> {
    if let Some(last) = entries.last_mut() {
        if let Some(joined) = last.join(entry) {
            *last = joined;
            return Ok(());
        }
    }
    entries.push(*entry)
}
