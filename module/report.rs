// SPDX-License-Identifier: GPL-2.0

//! What a pass tells the host: reports and withdrawals, and when these are shown.

use crate::control::CONTROL;
use crate::file::{CachedFile, Facts};
use crate::page_cache::PinnedFrames;
use crate::pass::{Pass, Stop, NOTHING};
use crate::ranges::Range;
use crate::runs::PinnedRun;
use crate::session::Why;
use crate::thread;
use crate::tracker::FileState;
use crate::wire::FileIdentity;

/// What pages belong to.
pub(crate) enum Source<'a> {
    File(&'a CachedFile<'a>, &'a Facts),
    Kernel(&'a FileIdentity),
}

/// Longest time between two reports, and between files, before the host is shown what it has not
/// seen: until it has answered, somebody may open the file for writing.
const SHOWN_US: u64 = 2_000;

impl Source<'_> {
    /// Whether no device can be about to write to pages of it.
    fn is_fit(&self, pin: &PinnedFrames) -> bool {
        match self {
            Self::File(file, _) => !file.may_be_written() && !pin.are_unfit(),
            Self::Kernel(_) => true,
        }
    }
}

impl Pass<'_> {
    /// Withdraws pages, together with those just before them.
    pub(crate) fn retract(&mut self, id: u32, range: Range) -> Result<(), Stop> {
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

    pub(crate) fn flush(&mut self, id: u32) -> Result<(), Stop> {
        let gone = core::mem::replace(&mut self.gone, NOTHING);
        if gone.is_empty() {
            return Ok(());
        }
        self.insist(|session| session.retract(id, gone, Why::Gone))
    }

    pub(crate) fn report(
        &mut self,
        source: &Source<'_>,
        id: u32,
        run: PinnedRun<PinnedFrames>,
    ) -> Result<(), Stop> {
        self.flush(id)?;
        if run.pages < CONTROL.min_run_pages.get() {
            return Ok(());
        }
        if self.session.needs_announcement(id) {
            let sends_names = self.session.ring().sends_names() && CONTROL.report_names.get() == 1;
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
            // It may have waited.
            Some(run) if !source.is_fit(&run.pin) => Ok(()),
            Some(run) => session.report(id, run).map_err(|(refusal, run)| {
                waiting = Some(run);
                refusal
            }),
        })?;
        self.show_soon();
        Ok(())
    }

    /// Has the host see what was reported a moment ago, if it has not yet.
    pub(crate) fn show_soon(&mut self) {
        let now = thread::now_us();
        let since = *self.unshown_us.get_or_insert(now);
        if now.saturating_sub(since) >= SHOWN_US {
            self.show();
        }
    }

    /// Has it see all that was reported.
    pub(crate) fn show(&mut self) {
        self.session.publish();
        self.unshown_us = None;
    }
}
