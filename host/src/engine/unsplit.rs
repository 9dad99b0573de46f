// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Huge pages that overlays lie over in part, and that are not split yet.
//!
//! What an overlay hides of a huge page is free when the huge page is split, or when all of it is
//! hidden. The latter costs half as much (`docs/host-cost.md`), and where a guest reports a file in
//! one piece that is what happens, an overlay after the other. So splitting waits until no overlay
//! has come for a moment, and is done for those huge pages of which a part is still seen.

#![expect(
    unsafe_code,
    reason = "gives guest memory ranges to the operations of `mapped`"
)]

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::huge_pages::HUGE_PAGE;
use super::mapped;
use super::memory::Memory;
use super::sharing::Sharing;
use crate::store::PAGE;

/// How long no overlay has come when the last huge pages are split.
const MOMENT: Duration = Duration::from_millis(20);

/// Most huge pages that wait: 256 MiB that the host may have to hold twice meanwhile. A host short
/// of memory splits what waits by itself.
const MOST: usize = 128;

/// Huge pages in the order in which overlays first came, by their number in the address space.
#[derive(Debug, Default)]
pub(super) struct Unsplit {
    order: VecDeque<usize>,
    known: HashSet<usize>,
    /// When the last overlay came.
    last: Option<Instant>,
}

impl Unsplit {
    /// An overlay has come over `range`.
    pub(super) fn note(&mut self, range: &Range<usize>) {
        for huge in range.start / HUGE_PAGE..range.end.div_ceil(HUGE_PAGE) {
            if self.known.insert(huge) {
                self.order.push_back(huge);
            }
        }
        self.last = Some(Instant::now());
    }

    fn is_at_rest(&self) -> bool {
        self.last.is_none_or(|last| last.elapsed() >= MOMENT)
    }

    fn take(&mut self) -> Option<usize> {
        let huge = self.order.pop_front()?;
        self.known.remove(&huge);
        Some(huge)
    }
}

/// Whether a huge page is split by a piece that is left of it, on a kernel of this release. Before
/// 6.9 one whose first page was hidden was taken for another process's, and stayed whole.
pub(super) fn splits_by_rest(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next().and_then(|it| it.parse::<u32>().ok());
    let version = next().zip(next());
    version.is_some_and(|version| version >= (6, 9))
}

impl Memory {
    /// Has it split huge pages before each overlay, as older kernels need it, for tests.
    #[doc(hidden)]
    pub fn split_at_once(&mut self) {
        self.splits_by_rest = false;
    }

    /// Splits one huge page of those that wait, if too many do, or all are to be split; whether there
    /// may be another.
    fn split_one(&mut self, all: bool) -> bool {
        if !all && self.unsplit.order.len() <= MOST {
            return false;
        }
        let Some(huge) = self.unsplit.take() else {
            return false;
        };
        let huge = huge * HUGE_PAGE..(huge + 1) * HUGE_PAGE;
        for ready in self.ready_ranges() {
            let here = huge.start.max(ready.start)..huge.end.min(ready.end);
            if here.is_empty() {
                continue;
            }
            // Of a folio that is seen in part, one page at least lies beside what hides the rest.
            for rest in self.not_cut(&here) {
                let (first, last) = (rest.start, rest.end - PAGE);
                for page in [first, last].into_iter().take(rest.len() / PAGE) {
                    // SAFETY: part of a region, which is mapped guest memory.
                    unsafe { mapped::split_huge_pages(&(page..page + PAGE)) };
                }
            }
        }
        true
    }

    /// What of `range` is neither an overlay nor was one.
    fn not_cut(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let overlays = self.overlays.in_range(range);
        let mut cut: Vec<_> = overlays
            .map(|(at, overlay)| at..at + overlay.pages as usize * PAGE)
            .chain(self.written.in_range(range).into_iter().map(|(it, _)| it))
            .collect();
        cut.sort_unstable_by_key(|it| it.start);
        let mut rest = Vec::with_capacity(cut.len() + 1);
        let mut at = range.start;
        for it in cut {
            rest.push(at..it.start);
            at = it.end;
        }
        rest.push(at..range.end);
        rest.retain(|it| !it.is_empty());
        rest
    }
}

impl Sharing {
    /// Splits the huge pages that overlays hide a part of, so that this part is free, as soon as no
    /// overlay has come for a moment; some of them before, if they are many. Whether some wait still:
    /// then this is to be called again in a moment. [`super::Guest::progress`] does all of that.
    pub fn split_cut(&self) -> bool {
        let at_rest = self.memory().unsplit.is_at_rest();
        while self.memory().split_one(at_rest) {}
        !self.memory().unsplit.order.is_empty()
    }

    /// As [`Sharing::split_cut`], without waiting for anything: before an undo, after which not every
    /// piece that is left of a huge page has a border by which it is found.
    pub fn split_all_cut(&self) {
        while self.memory().split_one(true) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_split_by_what_is_left_are_known_by_their_release() {
        let do_so = [
            "6.9.0",
            "6.12.57+deb13-amd64",
            "6.18.44",
            "7.3.4",
            "10.0-rc1",
        ];
        assert!(do_so.into_iter().all(splits_by_rest));
        let others = ["6.8.12", "6.1.0-41-amd64", "5.15", "", "x"];
        assert!(!others.into_iter().any(splits_by_rest));
    }

    #[test]
    fn huge_pages_wait_once_and_in_the_order_of_their_first_overlays() {
        let mut unsplit = Unsplit::default();
        for start in [7 * HUGE_PAGE + PAGE, 3 * HUGE_PAGE, 7 * HUGE_PAGE] {
            unsplit.note(&(start..start + PAGE));
        }
        unsplit.note(&(4 * HUGE_PAGE - PAGE..4 * HUGE_PAGE + PAGE));
        assert!(!unsplit.is_at_rest());
        let all: Vec<usize> = std::iter::from_fn(|| unsplit.take()).collect();
        assert_eq!(all, [7, 3, 4]);
        unsplit.note(&(3 * HUGE_PAGE..3 * HUGE_PAGE + PAGE));
        assert_eq!(unsplit.take(), Some(3));
    }
}
