// SPDX-License-Identifier: GPL-2.0

//! One pass: all processes, their files, the pages of those that changed.

use crate::control::CONTROL;
use crate::file::{Facts, MappedFile};
use crate::ivshmem::Ivshmem;
use crate::kernel_memory::{self, Part};
use crate::page_cache::{Folio, FolioBatch, PinnedFrames, Place};
use crate::policy;
use crate::ranges::Range;
use crate::runs::{PinnedRun, RunBuilder};
use crate::session::{Refusal, Session};
use crate::thread;
use crate::tracker::{FileState, PieceState, MAX_FRAME, MAX_PAGE};
use crate::walk::{Batch, Candidate, Seen, Walk};
use crate::wire::{FileIdentity, MAX_NAME};
use kernel::alloc::KVec;
use kernel::prelude::*;

/// What a session of this guest holds its pages with.
pub(crate) type GuestSession = Session<Ivshmem, PinnedFrames>;

/// Why a pass ended early. What it has not seen is left for the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Asked to: unloading, `run` is 0, the host paused or changed.
    Asked,
    /// The host takes too long.
    Stalled,
}

/// What a pass needs and keeps for the next one.
pub(crate) struct Workshop {
    batch: Batch,
    folios: FolioBatch,
    path: KVec<u8>,
    kernel: [Option<Part>; 2],
}

impl Workshop {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            batch: Batch::new()?,
            folios: FolioBatch::new(),
            // Room for a path that is cut, as the kernel writes paths from their end.
            path: KVec::from_elem(0, 4 * MAX_NAME, GFP_KERNEL)?,
            kernel: kernel_memory::parts(),
        })
    }
}

/// What a pass found.
#[derive(Clone, Copy, Default)]
pub(crate) struct Findings {
    /// Whether there was anything to tell the host.
    pub(crate) news: bool,
    /// Whether the host asked for another pass meanwhile.
    pub(crate) again: bool,
    /// Pages that may be reported, whether or not they were before.
    pub(crate) eligible: u64,
    /// What the walk saw.
    pub(crate) seen: Seen,
}

/// What pages belong to.
enum Source<'a> {
    File(&'a MappedFile, &'a Facts),
    Kernel(&'a FileIdentity),
}

/// A pass under way.
pub(crate) struct Pass<'a> {
    session: &'a mut GuestSession,
    number: u32,
    most: u64,
    path: &'a mut [u8],
    folios: &'a mut FolioBatch,
    looked: u64,
    /// What is to be withdrawn before anything else of this file is reported.
    gone: Range,
    findings: Findings,
}

const NOTHING: Range = Range { start: 0, end: 0 };

/// Makes a pass. `scans` is its number since the module was loaded.
pub(crate) fn run(
    session: &mut GuestSession,
    workshop: &mut Workshop,
    scans: u64,
) -> Result<Findings, Stop> {
    let (number, most) = (session.begin_pass(), session.most_run_pages());
    let Workshop {
        batch,
        folios,
        path,
        kernel,
    } = workshop;
    let findings = Findings::default();
    let mut pass = Pass {
        session,
        number,
        most,
        path,
        folios,
        looked: 0,
        gone: NOTHING,
        findings,
    };
    let result = pass.walk(batch, kernel).and_then(|()| pass.finish(scans));
    let findings = pass.findings;
    folios.release();
    batch.clear();
    result.map(|()| findings)
}

