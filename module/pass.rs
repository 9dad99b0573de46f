// SPDX-License-Identifier: GPL-2.0

//! One pass: all processes, their files, what to tell the host of them.

use crate::control::CONTROL;
use crate::file::{CachedFile, Facts};
use crate::inodes::Inodes;
use crate::ivshmem::Ivshmem;
use crate::kernel_memory::{self, Part};
use crate::leaf::MAX_PAGE;
use crate::list::List;
use crate::look::Look;
use crate::page_cache::{FolioBatch, PinnedFrames};
use crate::pages::{Cursor, PieceState};
use crate::policy::{self, Moment};
use crate::ranges::Range;
use crate::report::Source;
use crate::runs::PinnedRun;
use crate::scan::Wanted;
use crate::session::{Refusal, Session, Why};
use crate::superblock::{self, HeldSuper, Superblocks};
use crate::thread;
use crate::tracepoints;
use crate::tracker::FileState;
use crate::values::Scope;
use crate::walk::{Batch, Candidate, Seen, Walk};
use crate::wire::MAX_NAME;
use kernel::alloc::KVec;
use kernel::prelude::*;

/// What a session of this guest holds its pages with.
pub(crate) type GuestSession = Session<Ivshmem, PinnedFrames>;

/// Why a pass ended early. What it has not seen is left for the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Asked to: unloading, `run` is 0, the host paused or changed, the thread is to be frozen.
    Asked,
    /// The host takes too long.
    Stalled,
    /// Somebody wants a file system whose files are looked at.
    Wanted,
    /// There is no memory.
    NoMemory,
}

/// What a pass needs and keeps for the next one.
pub(crate) struct Workshop {
    superblocks: Superblocks,
    folios: FolioBatch,
    look: Option<Look>,
    path: KVec<u8>,
    /// Looked for by the first pass that can, as a thread of the kernel may know.
    kernel: Option<[Option<Part>; 2]>,
}

impl Workshop {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            superblocks: Superblocks::new(),
            folios: FolioBatch::new(),
            look: Some(Look::new()?),
            // Room for a path that is cut, as the kernel writes paths from their end.
            path: KVec::from_elem(0, 4 * MAX_NAME, GFP_KERNEL)?,
            kernel: None,
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
    /// Pages of files that were looked for.
    pub(crate) pages: u64,
    /// Milliseconds until the next file is old enough to be reported.
    pub(crate) due_ms: Option<u64>,
    /// What the walk saw.
    pub(crate) seen: Seen,
    /// Whether files were let go unseen because somebody wanted their file system.
    left_out: bool,
    /// Whether what the pass did not look at was taken for gone.
    pub(crate) has_judged: bool,
}

/// A pass under way.
pub(crate) struct Pass<'a> {
    pub(crate) session: &'a mut GuestSession,
    /// Holds the file systems of the files that are looked at.
    superblocks: &'a Superblocks,
    /// Those whose inodes have been gone through. Never followed.
    gone_through: List<usize>,
    number: u32,
    pub(crate) most: u64,
    pub(crate) path: &'a mut [u8],
    pub(crate) folios: &'a mut FolioBatch,
    pub(crate) look: &'a mut Option<Look>,
    pub(crate) looked: u64,
    /// What is to be withdrawn before anything else of this file is reported.
    pub(crate) gone: Range,
    /// When the first of the reports was made that the host has not been shown.
    pub(crate) unshown_us: Option<u64>,
    pub(crate) findings: Findings,
    rules: Rules,
}

pub(crate) const NOTHING: Range = Range { start: 0, end: 0 };
const EVERYTHING: Range = Range {
    start: 0,
    end: u64::MAX,
};

/// Knobs that say what belongs to a pass. After a change, what was reported and does not belong to
/// it any more is withdrawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rules {
    scope: Scope,
    kernel_text: bool,
}

impl Rules {
    /// The rules that hold now.
    pub(crate) fn now() -> Self {
        Self {
            scope: CONTROL.scope.get(),
            kernel_text: CONTROL.kernel_text.get() == 1,
        }
    }
}

