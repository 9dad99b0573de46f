// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One VM as the daemon sees it: a process, its sockets, its device, its store.

use super::control::{Answer, Control};
use super::pace::Pace;
use super::process::Process;
use super::registry::{Pause, SharedGroup, store_name_of};
use super::runtime::{Runtime, UndoneFile, VmRecord};
use super::word::Word;
use crate::device::PagefusionDevice;
use crate::protocol::{
    Connection, ControlRequest, EngineStatus, FileKey, LimitChanges, Limits, SplitHugePages,
};
use crate::store::{Group, PAGE, VmLimits};
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most connections of an engine at one time.
const MAX_CONNECTIONS: usize = 4;
/// Most threads that serve them. One whose connection is closed may still be at its last
/// request.
const MAX_THREADS: usize = 16;

/// A connection on which the engine asks.
#[derive(Debug)]
pub(super) struct Asker {
    /// In the order in which they were welcomed.
    number: u64,
    stream: UnixStream,
}

/// A thread that serves a connection.
#[derive(Debug)]
pub(super) struct Serving<'a>(&'a AtomicUsize);

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a request is to its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// The first on the connection that is now the newest.
    First,
    /// Another on that connection.
    Again,
    /// One on an older connection: it must not be done.
    Late,
}

/// A living VM.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) number: u32,
    pub(super) name: String,
    /// Trust group; `None` for a VM that shares with nobody.
    pub(super) group: Option<String>,
    pub(super) process: Process,
    pub(super) directory: PathBuf,
    pub(super) ivshmem: UnixListener,
    pub(super) engine: UnixListener,
    /// `None` when the VM is older than this daemon.
    pub(super) device: Option<PagefusionDevice>,
    pub(super) group_store: SharedGroup,
    /// What it may put into the store.
    pub(super) pace: Pace,
    limits: Mutex<Limits>,
    /// Whether huge pages are split, as the operator wants it.
    split_huge_pages: Mutex<SplitHugePages>,
    told_split_huge_pages: Word<SplitHugePages>,
    /// `None`: that it shall not share, and not what else.
    told_pause: Word<Option<Pause>>,
    pub(super) control: Control,
    /// What its engine said of itself last.
    heard: Mutex<EngineStatus>,
    record: Mutex<VmRecord>,
    /// Those of the record, to look a file up.
    undone_files: Mutex<Arc<HashSet<FileKey>>>,
    device_connection: Mutex<Option<UnixStream>>,
    engine_connections: Mutex<Vec<UnixStream>>,
    threads: AtomicUsize,
    /// How often its engine was refused.
    refusals: AtomicU64,
    /// How many have been welcomed to ask.
    askers: AtomicU64,
    /// The newest that has asked. Compared and changed with the store locked.
    asker: Mutex<Option<Arc<Asker>>>,
}

impl Vm {
    /// Makes directory and sockets of a VM. A `new` VM gets a device, an adopted one has one.
    pub(super) fn new(
        runtime: &Runtime,
        record: VmRecord,
        process: Process,
        group_store: SharedGroup,
        new: bool,
    ) -> io::Result<Self> {
        let directory = runtime.vm_directory(record.number, record.uid)?;
        let ivshmem = runtime.listen(&directory.join("ivshmem.sock"), record.uid)?;
        let engine = runtime.listen(&directory.join("engine.sock"), record.uid)?;
        let device = if new {
            Some(PagefusionDevice::new()?)
        } else {
            None
        };
        let control = Control::new();
        control.set_paused(record.paused);
        Ok(Self {
            number: record.number,
            name: record.name.clone(),
            group: record.group.clone(),
            process,
            directory,
            ivshmem,
            engine,
            device,
            group_store,
            pace: Pace::default(),
            limits: Mutex::default(),
            split_huge_pages: Mutex::default(),
            told_split_huge_pages: Word::new(SplitHugePages::default()),
            told_pause: Word::new(Some(Pause::Running)),
            control,
            heard: Mutex::default(),
            undone_files: Mutex::new(Arc::new(keys(&record.undone_files))),
            record: Mutex::new(record),
            device_connection: Mutex::default(),
            engine_connections: Mutex::default(),
            threads: AtomicUsize::default(),
            refusals: AtomicU64::default(),
            askers: AtomicU64::default(),
            asker: Mutex::default(),
        })
    }

