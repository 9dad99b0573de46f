// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Overlays that are worth nothing any more are given up.
//!
//! A page on an overlay is worth something while it lies on a store page that somebody else has
//! too. The rest costs no memory of its own, but mappings and store pages: an overlay loses what is
//! worthless at an end beside ordinary memory, with which it becomes one mapping, and one of which
//! little is worth something loses all that the guest has written, which stays in the overlay's
//! mapping (see [`super::written`]). What lies between overlays, or in the middle of one, stays: to
//! cut it out costs mappings and brings nothing.
//!
//! A page that the guest has evicted and read again into the frame where it was before is broken,
//! and of the same content. The guest may not have noticed, so it is asked to report such pages
//! again: only while it holds a page is it certain that no device is about to write it.

use std::io;
use std::ops::Range;

use roaring::RoaringBitmap;

use super::mapped::mask;
use super::memory::{Memory, WINDOW_PAGES};
use super::overlays::Overlay;
use super::pagemap::Pagemap;
use super::sharing::Sharing;
use super::window::{Wanted, ones};
use crate::protocol::{FileKey, FileSpan, StoreSpan};
use crate::store::PAGE;

/// Little of an overlay is worth something when no more than one page in so many is.
const WORTHLESS: usize = 8;

/// Rounds in a row, at most, in which a [`Tidier`] does not look.
const MOST_SKIPPED: u32 = 15;

/// [`tidy`], for who calls it now and then: the longer looks find nothing new, the fewer rounds
/// have one, down to one in sixteen. A look costs as much as everything that is shared; in a VM
/// that is at rest it finds nothing.
#[derive(Debug, Default)]
pub struct Tidier {
    last: Option<Looked>,
    /// Rounds without a look since the last one, and how many there may be.
    skipped: u32,
    may_skip: u32,
}

/// What a look has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Looked {
    overlaid: u64,
    broken: u64,
}

impl Tidier {
    /// A round. Looks at once when more or less is shared than after the last look, or when there
    /// are pages in `alone`.
    pub fn round(&mut self, sharing: &Sharing, alone: &[StoreSpan]) -> io::Result<Vec<FileSpan>> {
        let overlaid = || sharing.memory().overlays().pages();
        let changed = self.last.is_none_or(|last| last.overlaid != overlaid());
        if !changed && alone.is_empty() && self.skipped < self.may_skip {
            self.skipped += 1;
            return Ok(take_split(sharing, Vec::new()));
        }
        // Should it fail, the next round tries again.
        let last = self.last.take();
        let spans = look(sharing, alone)?;
        let looked = Looked {
            overlaid: overlaid(),
            broken: sharing.memory().broken,
        };
        let nothing_new = spans.is_empty() && last == Some(looked);
        self.may_skip = if nothing_new {
            (self.may_skip * 2 + 1).min(MOST_SKIPPED)
        } else {
            0
        };
        self.skipped = 0;
        self.last = Some(looked);
        Ok(take_split(sharing, spans))
    }
}

/// Tidies up. `alone` are store pages that no other process has been granted. Returns file pages
/// that the guest is to report again: those that were turned back though it has not written them,
/// of which the store knows nothing afterwards, and those that are on overlays, were written, and
/// have the same content all the same, and those that were spared for huge pages that are none any more.
pub fn tidy(sharing: &Sharing, alone: &[StoreSpan]) -> io::Result<Vec<FileSpan>> {
    let spans = look(sharing, alone)?;
    Ok(take_split(sharing, spans))
}

