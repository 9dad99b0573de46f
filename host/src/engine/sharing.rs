// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lock order: `Sharing::store`, then `Sharing::memory`, then the list in `Sharing::waiters`.
//!
//! The store's lock is held for a whole transaction (ask, overlay, give back what was not
//! needed), so that a page granted to one transaction is never given back by another. The
//! memory's lock is held for one window at a time, and is a fair one: whoever has many windows
//! before him takes it again and again, and a vCPU may wait for it.

use std::ops::DerefMut;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pagefusion_abi::wire::{Outcome, reason};
use roaring::RoaringBitmap;

use super::memory::Memory;
use super::store_view::StoreView;
use super::transaction::Transaction;
use super::usage;
use super::waiters::Waiters;
use crate::protocol::{FileKey, FileSpan, Undo};
use crate::store::{PageStore, StoreError};

/// All addresses.
const ALL: std::ops::Range<usize> = 0..usize::MAX;

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

/// Shares the memory of one process with what a store has.
#[derive(Debug)]
pub struct Sharing {
    store: Mutex<Option<Connected>>,
    memory: parking_lot::Mutex<Memory>,
    waiters: Waiters,
}

/// A store and the seed of its hashes.
pub(super) struct Connected {
    pub(super) pages: Box<dyn PageStore>,
    pub(super) seed: u64,
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
            memory: parking_lot::Mutex::new(memory),
            waiters: Waiters::new(),
        }
    }

    /// Guest memory, locked: be quick.
    pub fn memory(&self) -> impl DerefMut<Target = Memory> {
        let memory = self.memory.lock();
        self.release_waiters(&memory);
        memory
    }

    /// Guest memory if nobody works on it now.
    pub fn try_memory(&self) -> Option<impl DerefMut<Target = Memory>> {
        let memory = self.memory.try_lock()?;
        self.release_waiters(&memory);
        Some(memory)
    }

    /// Has the next one who locks guest memory let a thread go on that waits at `address`. Whoever
    /// hears of faults must not wait for the lock: its holder may wait for him.
    pub(super) fn add_waiter(&self, address: usize) {
        self.waiters.add(address);
    }

    pub(super) fn has_waiters(&self) -> bool {
        self.waiters.any()
    }

    fn release_waiters(&self, memory: &Memory) {
        for address in self.waiters.take() {
            memory.release_waiter(address);
        }
    }

    /// Connects a store, and tells it what is mapped. `view` is its read-only descriptor.
    pub fn connect(
        &self,
        mut pages: Box<dyn PageStore>,
        view: StoreView,
        seed: u64,
    ) -> Result<(), StoreError> {
        let mut store = lock(&self.store);
        if !self.memory().has_store(&view) {
            self.make_ordinary(&ALL);
        }
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

    /// Forgets the store; overlays stay. One in this process takes back what it has granted: with
    /// that, everything must have been undone before.
    pub fn disconnect(&self) {
        *lock(&self.store) = None;
    }

    /// Forgets the store without letting go of what it has granted: overlays stay, and nobody will
    /// undo them.
    pub(super) fn keep_store(&self) {
        if let Some(store) = lock(&self.store).take() {
            std::mem::forget(store.pages);
        }
    }

    /// Tells the store that the guest does not have these file pages any more.
    pub fn forget(&self, span: FileSpan) {
        self.memory().forget_waiting(&span);
        self.with_store(|store| store.pages.forget(span));
    }

    fn with_store(&self, ask: impl FnOnce(&mut Connected) -> Result<(), StoreError>) {
        ask_store(&mut lock(&self.store), ask);
    }

    /// Turns every overlay back into ordinary memory and gives the store pages back.
    pub fn undo_all(&self) -> std::io::Result<()> {
        self.undo_range(ALL)?;
        self.memory().unregister_all();
        Ok(())
    }

    /// Turns some overlays back into ordinary memory and gives the store pages back. What the
    /// store grants afterwards is shared again.
    pub fn undo(&self, what: &Undo) -> std::io::Result<()> {
        self.undo_ranges(|memory| usage::ranges(memory, what))
    }

    /// As [`Sharing::undo`] for pages of files.
    pub(super) fn unshare(&self, spans: &[FileSpan]) -> std::io::Result<()> {
        self.undo_ranges(|memory| usage::ranges_of(memory, spans))
    }

    /// As [`Sharing::undo`] for addresses of this process.
    pub(super) fn undo_ranges(
        &self,
        ranges: impl FnOnce(&Memory) -> Vec<std::ops::Range<usize>>,
    ) -> std::io::Result<()> {
        // While this is held, nobody shares what was granted before.
        let mut store = lock(&self.store);
        self.split_all_cut();
        let ranges = {
            let mut memory = self.memory();
            let ranges = ranges(&memory);
            if ranges.is_empty() {
                return Ok(());
            }
            memory.begin_undo(&ranges)?;
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
        self.split_all_cut();
        self.memory().begin_undo(std::slice::from_ref(&range))?;
        let result = self.restore(&range);
        self.end_undo();
        result
    }

    /// Turns the overlays of all regions that `range` reaches into back into ordinary memory, and
    /// shares nothing there meanwhile, for what needs all of it ordinary under one lock next:
    /// [`Memory::disable`], [`Memory::begin_change`], [`Memory::take_userfaultfd`],
    /// [`Memory::remove_region`]. They do the same, but have the lock from beginning to end; with
    /// this before, a guest that wants memory meanwhile waits for a window and not for all of it.
    /// What goes wrong here goes wrong there once more.
    pub fn make_ordinary(&self, range: &std::ops::Range<usize>) {
        self.split_all_cut();
        let regions = {
            let mut memory = self.memory();
            let mut regions = memory.regions_in(range);
            regions.retain(|region| memory.overlays().intersects(region));
            if regions.is_empty() || memory.begin_undo(&regions).is_err() {
                return;
            }
            for region in &regions {
                memory.changes.begin(region);
            }
            regions
        };
        let _ = regions.iter().try_for_each(|region| self.restore(region));
        let mut memory = self.memory();
        for region in &regions {
            memory.changes.end(region);
        }
        memory.end_undo();
    }

    /// Prepares for [`Sharing::undo_some`]; [`Sharing::end_undo`] must follow.
    pub(super) fn begin_undo(&self) -> std::io::Result<()> {
        self.split_all_cut();
        self.memory().begin_undo(std::slice::from_ref(&ALL))
    }

    /// Undoes at most so many windows; whether there may be more.
    pub(super) fn undo_some(&self, windows: usize) -> std::io::Result<bool> {
        for _ in 0..windows {
            if !self.memory().restore_some(&ALL)? {
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

    pub(super) fn give_back(
        &self,
        store: &mut Connected,
        granted: &RoaringBitmap,
    ) -> Result<(), StoreError> {
        let unneeded = self.memory().take_unneeded(granted);
        for part in unneeded.chunks(1 << 16) {
            store.pages.release(part.to_vec())?;
        }
        Ok(())
    }

    /// Resolves runs whose pages the guest holds pinned; one outcome per run. What was spared
    /// for the sake of huge pages ([`Memory::take_spared`]) counts as remembered. Huge pages of which
    /// something is shared take all of their memory until [`Sharing::split_cut`], which
    /// [`super::Guest`] calls.
    pub fn share(&self, runs: &[ReportedRun]) -> Vec<Outcome> {
        self.share_while(runs, &|| true)
    }

    /// As [`Sharing::share`], as long as `pinned` says that the guest holds them: it is asked
    /// in every window, while writers are stopped.
    pub fn share_while(&self, runs: &[ReportedRun], pinned: &dyn Fn() -> bool) -> Vec<Outcome> {
        let mut guard = lock(&self.store);
        let mut work = Transaction::new(self, runs, pinned);
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
