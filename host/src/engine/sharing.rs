// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lock order: `Sharing::store`, then `Sharing::memory`.
//!
//! The store's lock is held for a whole transaction (ask, overlay, give back what was not
//! needed), so that a page granted to one transaction is never given back by another. The
//! memory's lock is held for one overlay at a time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pagefusion_abi::wire::{Outcome, reason};
use roaring::RoaringBitmap;

use super::memory::{Memory, Refusal, WINDOW_PAGES};
use super::overlays::Overlay;
use super::regions::Piece;
use super::usage;
use crate::protocol::{
    FileKey, FileSpan, MAX_PUBLISH_PAGES, Segment, Sighting, StorePage, Undo, Verdict,
};
use crate::store::{PAGE, PageStore, StoreError, hash_page};

/// Most hashes in one request: what fits a message with room to spare.
const MAX_SIGHTINGS: usize = 4096;

/// A run that a guest has reported: `pages` pages of `file` from `page` on lie at `gfn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportedRun {
    /// The file.
    pub file: FileKey,
    /// First page in the file.
    pub page: u64,
    /// First guest frame.
    pub gfn: u64,
    /// Length, pages.
    pub pages: u32,
}

/// A piece of a run that is contiguous in file, store candidates and this process.
#[derive(Clone, Copy, Debug)]
struct Part {
    run: usize,
    file: FileKey,
    number: u32,
    page: u64,
    hva: usize,
    pages: usize,
}

impl Part {
    fn slice(self, from: usize, pages: usize) -> Self {
        Self {
            page: self.page + from as u64,
            hva: self.hva + from * PAGE,
            pages,
            ..self
        }
    }

    fn span(&self) -> FileSpan {
        FileSpan {
            file: self.file,
            page: self.page,
            pages: self.pages as u32,
        }
    }

    fn end(&self) -> usize {
        self.hva + self.pages * PAGE
    }
}

/// Shares the memory of one process with what a store has.
#[derive(Debug)]
pub struct Sharing {
    store: Mutex<Option<Connected>>,
    memory: Mutex<Memory>,
}

/// A store and the seed of its hashes.
struct Connected {
    pages: Box<dyn PageStore>,
    seed: u64,
}

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connected").finish_non_exhaustive()
    }
}

/// A lock whose holder panicked guards data that every step leaves consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ask_store(
    guard: &mut Option<Connected>,
    ask: impl FnOnce(&mut Connected) -> Result<(), StoreError>,
) {
    let Some(store) = guard.as_mut() else { return };
    if let Err(e) = ask(store) {
        log::warn!("{e}");
        if matches!(e, StoreError::Unreachable(_)) {
            *guard = None;
        }
    }
}

impl Sharing {
    /// Shares `memory` once a store is connected.
    pub fn new(memory: Memory) -> Self {
        Self {
            store: Mutex::new(None),
            memory: Mutex::new(memory),
        }
    }