/// Makes a pass. `scans` is its number since the module was loaded; `are_new` says that no pass
/// with these rules has judged yet.
pub(crate) fn run(
    session: &mut GuestSession,
    workshop: &mut Workshop,
    scans: u64,
    rules: Rules,
    are_new: bool,
) -> Result<Findings, Stop> {
    tracepoints::begin_pass();
    session.most_inflight_pages = CONTROL.max_inflight_pages.get();
    let (number, most) = (session.begin_pass(), session.most_run_pages());
    let Workshop {
        superblocks,
        folios,
        look,
        path,
        kernel,
    } = workshop;
    let findings = Findings::default();
    let mut pass = Pass {
        session,
        superblocks,
        gone_through: List::new(),
        number,
        most,
        path,
        folios,
        look,
        looked: 0,
        gone: NOTHING,
        unshown_us: None,
        findings,
        rules,
    };
    if kernel.is_none() {
        // Without memory for that the next pass tries again.
        *kernel = kernel_memory::parts().ok();
    }
    let mut result = pass.walk(kernel.as_ref().map_or(&[], |parts| &parts[..]));
    if result.is_ok() {
        pass.findings.has_judged = pass.session.judges(pass.is_whole());
        if are_new && pass.findings.has_judged {
            result = pass.withdraw_strays();
        }
    }
    let result = result.and_then(|()| pass.finish(scans));
    let findings = pass.findings;
    // However it went: the host cannot answer what it does not see, and would seem to stand still.
    pass.session.publish();
    folios.release();
    result.map(|()| findings)
}

