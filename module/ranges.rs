// SPDX-License-Identifier: GPL-2.0

//! Sets of page ranges: what of a file has been looked at in this pass already.

use crate::list::{List, NoMemory};

/// Pages `start..end`, never empty where it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Range {
    pub(crate) const fn is_empty(self) -> bool {
        self.start >= self.end
    }
}

/// Disjoint ranges in ascending order that do not touch each other.
pub(crate) struct Ranges {
    list: List<Range>,
}

impl Ranges {
    pub(crate) const fn new() -> Self {
        Self { list: List::new() }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.list.bytes()
    }

    #[cfg(test)]
    pub(crate) fn as_slice(&self) -> &[Range] {
        &self.list
    }

    /// The first part of `range` that is not in the set; empty when all of it is.
    pub(crate) fn first_missing(&self, range: Range) -> Range {
        let i = self.list.partition_point(|known| known.end <= range.start);
        let mut missing = range;
        if let Some(known) = self.list.get(i) {
            if known.start <= missing.start {
                missing.start = known.end.min(range.end);
            }
            let next = if known.start > missing.start {
                i
            } else {
                i + 1
            };
            if let Some(next) = self.list.get(next) {
                missing.end = missing.end.min(next.start.max(missing.start));
            }
        }
        missing
    }

    /// Adds `range`, joining it with all that it overlaps or touches.
    pub(crate) fn insert(&mut self, range: Range) -> Result<(), NoMemory> {
        if range.is_empty() {
            return Ok(());
        }
        let from = self.list.partition_point(|known| known.end < range.start);
        let to = self.list.partition_point(|known| known.start <= range.end);
        let mut joined = range;
        if from < to {
            joined.start = joined.start.min(self.list[from].start);
            joined.end = joined.end.max(self.list[to - 1].end);
        }
        self.list.splice(from, to, &[joined])
    }
}

/// Sorts ranges that belong to keys and joins those of one key that overlap or touch. Returns
/// how many are left at the front of `items`; the rest is to be dropped by the caller.
pub(crate) fn join<T>(
    items: &mut [T],
    key: impl Fn(&T) -> usize,
    range: impl Fn(&mut T) -> &mut Range,
) -> usize {
    // Shell's sort: short, without recursion or scratch memory, and fast enough for a batch.
    let order = |item: &mut T| (key(item), range(item).start);
    for gap in [57, 23, 10, 4, 1] {
        for i in gap..items.len() {
            let mut j = i;
            while j >= gap && order(&mut items[j - gap]) > order(&mut items[j]) {
                items.swap(j - gap, j);
                j -= gap;
            }
        }
    }
    let mut kept = 0;
    for i in 0..items.len() {
        let next = *range(&mut items[i]);
        if next.is_empty() {
            continue;
        }
        if kept > 0 && key(&items[kept - 1]) == key(&items[i]) {
            let last = range(&mut items[kept - 1]);
            if next.start <= last.end {
                last.end = last.end.max(next.end);
                continue;
            }
        }
        items.swap(kept, i);
        kept += 1;
    }
    kept
}