    /// Guest memory, locked: be quick.
    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        lock(&self.memory)
    }

    /// Guest memory if nobody works on it now.
    pub fn try_memory(&self) -> Option<MutexGuard<'_, Memory>> {
        self.memory.try_lock().ok()
    }

    /// Connects a store, and tells it what is mapped. `view` is its read-only descriptor.
    pub fn connect(
        &self,
        mut pages: Box<dyn PageStore>,
        view: super::mapped::StoreView,
        seed: u64,
    ) -> Result<(), StoreError> {
        let mut store = lock(&self.store);
        let holdings = {
            let mut memory = self.memory();
            memory.set_store(view).map_err(StoreError::Unreachable)?;
            memory.holdings()
        };
        pages.announce(holdings)?;
        *store = Some(Connected { pages, seed });
        Ok(())
    }

    /// Whether a store is connected.
    pub fn is_connected(&self) -> bool {
        lock(&self.store).is_some()
    }

    /// Forgets the store; overlays stay.
    pub fn disconnect(&self) {
        *lock(&self.store) = None;
    }

    /// Tells the store that the guest does not have these file pages any more.
    pub fn forget(&self, span: FileSpan) {
        self.with_store(|store| store.pages.forget(span));
    }

    fn with_store(&self, ask: impl FnOnce(&mut Connected) -> Result<(), StoreError>) {
        ask_store(&mut lock(&self.store), ask);
    }

    /// Turns every overlay back into ordinary memory and gives the store pages back.
    pub fn undo_all(&self) -> std::io::Result<()> {
        self.undo_range(0..usize::MAX)?;
        self.memory().unregister_all();
        Ok(())
    }

    /// Turns some overlays back into ordinary memory and gives the store pages back. What the
    /// store grants afterwards is shared again.
    pub fn undo(&self, what: &Undo) -> std::io::Result<()> {
        self.undo_ranges(|memory| usage::ranges(memory, what))
    }

    /// As [`Sharing::undo`] for addresses of this process.
    pub(super) fn undo_ranges(
        &self,
        ranges: impl FnOnce(&Memory) -> Vec<std::ops::Range<usize>>,
    ) -> std::io::Result<()> {
        // While this is held, nobody shares what was granted before.
        let mut store = lock(&self.store);
        let ranges = {
            let mut memory = self.memory();
            let ranges = ranges(&memory);
            if ranges.is_empty() {
                return Ok(());
            }
            memory.begin_undo()?;
            ranges
        };
        let result = ranges.iter().try_for_each(|range| self.restore(range));
        self.memory().end_undo();
        result?;
        ask_store(&mut store, |store| {
            self.give_back(store, &RoaringBitmap::new())
        });
        Ok(())
    }

    /// As [`Sharing::undo_all`] for addresses of this process.
    pub fn undo_range(&self, range: std::ops::Range<usize>) -> std::io::Result<()> {
        self.begin_undo()?;
        let result = self.restore(&range);
        self.end_undo();
        result
    }

    /// Prepares for [`Sharing::undo_some`]; [`Sharing::end_undo`] must follow.
    pub(super) fn begin_undo(&self) -> std::io::Result<()> {
        self.memory().begin_undo()
    }

    /// Undoes at most so many windows; whether there may be more.
    pub(super) fn undo_some(&self, windows: usize) -> std::io::Result<bool> {
        for _ in 0..windows {
            if !self.memory().restore_some(&(0..usize::MAX))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Ends an undo, and gives the store pages back.
    pub(super) fn end_undo(&self) {
        self.memory().end_undo();
        self.with_store(|store| self.give_back(store, &RoaringBitmap::new()));
    }

    /// Within an undo. The lock is taken anew for every window, so that nobody waits long.
    fn restore(&self, range: &std::ops::Range<usize>) -> std::io::Result<()> {
        while self.memory().restore_some(range)? {}
        Ok(())
    }

    fn give_back(&self, store: &mut Connected, granted: &RoaringBitmap) -> Result<(), StoreError> {
        let unneeded = self.memory().take_unneeded(granted);
        for part in unneeded.chunks(1 << 16) {
            store.pages.release(part.to_vec())?;
        }
        Ok(())
    }

    /// Resolves runs whose pages the guest holds pinned; one outcome per run.
    pub fn share(&self, runs: &[ReportedRun]) -> Vec<Outcome> {
        self.share_while(runs, &|| true)
    }

    /// As [`Sharing::share`], as long as `pinned` says that the guest holds them: it is asked
    /// in every window, while writers are stopped.
    pub fn share_while(&self, runs: &[ReportedRun], pinned: &dyn Fn() -> bool) -> Vec<Outcome> {
        let mut work = Transaction::new(self, runs, pinned);
        let mut guard = lock(&self.store);
        match guard.as_mut() {
            None => work.refuse_all(reason::NO_STORE),
            Some(store) => {
                if let Err(e) = work.run(store) {
                    log::warn!("{e}");
                    work.refuse_all(reason::NO_STORE);
                    if matches!(e, StoreError::Unreachable(_)) {
                        *guard = None;
                    }
                }
            }
        }
        work.outcomes()
    }
}

/// Pages of one run, counted while it is resolved.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    pages: u32,
    shared: u32,
    remembered: u32,
    reason: Refusal,
}

