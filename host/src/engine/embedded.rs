// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lock order: `Engine::open`, then `Engine::joined`, then `Engine::guest`, then the locks of
//! [`Sharing`]; `Engine::guest_status` last. `Engine::tidier` comes before those of [`Sharing`], and
//! never together with `Engine::guest`. Nobody who has `Engine::open` takes it again.
//!
//! Everything that shares the memory of one VM, put together for its VMM.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::time::{ClockId, clock_gettime};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryMmap};

use super::audit::audit;
use super::faults::serve_faults;
use super::guest::{Guest, Progressed};
use super::memory::Memory;
use super::regions::Region;
use super::shared_memory::SharedMemory;
use super::sharing::Sharing;
use super::store_view::StoreView;
use super::tidy::Tidier;
use super::uffd::Uffd;
use super::usage::file_uses;
use crate::device::PagefusionDevice;
use crate::protocol::{
    ControlReply, ControlRequest, EngineStatus, FileSpan, MAX_FILES, SplitHugePages, StoreClient,
    StoreSpan, Undo, Welcome,
};
use crate::store::{Group, LocalStore, PAGE, StoreError};

/// Pages a guest may have pinned for us at a time: 64 MiB.
const MAX_INFLIGHT_PAGES: u64 = 16_384;
/// All addresses.
const ALL: Range<usize> = 0..usize::MAX;
/// Between two calls of [`Engine::look`] by [`Engine::serve_ring`].
const LOOK: Duration = Duration::from_secs(5);
const LOOK_TIMESPEC: Timespec = Timespec {
    tv_sec: LOOK.as_secs() as i64,
    tv_nsec: 0,
};
/// Until what could not be done for the guest is tried again.
const RETRY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 25_000_000,
};

/// The engine of one VM, for its VMM.
///
/// It starts no thread. Two are needed, and the VMM starts them: one in [`Engine::serve_faults`],
/// without which nothing is shared, and one in [`Engine::serve_ring`]; a VMM with an event loop
/// calls [`Engine::progress`] and [`Engine::look`] instead of the latter. Everything else may be
/// called by any thread.
///
/// The VMM asks the engine for whatever changes what guest memory is made of:
/// [`Engine::discard`] for a balloon and the like, [`Engine::change`] for locks, protection and
/// advice, [`Engine::set_guest_memory`] for memory that is plugged in or out, and
/// [`Engine::disable`] before a device gets hold of guest pages.
///
/// # The end
///
/// [`Engine::stop`] makes all of guest memory ordinary and has both threads return. It may be
/// called with the guest running; the engine should live as long as the guest nevertheless, for
/// [`Engine::discard`]. An engine that is dropped with something shared leaves it shared, and its
/// part of the store is kept until the process ends, so that no guest sees anything of it.
#[derive(Debug)]
pub struct Engine {
    sharing: Sharing,
    guest: Mutex<Guest<SharedMemory>>,
    /// What the guest's part of the status was after its last batch: whoever asks does not wait
    /// for a batch, which may wait for the daemon.
    guest_status: Mutex<EngineStatus>,
    tidier: Mutex<Tidier>,
    device: Arc<PagefusionDevice>,
    events: Uffd,
    /// Threads in [`Engine::serve_faults`].
    serving: AtomicUsize,
    /// Whether it was not stopped. Read-locked by who does what may wait for faults to be served.
    open: RwLock<bool>,
    /// Readable once it was stopped.
    stopped: OwnedFd,
    /// The store in this process that it has joined, and as which VM.
    joined: Mutex<Option<(Arc<Mutex<Group>>, u32)>>,
    /// What [`Engine::progress`] and [`Engine::look`] have cost.
    cpu_nanoseconds: AtomicU64,
}

/// A lock whose holder panicked guards data that every step leaves consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Non-zero, and new for every engine.
fn instance() -> u64 {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    (now.as_nanos() as u64).max(1)
}

fn cpu_nanoseconds() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// One more thread serves faults, as long as this lives.
struct Serving<'a>(&'a AtomicUsize);