    pub(super) fn store(&self) -> MutexGuard<'_, Group> {
        self.group_store.lock()
    }

    /// Name of the store file of its group.
    pub(super) fn store_name(&self) -> String {
        store_name_of(self.number, self.group.as_deref())
    }

    pub(super) fn pause(&self) -> Pause {
        let record = lock(&self.record);
        match (record.paused, record.undone) {
            (false, _) => Pause::Running,
            (true, false) => Pause::Paused,
            (true, true) => Pause::Undone,
        }
    }

    pub(super) fn set_pause(&self, runtime: &Runtime, pause: Pause) -> io::Result<()> {
        self.update(runtime, |record| {
            // What was turned back stays so when it is only paused afterwards.
            record.undone = match pause {
                Pause::Running => false,
                Pause::Paused => record.paused && record.undone,
                Pause::Undone => true,
            };
            record.paused = pause.is_paused();
        })
    }

    /// Files that this VM shall not share.
    pub(super) fn undone_files(&self) -> Arc<HashSet<FileKey>> {
        lock(&self.undone_files).clone()
    }

    /// Notes what its engine says of itself.
    pub(super) fn hear(&self, engine: &EngineStatus) {
        lock(&self.heard).clone_from(engine);
    }

    /// What its engine said last, for when it says nothing: what it shares is shared still, and
    /// what was counted does not become less.
    pub(super) fn last_heard(&self) -> EngineStatus {
        lock(&self.heard).clone()
    }

    /// The same with the names they were undone by, if those or their ids are `name`.
    pub(super) fn undone_files_named(&self, name: &str) -> BTreeMap<FileKey, String> {
        let record = lock(&self.record);
        let named = record.undone_files.iter().filter(|it| it.is(name));
        named.map(|it| (it.file, it.name.clone())).collect()
    }

    /// Changes the list of files that this VM shall not share.
    pub(super) fn change_undone_files(
        &self,
        runtime: &Runtime,
        change: impl FnOnce(&mut Vec<UndoneFile>),
    ) -> io::Result<()> {
        self.update(runtime, |record| change(&mut record.undone_files))?;
        let keys = keys(&lock(&self.record).undone_files);
        *lock(&self.undone_files) = Arc::new(keys);
        Ok(())
    }

    /// Its own limits, without those of wider scopes.
    pub(super) fn own_limits(&self) -> Limits {
        lock(&self.record).limits
    }

    /// Changes its own limits.
    pub(super) fn change_limits(&self, runtime: &Runtime, changes: LimitChanges) -> io::Result<()> {
        self.update(runtime, |record| record.limits.change(changes))
    }

    /// What holds for it now.
    pub(super) fn limits(&self) -> Limits {
        *lock(&self.limits)
    }

    /// Has these limits hold from now on.
    pub(super) fn apply_limits(&self, limits: Limits) {
        *lock(&self.limits) = limits;
        self.pace.set_rate(limits.publish_rate);
        let vm_limits = VmLimits {
            store_pages: pages(limits.max_store),
            granted_pages: pages(limits.max_overlays),
        };
        self.store().set_vm_limits(self.number, vm_limits);
    }

    /// Has huge pages be split or not once the engine is told.
    pub(super) fn set_split_huge_pages(&self, wanted: SplitHugePages) {
        *lock(&self.split_huge_pages) = wanted;
    }

    /// Whether it is paused and whether huge pages are split, for an engine that is told so now.
    pub(super) fn welcome(&self) -> (bool, SplitHugePages) {
        let pause = self
            .told_pause
            .welcome(|| Some(self.pause()).filter(|noted| !noted.is_paused()));
        let split = self
            .told_split_huge_pages
            .welcome(|| *lock(&self.split_huge_pages));
        (pause.is_none(), split)
    }

    /// Takes the connection into use by which the engine that was welcomed is asked, and tells it
    /// what is new since.
    pub(super) fn connect_control(&self, connection: Connection) -> io::Result<()> {
        let connect = || self.control.connect(connection);
        self.told_pause
            .begin(|| self.told_split_huge_pages.begin(connect))?;
        // Nobody waits for the answers.
        let noted = || Some(self.pause());
        self.told_pause.tell(noted, |it| self.ask_to(it));
        self.tell_split_huge_pages();
        Ok(())
    }

    /// Tells the engine of an order that was noted, or what was noted since.
    pub(super) fn tell_pause(&self, order: Pause) -> Option<Receiver<Answer>> {
        let noted = || match (order, self.pause()) {
            // Whoever has had it undone tells that.
            (Pause::Paused, Pause::Undone) => Some(order),
            (_, noted) => Some(noted),
        };
        self.told_pause.tell_again(noted, |it| self.ask_to(it))
    }

    /// Has the guest report everything again, unless it is paused.
    pub(super) fn ask_for_everything(&self) {
        // Whoever has noted that it is paused tells it.
        let running = || Some(self.pause()).filter(|noted| !noted.is_paused());
        self.told_pause.tell_again(running, |it| self.ask_to(it));
    }

    fn ask_to(&self, pause: Option<Pause>) -> Option<Receiver<Answer>> {
        self.control.ask(pause?.request())
    }

    /// Tells the engine whether to split huge pages, if it believes something else. One that is not
    /// connected is told when it is.
    pub(super) fn tell_split_huge_pages(&self) {
        self.told_split_huge_pages.tell(
            || *lock(&self.split_huge_pages),
            |it| self.control.ask(ControlRequest::SplitHugePages(it)),
        );
    }

    /// Whether the VMM has the device; not known of a VM older than this daemon.
    pub(super) fn has_connected_device(&self) -> Option<bool> {
        self.device.as_ref()?;
        let held = lock(&self.device_connection);
        Some(held.as_ref().is_some_and(|stream| !is_closed(stream)))
    }

    /// Notes, for the next daemon, that this VM may map pages of the store.
    pub(super) fn engine_seen(&self, runtime: &Runtime) -> io::Result<()> {
        self.update(runtime, |record| record.engine_seen = true)
    }

    /// Gives the device to the VMM, unless it has it.
    pub(super) fn connect_device(&self, stream: UnixStream) -> io::Result<()> {
        let Some(device) = &self.device else {
            return Err(io::Error::other("the device was made by an earlier daemon"));
        };
        let mut held = lock(&self.device_connection);
        if held.as_ref().is_some_and(|stream| !is_closed(stream)) {
            return Err(io::Error::other("the device is connected already"));
        }
        stream.set_nonblocking(true)?;
        device.introduce(std::os::fd::AsFd::as_fd(&stream))?;
        *held = Some(stream);
        Ok(())
    }

    /// Notes a connection of the engine, so that it can be closed when the VM ends. Returns
    /// whether there may be one more.
    pub(super) fn note_connection(&self, stream: &UnixStream) -> io::Result<bool> {
        let mut connections = lock(&self.engine_connections);
        connections.retain(|stream| !is_closed(stream));
        if connections.len() >= MAX_CONNECTIONS {
            return Ok(false);
        }
        connections.push(stream.try_clone()?);
        Ok(true)
    }

    /// Counts a thread that serves a connection, until the answer is dropped; `None` when there
    /// are too many.
    pub(super) fn enter(&self) -> Option<Serving<'_>> {
        let serving = Serving(&self.threads);
        (self.threads.fetch_add(1, Ordering::Relaxed) < MAX_THREADS).then_some(serving)
    }

    /// Counts that its engine was refused; how often so far.
    pub(super) fn count_refusal(&self) -> u64 {
        self.refusals.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Numbers a connection on which the engine will ask, before it is welcome to.
    pub(super) fn new_asker(&self, stream: &UnixStream) -> io::Result<Arc<Asker>> {
        Ok(Arc::new(Asker {
            stream: stream.try_clone()?,
            number: self.askers.fetch_add(1, Ordering::Relaxed),
        }))
    }

    /// Whether the engine has asked on a newer connection: what it gave up waiting for must
    /// not be done after it has told again what it maps. Ends the older ones. The store must
    /// be locked, and stay so until the request is done.
    pub(super) fn hears(&self, asker: &Arc<Asker>) -> Heard {
        let mut newest = lock(&self.asker);
        match &*newest {
            Some(it) if it.number == asker.number => return Heard::Again,
            Some(it) if it.number > asker.number => return Heard::Late,
            Some(older) => {
                // Wakes its thread. What is queued there still comes, and is not heard.
                let _ = older.stream.shutdown(Shutdown::Both);
            }
            None => {}
        }
        *newest = Some(asker.clone());
        Heard::First
    }

    /// Closes everything: the process is gone.
    pub(super) fn close(&self) {
        self.control.disconnect();
        for stream in lock(&self.engine_connections).drain(..) {
            // Closed by the process already; this wakes our own threads.
            let _ = stream.shutdown(Shutdown::Both);
        }
        *lock(&self.device_connection) = None;
    }

    fn update(&self, runtime: &Runtime, change: impl FnOnce(&mut VmRecord)) -> io::Result<()> {
        let mut record = lock(&self.record);
        let mut changed = record.clone();
        change(&mut changed);
        if changed != *record {
            runtime.save_record(&changed)?;
            self.control.set_paused(changed.paused);
            *record = changed;
        }
        Ok(())
    }
}

/// A limit in bytes as one in pages.
pub(super) fn pages(limit: Option<u64>) -> u64 {
    limit.map_or(u64::MAX, |bytes| bytes / PAGE as u64)
}

fn keys(files: &[UndoneFile]) -> HashSet<FileKey> {
    files.iter().map(|it| it.file).collect()
}

fn is_closed(stream: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(1..))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
