// SPDX-License-Identifier: GPL-2.0

//! One guest's dealings with its host: what was announced and reported, what is in flight, what
//! the host has answered and wants.
//!
//! Free of the kernel: memory, pins and the clock come from the caller.

use crate::inflight::Fifo;
use crate::policy;
use crate::ranges::Range;
use crate::ring::{Event, Full, Memory, Ring, State};
use crate::runs::PinnedRun;
use crate::tracker::{FileState, Tracker};
use crate::wire::{self, reason, FileIdentity, Outcome, Record, Request};

/// Totals since the module was loaded.
#[derive(Clone, Copy, Default)]
pub(crate) struct Totals {
    pub(crate) reported: u64,
    pub(crate) runs: u64,
    pub(crate) acknowledged: u64,
    pub(crate) remembered: u64,
    pub(crate) refused: u64,
    pub(crate) refused_by: [u64; reason::COUNT],
    pub(crate) retracted: u64,
    pub(crate) revocations: u64,
}

/// A record that was produced and matters again when it is acknowledged.
struct InFlight<P> {
    position: u64,
    file: u32,
    what: What<P>,
}

/// Why pages are withdrawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// They are not what was reported, or nobody has found them for long. As far as they still are,
    /// they may stay shared.
    Gone,
    /// They must not be shared any more.
    Unwanted,
}

enum What<P> {
    Run(PinnedRun<P>),
    Announce,
    Retire,
    Other,
}

/// Sizes of this guest that the host is told.
#[derive(Clone, Copy)]
pub(crate) struct Geometry {
    /// One more than the highest frame, in guest pages.
    pub(crate) memory_pages: u64,
    /// Wire pages in one guest page.
    pub(crate) scale: u64,
}

/// Why something could not be produced now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The ring is full or too much is in flight: wait for the host.
    Busy,
    /// Not attached, or paused: give up the pass.
    Closed,
    /// No memory: leave it for a later pass.
    NoMemory,
}

/// What [`Session::service`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Serviced {
    /// The host wants to see pages: look again at once.
    pub(crate) wants_pass: bool,
    /// All that was known is forgotten; a pass that is under way begins anew.
    pub(crate) restarted: bool,
}

/// State of one attachment.
pub(crate) struct Session<M, P> {
    ring: Ring<M>,
    geometry: Geometry,
    inflight: Fifo<InFlight<P>>,
    pages_in_flight: u64,
    pub(crate) tracker: Tracker,
    pub(crate) totals: Totals,
    pass: u32,
    /// The last pass that came to its end.
    whole_pass: u32,
    /// Passes in a row that had to leave something out.
    partial_passes: u32,
    acknowledged: u64,
    progress_ms: u64,
    /// Whether the host owed an answer when it was last looked for one.
    was_waiting: bool,
    news: bool,
    said_goodbye: bool,
    /// Most pages that the operator lets be in flight.
    pub(crate) most_inflight_pages: u64,
}

impl<M: Memory, P> Session<M, P> {
    pub(crate) fn new(ring: Ring<M>, geometry: Geometry, most_files: usize) -> Self {
        Self {
            ring,
            geometry,
            inflight: Fifo::new(),
            pages_in_flight: 0,
            tracker: Tracker::new(most_files),
            totals: Totals::default(),
            pass: 0,
            whole_pass: 0,
            partial_passes: 0,
            acknowledged: 0,
            progress_ms: 0,
            was_waiting: false,
            news: false,
            said_goodbye: false,
            most_inflight_pages: u64::MAX,
        }
    }

    pub(crate) const fn ring(&self) -> &Ring<M> {
        &self.ring
    }

    pub(crate) const fn pages_in_flight(&self) -> u64 {
        self.pages_in_flight
    }

    /// Whether anything waits for the host's answer.
    pub(crate) const fn is_waiting(&self) -> bool {
        !self.inflight.is_empty() || self.said_goodbye
    }