impl Pass<'_> {
    fn walk(&mut self, kernel: &[Option<Part>]) -> Result<(), Stop> {
        let superblocks = self.superblocks;
        let mut batch = Batch::new().map_err(|_| Stop::NoMemory)?;
        let mut walk = Walk::new(self.rules.scope);
        loop {
            let more = walk.fill(&mut batch, superblocks);
            for Candidate { file, .. } in batch.candidates() {
                tracepoints::note(file);
            }
            let scanned = self
                .scan_batch(&batch)
                .and_then(|()| self.scan_superblocks());
            batch.clear();
            self.let_go(scanned)?;
            self.show();
            self.look_up()?;
            if !more {
                break;
            }
            self.go_on()?;
        }
        self.findings.seen = walk.seen;
        if self.rules.kernel_text {
            for part in kernel.iter().flatten() {
                self.scan_kernel(part)?;
            }
        }
        Ok(())
    }

    fn scan_batch(&mut self, batch: &Batch<'_>) -> Result<(), Stop> {
        for Candidate { file, range, .. } in batch.candidates() {
            self.scan_file(file, *range, Wanted::All)?;
            if self.unshown_us.is_some() {
                self.show_soon();
            }
        }
        Ok(())
    }

    /// Looks at files that are mapped nowhere, too, on file systems that have one that is.
    fn scan_superblocks(&mut self) -> Result<(), Stop> {
        if self.rules.scope < Scope::Clean {
            return Ok(());
        }
        let superblocks = self.superblocks;
        for held in (0..superblock::MOST).filter_map(|index| superblocks.at(index)) {
            let address = held.as_ptr() as usize;
            // Without memory to remember it, the next pass goes through it.
            if !self.gone_through.contains(&address) && self.gone_through.push(address).is_ok() {
                self.scan_superblock(held)?;
            }
        }
        Ok(())
    }

    fn scan_superblock(&mut self, held: HeldSuper<'_>) -> Result<(), Stop> {
        let mut inodes = Inodes::new(held);
        while let Some(file) = inodes.next() {
            let Some(file) = file else {
                self.breathe()?;
                continue;
            };
            let wanted = if file.is_mapped() {
                Wanted::All
            } else {
                Wanted::Used
            };
            self.scan_file(file, EVERYTHING, wanted)?;
            self.show();
            self.go_on()?;
            self.look_up()?;
        }
        Ok(())
    }

    /// Goes on without the files that were let go because somebody wants their file system; they
    /// are looked at in another pass.
    fn let_go(&mut self, scanned: Result<(), Stop>) -> Result<(), Stop> {
        if scanned != Err(Stop::Wanted) {
            return scanned;
        }
        self.gone = NOTHING;
        self.findings.again = true;
        self.findings.left_out = true;
        Ok(())
    }

    /// Rests a little, unfrozen: reports may be in flight, and file systems held.
    fn pause(&self) -> Result<(), Stop> {
        thread::wait_unfrozen(policy::POLL_MS);
        self.breathe()
    }

    /// To be called between two looks at a file: shows what was reported, rests when that is due,
    /// and breathes.
    pub(crate) fn go_on(&mut self) -> Result<(), Stop> {
        if self.unshown_us.is_some() {
            self.show_soon();
        }
        if self.looked < CONTROL.pages_to_scan.get() {
            return self.breathe();
        }
        self.looked = 0;
        self.show();
        self.pause()
    }

    /// To be called now and then: others wait for the processor, for file systems that are held, or
    /// for the thread to freeze.
    pub(crate) fn breathe(&self) -> Result<(), Stop> {
        thread::give_way();
        if thread::is_freezing() || thread::must_stop() {
            return Err(Stop::Asked);
        }
        if self.superblocks.are_wanted() {
            return Err(Stop::Wanted);
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
        let (mut rest, mut cursor) = (place.range, Cursor::default());
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
        self.session.tracker.cover(id, place.range);
        Ok(())
    }

    /// Whether all was looked at that is mapped.
    const fn is_whole(&self) -> bool {
        let Findings { seen, left_out, .. } = &self.findings;
        seen.skipped == 0 && !seen.busy && !*left_out
    }

    /// Withdraws what was reported and has not been looked at in this pass.
    fn withdraw_strays(&mut self) -> Result<(), Stop> {
        for id in 0..self.session.tracker.ids() {
            let mut page = 0;
            while let Some(stray) = self.session.tracker.stray(id, self.number, page) {
                self.insist(|session| session.retract(id, stray, Why::Unwanted))?;
                page = stray.end;
            }
        }
        Ok(())
    }

    /// Forgets files that are gone and ends the pass.
    fn finish(&mut self, scans: u64) -> Result<(), Stop> {
        self.withdraw_unchecked()?;
        let mut from = 0;
        while let Some(id) = self.next_unseen(from) {
            self.retire(id, Why::Gone)?;
            from = id + 1;
        }
        if from != 0 {
            tracepoints::forget();
        }
        tracepoints::end_pass();
        let eligible = self.findings.eligible;
        self.findings.news = self.insist(|session| session.end_pass(scans, eligible))?;
        Ok(())
    }

    /// Withdraws files that were reported and not found now, when there is another list of excluded
    /// names: they may be on it, and are compared with it when they are found again.
    fn withdraw_unchecked(&mut self) -> Result<(), Stop> {
        let version = CONTROL.exclude.version();
        let mut from = 0;
        while let Some(id) = self
            .session
            .tracker
            .next_unchecked(from, self.number, version)
        {
            self.retire(id, Why::Unwanted)?;
            from = id + 1;
        }
        Ok(())
    }

    fn next_unseen(&self, from: u32) -> Option<u32> {
        if !self.findings.has_judged {
            return None;
        }
        let tracker = &self.session.tracker;
        tracker.next_unseen(from, self.number, policy::KEEP_PASSES)
    }

    /// Takes what the host has to say and looks whether to go on.
    fn look_up(&mut self) -> Result<(), Stop> {
        let serviced = self.session.service(thread::now_ms());
        self.findings.again |= serviced.wants_pass;
        let go_on = !serviced.restarted
            && self.session.is_open()
            && CONTROL.run.get() == 1
            && !thread::must_stop()
            && !thread::is_freezing();
        if go_on {
            Ok(())
        } else {
            Err(Stop::Asked)
        }
    }

    /// Repeats something until the host has made room for it.
    pub(crate) fn insist<T>(
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
            CONTROL.ring_full_waits.add(1);
            self.show();
            if self.session.ask_to_be_woken(false) {
                thread::wait_unfrozen(policy::POLL_MS);
            }
            self.breathe()?;
            self.look_up()?;
            if thread::now_ms().saturating_sub(began) > policy::PASS_WAIT_MS {
                return Err(Stop::Stalled);
            }
        }
    }

    fn retire(&mut self, id: u32, why: Why) -> Result<(), Stop> {
        self.insist(|session| session.retire(id, why))
    }

    /// Looks at what has not been looked at of a file.
    fn scan_file(
        &mut self,
        file: &CachedFile<'_>,
        mut range: Range,
        wanted: Wanted,
    ) -> Result<(), Stop> {
        let known = self.session.tracker.find(file.key());
        let Some(facts) = file.facts() else {
            return known.map_or(Ok(()), |id| self.retire(id, Why::Gone));
        };
        range.end = range.end.min(facts.pages).min(MAX_PAGE);
        // What only passes through the page cache is not worth an entry in the tracker.
        if known.is_none() && wanted == Wanted::Used && !self.has_used(file, &facts)? {
            return Ok(());
        }
        let Some(id) = self.identify(file, &facts, known)? else {
            return Ok(());
        };
        loop {
            let part = self.session.tracker.uncovered(id, self.number, range);
            if part.is_empty() {
                return Ok(());
            }
            self.findings.pages += part.end - part.start;
            self.scan(file, &facts, id, part, wanted)?;
            self.session.tracker.cover(id, part);
            range.start = part.end;
        }
    }

    /// The id of a file; a new one when the file has changed. `None` when it is not to be
    /// reported now, or without room.
    fn identify(
        &mut self,
        file: &CachedFile<'_>,
        facts: &Facts,
        known: Option<u32>,
    ) -> Result<Option<u32>, Stop> {
        let id = match known {
            Some(id) if self.session.tracker.is_current(id, facts.stamp) => Some(id),
            Some(id) => self.replace(id, file, facts, Why::Gone)?,
            None => self.add(file, facts),
        };
        let Some(id) = id else { return Ok(None) };
        match self.unless_excluded(id, file, facts)? {
            Some(id) if self.is_old_enough(id) => Ok(Some(id)),
            Some(id) => {
                self.session.tracker.touch(id, self.number);
                Ok(None)
            }
            None => Ok(None),
        }
    }

    fn add(&mut self, file: &CachedFile<'_>, facts: &Facts) -> Option<u32> {
        let id = self.session.tracker.add(file.key(), facts.stamp)?;
        self.session.tracker.get_mut(id)?.since = Moment::at(thread::now_ms());
        Some(id)
    }

    /// Withdraws a file and begins anew with it.
    fn replace(
        &mut self,
        id: u32,
        file: &CachedFile<'_>,
        facts: &Facts,
        why: Why,
    ) -> Result<Option<u32>, Stop> {
        self.retire(id, why)?;
        // Without memory it is still there.
        let is_gone = self.session.tracker.find(file.key()).is_none();
        Ok(if is_gone { self.add(file, facts) } else { None })
    }

    /// The id of a file whose name is not excluded. Names are looked at once for each list.
    fn unless_excluded(
        &mut self,
        mut id: u32,
        file: &CachedFile<'_>,
        facts: &Facts,
    ) -> Result<Option<u32>, Stop> {
        let version = CONTROL.exclude.version();
        let Some(tracked) = self.session.tracker.get_mut(id) else {
            return Ok(None);
        };
        if tracked.checked != version {
            let state = tracked.state;
            let excluded = CONTROL.exclude.has(file.name(self.path));
            if excluded && state != FileState::Unannounced {
                match self.replace(id, file, facts, Why::Unwanted)? {
                    Some(new) => id = new,
                    None => return Ok(None),
                }
            }
            if let Some(tracked) = self.session.tracker.get_mut(id) {
                tracked.checked = version;
                tracked.excluded = excluded;
            }
        }
        let tracked = self.session.tracker.get_mut(id);
        if tracked.is_some_and(|tracked| tracked.excluded) {
            self.session.tracker.touch(id, self.number);
            return Ok(None);
        }
        Ok(Some(id))
    }

    /// Whether a file has been known long enough to be reported, or was already.
    fn is_old_enough(&mut self, id: u32) -> bool {
        let age = CONTROL.min_age_millisecs.get();
        let Some(file) = self.session.tracker.get_mut(id) else {
            return false;
        };
        if age == 0 || file.state != FileState::Unannounced {
            return true;
        }
        let left = file.since.until_age(age, thread::now_ms());
        if left != 0 {
            let due = self.findings.due_ms.map_or(left, |due| due.min(left));
            self.findings.due_ms = Some(due);
        }
        left == 0
    }
}