impl Segment {
    fn skip(self, pages: u32) -> Self {
        Self {
            pages: self.pages - pages,
            store: self.store.map(|at| at + pages),
        }
    }
}

/// One batch of runs on its way through the store.
struct Transaction<'a> {
    sharing: &'a Sharing,
    pinned: &'a dyn Fn() -> bool,
    counts: Vec<Count>,
    parts: Vec<Part>,
    granted: RoaringBitmap,
}

impl<'a> Transaction<'a> {
    fn new(sharing: &'a Sharing, runs: &[ReportedRun], pinned: &'a dyn Fn() -> bool) -> Self {
        let mut this = Self {
            sharing,
            pinned,
            counts: vec![Count::default(); runs.len()],
            parts: Vec::with_capacity(runs.len()),
            granted: RoaringBitmap::new(),
        };
        let mut memory = sharing.memory();
        for (index, run) in runs.iter().enumerate() {
            this.counts[index].pages = run.pages;
            let pieces: Vec<Piece> = memory.pieces(run.gfn, u64::from(run.pages));
            if pieces.iter().map(|p| p.pages).sum::<usize>() < run.pages as usize {
                this.counts[index].reason = reason::OUTSIDE_MEMORY;
            }
            for piece in pieces {
                let number = memory.file_number(run.file);
                match (number, memory.check(piece.hva)) {
                    (Some(number), Ok(())) => this.parts.push(Part {
                        run: index,
                        file: run.file,
                        number,
                        page: run.page + piece.offset,
                        hva: piece.hva,
                        pages: piece.pages,
                    }),
                    (None, _) => this.counts[index].reason = reason::TOO_MANY_FILES,
                    (_, Err(why)) => this.counts[index].reason = why,
                }
            }
        }
        drop(memory);
        this
    }

    fn refuse(&mut self, run: usize, why: Refusal) {
        self.counts[run].reason = why;
    }

    fn refuse_all(&mut self, why: Refusal) {
        for count in &mut self.counts {
            if count.shared + count.remembered < count.pages && count.reason == reason::NONE {
                count.reason = why;
            }
        }
    }

    fn run(&mut self, store: &mut Connected) -> Result<(), StoreError> {
        let parts = std::mem::take(&mut self.parts);
        let spans: Vec<FileSpan> = parts.iter().map(Part::span).collect();
        let mut segments = Vec::new();
        if !spans.is_empty() {
            store.pages.lookup(&spans, &mut segments)?;
        }
        let unknown = self.overlay_found(&parts, &segments)?;
        let mut wanted = Vec::new();
        for batch in split_by_pages(&unknown, MAX_SIGHTINGS) {
            wanted.extend(self.sight(store, &batch)?);
        }
        for part in join(wanted) {
            for from in (0..part.pages).step_by(MAX_PUBLISH_PAGES) {
                let pages = MAX_PUBLISH_PAGES.min(part.pages - from);
                self.publish(store, part.slice(from, pages))?;
            }
        }
        let granted = std::mem::take(&mut self.granted);
        self.sharing.give_back(store, &granted)
    }