    /// Whether a host that does not stand still has yet to answer a report. Takes its answers.
    pub(crate) fn is_owed(&mut self) -> bool {
        let is_settled = self.is_settled();
        self.ring.state() == State::Attached && !is_settled && !self.inflight.is_empty()
    }

    /// How long nothing of that has been answered.
    pub(crate) fn waited_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.progress_ms)
    }

    /// Whether records may be produced now.
    pub(crate) fn is_open(&self) -> bool {
        self.ring.state() == State::Attached && self.ring.policy() & wire::policy::PAUSE == 0
    }

    /// Most pages of one run.
    pub(crate) fn most_run_pages(&self) -> u64 {
        self.most_in_flight()
            .min(u64::from(wire::MAX_RUN_PAGES) / self.geometry.scale)
    }

    fn most_in_flight(&self) -> u64 {
        let host = self.ring.most_in_flight() / self.geometry.scale;
        policy::most_in_flight(host, self.most_inflight_pages, self.geometry.memory_pages)
    }

    /// Takes all that the host has answered and asked for.
    pub(crate) fn service(&mut self, now_ms: u64) -> Serviced {
        let mut serviced = Serviced::default();
        match self.ring.poll() {
            Event::None => {}
            Event::Attached => {
                self.greet();
                self.progress_ms = now_ms;
                serviced.wants_pass = true;
            }
            Event::HostChanged => {
                self.forget_all();
                serviced.restarted = true;
                self.ring.poll();
            }
            Event::Settled => {
                self.drain(u64::MAX);
                self.forget_all();
                serviced.restarted = true;
                self.ring.poll();
            }
        }
        let acknowledged = self.ring.acknowledged();
        self.drain(acknowledged);
        let is_waiting = self.is_waiting();
        // Its time begins when it is looked for first: nobody may have looked for long before.
        let begins = !core::mem::replace(&mut self.was_waiting, is_waiting);
        if acknowledged != self.acknowledged || !is_waiting || begins {
            self.acknowledged = acknowledged;
            self.progress_ms = now_ms;
        } else if now_ms.saturating_sub(self.progress_ms) > policy::STALL_MS
            && self.ring.state() == State::Attached
        {
            self.revoke();
            serviced.restarted = true;
        }
        // A host that asks faster than we look has the rest looked at next time.
        for _ in 0..self.ring.most_requests() {
            let Some(request) = self.ring.take_request() else {
                break;
            };
            serviced.wants_pass = true;
            match request {
                Request::Report { file, page, pages } => self.expect(file, page, pages),
                Request::Rescan => self.tracker.forget_pages(),
            }
        }
        serviced
    }

    fn greet(&mut self) {
        let Geometry {
            memory_pages,
            scale,
        } = self.geometry;
        // The ring is empty, and larger than any record.
        let _ = self.ring.push(&Record::Hello {
            epoch: self.ring.epoch(),
            memory_pages: memory_pages * scale,
            pages_per_guest_page: scale,
        });
        self.ring.publish();
    }

    /// The host wants these pages reported again.
    fn expect(&mut self, file: u32, page: u64, pages: u64) {
        let scale = self.geometry.scale;
        if let Some(file) = self.tracker.get_mut(file) {
            if pages == 0 {
                file.pages.clear();
            } else {
                let end = page.saturating_add(pages).div_ceil(scale);
                file.pages.forget(Range {
                    start: page / scale,
                    end,
                });
            }
        }
    }

    /// Takes the outcomes of what lies before `acknowledged` and lets its pages go.
    fn drain(&mut self, acknowledged: u64) {
        while self
            .inflight
            .front()
            .is_some_and(|first| first.position < acknowledged)
        {
            let Some(InFlight {
                position,
                file,
                what,
            }) = self.inflight.pop()
            else {
                return;
            };
            let outcome = self.ring.outcome(position);
            match what {
                What::Run(run) => self.settle(file, &run, outcome),
                What::Announce if outcome.reason != reason::NONE => self.unannounce(file),
                What::Retire => self.tracker.release(file),
                What::Announce | What::Other => {}
            }
        }
    }

    fn settle(&mut self, id: u32, run: &PinnedRun<P>, outcome: Outcome) {
        self.pages_in_flight -= run.pages;
        let wire_pages = run.pages * self.geometry.scale;
        let shared = u64::from(outcome.shared).min(wire_pages);
        let remembered = u64::from(outcome.remembered).min(wire_pages - shared);
        let refused = wire_pages - shared - remembered;
        self.totals.acknowledged += wire_pages;
        self.totals.remembered += remembered;
        let Some(file) = self.tracker.get_mut(id) else {
            return;
        };
        if refused == 0 {
            file.backoff = 0;
            return;
        }
        self.totals.refused += refused;
        if let Some(count) = self.totals.refused_by.get_mut(usize::from(outcome.reason)) {
            *count += refused;
        }
        if outcome.reason == reason::UNKNOWN_FILE && file.state == FileState::Announced {
            file.state = FileState::Unannounced;
        }
        if policy::is_retryable(outcome.reason) {
            file.pages.refuse(
                Range {
                    start: run.page,
                    end: run.page + run.pages,
                },
                run.frame,
            );
            // All refusals of one pass count as one.
            file.has_refused = true;
            if self.pass.wrapping_sub(file.retry_at) as i32 >= 0 {
                file.retry_at = self.pass.wrapping_add(policy::backoff_passes(file.backoff));
                file.backoff = file.backoff.saturating_add(1);
            }
        }
    }

    fn unannounce(&mut self, id: u32) {
        if let Some(file) = self.tracker.get_mut(id) {
            if file.state == FileState::Announced {
                file.state = FileState::Unannounced;
            }
        }
    }

    /// Lets go of all that is in flight and forgets what was reported.
    fn forget_all(&mut self) {
        while self.inflight.pop().is_some() {}
        self.pages_in_flight = 0;
        self.acknowledged = 0;
        self.said_goodbye = false;
        self.tracker.clear();
    }

    /// Takes back what the host has not claimed; what it has claimed stays held until it is
    /// acknowledged.
    pub(crate) fn revoke(&mut self) {
        let claim = self.ring.revoke();
        self.totals.revocations += 1;
        while self
            .inflight
            .newest()
            .is_some_and(|newest| newest.position >= claim)
        {
            if let Some(InFlight {
                what: What::Run(run),
                ..
            }) = self.inflight.pop_newest()
            {
                self.pages_in_flight -= run.pages;
            }
        }
    }

    /// Gives up on a host that has claimed records and does not answer: their pages stay held
    /// for ever, because it might still write to them. Returns how many.
    pub(crate) fn abandon(&mut self) -> u64 {
        let mut pages = 0;
        while let Some(InFlight { what, .. }) = self.inflight.pop() {
            if let What::Run(run) = what {
                pages += run.pages;
                core::mem::forget(run);
            }
        }
        self.pages_in_flight = 0;
        pages
    }

    /// Says goodbye, if the host still listens, and asks to be told when it has heard. The host
    /// then undoes all sharing before it answers.
    pub(crate) fn say_goodbye(&mut self) {
        if self.ring.push(&Record::Goodbye).is_ok() {
            self.ring.publish();
            self.ring.notify_at(self.ring.head());
            self.said_goodbye = true;
        }
    }

    /// Whether goodbye was said: nothing can be reported before [`Session::withdraw`] is done.
    pub(crate) const fn is_leaving(&self) -> bool {
        self.said_goodbye
    }

    /// Takes the next step towards a host that shares nothing of this guest and a guest that
    /// remembers no report; to be called after [`Session::service`]. Returns whether it is done.
    pub(crate) fn withdraw(&mut self) -> bool {
        let is_done = match self.ring.state() {
            // Nobody to withdraw from.
            State::Detached => true,
            // Only who is attached can say anything.
            State::Attaching | State::Revoked { .. } => false,
            State::Attached if self.said_goodbye => self.is_settled(),
            State::Attached => {
                self.say_goodbye();
                false
            }
        };
        if is_done {
            self.ring.detach();
            self.forget_all();
        }
        is_done
    }

    /// Whether the host has answered all that it must, or is gone. Takes its answers.
    pub(crate) fn is_settled(&mut self) -> bool {
        let acknowledged = self.ring.acknowledged();
        self.drain(acknowledged);
        match self.ring.state() {
            State::Attached => acknowledged == self.ring.head() || self.ring.is_orphaned(),
            State::Revoked { claim } => acknowledged >= claim || self.ring.is_orphaned(),
            State::Detached | State::Attaching => true,
        }
    }

    /// Nobody is here any more.
    pub(crate) fn leave(&self) {
        self.ring.leave();
    }

    /// Begins a pass and returns its number.
    pub(crate) fn begin_pass(&mut self) -> u32 {
        self.pass = self.pass.wrapping_add(1);
        self.news = false;
        self.pass
    }

    /// The pass has looked at all there is, or, unless `is_whole`, not at processes and file systems
    /// that others have for themselves. Returns whether what it has not found is gone: not while
    /// it may be there, but nobody can have it for himself for ever.
    pub(crate) fn judges(&mut self, is_whole: bool) -> bool {
        self.partial_passes = if is_whole {
            0
        } else {
            self.partial_passes.saturating_add(1)
        };
        is_whole || self.partial_passes > policy::KEEP_PASSES
    }

    fn push(&mut self, file: u32, record: &Record<'_>, what: What<P>) -> Result<(), Refusal> {
        if self.ring.state() != State::Attached {
            return Err(Refusal::Closed);
        }
        self.inflight.reserve().map_err(|_| Refusal::NoMemory)?;
        let position = self.ring.push(record).map_err(|Full| Refusal::Busy)?;
        // Room was made before the record became visible.
        let _ = self.inflight.push(InFlight {
            position,
            file,
            what,
        });
        self.news = true;
        Ok(())
    }

    /// Whether refused pages of a file are to be tried again in this pass.
    pub(crate) fn retries(&mut self, id: u32) -> bool {
        let pass = self.pass;
        self.tracker
            .get_mut(id)
            .is_some_and(|file| file.is_due(pass))
    }

    /// Whether the host must be told about this file before its pages are reported.
    pub(crate) fn needs_announcement(&mut self, id: u32) -> bool {
        self.tracker
            .get_mut(id)
            .is_some_and(|file| file.state == FileState::Unannounced)
    }

    /// Tells the host what a file is.
    pub(crate) fn announce(
        &mut self,
        id: u32,
        identity: FileIdentity,
        name: &[u8],
    ) -> Result<(), Refusal> {
        let name = if self.ring.sends_names() { name } else { &[] };
        self.push(
            id,
            &Record::File {
                file: id,
                identity,
                name,
            },
            What::Announce,
        )?;
        if let Some(file) = self.tracker.get_mut(id) {
            file.state = FileState::Announced;
        }
        Ok(())
    }

    /// Whether a run of so many pages can be reported now.
    pub(crate) fn has_room(&self, pages: u64) -> bool {
        self.pages_in_flight == 0 || self.pages_in_flight + pages <= self.most_in_flight()
    }

    /// Reports a run and remembers that. Hands it back when it cannot be done now.
    pub(crate) fn report(
        &mut self,
        id: u32,
        run: PinnedRun<P>,
    ) -> Result<(), (Refusal, PinnedRun<P>)> {
        if !self.is_open() {
            return Err((Refusal::Closed, run));
        }
        if !self.has_room(run.pages) {
            return Err((Refusal::Busy, run));
        }
        if self.inflight.reserve().is_err() {
            return Err((Refusal::NoMemory, run));
        }
        let scale = self.geometry.scale;
        let record = Record::Run(wire::Run {
            file: id,
            pages: (run.pages * scale) as u32,
            page: run.page * scale,
            gfn: run.frame * scale,
        });
        let Ok(position) = self.ring.push(&record) else {
            return Err((Refusal::Busy, run));
        };
        if let Some(file) = self.tracker.get_mut(id) {
            // What cannot be remembered is reported once more in the next pass.
            let _ = file.pages.record(
                Range {
                    start: run.page,
                    end: run.page + run.pages,
                },
                run.frame,
            );
        }
        self.pages_in_flight += run.pages;
        self.totals.reported += run.pages * scale;
        self.totals.runs += 1;
        self.news = true;
        // Room was made before the record became visible.
        let _ = self.inflight.push(InFlight {
            position,
            file: id,
            what: What::Run(run),
        });
        Ok(())
    }

    /// Withdraws what was reported of a range, if anything was.
    pub(crate) fn retract(&mut self, id: u32, range: Range, why: Why) -> Result<(), Refusal> {
        let Some(file) = self.tracker.get_mut(id) else {
            return Ok(());
        };
        if !file.pages.has_any(range) {
            return Ok(());
        }
        let scale = self.geometry.scale;
        let (page, pages) = (range.start * scale, (range.end - range.start) * scale);
        self.push(
            id,
            &Record::Retract {
                file: id,
                page,
                pages,
                unshare: why == Why::Unwanted,
            },
            What::Other,
        )?;
        if let Some(file) = self.tracker.get_mut(id) {
            self.totals.retracted += file.pages.forget(range) * scale;
        }
        Ok(())
    }

    /// Forgets a file; its id is free again when the host has acknowledged that.
    pub(crate) fn retire(&mut self, id: u32, why: Why) -> Result<(), Refusal> {
        let Some(file) = self.tracker.get_mut(id) else {
            return Ok(());
        };
        if file.state != FileState::Announced {
            self.tracker.retire(id);
            self.tracker.release(id);
            return Ok(());
        }
        let pages = file.pages.pages();
        let record = Record::Retract {
            file: id,
            page: 0,
            pages: 0,
            unshare: why == Why::Unwanted,
        };
        self.push(id, &record, What::Retire)?;
        self.totals.retracted += pages * self.geometry.scale;
        self.tracker.retire(id);
        Ok(())
    }

    /// Gives memory back: forgets files that the last whole pass did not find, as far as the host
    /// can be told now, and then what was reported of others, which is reported again some day.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        let before = self.tracker.bytes();
        let mut from = 0;
        while let Some(id) = self.tracker.next_missing(from, self.whole_pass) {
            if self.retire(id, Why::Gone).is_err() {
                break;
            }
            from = id + 1;
        }
        let freed = before.saturating_sub(self.tracker.bytes());
        self.tracker.shrink(bytes.saturating_sub(freed));
        self.ring.publish();
    }

    /// Ends a pass; one that had nothing to say says nothing. Returns whether it had.
    pub(crate) fn end_pass(&mut self, passes: u64, eligible: u64) -> Result<bool, Refusal> {
        if self.news {
            let eligible = eligible * self.geometry.scale;
            self.push(
                0,
                &Record::EndOfPass {
                    pass: passes,
                    eligible,
                },
                What::Other,
            )?;
        }
        if self.partial_passes == 0 {
            self.whole_pass = self.pass;
        }
        self.tracker.end_of_pass(self.pass);
        self.ring.publish();
        Ok(self.news)
    }

    /// Shows the host what was produced.
    pub(crate) fn publish(&mut self) {
        self.ring.publish();
    }

    /// Asks for an interrupt when about half of what is in flight has been answered, so that
    /// the ring does not run dry, or when all of it has.
    /// Returns whether there is anything to wait for.
    pub(crate) fn ask_to_be_woken(&mut self, all: bool) -> bool {
        if !self.is_waiting() {
            self.ring.notify_at(0);
            return true;
        }
        let (ack, head) = (self.ring.acknowledged(), self.ring.head());
        let position = if all {
            head
        } else {
            ack + (head - ack).div_ceil(2)
        };
        self.ring.notify_at(position);
        // The host may have passed the position before it could see that it was asked.
        self.ring.acknowledged() < position
    }
}