/// What the guest is to report again of what overlays were turned back or are broken. Notes how many
/// pages that it has broken are left.
fn look(sharing: &Sharing, alone: &[StoreSpan]) -> io::Result<Vec<FileSpan>> {
    let (overlays, written, alone) = {
        let memory = sharing.memory();
        let overlays: Vec<(usize, Overlay)> = memory.overlays().iter().collect();
        let alone = memory.overlays().held_once(alone);
        (overlays, memory.written.clone(), alone)
    };
    // Without the lock: what the guest breaks meanwhile is found next time, and ordinary memory
    // has the same content in any case.
    let mut pagemap = Pagemap::open()?;
    let mut ranges = Vec::new();
    let mut wanted = Vec::new();
    let mut broken = 0;
    for (i, &(address, overlay)) in overlays.iter().enumerate() {
        let pages = overlay.pages as usize;
        let unbroken = is_unbroken(&mut pagemap, address, pages)?;
        let in_store = overlay.store..overlay.store + overlay.pages;
        // Nearly always: as quick as can be.
        if unbroken && alone.range_cardinality(in_store) == 0 {
            continue;
        }
        let behind = end(&overlays[i]);
        let beside = Beside {
            before: i > 0 && end(&overlays[i - 1]) == address || written.contains(address - 1),
            behind: overlays.get(i + 1).is_some_and(|next| next.0 == behind)
                || written.contains(behind),
            written: written.contains(address - 1) || written.contains(behind),
        };
        let (mut intact, mut same) = (Vec::with_capacity(pages), Vec::with_capacity(pages));
        for from in (0..pages).step_by(WINDOW_PAGES) {
            let part = overlay.slice(from as u32, WINDOW_PAGES as u32);
            let (at, count) = (address + from * PAGE, part.pages as usize);
            let mask = pagemap.intact_lately(at, count)?;
            intact.extend((0..count).map(|i| mask >> i & 1 == 1));
            let mask = mask | alike(sharing, at, part, pagemap.written_lately(at, count)?);
            same.extend((0..count).map(|i| mask >> i & 1 == 1));
        }
        let worth = |i: usize| same[i] && !alone.contains(overlay.store + i as u32);
        let gone = removable(worthless(pages, worth, beside), &intact, beside);
        let is_gone = |i: usize| gone.iter().any(|part| part.contains(&i));
        broken += (0..pages).filter(|&i| !intact[i] && !is_gone(i)).count() as u64;
        let is_wanted = |i: &usize| same[*i] && (is_gone(*i) || !intact[*i]);
        let mut rest = 0..pages;
        let mut file = None;
        while let Some(first) = rest.find(is_wanted) {
            let last = rest.find(|i| !is_wanted(i)).unwrap_or(pages);
            file = file.or_else(|| file_now(&sharing.memory(), address, overlay));
            // With nothing left of the overlay, whoever took it has seen to its pages.
            wanted.extend(file.map(|file| FileSpan {
                file,
                page: overlay.page + first as u64,
                pages: (last - first) as u32,
            }));
        }
        ranges.extend(
            gone.iter()
                .map(|part| address + part.start * PAGE..address + part.end * PAGE),
        );
    }
    sharing.memory().look_away();
    sharing.undo_ranges(|_| ranges)?;
    sharing.memory().broken = broken;
    Ok(wanted)
}

/// The file of an overlay that was at `address`, if anything of it still is: its number may have become
/// another file's otherwise.
fn file_now(memory: &Memory, address: usize, overlay: Overlay) -> Option<FileKey> {
    let range = address..address + overlay.pages as usize * PAGE;
    let is_part = |(at, it): &(usize, Overlay)| {
        it.file == overlay.file && it.page == overlay.page + ((at - address) / PAGE) as u64
    };
    let part = memory.overlays().in_range(&range).find(is_part);
    part.map(|(_, it)| memory.file_key(it.file))
}