    /// Overlays what the lookup found; returns what it did not find, or what differed.
    fn overlay_found(
        &mut self,
        parts: &[Part],
        segments: &[Segment],
    ) -> Result<Vec<Part>, StoreError> {
        let mut unknown = Vec::new();
        let mut segments = segments.iter().copied();
        // A segment may reach over the end of a span into the next.
        let mut rest: Option<Segment> = None;
        for part in parts {
            let mut from = 0;
            while from < part.pages {
                let segment = rest
                    .take()
                    .or_else(|| segments.find(|s| s.pages > 0))
                    .ok_or_else(|| StoreError::Refused("segments end before the spans".into()))?;
                let pages = (segment.pages as usize).min(part.pages - from);
                let here = part.slice(from, pages);
                match segment.store {
                    Some(store) => unknown.extend(self.overlay(here, store)),
                    None => unknown.push(here),
                }
                from += pages;
                rest = Some(segment.skip(pages as u32)).filter(|s| s.pages > 0);
            }
        }
        Ok(unknown)
    }

    /// Overlays `part` with store pages from `store` on, window by window; returns the
    /// sub-parts whose bytes differ.
    fn overlay(&mut self, part: Part, store: StorePage) -> Vec<Part> {
        self.granted.insert_range(store..store + part.pages as u32);
        let mut different = Vec::new();
        for from in (0..part.pages).step_by(WINDOW_PAGES) {
            let window = part.slice(from, WINDOW_PAGES.min(part.pages - from));
            let overlay = Overlay {
                pages: window.pages as u32,
                store: store + from as u32,
                file: window.number,
                page: window.page,
            };
            let done = self
                .sharing
                .memory()
                .overlay(window.hva, overlay, self.pinned);
            match done {
                Ok(shared) => {
                    self.counts[part.run].shared += shared.count_ones();
                    if shared.count_ones() as usize != window.pages {
                        different.extend(
                            (0..window.pages)
                                .filter(|i| shared >> i & 1 == 0)
                                .map(|i| window.slice(i, 1)),
                        );
                    }
                }
                Err(why) => self.refuse(part.run, why),
            }
        }
        join(different)
    }

    /// Tells the store what was seen; overlays what it found by content, returns what it
    /// wants published.
    fn sight(&mut self, store: &mut Connected, parts: &[Part]) -> Result<Vec<Part>, StoreError> {
        let mut sightings = Vec::with_capacity(parts.len());
        let mut asked = Vec::with_capacity(parts.len());
        let mut page = [0; PAGE];
        for part in parts {
            let mut hashes = Vec::with_capacity(part.pages);
            for i in 0..part.pages {
                let address = part.hva + i * PAGE;
                // A copy: the guest may write meanwhile, and a hash of what changes under it
                // would be one of nothing.
                if let Err(why) = self.sharing.memory().copy_out(address, &mut page) {
                    self.refuse(part.run, why);
                    break;
                }
                hashes.push(hash_page(store.seed, &page));
            }
            if !hashes.is_empty() {
                asked.push(part.slice(0, hashes.len()));
                sightings.push(Sighting {
                    file: part.file,
                    page: part.page,
                    hashes,
                });
            }
        }
        if sightings.is_empty() {
            return Ok(Vec::new());
        }
        let mut verdicts = Vec::new();
        store.pages.sight(sightings, &mut verdicts)?;
        if verdicts.len() != asked.iter().map(|p| p.pages).sum::<usize>() {
            return Err(StoreError::Refused(
                "as many verdicts as pages were expected".into(),
            ));
        }
        let mut wanted = Vec::new();
        let mut verdicts = verdicts.into_iter();
        for part in asked {
            let mut found: Option<(Part, StorePage)> = None;
            for (i, verdict) in (0..part.pages).zip(&mut verdicts) {
                let here = part.slice(i, 1);
                found = match (verdict, found) {
                    (Verdict::Found(at), Some((run, store))) if store + run.pages as u32 == at => {
                        Some((
                            Part {
                                pages: run.pages + 1,
                                ..run
                            },
                            store,
                        ))
                    }
                    (verdict, earlier) => {
                        self.overlay_by_content(earlier);
                        match verdict {
                            Verdict::Found(at) => Some((here, at)),
                            Verdict::Remembered => {
                                self.counts[part.run].remembered += 1;
                                None
                            }
                            Verdict::Publish => {
                                wanted.push(here);
                                None
                            }
                        }
                    }
                };
            }
            self.overlay_by_content(found);
        }
        Ok(wanted)
    }

