// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Overlays that are worth nothing any more become ordinary memory.
//!
//! A page on an overlay is worth something while it lies on a store page that somebody else has
//! too. The rest costs no memory of its own, but mappings and store pages: an overlay of which
//! little is worth something goes as a whole, others lose what is worthless at an end beside
//! ordinary memory, with which it becomes one mapping. What lies between overlays, or in the middle
//! of one, stays: to cut it out costs mappings and brings nothing.

use std::io;
use std::ops::Range;

use roaring::RoaringBitmap;

use super::memory::WINDOW_PAGES;
use super::overlays::Overlay;
use super::pagemap::Pagemap;
use super::sharing::Sharing;
use crate::protocol::{FileSpan, StoreSpan};
use crate::store::PAGE;

/// An overlay goes as a whole when no more than one page in so many is worth something.
const WORTHLESS: usize = 8;

/// Tidies up. `alone` are store pages that no other process has been granted. Returns file pages
/// that were turned back though the guest has not written them: the store knows nothing of them
/// afterwards, so the guest is to report them again.
pub fn tidy(sharing: &Sharing, alone: &[StoreSpan]) -> io::Result<Vec<FileSpan>> {
    let (overlays, alone) = {
        let memory = sharing.memory();
        let overlays: Vec<(usize, Overlay)> = memory.overlays().iter().collect();
        (overlays, memory.overlays().held_once(alone))
    };
    // Without the lock: what the guest breaks meanwhile is found next time, and ordinary memory
    // has the same content in any case.
    let mut pagemap = Pagemap::open()?;
    let mut ranges = Vec::new();
    let mut turned_back = Vec::new();
    for (i, &(address, overlay)) in overlays.iter().enumerate() {
        let beside = Beside {
            before: i > 0 && end(&overlays[i - 1]) == address,
            behind: overlays
                .get(i + 1)
                .is_some_and(|next| next.0 == end(&overlays[i])),
        };
        let pages = overlay.pages as usize;
        let mut intact = Vec::with_capacity(pages);
        for from in (0..pages).step_by(WINDOW_PAGES) {
            let count = WINDOW_PAGES.min(pages - from);
            let mask = pagemap.intact_lately(address + from * PAGE, count)?;
            intact.extend((0..count).map(|i| mask >> i & 1 == 1));
        }
        let worth = |i: usize| intact[i] && !alone.contains(overlay.store + i as u32);
        for part in worthless(pages, worth, beside) {
            ranges.push(address + part.start * PAGE..address + part.end * PAGE);
            let mut again = part;
            while let Some(first) = again.find(|&i| intact[i]) {
                let last = again.find(|&i| !intact[i]).unwrap_or(again.end);
                turned_back.push((overlay.file, overlay.page + first as u64, last - first));
            }
        }
    }
    let mut spans = Vec::with_capacity(turned_back.len());
    sharing.undo_ranges(|memory| {
        spans.extend(turned_back.iter().map(|&(file, page, pages)| FileSpan {
            file: memory.file_key(file),
            page,
            pages: pages as u32,
        }));
        ranges
    })?;
    Ok(spans)
}

fn end(&(address, overlay): &(usize, Overlay)) -> usize {
    address + overlay.pages as usize * PAGE
}

/// Whether an overlay has others at its ends.
#[derive(Clone, Copy, Debug, Default)]
struct Beside {
    before: bool,
    behind: bool,
}

/// What of `pages` pages is turned back, by whether each is worth something.
fn worthless(pages: usize, worth: impl Fn(usize) -> bool, beside: Beside) -> Vec<Range<usize>> {
    let worthy = (0..pages).filter(|&i| worth(i)).count();
    if worthy * WORTHLESS <= pages {
        return std::iter::once(0..pages).collect();
    }
    let first = (0..pages).find(|&i| worth(i)).unwrap_or(pages);
    let last = (0..pages).rfind(|&i| worth(i)).map_or(0, |i| i + 1);
    [(0..first, beside.before), (last..pages, beside.behind)]
        .into_iter()
        .filter(|(part, joined)| !part.is_empty() && !joined)
        .map(|(part, _)| part)
        .collect()
}

impl super::overlays::Overlays {
    /// Of `pages`, those that a single page of this process lies on: duplicates within one guest
    /// save memory though no other has them.
    fn held_once(&self, pages: &[StoreSpan]) -> RoaringBitmap {
        let mut once = RoaringBitmap::new();
        for span in pages {
            once.insert_range(span.page..span.page.saturating_add(span.pages));
        }
        once &= self.held();
        once - self.held_twice()
    }
}

#[cfg(test)]
mod tests {
    use super::{Beside, worthless};
    use proptest::prelude::*;

    fn parts(worth: &str) -> Vec<(usize, usize)> {
        let worth: Vec<bool> = worth.bytes().map(|it| it == b'#').collect();
        let parts = worthless(worth.len(), |i| worth[i], Beside::default());
        parts.into_iter().map(|it| (it.start, it.end)).collect()
    }

    #[test]
    fn ends_go_and_holes_stay() {
        assert_eq!(parts("####"), []);
        assert_eq!(parts("..##.#."), [(0, 2), (6, 7)]);
        assert_eq!(parts("#.......##"), []);
    }

    #[test]
    fn what_is_mostly_worthless_goes_as_a_whole() {
        assert_eq!(parts("...."), [(0, 4)]);
        assert_eq!(parts("....#..."), [(0, 8)]);
        assert_eq!(parts("....#.."), [(0, 4), (5, 7)]);
    }

    proptest! {
        #[test]
        fn no_overlay_is_cut_in_two(
            worth in prop::collection::vec(any::<bool>(), 1..200),
            before: bool,
            behind: bool,
        ) {
            let beside = Beside { before, behind };
            let gone = worthless(worth.len(), |i| worth[i], beside);
            let all: usize = gone.iter().map(ExactSizeIterator::len).sum();
            prop_assert!(all <= worth.len() && gone.len() <= 2);
            for part in gone {
                prop_assert!(
                    part == (0..worth.len())
                        || (part.start == 0 && !before)
                        || (part.end == worth.len() && !behind)
                );
            }
        }
    }
}
