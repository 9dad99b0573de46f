// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which huge pages of guest memory may be split.
//!
//! An overlay over a part of a huge page ends it: the guest's other pages in there are mapped one by
//! one from then on, which costs it misses of the TLB, and what the overlay hides is free. Whether
//! that is a good bargain is the operator's to say ([`SplitHugePages`]). Pages that could be shared,
//! and are not for the sake of a huge page, are *spared*. What is known of them here is forgotten
//! with the guest that reported them; nothing but the time of sharing depends on it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::mem;
use std::ops::Range;

use super::memory::Memory;
use crate::protocol::{FileSpan, SplitHugePages};
use crate::store::PAGE;

/// Huge pages of the processor; of bigger ones this is a part.
pub(super) const HUGE_PAGE: usize = 2 << 20;

/// Pages of a huge page that must wait to be shared until splitting it is worthwhile: an eighth.
pub const WORTHWHILE_PAGES: u32 = 64;

/// Pages of one huge page that a guest has reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    /// First page within the huge page.
    pub(super) first: u16,
    pub(super) pages: u16,
    /// File, by its number.
    pub(super) file: u32,
    /// First page within the file.
    pub(super) page: u64,
}

impl Waiting {
    /// Pages at `address`, all of them in one huge page.
    pub(super) fn at(address: usize, pages: usize, file: u32, page: u64) -> Self {
        let first = address % HUGE_PAGE / PAGE;
        debug_assert!(first + pages <= HUGE_PAGE / PAGE, "pages of one huge page");
        Self {
            first: first as u16,
            pages: pages as u16,
            file,
            page,
        }
    }

    fn range(&self) -> Range<usize> {
        let first = usize::from(self.first);
        first..first + usize::from(self.pages)
    }

    fn slice(&self, range: Range<usize>) -> Self {
        Self {
            first: range.start as u16,
            pages: range.len() as u16,
            page: self.page + (range.start - usize::from(self.first)) as u64,
            ..*self
        }
    }

    /// Appends what is left of this without `taken`.
    fn without(&self, taken: &Range<usize>, rest: &mut Vec<Self>) {
        let all = self.range();
        for part in [
            all.start..all.end.min(taken.start),
            all.start.max(taken.end)..all.end,
        ] {
            if !part.is_empty() {
                rest.push(self.slice(part));
            }
        }
    }
}

/// What waits in huge pages, and what the operator wants of them.
#[derive(Debug, Default)]
pub(super) struct HugePages {
    choice: SplitHugePages,
    /// By the number of the huge page in the address space; no two parts overlap.
    waiting: BTreeMap<usize, Vec<Waiting>>,
    by_file: HashMap<u32, BTreeSet<usize>>,
    spared: u64,
    again: Vec<Waiting>,
}

impl HugePages {
    /// Whether the huge page `huge` stays whole, though `reported` could be shared.
    fn spares(&mut self, huge: usize, reported: &[Waiting]) -> bool {
        let pages: u64 = reported.iter().map(|it| u64::from(it.pages)).sum();
        match self.choice {
            SplitHugePages::Always => return false,
            SplitHugePages::Never => {
                self.spared += pages;
                return true;
            }
            SplitHugePages::Worthwhile => {}
        }
        let mut before = self.take(huge);
        for new in reported {
            let mut rest = Vec::with_capacity(before.len() + 1);
            before
                .iter()
                .for_each(|old| old.without(&new.range(), &mut rest));
            before = rest;
        }
        let mut all = before.clone();
        for new in reported {
            // A guest may have told of the same page twice.
            let mut rest = Vec::with_capacity(all.len() + 1);
            all.iter()
                .for_each(|old| old.without(&new.range(), &mut rest));
            rest.push(*new);
            all = rest;
        }
        if all.iter().map(|it| u32::from(it.pages)).sum::<u32>() >= WORTHWHILE_PAGES {
            self.again.extend(before);
            return false;
        }
        self.spared += pages;
        for one in &all {
            self.by_file.entry(one.file).or_default().insert(huge);
        }
        self.waiting.insert(huge, all);
        true
    }

    /// Takes out what waits in a huge page.
    fn take(&mut self, huge: usize) -> Vec<Waiting> {
        let taken = self.waiting.remove(&huge).unwrap_or_default();
        for one in &taken {
            self.unlink(one.file, huge);
        }
        taken
    }

    fn unlink(&mut self, file: u32, huge: usize) {
        if let Some(places) = self.by_file.get_mut(&file) {
            places.remove(&huge);
            if places.is_empty() {
                self.by_file.remove(&file);
            }
        }
    }