impl<'a> Serving<'a> {
    fn begin(threads: &'a AtomicUsize) -> Self {
        threads.fetch_add(1, Ordering::AcqRel);
        Self(threads)
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Engine {
    /// An engine for the guest with this memory and this device. Memory that is not private and
    /// anonymous, or that is locked, is left alone, as [`Engine::status`] says.
    pub fn new<B>(
        uffd: Uffd,
        memory: &GuestMemoryMmap<B>,
        device: Arc<PagefusionDevice>,
    ) -> io::Result<Self>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let events = uffd.try_clone()?;
        let mut known = Memory::new(uffd)?;
        known.set_guest_memory(memory)?;
        let guest = device.guest(instance(), MAX_INFLIGHT_PAGES)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            sharing: Sharing::new(known),
            guest: Mutex::new(guest),
            guest_status: Mutex::default(),
            tidier: Mutex::default(),
            device,
            events,
            serving: AtomicUsize::new(0),
            open: RwLock::new(true),
            stopped: eventfd(0, flags)?,
            joined: Mutex::new(None),
            cpu_nanoseconds: AtomicU64::new(0),
        })
    }

    /// Shares with the other engines of this process that have joined `group`, as `vm`, a number
    /// that none of them has. An engine joins one group in its life, and then has no daemon.
    pub fn join(&self, group: &Arc<Mutex<Group>>, vm: u32) -> Result<(), StoreError> {
        let mut joined = lock(&self.joined);
        if joined.is_some() || self.sharing.is_connected() {
            return Err(StoreError::Refused("this engine has a store".into()));
        }
        let store = LocalStore::new(group.clone(), vm);
        let view = store.read_only().and_then(StoreView::new);
        let view = view.map_err(StoreError::Unreachable)?;
        let seed = store.hash_seed();
        self.sharing.connect(Box::new(store), view, seed)?;
        *joined = Some((group.clone(), vm));
        Ok(())
    }

    /// Shares with those that a daemon lets this VM share with, as it says in `welcome`, which
    /// came with the descriptor `store`. To be called again, with a new connection, when
    /// [`Engine::is_connected`] says that the daemon has gone. What the daemon asks
    /// ([`crate::protocol::ControlConnection`]) goes to [`Engine::answer`].
    pub fn connect(
        &self,
        client: StoreClient,
        welcome: &Welcome,
        store: OwnedFd,
    ) -> Result<(), StoreError> {
        let _open = self.enter().map_err(StoreError::Unreachable)?;
        let joined = lock(&self.joined);
        if joined.is_some() {
            return Err(StoreError::Refused("this engine has joined a group".into()));
        }
        {
            let mut memory = self.sharing.memory();
            memory.set_paused(welcome.paused);
            memory.set_split_huge_pages(welcome.split_huge_pages);
        }
        let view = StoreView::new(store).map_err(StoreError::Unreachable)?;
        self.sharing
            .connect(Box::new(client), view, welcome.hash_seed)?;
        // What only this guest has was known to the old daemon alone.
        lock(&self.guest).set_paused(welcome.paused);
        self.ring_guest().map_err(StoreError::Unreachable)
    }

    /// Whether it has a store.
    pub fn is_connected(&self) -> bool {
        self.sharing.is_connected()
    }

    /// The guest's device.
    pub fn device(&self) -> &Arc<PagefusionDevice> {
        &self.device
    }

    /// What is shared, for what this type has no function for. Whoever undoes something by it
    /// waits for a thread in [`Engine::serve_faults`].
    pub fn sharing(&self) -> &Sharing {
        &self.sharing
    }

    /// Serves faults until [`Engine::stop`]: for a thread of the VMM that does nothing else, and
    /// never waits for one that may wait for guest memory.
    ///
    /// After an error it must be called again: threads may wait for guest memory meanwhile.
    /// Nothing is shared until somebody does.
    pub fn serve_faults(&self) -> io::Result<()> {
        let _serving = Serving::begin(&self.serving);
        serve_faults(&self.events, &self.sharing, self.stopped.as_fd())
    }

    /// Looks after the guest's ring until [`Engine::stop`]: for a thread of the VMM that does
    /// nothing else.
    pub fn serve_ring(&self) -> io::Result<()> {
        let mut looked_at = Instant::now();
        loop {
            if looked_at.elapsed() >= LOOK {
                looked_at = Instant::now();
                self.look()?;
            }
            let done = self.progress()?;
            let mut fds = [
                PollFd::from_borrowed_fd(self.device.doorbell(), PollFlags::IN),
                PollFd::new(&self.stopped, PollFlags::IN),
            ];
            let limit = match done {
                Progressed { busy: true, .. } => Timespec::default(),
                Progressed { retry: true, .. } => RETRY,
                _ => LOOK_TIMESPEC,
            };
            match poll(&mut fds, Some(&limit)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            if !fds[1].revents().is_empty() {
                return Ok(());
            }
            self.device.take_doorbell()?;
        }
    }

    /// Handles at most one batch of what the guest has reported, and rings the guest if it wants
    /// that: for an event loop, when [`PagefusionDevice::doorbell`] is readable, and every few
    /// seconds, since a guest that was restored from a snapshot does not ring. To be called again at
    /// once if there may be more, and after a tenth of a second at most if something is to be tried
    /// again, as while nobody serves faults. Takes milliseconds, longer where the store is far away.
    pub fn progress(&self) -> io::Result<Progressed> {
        let began = cpu_nanoseconds();
        let open = self.open();
        if !*open {
            return Ok(Progressed::default());
        }
        if self.serving.load(Ordering::Acquire) == 0 {
            let retry = true;
            return Ok(Progressed {
                retry,
                ..Progressed::default()
            });
        }
        let done = {
            let mut guest = lock(&self.guest);
            let done = guest.progress(&self.sharing);
            guest.fill_status(&mut lock(&self.guest_status));
            done
        };
        self.note_cpu(began);
        if done.ring {
            self.ring_guest()?;
        }
        Ok(done)
    }

    /// Does what nobody rings for: has the guest report again what has become worth sharing, gives
    /// overlays up that are worth nothing any more, lets go of memory that has gone. Every few
    /// seconds is often enough.
    pub fn look(&self) -> io::Result<()> {
        let began = cpu_nanoseconds();
        let Ok(_open) = self.enter() else {
            // They are to be served again, and then there is another look.
            return Ok(());
        };
        if let Err(e) = self.sharing.look_for_userfaultfds() {
            log::debug!("mappings cannot be read: {e}");
        }
        self.sharing.memory().let_go();
        if self.sharing.memory().take_untold() {
            self.rescan()?;
        }
        let joined = lock(&self.joined).clone();
        if let Some((group, vm)) = joined {
            let (reports, alone) = {
                let mut group = lock(&group);
                group.clear_strays();
                (group.take_reports_of(vm), group.take_alone(vm))
            };
            self.report(&reports)?;
            if let Err(e) = self.tidy(&alone) {
                log::debug!("tidying up: {e}");
            }
        }
        self.note_cpu(began);
        Ok(())
    }

    /// Has `discard` discard the `bytes` of guest memory from `at` on, by `MADV_DONTNEED` for
    /// instance: a balloon, free page reporting. What is shared there is made ordinary before, else
    /// the guest would find the file's bytes again instead of zeros. Only whole pages count.
    ///
    /// `discard` is called with guest memory locked: it must not call the engine, or wait for
    /// anybody who may touch guest memory. It must discard all of that memory, unless it is locked.
    pub fn discard<T>(
        &self,
        at: GuestAddress,
        bytes: u64,
        discard: impl FnOnce() -> T,
    ) -> io::Result<T> {
        let page = PAGE as u64;
        let first = at.raw_value().div_ceil(page);
        let end = at.raw_value().saturating_add(bytes) / page;
        let mut memory = self.sharing.memory();
        for range in pieces(&memory, first..end) {
            memory.before_discard(&range, false)?;
        }
        Ok(discard())
    }

    /// Has `change` change what the `bytes` of guest memory from `at` on are made of: lock it,
    /// protect it, give advice that concerns how it is made. Nothing is shared in its regions
    /// meanwhile, and they are looked at anew afterwards. Of the engine, `change` may ask for the
    /// status and nothing else.
    pub fn change<T>(
        &self,
        at: GuestAddress,
        bytes: u64,
        change: impl FnOnce() -> T,
    ) -> io::Result<T> {
        let _open = self.enter()?;
        let page = PAGE as u64;
        let first = at.raw_value() / page;
        let end = at.raw_value().saturating_add(bytes).div_ceil(page);
        let ranges = pieces(&self.sharing.memory(), first..end);
        let mut begun = 0;
        let begin = |range: &Range<usize>| {
            self.sharing.make_ordinary(range);
            self.sharing.memory().begin_change(range)?;
            begun += 1;
            Ok(())
        };
        let result = ranges.iter().try_for_each(begin).map(|()| change());
        let mut memory = self.sharing.memory();
        for range in &ranges[..begun] {
            memory.end_change(range);
        }
        result
    }

    /// From now on `memory` is all of guest memory: for memory that was plugged in, and before some
    /// is unplugged. Regions that are in it no more are ordinary memory afterwards, and are not kept
    /// mapped any longer than [`Memory::set_guest_memory`] says.
    pub fn set_guest_memory<B>(&self, memory: &GuestMemoryMmap<B>) -> io::Result<()>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let _open = self.enter()?;
        let regions = Region::all_of(memory)?;
        let stays = |it: &Region| regions.contains(it);
        let gone = self.sharing.memory().regions_but(stays);
        for range in gone {
            self.sharing.make_ordinary(&range);
        }
        if self.sharing.memory().set_guest_memory(memory)? {
            self.rescan()?;
        }
        Ok(())
    }

    /// Ends sharing for good: before something gets hold of guest pages that would go on seeing the
    /// old ones (VFIO, vhost-user). After an error something is shared still, and it must not.
    pub fn disable(&self, why: &str) -> io::Result<()> {
        let _open = self.enter()?;
        self.sharing.make_ordinary(&ALL);
        self.sharing.memory().disable(why)
    }

    /// Shares nothing more, or shares again; what is shared stays.
    pub fn set_paused(&self, paused: bool) -> io::Result<()> {
        self.sharing.memory().set_paused(paused);
        lock(&self.guest).set_paused(paused);
        self.ring_guest()
    }

    /// Makes ordinary memory of what is shared. After [`Undo::All`] it is paused as well.
    pub fn undo(&self, what: &Undo) -> io::Result<()> {
        let _open = self.enter()?;
        let undone = match what {
            Undo::All => {
                self.set_paused(true)?;
                self.sharing.undo_all()
            }
            _ => self.sharing.undo(what),
        };
        let told = self.publish_shared();
        undone.and(told)
    }

    /// Whether huge pages are split from now on, for what little of them is shared.
    pub fn set_split_huge_pages(&self, choice: SplitHugePages) -> io::Result<()> {
        if self.sharing.memory().set_split_huge_pages(choice) {
            self.rescan()?;
        }
        Ok(())
    }

    /// Counters, and why nothing is shared if so. Looks at every page that is shared, without
    /// holding anybody up. CPU time is that of [`Engine::progress`] and [`Engine::look`].
    pub fn status(&self) -> io::Result<EngineStatus> {
        let audit = audit(&self.sharing)?;
        let mut status = EngineStatus {
            memory_source: "vm-memory".to_owned(),
            pages_shared: audit.intact,
            pages_broken: audit.broken,
            overlays: audit.overlays,
            overlay_mappings: audit.overlay_mappings,
            mappings: audit.mappings,
            cpu_seconds: self.cpu_nanoseconds.load(Ordering::Relaxed) as f64 / 1e9,
            ..lock(&self.guest_status).clone()
        };
        let memory = self.sharing.memory();
        status.memory_bytes = memory.bytes();
        status.mappings_limit = memory.budget().limit() as u64;
        status.disabled = memory.disabled();
        Ok(status)
    }

    /// Does what the daemon asks, and says how it went.
    pub fn answer(&self, request: ControlRequest) -> ControlReply {
        match request {
            ControlRequest::Status => match self.status() {
                Ok(status) => ControlReply::Status(Box::new(status)),
                Err(e) => ControlReply::Error(e.to_string()),
            },
            ControlRequest::Report { spans } => {
                ControlReply::done("asking the guest", self.report(&spans))
            }
            ControlRequest::Files { after } => {
                let guest = lock(&self.guest);
                let name_of = |file: &_| guest.name_of(file);
                match file_uses(&self.sharing, after, MAX_FILES, name_of) {
                    Ok(files) => ControlReply::Files(files),
                    Err(e) => ControlReply::Error(e.to_string()),
                }
            }
            ControlRequest::Undo(what) => {
                ControlReply::done("undoing an overlay", self.undo(&what))
            }
            ControlRequest::Tidy { alone } => {
                let tidied = self.enter().and_then(|_open| self.tidy(&alone));
                ControlReply::done("tidying up", tidied)
            }
            ControlRequest::Pause => ControlReply::done("pausing", self.set_paused(true)),
            ControlRequest::SplitHugePages(choice) => {
                ControlReply::done("asking the guest", self.set_split_huge_pages(choice))
            }
            ControlRequest::Resume => ControlReply::done("going on", self.set_paused(false)),
        }
    }

    /// Makes all of guest memory ordinary, for good, and has [`Engine::serve_faults`] and
    /// [`Engine::serve_ring`] return. Fails where nobody serves faults though something is shared,
    /// or where memory is short; then it is as if it had not been called, but that nothing more is
    /// shared.
    pub fn stop(&self) -> io::Result<()> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        self.is_served()?;
        self.set_paused(true)?;
        let undone = self.sharing.undo_all();
        // A guest that cannot be rung sees it later.
        let _ = self.publish_shared();
        undone?;
        *open = false;
        rustix::io::write(&self.stopped, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    fn open(&self) -> RwLockReadGuard<'_, bool> {
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For who may undo something: as long as he holds the answer, faults are served.
    fn enter(&self) -> io::Result<RwLockReadGuard<'_, bool>> {
        let open = self.open();
        self.is_served().map(|()| open)
    }

    /// Undoing waits for whoever serves faults.
    fn is_served(&self) -> io::Result<()> {
        let served = self.serving.load(Ordering::Acquire) > 0;
        if served || self.sharing.memory().overlays().pages() == 0 {
            return Ok(());
        }
        Err(io::Error::other("no thread serves faults"))
    }

    fn ring_guest(&self) -> io::Result<()> {
        self.device.ring_guest()
    }

    /// Asks the guest to report everything again.
    fn rescan(&self) -> io::Result<()> {
        lock(&self.guest).request_rescan();
        self.ring_guest()
    }

    /// Asks the guest to report these again.
    fn report(&self, spans: &[FileSpan]) -> io::Result<()> {
        let ring = lock(&self.guest).request_report(spans);
        if ring { self.ring_guest() } else { Ok(()) }
    }

    fn tidy(&self, alone: &[StoreSpan]) -> io::Result<()> {
        let spans = lock(&self.tidier).round(&self.sharing, alone)?;
        // What is to be reported again is known here alone: it is asked for in any case.
        let told = self.publish_shared();
        self.report(&spans).and(told)
    }

    fn publish_shared(&self) -> io::Result<()> {
        let ring = lock(&self.guest).publish_shared(&self.sharing.memory());
        if ring { self.ring_guest() } else { Ok(()) }
    }

    fn note_cpu(&self, since: u64) {
        let spent = cpu_nanoseconds().saturating_sub(since);
        self.cpu_nanoseconds.fetch_add(spent, Ordering::Relaxed);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // To undo it takes a thread that serves faults, and there is none.
        if self.sharing.memory().overlays().pages() > 0 {
            log::error!("an engine was not stopped: its part of the store stays where it is");
            self.sharing.keep_store();
        }
    }
}

/// Where guest frames are in this process.
fn pieces(memory: &Memory, frames: Range<u64>) -> Vec<Range<usize>> {
    let pages = frames.end.saturating_sub(frames.start);
    let pieces = memory.pieces(frames.start, pages);
    pieces
        .map(|piece| piece.hva..piece.hva + piece.pages * PAGE)
        .collect()
}