impl Pass<'_> {
    fn walk(&mut self, batch: &mut Batch, kernel: &[Option<Part>]) -> Result<(), Stop> {
        let mut walk = Walk::new();
        loop {
            batch.clear();
            let more = walk.fill(batch);
            for Candidate { file, range, .. } in batch.candidates() {
                self.scan_file(file, *range)?;
            }
            batch.clear();
            self.session.publish();
            self.look_up()?;
            if !more {
                break;
            }
            if self.looked >= CONTROL.pages_to_scan.get() {
                self.looked = 0;
                thread::wait(policy::POLL_MS);
            }
        }
        self.findings.seen = walk.seen;
        if CONTROL.kernel_text.get() == 1 {
            for part in kernel.iter().flatten() {
                self.scan_kernel(part)?;
            }
        }
        Ok(())
    }

    /// Reports a part of the kernel. Its frames are never freed, so nothing needs to hold them.
    fn scan_kernel(&mut self, part: &Part) -> Result<(), Stop> {
        let Part {
            key,
            ref identity,
            place,
        } = *part;
        let known = self.session.tracker.find(key);
        let Some(id) = known.or_else(|| self.session.tracker.add(key, 0)) else {
            return Ok(());
        };
        self.session.tracker.uncovered(id, self.number, place.range);
        self.findings.eligible += place.range.end - place.range.start;
        let retry = self.session.retries(id);
        let (mut rest, mut cursor) = (place.range, 0);
        while !rest.is_empty() {
            let frame = place.frame + rest.start;
            let Some(tracked) = self.session.tracker.get_mut(id) else {
                return Ok(());
            };
            let mut piece = tracked.pages.compare(rest, frame, retry, &mut cursor);
            if piece.state != PieceState::Known {
                piece.range.end = piece.range.end.min(rest.start + self.most);
                let pages = piece.range.end - piece.range.start;
                let pin = PinnedFrames::none();
                let run = PinnedRun {
                    page: rest.start,
                    frame,
                    pages,
                    pin,
                };
                self.report(&Source::Kernel(identity), id, run)?;
            }
            rest.start = piece.range.end;
        }
        Ok(())
    }

    /// Forgets files that are gone and ends the pass.
    fn finish(&mut self, scans: u64) -> Result<(), Stop> {
        let mut from = 0;
        while let Some(id) =
            self.session
                .tracker
                .next_unseen(from, self.number, policy::KEEP_PASSES)
        {
            self.retire(id)?;
            from = id + 1;
        }
        let eligible = self.findings.eligible;
        self.findings.news = self.insist(|session| session.end_pass(scans, eligible))?;
        Ok(())
    }

    /// Takes what the host has to say and looks whether to go on.
    fn look_up(&mut self) -> Result<(), Stop> {
        let serviced = self.session.service(thread::now_ms());
        self.findings.again |= serviced.wants_pass;
        let go_on = !serviced.restarted
            && self.session.is_open()
            && CONTROL.run.get() == 1
            && !thread::must_stop();
        if go_on {
            Ok(())
        } else {
            Err(Stop::Asked)
        }
    }

    /// Repeats something until the host has made room for it.
    fn insist<T>(
        &mut self,
        mut attempt: impl FnMut(&mut GuestSession) -> Result<T, Refusal>,
    ) -> Result<T, Stop>
    where
        T: Default,
    {
        let began = thread::now_ms();
        loop {
            match attempt(self.session) {
                Ok(done) => return Ok(done),
                // It is as if this pass had not seen it.
                Err(Refusal::NoMemory) => return Ok(T::default()),
                Err(Refusal::Closed) => return Err(Stop::Asked),
                Err(Refusal::Busy) => {}
            }
            self.session.publish();
            if self.session.ask_to_be_woken(false) {
                thread::wait(policy::POLL_MS);
            }
            self.look_up()?;
            if thread::now_ms().saturating_sub(began) > policy::PASS_WAIT_MS {
                return Err(Stop::Stalled);
            }
        }
    }

    fn retire(&mut self, id: u32) -> Result<(), Stop> {
        self.insist(|session| session.retire(id))
    }

    /// Looks at what has not been looked at of a file.
    fn scan_file(&mut self, file: &MappedFile, mut range: Range) -> Result<(), Stop> {
        let known = self.session.tracker.find(file.key());
        let Some(facts) = file.facts() else {
            return known.map_or(Ok(()), |id| self.retire(id));
        };
        range.end = range.end.min(facts.pages).min(MAX_PAGE);
        let Some(id) = self.identify(file, &facts, known)? else {
            return Ok(());
        };
        loop {
            let part = self.session.tracker.uncovered(id, self.number, range);
            if part.is_empty() {
                return Ok(());
            }
            self.scan(file, &facts, id, part)?;
            self.session.tracker.cover(id, part);
            range.start = part.end;
        }
    }

    /// The id of a file; a new one when the file has changed. `None` without room.
    fn identify(
        &mut self,
        file: &MappedFile,
        facts: &Facts,
        known: Option<u32>,
    ) -> Result<Option<u32>, Stop> {
        if let Some(id) = known {
            if self.session.tracker.is_current(id, facts.stamp) {
                return Ok(Some(id));
            }
            self.retire(id)?;
        }
        Ok(self.session.tracker.add(file.key(), facts.stamp))
    }

    /// Looks at the page cache of one range and reports what changed.
    fn scan(
        &mut self,
        file: &MappedFile,
        facts: &Facts,
        id: u32,
        range: Range,
    ) -> Result<(), Stop> {
        let retry = self.session.retries(id);
        let mut runs = RunBuilder::new(self.most);
        let (mut next, mut expected, mut cursor) = (range.start, range.start, 0);
        // Taken out, as reporting needs all of `self`.
        let mut folios = core::mem::replace(self.folios, FolioBatch::new());
        while folios.fill(file, &mut next, range.end) {
            for folio in folios.folios() {
                let Some(place) = folio.place(file).and_then(|place| clip(place, range)) else {
                    continue;
                };
                self.retract(
                    id,
                    Range {
                        start: expected,
                        end: place.range.start,
                    },
                )?;
                expected = place.range.end;
                let pages = place.range.end - place.range.start;
                self.looked += pages;
                self.findings.eligible += pages;
                self.compare(
                    file,
                    facts,
                    id,
                    &folio,
                    place,
                    retry,
                    &mut cursor,
                    &mut runs,
                )?;
            }
            thread::give_way();
        }
        *self.folios = folios;
        self.retract(
            id,
            Range {
                start: expected,
                end: range.end,
            },
        )?;
        self.flush(id)?;
        if let Some(run) = runs.finish() {
            self.report(&Source::File(file, facts), id, run)?;
        }
        Ok(())
    }

    /// Reports those pages of a folio that were not reported at their frame.
    #[expect(clippy::too_many_arguments, reason = "the state of one scan")]
    fn compare(
        &mut self,
        file: &MappedFile,
        facts: &Facts,
        id: u32,
        folio: &Folio<'_>,
        place: Place,
        retry: bool,
        cursor: &mut usize,
        runs: &mut RunBuilder<PinnedFrames>,
    ) -> Result<(), Stop> {
        let Place {
            range: mut rest,
            frame,
        } = place;
        let shift = rest.start;
        while !rest.is_empty() {
            let at = frame + (rest.start - shift);
            let Some(tracked) = self.session.tracker.get_mut(id) else {
                return Ok(());
            };
            let mut piece = tracked.pages.compare(rest, at, retry, cursor);
            if piece.state != PieceState::Known {
                if folio.is_unfit() {
                    return self.retract(id, rest);
                }
                piece.range.end = piece.range.end.min(rest.start + self.most);
                if piece.state == PieceState::Moved {
                    self.retract(id, piece.range)?;
                }
                let pages = piece.range.end - piece.range.start;
                let pin = folio.pin(at, pages);
                let piece = PinnedRun {
                    page: rest.start,
                    frame: at,
                    pages,
                    pin,
                };
                if let Some(run) = runs.push(piece) {
                    self.report(&Source::File(file, facts), id, run)?;
                }
            }
            rest.start = piece.range.end;
        }
        Ok(())
    }

    /// Withdraws pages, together with those just before them.
    fn retract(&mut self, id: u32, range: Range) -> Result<(), Stop> {
        if range.is_empty() {
            return Ok(());
        }
        if self.gone.is_empty() || self.gone.end != range.start {
            self.flush(id)?;
            self.gone.start = range.start;
        }
        self.gone.end = range.end;
        Ok(())
    }

    fn flush(&mut self, id: u32) -> Result<(), Stop> {
        let gone = core::mem::replace(&mut self.gone, NOTHING);
        if gone.is_empty() {
            return Ok(());
        }
        self.insist(|session| session.retract(id, gone))
    }

    fn report(
        &mut self,
        source: &Source<'_>,
        id: u32,
        run: PinnedRun<PinnedFrames>,
    ) -> Result<(), Stop> {
        self.flush(id)?;
        if self.session.needs_announcement(id) {
            let sends_names = self.session.ring().sends_names();
            let path = core::mem::take(&mut self.path);
            let (identity, name) = match *source {
                Source::File(file, facts) if sends_names => (facts.identity, file.name(path)),
                Source::File(_, facts) => (facts.identity, &[][..]),
                Source::Kernel(identity) => (*identity, &[][..]),
            };
            let announced = self.insist(|session| session.announce(id, identity, name));
            self.path = path;
            announced?;
            let announced = self.session.tracker.get_mut(id).map(|file| file.state);
            if announced != Some(FileState::Announced) {
                return Ok(());
            }
        }
        let mut waiting = Some(run);
        self.insist(|session| match waiting.take() {
            None => Ok(()),
            Some(run) => session.report(id, run).map_err(|(refusal, run)| {
                waiting = Some(run);
                refusal
            }),
        })
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