    /// The guest does not have these pages of a file any more.
    fn forget(&mut self, file: u32, pages: &Range<u64>) {
        let places = self.by_file.get(&file).cloned().unwrap_or_default();
        for huge in places {
            let Some(waiting) = self.waiting.get_mut(&huge) else {
                continue;
            };
            let mut rest = Vec::with_capacity(waiting.len());
            for one in waiting.iter() {
                let of_file = one.page..one.page + u64::from(one.pages);
                let (start, end) = (pages.start.max(of_file.start), pages.end.min(of_file.end));
                if one.file != file || start >= end {
                    rest.push(*one);
                    continue;
                }
                let place = |page: u64| usize::from(one.first) + (page - one.page) as usize;
                one.without(&(place(start)..place(end)), &mut rest);
            }
            let has_more = rest.iter().any(|it| it.file == file);
            if rest.is_empty() {
                self.waiting.remove(&huge);
            } else {
                *waiting = rest;
            }
            if !has_more {
                self.unlink(file, huge);
            }
        }
    }

    /// Numbers of files that are known here.
    pub(super) fn files(&self) -> impl Iterator<Item = u32> + '_ {
        let again = self.again.iter().map(|it| it.file);
        self.by_file.keys().copied().chain(again)
    }

    /// Forgets everything that waits in a range of addresses.
    fn clear(&mut self, range: &Range<usize>) {
        let inside = range.start.div_ceil(HUGE_PAGE)..range.end.div_ceil(HUGE_PAGE);
        let gone: Vec<usize> = self.waiting.range(inside).map(|(huge, _)| *huge).collect();
        for huge in gone {
            self.take(huge);
        }
    }
}

/// What became of runs beside their outcomes, in which spared pages count as remembered.
#[derive(Debug, Default)]
pub struct Spared {
    /// Pages spared.
    pub pages: u64,
    /// Pages spared earlier, which the guest is to report again, as they can be shared now.
    pub again: Vec<FileSpan>,
}

impl Memory {
    /// Whether to split huge pages, from now on. Pages spared so far are shared when the guest
    /// reports them again, which it is to be asked for if this returns true: the choice is
    /// another one.
    pub fn set_split_huge_pages(&mut self, choice: SplitHugePages) -> bool {
        if choice != SplitHugePages::Always && !self.pagemap.tells_huge_pages() {
            log::warn!(
                "this kernel cannot tell which memory is in huge pages (Linux 6.7 can): they \
                 are split as if that were set to always"
            );
        }
        self.forget_spared();
        mem::replace(&mut self.huge_pages.choice, choice) != choice
    }

    /// Whether any huge page is to stay whole.
    pub(super) fn spares_huge_pages(&self) -> bool {
        self.huge_pages.choice != SplitHugePages::Always
    }

    /// Whether the huge page that `reported` lies in stays whole, as which it is mapped now.
    pub(super) fn spares(&mut self, huge: usize, reported: &[Waiting]) -> bool {
        reported.first().is_some_and(|one| self.is_whole(huge, one))
            && self.huge_pages.spares(huge, reported)
    }

    fn is_whole(&self, huge: usize, one: &Waiting) -> bool {
        let address = huge * HUGE_PAGE;
        // The store's pages may be huge as well.
        if self.is_cut(&(address..address + HUGE_PAGE)) {
            return false;
        }
        let page = address + usize::from(one.first) * PAGE;
        self.pagemap
            .huge_now(&(page..page + PAGE))
            .is_ok_and(|pages| pages > 0)
    }

    /// What was spared since this was last asked.
    pub fn take_spared(&mut self) -> Spared {
        let again = mem::take(&mut self.huge_pages.again);
        Spared {
            pages: mem::take(&mut self.huge_pages.spared),
            again: self.spans(&again),
        }
    }

    /// Appends pages spared for huge pages that somebody else has split since, of some from the
    /// one numbered `from` on; the number of the next, if there are more.
    pub(super) fn take_split(&mut self, from: usize, into: &mut Vec<FileSpan>) -> Option<usize> {
        /// Huge pages looked at while others wait for the lock: some hundred microseconds.
        const MOST: usize = 256;
        let behind = self.huge_pages.waiting.range(from..);
        let mut places: Vec<usize> = behind.take(MOST + 1).map(|(huge, _)| *huge).collect();
        let next = places.get(MOST).copied();
        places.truncate(MOST);
        for huge in places {
            let waiting = &self.huge_pages.waiting[&huge];
            if waiting.first().is_some_and(|one| !self.is_whole(huge, one)) {
                let split = self.huge_pages.take(huge);
                into.extend(self.spans(&split));
            }
        }
        next
    }

