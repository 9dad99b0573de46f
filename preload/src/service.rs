// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lock order: `Service::guest`, then the locks of [`Sharing`]; `Service::guest_status` last.
//! `Service::tidier` comes before those of [`Sharing`], and never together with `Service::guest`.
//!
//! The engine's three threads: one serves the guest's ring, one the daemon's requests and
//! the connection to it, one the events of `userfaultfd`.

use std::error::Error;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use pagefusion_host::engine::{
    Guest, Memory, Progressed, SharedMemory, Sharing, StoreView, Tidier, Uffd, audit, file_uses,
    serve_faults,
};
use pagefusion_host::protocol::{
    ControlConnection, ControlReply, ControlRequest, DeviceDescriptors, EngineStatus, MAX_FILES,
    StoreClient, Undo, WelcomeWithFds,
};
use pagefusion_host::store::StoreError;
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::connection::Held;
use crate::device::Device;
use crate::runtime::{Config, Runtime};
use crate::search::Search;

/// Pages a guest may have pinned for us at a time: 64 MiB.
const MAX_INFLIGHT_PAGES: u64 = 16384;
/// Between tries to read events of `userfaultfd` that could not be read.
const RETRY_EVENTS: Duration = Duration::from_millis(100);
/// Between tries to reach a daemon that is gone.
const RECONNECT: Duration = Duration::from_millis(100);
/// Between tries where the daemon answers and refuses, as one of another version does for good.
const REFUSED: Duration = Duration::from_secs(5);
/// Between two looks at what nobody rings for.
const LOOK: Duration = Duration::from_secs(5);
const LOOK_TIMESPEC: Timespec = Timespec {
    tv_sec: LOOK.as_secs() as i64,
    tv_nsec: 0,
};
/// By how much the engine's work gives way to the VMM's: as much as KSM's thread does. That of
/// `pf-faults` does not, as the VMM waits for it.
const NICE: i32 = 5;
/// Until what could not be done for the guest is tried again.
const RETRY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 25_000_000,
};

/// Threads whose CPU time is the engine's.
#[derive(Clone, Copy)]
enum Thread {
    Control,
    Ring,
    Faults,
}

#[derive(Debug)]
struct Service {
    config: Config,
    runtime: &'static Runtime,
    sharing: Arc<Sharing>,
    guest: Mutex<Guest<SharedMemory>>,
    from_guest: OwnedFd,
    to_guest: OwnedFd,
    tidier: Mutex<Tidier>,
    /// Where guest memory was found.
    source: OnceLock<&'static str>,
    /// Shut down by whoever finds the daemon gone, to have the connection renewed.
    control: Held<UnixStream>,
    /// What the guest's part of the status was after its last batch: whoever asks does not wait
    /// for a batch, which may wait for the daemon.
    guest_status: Mutex<EngineStatus>,
    /// Nanoseconds by [`Thread`].
    cpu: [AtomicU64; 3],
}

/// Starts the engine's threads.
pub(crate) fn spawn(config: Config, runtime: &'static Runtime) {
    let control = move || {
        if let Err(e) = start(config, runtime) {
            runtime.give_up(&*e);
        }
    };
    if let Err(e) = spawn_quiet("pf-control", control) {
        runtime.give_up(&e);
    }
}

/// Starts a thread that takes none of the VMM's signals.
fn spawn_quiet(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let started = crate::signals::without(|| thread::Builder::new().name(name.into()).spawn(run));
    let named = |e: io::Error| io::Error::new(e.kind(), format!("no thread {name}: {e}"));
    started.map(drop).map_err(named)
}

type Work = Box<dyn FnOnce() + Send>;

/// A thread that waits for its work, and ends if none comes: all are there before a guest is told
/// that it has a host.
fn spawn_waiting(name: &str) -> io::Result<Sender<Work>> {
    let (give, take) = mpsc::channel::<Work>();
    spawn_quiet(name, move || {
        if let Ok(work) = take.recv() {
            work();
        }
    })?;
    Ok(give)
}