    fn overlay_by_content(&mut self, found: Option<(Part, StorePage)>) {
        let Some((part, store)) = found else { return };
        if !self.overlay(part, store).is_empty() {
            self.refuse(part.run, reason::DIFFERENT);
        }
    }

    /// Sends pages to the store and overlays them with what became of them there.
    fn publish(&mut self, store: &mut Connected, part: Part) -> Result<(), StoreError> {
        let mut bytes = vec![0; part.pages * PAGE];
        if let Err(why) = self.sharing.memory().copy_out(part.hva, &mut bytes) {
            self.refuse(part.run, why);
            return Ok(());
        }
        let mut positions = Vec::new();
        store.pages.publish(part.span(), &bytes, &mut positions)?;
        if positions.len() != part.pages {
            return Err(StoreError::Refused(
                "as many positions as pages were expected".into(),
            ));
        }
        let mut from = 0;
        while from < part.pages {
            let Some(first) = positions[from] else {
                self.refuse(part.run, reason::STORE_FULL);
                from += 1;
                continue;
            };
            let follows = |i: &usize| positions[from + i] == Some(first + *i as u32);
            let count = (0..part.pages - from).take_while(follows).count();
            if !self.overlay(part.slice(from, count), first).is_empty() {
                self.refuse(part.run, reason::DIFFERENT);
            }
            from += count;
        }
        Ok(())
    }

    fn outcomes(self) -> Vec<Outcome> {
        let outcome = |c: Count| {
            let rest = c.pages.saturating_sub(c.shared + c.remembered);
            let why = if c.reason == reason::NONE {
                reason::DIFFERENT
            } else {
                c.reason
            };
            Outcome {
                reason: if rest == 0 { reason::NONE } else { why },
                shared: u16::try_from(c.shared).unwrap_or(u16::MAX),
                remembered: u16::try_from(c.remembered).unwrap_or(u16::MAX),
            }
        };
        self.counts.into_iter().map(outcome).collect()
    }
}

/// Joins parts of one run that follow each other.
fn join(parts: Vec<Part>) -> Vec<Part> {
    let mut joined: Vec<Part> = Vec::with_capacity(parts.len());
    for part in parts {
        match joined.last_mut() {
            Some(last)
                if last.run == part.run
                    && last.end() == part.hva
                    && last.page + last.pages as u64 == part.page =>
            {
                last.pages += part.pages;
            }
            _ => joined.push(part),
        }
    }
    joined
}

/// Cuts parts into batches of at most `most` pages.
fn split_by_pages(parts: &[Part], most: usize) -> Vec<Vec<Part>> {
    let mut batches = Vec::new();
    let mut batch = Vec::new();
    let mut room = most;
    for part in parts {
        let mut from = 0;
        while from < part.pages {
            let pages = room.min(part.pages - from);
            batch.push(part.slice(from, pages));
            from += pages;
            room -= pages;
            if room == 0 {
                batches.push(std::mem::take(&mut batch));
                room = most;
            }
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

/// When sharing of a guest began and when it last grew.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    started: Instant,
    last_shared: Instant,
}

impl Progress {
    /// Begins now.
    pub(super) fn start() -> Self {
        let now = Instant::now();
        Self {
            started: now,
            last_shared: now,
        }
    }

    /// Something was shared just now.
    pub(super) fn shared(&mut self) {
        self.last_shared = Instant::now();
    }

    /// Seconds from the beginning to the last newly shared page.
    pub(super) fn seconds(&self) -> f64 {
        (self.last_shared - self.started).as_secs_f64()
    }
}