    /// The guest does not have these file pages any more.
    pub(super) fn forget_waiting(&mut self, span: &FileSpan) {
        let Some(file) = self.files.known(&span.file) else {
            return;
        };
        let end = match span.pages {
            0 => u64::MAX,
            pages => span.page.saturating_add(u64::from(pages)),
        };
        self.huge_pages.forget(file, &(span.page..end));
    }

    /// The guest has another memory, or reports all of it again.
    pub(super) fn forget_spared(&mut self) {
        self.huge_pages.clear(&(0..usize::MAX));
        self.huge_pages.again.clear();
    }

    /// Guest memory at `range` is none any more.
    pub(super) fn forget_spared_at(&mut self, range: &Range<usize>) {
        let first = range.start / HUGE_PAGE * HUGE_PAGE;
        self.huge_pages.clear(&(first..range.end));
    }

    fn spans(&self, waiting: &[Waiting]) -> Vec<FileSpan> {
        let span = |one: &Waiting| FileSpan {
            file: self.file_key(one.file),
            page: one.page,
            pages: u32::from(one.pages),
        };
        waiting.iter().map(span).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn huge_pages(choice: SplitHugePages) -> HugePages {
        HugePages {
            choice,
            ..HugePages::default()
        }
    }

    /// Pages of a huge page, as the same pages of a file, counted from 1000.
    fn part(first: u16, pages: u16, file: u32) -> Waiting {
        Waiting {
            first,
            pages,
            file,
            page: 1000 + u64::from(first),
        }
    }

    #[test]
    fn never_spares_however_much_there_is_and_always_nothing() {
        let mut never = huge_pages(SplitHugePages::Never);
        assert!(never.spares(1, &[part(0, 512, 1)]));
        assert_eq!((never.spared, never.waiting.len()), (512, 0));
        let mut always = huge_pages(SplitHugePages::Always);
        assert!(!always.spares(1, &[part(0, 1, 1)]));
        assert_eq!(always.spared, 0);
    }

    #[test]
    fn an_eighth_is_worthwhile_and_what_waited_is_asked_for_again() {
        let mut pages = huge_pages(SplitHugePages::Worthwhile);
        assert!(pages.spares(1, &[part(0, 40, 1), part(100, 20, 2)]));
        // Another huge page is another matter.
        assert!(pages.spares(2, &[part(0, 63, 1)]));
        // Three new ones, and one that waits already.
        assert!(pages.spares(1, &[part(39, 4, 1)]));
        assert_eq!(pages.again, []);
        assert_eq!(pages.spared, 60 + 63 + 4);
        assert!(!pages.spares(1, &[part(511, 1, 1), part(0, 2, 1)]));
        let expected = [part(100, 20, 2), part(2, 37, 1), part(39, 4, 1)];
        let mut again = pages.again.clone();
        again.sort_by_key(|it| (it.file != 2, it.first));
        assert_eq!(again, expected);
        assert_eq!(pages.waiting.len(), 1);
        // It begins anew.
        assert!(pages.spares(1, &[part(0, 63, 1)]));
    }

    #[test]
    fn pages_told_twice_count_once() {
        let mut pages = huge_pages(SplitHugePages::Worthwhile);
        for _ in 0..3 {
            assert!(pages.spares(1, &[part(0, 40, 1), part(10, 40, 2)]));
        }
        assert_eq!(
            pages.waiting[&1],
            [part(0, 10, 1), part(10, 40, 2)],
            "the last word counts"
        );
    }

    #[test]
    fn what_the_guest_has_no_more_does_not_wait() {
        let mut pages = huge_pages(SplitHugePages::Worthwhile);
        pages.spares(1, &[part(0, 40, 1), part(50, 10, 2)]);
        pages.spares(2, &[part(0, 10, 1)]);
        pages.forget(1, &(1010..1020));
        assert_eq!(
            pages.waiting[&1],
            [part(0, 10, 1), part(20, 20, 1), part(50, 10, 2)]
        );
        assert!(!pages.waiting.contains_key(&3));
        assert_eq!(pages.waiting[&2], [part(0, 10, 1)]);
        pages.forget(1, &(0..u64::MAX));
        assert_eq!(pages.waiting[&1], [part(50, 10, 2)]);
        assert_eq!((pages.waiting.len(), pages.by_file.len()), (1, 1));
        pages.clear(&(HUGE_PAGE..HUGE_PAGE + 1));
        assert_eq!((pages.waiting.len(), pages.by_file.len()), (0, 0));
    }
}
