// SPDX-License-Identifier: GPL-2.0

//! The page cache of one file range, compared with what was reported of it.
//!
//! First by a look without references, which finds nothing in a range that is as it was. Where it
//! finds a difference the folios are taken hold of and everything is checked anew: only that
//! reports or withdraws.

use crate::file::{CachedFile, Facts};
use crate::leaf::{MAX_FRAME, MAX_PAGE};
use crate::look::Look;
use crate::page_cache::{Folio, FolioBatch, PinnedFrames, Place};
use crate::pages::{Cursor, PieceState};
use crate::pass::{Pass, Stop};
use crate::ranges::Range;
use crate::report::Source;
use crate::runs::{PinnedRun, RunBuilder};
use crate::sight::Comparison;

/// Which pages are reported; what was reported stays so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    All,
    /// Those that were used more than once.
    Used,
}

/// The file that is looked at, and how far that is.
struct Subject<'a> {
    file: &'a CachedFile<'a>,
    facts: &'a Facts,
    id: u32,
    wanted: Wanted,
    /// Refused pages are tried again.
    retry: bool,
    cursor: Cursor,
    runs: RunBuilder<PinnedFrames>,
}

impl Pass<'_> {
    /// Whether a file has a page that was used more than once.
    pub(crate) fn has_used(&mut self, file: &CachedFile<'_>, facts: &Facts) -> Result<bool, Stop> {
        let (mut next, end) = (0, facts.pages.min(MAX_PAGE));
        while self.folios.fill(file, &mut next, end) {
            for folio in self.folios.folios() {
                let place = folio.place(file, facts);
                let pages = place.map_or(1, |it| it.range.end - it.range.start);
                self.looked += pages;
                if place.is_some() && folio.is_used() {
                    return Ok(true);
                }
            }
            self.folios.release();
            self.go_on()?;
        }
        Ok(false)
    }

    /// Looks at the page cache of one range and reports what changed.
    pub(crate) fn scan(
        &mut self,
        file: &CachedFile<'_>,
        facts: &Facts,
        id: u32,
        range: Range,
        wanted: Wanted,
    ) -> Result<(), Stop> {
        let mut subject = Subject {
            file,
            facts,
            id,
            wanted,
            retry: self.session.retries(id),
            cursor: Cursor::default(),
            runs: RunBuilder::new(self.most),
        };
        // Taken out, as reporting needs all of `self`.
        let Some(mut look) = self.look.take() else {
            return Ok(());
        };
        let mut folios = core::mem::replace(self.folios, FolioBatch::new());
        let result = self.compare(&mut subject, &mut look, &mut folios, range);
        *self.folios = folios;
        *self.look = Some(look);
        result?;
        self.flush(id)?;
        match subject.runs.finish() {
            Some(run) => self.report(&Source::File(file, facts), id, run),
            None => Ok(()),
        }
    }

    fn compare(
        &mut self,
        subject: &mut Subject<'_>,
        look: &mut Look,
        folios: &mut FolioBatch,
        range: Range,
    ) -> Result<(), Stop> {
        let mut next = range.start;
        while next < range.end {
            let start = next;
            let sights = look.at(subject.file, &mut next, range.end);
            let window = Range { start, end: next };
            let mut comparison = Comparison::new(sights, window, subject.retry);
            while let Some(tracked) = self.session.tracker.get_mut(subject.id) {
                let difference = comparison.next_difference(&tracked.pages, &mut subject.cursor);
                let Some(difference) = difference else { break };
                self.look_properly(subject, folios, difference)?;
            }
            self.looked += comparison.same;
            self.findings.eligible += comparison.same;
            self.go_on()?;
        }
        Ok(())
    }

    /// Takes hold of the folios in a range and deals with what has changed.
    fn look_properly(
        &mut self,
        subject: &mut Subject<'_>,
        folios: &mut FolioBatch,
        range: Range,
    ) -> Result<(), Stop> {
        let (mut next, mut expected) = (range.start, range.start);
        while folios.fill(subject.file, &mut next, range.end) {
            for folio in folios.folios() {
                let place = folio.place(subject.file, subject.facts);
                let Some(place) = place.and_then(|place| clip(place, range)) else {
                    self.looked += 1;
                    continue;
                };
                let before = Range {
                    start: expected,
                    end: place.range.start,
                };
                self.retract(subject.id, before)?;
                expected = place.range.end;
                let pages = place.range.end - place.range.start;
                self.looked += pages;
                self.findings.eligible += pages;
                self.update(subject, &folio, place)?;
            }
            if self.unshown_us.is_some() {
                self.show_soon();
            }
            self.breathe()?;
        }
        let rest = Range {
            start: expected,
            end: range.end,
        };
        self.retract(subject.id, rest)
    }

    /// Reports those pages of a folio that were not reported at their frame.
    fn update(
        &mut self,
        subject: &mut Subject<'_>,
        folio: &Folio<'_>,
        place: Place,
    ) -> Result<(), Stop> {
        let id = subject.id;
        let mut rest = place.range;
        while !rest.is_empty() {
            let at = place.frame + (rest.start - place.range.start);
            let Some(tracked) = self.session.tracker.get_mut(id) else {
                return Ok(());
            };
            let cursor = &mut subject.cursor;
            let mut piece = tracked.pages.compare(rest, at, subject.retry, cursor);
            let is_new = piece.state == PieceState::New;
            if is_new && subject.wanted == Wanted::Used && !folio.is_used() {
                rest.start = piece.range.end;
                continue;
            }
            if piece.state != PieceState::Known {
                if folio.is_unfit() || subject.file.may_be_written() {
                    return self.retract(id, rest);
                }
                piece.range.end = piece.range.end.min(rest.start + self.most);
                if piece.state == PieceState::Moved {
                    self.retract(id, piece.range)?;
                }
                let pages = piece.range.end - piece.range.start;
                let run = PinnedRun {
                    page: rest.start,
                    frame: at,
                    pages,
                    pin: folio.pin(at, pages),
                };
                if let Some(run) = subject.runs.push(run) {
                    self.report(&Source::File(subject.file, subject.facts), id, run)?;
                }
            }
            rest.start = piece.range.end;
        }
        Ok(())
    }
}

/// The part of a folio that lies within `range` and can be tracked.
fn clip(place: Place, range: Range) -> Option<Place> {
    let clipped = Range {
        start: place.range.start.max(range.start),
        end: place.range.end.min(range.end),
    };
    let frame = place.frame + clipped.start.wrapping_sub(place.range.start);
    let fits = !clipped.is_empty() && frame + (clipped.end - clipped.start) <= MAX_FRAME;
    fits.then_some(Place {
        range: clipped,
        frame,
    })
}