/// Whether all pages of an overlay lie on store pages still.
fn is_unbroken(pagemap: &mut Pagemap, address: usize, pages: usize) -> io::Result<bool> {
    for from in (0..pages).step_by(WINDOW_PAGES) {
        let count = WINDOW_PAGES.min(pages - from);
        if pagemap.intact_lately(address + from * PAGE, count)? != mask(count) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// With those pages that were spared for huge pages that are none any more.
fn take_split(sharing: &Sharing, mut spans: Vec<FileSpan>) -> Vec<FileSpan> {
    let mut next = Some(0);
    while let Some(from) = next {
        next = sharing.memory().take_split(from, &mut spans);
    }
    spans
}

/// Of those pages of an overlay at `address` that the guest has `written`, the ones that are what
/// they were.
fn alike(sharing: &Sharing, address: usize, overlay: Overlay, written: u64) -> u64 {
    let mut alike = 0;
    for (first, count) in ones(written, overlay.pages as usize) {
        let wanted = Wanted {
            address: address + first * PAGE,
            overlay: overlay.slice(first as u32, count as u32),
        };
        // Without the store nothing can be said of them, and nothing was.
        let found = sharing.memory().alike(&wanted).unwrap_or(0);
        alike |= found << first;
    }
    alike
}

fn end(&(address, overlay): &(usize, Overlay)) -> usize {
    address + overlay.pages as usize * PAGE
}

/// Whether an overlay has others at its ends.
#[derive(Clone, Copy, Debug, Default)]
struct Beside {
    before: bool,
    behind: bool,
    /// Or what the guest has written of such, which may be one mapping with it.
    written: bool,
}

/// What of `pages` pages is turned back, by whether each is worth something.
fn worthless(pages: usize, worth: impl Fn(usize) -> bool, beside: Beside) -> Vec<Range<usize>> {
    let worthy = (0..pages).filter(|&i| worth(i)).count();
    if worthy * WORTHLESS <= pages {
        let mut parts = Vec::new();
        let mut rest = 0..pages;
        while let Some(first) = rest.find(|&i| !worth(i)) {
            let last = rest.find(|&i| worth(i)).unwrap_or(pages);
            parts.push(first..last);
        }
        return parts;
    }
    let first = (0..pages).find(|&i| worth(i)).unwrap_or(pages);
    let last = (0..pages).rfind(|&i| worth(i)).map_or(0, |i| i + 1);
    [(0..first, beside.before), (last..pages, beside.behind)]
        .into_iter()
        .filter(|(part, joined)| !part.is_empty() && !joined)
        .map(|(part, _)| part)
        .collect()
}

/// Of the parts of an overlay that are worth nothing, those that can go. Pages that the guest has
/// written go, but stay in the overlay's mapping; those that lie on the store would be cut out of
/// it, and only go where they come to lie beside ordinary memory.
fn removable(worthless: Vec<Range<usize>>, intact: &[bool], beside: Beside) -> Vec<Range<usize>> {
    let mut removable = Vec::with_capacity(worthless.len());
    for part in worthless {
        let mut at = part.start;
        while at < part.end {
            let run = at..(at..part.end)
                .find(|&i| intact[i] != intact[at])
                .unwrap_or(part.end);
            at = run.end;
            let whole = run.len() == intact.len() && !beside.written;
            let joins =
                run.start == 0 && !beside.before || run.end == intact.len() && !beside.behind;
            if joins || whole || !intact[run.start] {
                removable.push(run);
            }
        }
    }
    removable
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
    use super::{Beside, removable, worthless};
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
    fn of_what_is_mostly_worthless_all_that_is_worth_nothing_goes() {
        assert_eq!(parts("...."), [(0, 4)]);
        assert_eq!(parts("....#..."), [(0, 4), (5, 8)]);
        assert_eq!(parts(".#.............."), [(0, 1), (2, 16)]);
        assert_eq!(parts("....#.."), [(0, 4), (5, 7)]);
    }

    proptest! {
        #[test]
        fn no_mapping_is_cut_in_two(
            found in prop::collection::vec((any::<bool>(), 0..8), 1..200),
            before: bool,
            behind: bool,
            written: bool,
        ) {
            let beside = Beside { before: before || written, behind, written };
            let intact: Vec<bool> = found.iter().map(|it| it.0).collect();
            let worth = |i: usize| intact[i] && found[i].1 == 0;
            let pages = found.len();
            let gone = removable(worthless(pages, worth, beside), &intact, beside);
            let mut end = 0;
            for part in gone {
                prop_assert!(part.start >= end && part.end <= pages && !part.is_empty());
                end = part.end;
                prop_assert!(part.clone().all(|i| !worth(i)));
                let of_one_kind = part.clone().all(|i| intact[i] == intact[part.start]);
                prop_assert!(of_one_kind);
                prop_assert!(
                    !intact[part.start]
                        || (part == (0..pages) && !written)
                        || (part.start == 0 && !beside.before)
                        || (part.end == pages && !beside.behind)
                );
            }
        }
    }
}