/// Serves as long as the process lives, once everything has been had that may not be there.
fn start(config: Config, runtime: &'static Runtime) -> Result<(), Box<dyn Error>> {
    let (client, welcome) = StoreClient::connect(&config.engine_socket)?;
    let WelcomeWithFds {
        welcome,
        store,
        device,
        uffd_device,
    } = welcome;
    let Some(DeviceDescriptors {
        memory,
        from_guest,
        to_guest,
    }) = device
    else {
        return Err("the daemon was started after this VM's device".into());
    };
    let mut device = Device::new(&memory)?;
    let shared = SharedMemory::map(memory)?;
    let layout = shared
        .layout()
        .map_err(|e| format!("the device's memory: {e:?}"))?;
    let uffd = Uffd::open(uffd_device.as_ref().map(AsFd::as_fd))?;
    let events = uffd.try_clone()?;
    let mut memory = Memory::new(uffd)?;
    memory.set_paused(welcome.paused);
    memory.set_split_huge_pages(welcome.split_huge_pages);
    let sharing = Arc::new(Sharing::new(memory));
    sharing.connect(Box::new(client), StoreView::new(store)?, welcome.hash_seed)?;
    // Never readable: events are served as long as the process lives.
    let never = rustix::pipe::pipe()?;
    let (faults_thread, ring_thread) = (spawn_waiting("pf-faults")?, spawn_waiting("pf-ring")?);
    // Nothing fails from here on.
    let mut guest = Guest::new(shared, layout, instance(), MAX_INFLIGHT_PAGES);
    guest.set_paused(welcome.paused);
    runtime.attach(&sharing);
    let service = Arc::new(Service {
        config,
        runtime,
        sharing,
        guest: Mutex::new(guest),
        from_guest,
        to_guest,
        tidier: Mutex::default(),
        source: OnceLock::new(),
        control: Held::new(),
        guest_status: Mutex::default(),
        cpu: Default::default(),
    });
    // Events first: undoing an overlay waits for them.
    let faults = service.clone();
    let ring = service.clone();
    let _ = faults_thread.send(Box::new(move || faults.serve_faults(&events, &never)));
    let _ = ring_thread.send(Box::new(move || ring.serve_ring(&mut device)));
    give_way();
    service.serve_control();
    Ok(())
}

/// Lowers this thread's priority.
fn give_way() {
    if let Err(e) = rustix::process::nice(NICE) {
        log::warn!("sharing has the VMM's priority: {e}");
    }
}

/// Non-zero, and new for every engine.
fn instance() -> u64 {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    (now.as_nanos() as u64).max(1)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long not to try again. A daemon that is gone may be back at once.
fn pause_after(error: &(dyn Error + 'static)) -> Duration {
    match error.downcast_ref() {
        Some(StoreError::Refused(_)) => REFUSED,
        _ => RECONNECT,
    }
}

impl Service {
    fn ring_guest(&self) {
        // A full counter means that the guest has been rung and has not looked yet.
        let _ = rustix::io::write(&self.to_guest, &1_u64.to_ne_bytes());
    }

    fn note_cpu(&self, thread: Thread) {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        let nanoseconds = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        self.cpu[thread as usize].store(nanoseconds, Ordering::Relaxed);
    }

    fn serve_faults(&self, events: &Uffd, (stop, _kept): &(OwnedFd, OwnedFd)) {
        let mut failed = false;
        while let Err(e) = serve_faults(events, &self.sharing, stop.as_fd()) {
            if !failed {
                failed = true;
                log::error!("userfaultfd events cannot be read: {e}");
                let sharing = self.sharing.clone();
                // Undoing waits for events, so it cannot be done here, and they are served on.
                let disable = move || {
                    sharing.make_ordinary(&(0..usize::MAX));
                    let _ = sharing
                        .memory()
                        .disable("userfaultfd events cannot be read");
                };
                if let Err(e) = spawn_quiet("pf-undo", disable) {
                    log::error!("what is shared cannot be undone: {e}");
                }
            }
            std::thread::sleep(RETRY_EVENTS);
        }
        self.note_cpu(Thread::Faults);
    }

    fn serve_ring(&self, device: &mut Device) {
        give_way();
        let mut counter = [0_u8; 8];
        let mut retry = false;
        let mut search = Search::new();
        let mut looked_at = Instant::now();
        loop {
            if looked_at.elapsed() >= LOOK {
                looked_at = Instant::now();
                self.look();
                if device.is_missing(looked_at) {
                    log::warn!(
                        "this VM shares nothing so far: it has no pagefusion device, which \
                         pagefusionctl run adds to QEMU's command line"
                    );
                }
            }
            match rustix::io::read(&self.from_guest, &mut counter) {
                Ok(_) => {}
                Err(Errno::AGAIN) => {
                    let mut fd = [rustix::event::PollFd::new(
                        &self.from_guest,
                        rustix::event::PollFlags::IN,
                    )];
                    let limit = if retry { RETRY } else { LOOK_TIMESPEC };
                    let waited = rustix::event::poll(&mut fd, Some(&limit)) == Ok(0);
                    if !waited || !(retry || lock(&self.guest).has_news()) {
                        continue;
                    }
                }
                Err(Errno::INTR) => continue,
                Err(e) => {
                    log::error!("the guest's doorbell: {e}");
                    return;
                }
            }
            self.find_memory(&mut search);
            loop {
                let done = self.progress();
                if done.ring {
                    self.ring_guest();
                }
                self.note_cpu(Thread::Ring);
                retry = done.retry;
                if !done.busy {
                    break;
                }
            }
            if !self.sharing.is_connected() {
                self.reconnect();
            }
        }
    }

    /// Has the guest report again what was not shared for something that the VMM did and has ended.
    fn look(&self) {
        if let Err(e) = self.sharing.look_for_userfaultfds() {
            log::debug!("mappings cannot be read: {e}");
        }
        let untold = self.sharing.memory().take_untold();
        if untold {
            lock(&self.guest).request_rescan();
            self.ring_guest();
        }
    }

    fn progress(&self) -> Progressed {
        let mut guest = lock(&self.guest);
        let done = guest.progress(&self.sharing);
        guest.fill_status(&mut lock(&self.guest_status));
        done
    }

    /// Without KVM, guest memory is asked of QEMU as soon as the guest is there to ring.
    fn find_memory(&self, search: &mut Search) {
        if self.source.get() == Some(&"kvm") {
            return;
        }
        if self.runtime.has_kvm_slots() {
            let _ = self.source.set("kvm");
            return;
        }
        let Some(socket) = &self.config.qmp_socket else {
            return;
        };
        let outside = lock(&self.guest).pages_outside();
        if search.ask(socket, self.runtime, &self.sharing, outside)
            && self.source.set("qmp").is_err()
        {
            // What was reported of it before is no less worth sharing.
            lock(&self.guest).request_rescan();
            self.ring_guest();
        }
    }

    /// Ends the control connection, so that both are made anew.
    fn reconnect(&self) {
        if let Some(stream) = self.control.take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn serve_control(&self) {
        loop {
            if let Err(e) = self.serve_one_connection() {
                log::info!("the daemon is gone ({e}); running on without it");
            }
            self.sharing.disconnect();
            let mut refusals = 0_u64;
            while let Err(e) = self.connect_again(&self.config.engine_socket) {
                let pause = pause_after(&*e);
                if pause == REFUSED {
                    refusals += 1;
                    if refusals.is_power_of_two() {
                        log::warn!("{e}; trying again ({refusals} times so far)");
                    }
                } else {
                    log::debug!("no daemon yet: {e}");
                }
                thread::sleep(pause);
            }
            self.note_cpu(Thread::Control);
            log::info!("connected to the daemon again");
        }
    }

    fn connect_again(&self, socket: &Path) -> Result<(), Box<dyn Error>> {
        let (client, welcome) = StoreClient::connect(socket)?;
        let WelcomeWithFds { welcome, store, .. } = welcome;
        {
            let mut memory = self.sharing.memory();
            memory.set_paused(welcome.paused);
            memory.set_split_huge_pages(welcome.split_huge_pages);
        }
        self.sharing
            .connect(Box::new(client), StoreView::new(store)?, welcome.hash_seed)?;
        // What only this guest has was known to the old daemon alone.
        lock(&self.guest).set_paused(welcome.paused);
        self.ring_guest();
        Ok(())
    }

    fn serve_one_connection(&self) -> io::Result<()> {
        let mut control = ControlConnection::connect(&self.config.engine_socket)?;
        let stream = control.try_clone_stream()?;
        if !self.control.hold(stream, || self.sharing.is_connected()) {
            return Err(io::Error::other("it does not answer"));
        }
        loop {
            let request = control.recv()?;
            let reply = self.answer(request);
            self.note_cpu(Thread::Control);
            control.reply(&reply)?;
        }
    }

    fn answer(&self, request: ControlRequest) -> ControlReply {
        match request {
            ControlRequest::Status => match self.status() {
                Ok(status) => ControlReply::Status(Box::new(status)),
                Err(e) => ControlReply::Error(e.to_string()),
            },
            ControlRequest::Report { spans } => {
                if lock(&self.guest).request_report(&spans) {
                    self.ring_guest();
                }
                ControlReply::Done
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
                let undone = match &what {
                    Undo::All => {
                        self.set_paused(true);
                        self.sharing.undo_all()
                    }
                    _ => self.sharing.undo(&what),
                };
                if lock(&self.guest).publish_shared(&self.sharing.memory()) {
                    self.ring_guest();
                }
                ControlReply::done("undoing an overlay", undone)
            }
            ControlRequest::Tidy { alone } => {
                let tidied = lock(&self.tidier).round(&self.sharing, &alone);
                let reported = tidied.map(|spans| {
                    let mut guest = lock(&self.guest);
                    let told = guest.publish_shared(&self.sharing.memory());
                    if guest.request_report(&spans) || told {
                        self.ring_guest();
                    }
                });
                ControlReply::done("tidying up", reported)
            }
            ControlRequest::Pause => {
                self.set_paused(true);
                ControlReply::Done
            }
            ControlRequest::SplitHugePages(choice) => {
                if self.sharing.memory().set_split_huge_pages(choice) {
                    lock(&self.guest).request_rescan();
                    self.ring_guest();
                }
                ControlReply::Done
            }
            ControlRequest::Resume => {
                self.set_paused(false);
                ControlReply::Done
            }
        }
    }

    fn set_paused(&self, paused: bool) {
        self.sharing.memory().set_paused(paused);
        lock(&self.guest).set_paused(paused);
        self.ring_guest();
    }

    fn status(&self) -> io::Result<EngineStatus> {
        let audit = audit(&self.sharing)?;
        let mut status = EngineStatus {
            memory_source: (*self.source.get().unwrap_or(&"none")).to_owned(),
            pages_shared: audit.intact,
            pages_broken: audit.broken,
            overlays: audit.overlays,
            overlay_mappings: audit.overlay_mappings,
            mappings: audit.mappings,
            ..lock(&self.guest_status).clone()
        };
        {
            let memory = self.sharing.memory();
            status.memory_bytes = memory.bytes();
            status.mappings_limit = memory.budget().limit() as u64;
            status.disabled = memory.disabled();
        }
        let nanoseconds: u64 = self.cpu.iter().map(|t| t.load(Ordering::Relaxed)).sum();
        status.cpu_seconds = nanoseconds as f64 / 1e9;
        Ok(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_refuses_is_asked_seldom_and_one_that_is_gone_often() {
        let refused: Box<dyn Error> = StoreError::Refused("another version".into()).into();
        assert!(pause_after(&*refused) >= Duration::from_secs(1));
        let gone = io::Error::from(io::ErrorKind::NotFound);
        let gone: Box<dyn Error> = StoreError::Unreachable(gone).into();
        assert!(pause_after(&*gone) <= Duration::from_millis(100));
    }
}
