// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `pagefusiond`: page stores, devices and the processes that use them.
//!
//! One thread waits for new connections and for processes to end; every connection is
//! served on a thread of its own. The daemon may die at any instruction: VMs go on with what
//! they have, and the next daemon finds the VMs by their records and the pages by the store
//! files, and learns from the engines who has mapped what.

mod admin;
#[cfg(test)]
mod busy_tests;
mod control;
mod engine;
mod error;
mod files;
mod gate;
mod http;
mod leftover;
mod limits;
mod line;
mod metrics;
mod orders;
mod pace;
mod pressure;
mod process;
mod registry;
mod runtime;
mod status;
#[cfg(test)]
mod testing;
mod tidy;
mod vm;
mod word;

/// What threads meet at; the tests of such files put `loom`'s in place of these.
mod primitives {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering};
    pub(super) use std::sync::mpsc::{Receiver, Sender, channel};
    pub(super) use std::sync::{Mutex, MutexGuard};
    pub(super) use std::thread::{Builder, JoinHandle, ThreadId, current};
}

pub use error::DaemonError;
pub use pressure::PressureThresholds;
pub(crate) use runtime::{TMPFS_MAGIC, foreign};

use crate::protocol::{Connection, Encoding, FileKey, peer};
use crate::store::Group;
use pressure::{INTERVAL, Pressure};
use registry::Registry;
use runtime::Runtime;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use std::collections::HashSet;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vm::Vm;

/// How long nothing is accepted after an error, which is as a rule the limit on open files.
const BREATHER: Duration = Duration::from_millis(100);

/// Clients that may ask for metrics at one time.
const MAX_METRICS_CLIENTS: usize = 8;

/// Where a daemon works and what it may take.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of sockets and records.
    pub runtime_dir: PathBuf,
    /// Directory of the page stores, on a tmpfs.
    pub store_dir: PathBuf,
    /// Most memory for the canonical pages of one trust group, bytes, where the operator has
    /// set no other limit.
    pub max_store: Option<u64>,
    /// Where else than on `metrics.sock` in the runtime directory metrics are given out, to
    /// whoever can connect.
    pub metrics: Option<SocketAddr>,
    /// From when on the policy `pressure` shares.
    pub pressure: PressureThresholds,
    /// How long between two looks for overlays that save nothing; `None` never looks.
    pub tidy: Option<Duration>,
}

/// A daemon that has taken over what was there and can be reached.
#[derive(Debug)]
pub struct Daemon {
    registry: Arc<Registry>,
    events: Arc<EventLoop>,
    admin: UnixListener,
    metrics: UnixListener,
    metrics_tcp: Option<TcpListener>,
    metrics_clients: Arc<AtomicUsize>,
    pressure: PressureThresholds,
    tidy: Option<Duration>,
}

impl Daemon {
    /// Locks the directories, adopts the VMs of an earlier daemon and opens the sockets.
    pub fn start(config: &Config) -> Result<Self, DaemonError> {
        let runtime = Runtime::open(&config.runtime_dir, &config.store_dir)?;
        let registry = Arc::new(Registry::adopt(runtime, config.max_store)?);
        let socket = |name| {
            let made = registry.runtime().operator_socket(name);
            made.map_err(|source| DaemonError::RuntimeDirectory {
                path: config.runtime_dir.clone(),
                source,
            })
        };
        let admin = socket("admin.sock")?;
        let metrics = socket("metrics.sock")?;
        let metrics_tcp = config.metrics.map(listen).transpose()?;
        let events = EventLoop::new().map_err(DaemonError::system("cannot wait for events"))?;
        let watching = DaemonError::system("cannot watch sockets and processes");
        events.watch(&admin, Source::Admin).map_err(&watching)?;
        events.watch(&metrics, Source::Metrics).map_err(&watching)?;
        if let Some(metrics) = &metrics_tcp {
            let source = Source::MetricsTcp;
            events.watch(metrics, source).map_err(&watching)?;
        }
        for vm in registry.vms() {
            events.watch_vm(&vm).map_err(&watching)?;
        }
        Ok(Self {
            registry,
            events: Arc::new(events),
            admin,
            metrics,
            metrics_tcp,
            metrics_clients: Arc::default(),
            pressure: config.pressure,
            tidy: config.tidy,
        })
    }

    /// Serves until `stop` is readable. VMs keep what they share.
    pub fn run(&self, stop: impl AsFd) -> Result<(), DaemonError> {
        let failed = DaemonError::system("cannot wait for events");
        self.events.watch(&stop, Source::Stop).map_err(&failed)?;
        let (registry, mut pressure) = (self.registry.clone(), Pressure::new(self.pressure));
        let _pressure = every(INTERVAL, "pressure", move || {
            if registry.heeds_pressure() && registry.set_pressure(pressure.look()) {
                orders::rescan(&registry);
            }
        });
        let registry = self.registry.clone();
        let _strays = every(tidy::STRAYS, "strays", move || {
            tidy::clear_strays(&registry);
        });
        let registry = self.registry.clone();
        let mut tidying = tidy::Tidying::default();
        let _tidy = self
            .tidy
            .map(|interval| every(interval, "tidy", move || tidying.round(&registry)));
        let mut buffer = Vec::with_capacity(64);
        'serve: loop {
            for source in self.events.wait(&mut buffer).map_err(&failed)? {
                match source {
                    Source::Stop => break 'serve,
                    Source::Admin => self.accept_admin(),
                    Source::Metrics => {
                        if let Some(client) = accept(&self.metrics) {
                            self.give_metrics(client);
                        }
                    }
                    Source::MetricsTcp => {
                        let accepted = self.metrics_tcp.as_ref().map(TcpListener::accept);
                        if let Some((client, _)) = accepted.and_then(accepted_one) {
                            self.give_metrics(client);
                        }
                    }
                    Source::Vm(number, part) => {
                        // It may have ended by an event before this one.
                        if let Some(vm) = self.registry.vm(number) {
                            self.serve_vm(&vm, part);
                        }
                    }
                }
            }
        }
        self.registry.vms().iter().for_each(|vm| vm.close());
        self.registry.wait_for_ends();
        Ok(())
    }

    fn accept_admin(&self) {
        let Some(stream) = accept(&self.admin) else {
            return;
        };
        let (registry, events) = (self.registry.clone(), self.events.clone());
        spawn("admin", move || admin::serve(&registry, &events, stream));
    }

    /// A few clients at a time; more are sent away.
    fn give_metrics(&self, mut client: impl http::Client) {
        if self.metrics_clients.fetch_add(1, Ordering::Relaxed) < MAX_METRICS_CLIENTS {
            let registry = self.registry.clone();
            let leaving = Leaving(self.metrics_clients.clone());
            spawn("metrics", move || {
                http::serve(&registry, &mut client);
                // Whoever sees the end finds the place free.
                drop(leaving);
                drop(client);
            });
        } else {
            self.metrics_clients.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Forgets a VM, on a thread of its own: others may have hold of its store, and all that it had
    /// is to be looked at.
    fn end(&self, number: u32) {
        let Some(vm) = self.registry.begin_end(number) else {
            return;
        };
        let (registry, ended) = (self.registry.clone(), vm.clone());
        let thread = std::thread::Builder::new().name("end".into());
        if let Err(error) = thread.spawn(move || registry.finish_end(&ended)) {
            log::error!("cannot start a thread: {error}");
            self.registry.finish_end(&vm);
        }
    }

    fn serve_vm(&self, vm: &Arc<Vm>, part: Part) {
        match part {
            Part::Process => {
                self.events.forget_vm(vm);
                self.end(vm.number);
            }
            Part::Ivshmem => {
                let Some(stream) = accept_from(&vm.ivshmem, vm) else {
                    return;
                };
                if let Err(error) = vm.connect_device(stream) {
                    log::warn!("device of VM {} ({}): {error}", vm.number, vm.name);
                }
            }
            Part::Engine => {
                let Some(stream) = accept_from(&vm.engine, vm) else {
                    return;
                };
                match vm.note_connection(&stream) {
                    Ok(true) => {
                        let (registry, vm) = (self.registry.clone(), vm.clone());
                        spawn("engine", move || engine::serve(&registry, &vm, stream));
                    }
                    Ok(false) => log::warn!("VM {} has too many connections", vm.number),
                    Err(error) => log::warn!("connection of VM {}: {error}", vm.number),
                }
            }
        }
    }
}

/// Serves the requests of one engine from a store, without a daemon around it, until the
/// connection ends. For fuzzing: the code is the daemon's.
#[doc(hidden)]
pub fn serve_requests_alone(
    stream: UnixStream,
    limit: Duration,
    vm: u32,
    undone: &Arc<HashSet<FileKey>>,
    store: &Mutex<Group>,
) -> io::Result<()> {
    let mut connection = Connection::new(stream, Encoding::Postcard, limit)?;
    let answered = engine::answer_all(&mut connection, |request, payload, first| {
        let store = store.lock().unwrap_or_else(PoisonError::into_inner);
        gate::Gate::new(vm, undone.clone(), store).answer(request, payload, first)
    });
    answered.map(drop)
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Stop,
    Admin,
    Metrics,
    MetricsTcp,
    Vm(u32, Part),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Process,
    Ivshmem,
    Engine,
}

impl Source {
    fn to_token(self) -> u64 {
        match self {
            Source::Stop => 0,
            Source::Admin => 1,
            Source::Metrics => 2,
            Source::MetricsTcp => 3,
            Source::Vm(number, part) => u64::from(number) << 2 | part as u64 | 1 << 63,
        }
    }

    fn from_token(token: u64) -> Option<Self> {
        Some(match token {
            0 => Source::Stop,
            1 => Source::Admin,
            2 => Source::Metrics,
            3 => Source::MetricsTcp,
            _ => {
                let part = match token & 3 {
                    0 => Part::Process,
                    1 => Part::Ivshmem,
                    2 => Part::Engine,
                    _ => return None,
                };
                Source::Vm((token >> 2) as u32, part)
            }
        })
    }
}

/// The descriptors that the first thread waits for.
#[derive(Debug)]
struct EventLoop {
    epoll: OwnedFd,
}

impl EventLoop {
    fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
        })
    }

    fn watch(&self, descriptor: impl AsFd, source: Source) -> io::Result<()> {
        let data = EventData::new_u64(source.to_token());
        Ok(epoll::add(&self.epoll, descriptor, data, EventFlags::IN)?)
    }

    fn watch_vm(&self, vm: &Vm) -> io::Result<()> {
        self.watch(&vm.ivshmem, Source::Vm(vm.number, Part::Ivshmem))?;
        self.watch(&vm.engine, Source::Vm(vm.number, Part::Engine))?;
        self.watch(&vm.process, Source::Vm(vm.number, Part::Process))
    }

    fn forget_vm(&self, vm: &Vm) {
        for descriptor in [vm.ivshmem.as_fd(), vm.engine.as_fd(), vm.process.as_fd()] {
            if let Err(error) = epoll::delete(&self.epoll, descriptor) {
                log::warn!("cannot stop watching VM {}: {error}", vm.number);
            }
        }
    }

    fn wait(&self, buffer: &mut Vec<Event>) -> io::Result<Vec<Source>> {
        buffer.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(buffer), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(buffer
            .iter()
            .filter_map(|event| Source::from_token(event.data.u64()))
            .collect())
    }
}

/// Counts a client of the metrics out, however it leaves.
struct Leaving(Arc<AtomicUsize>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener, DaemonError> {
    let bound = TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|source| DaemonError::MetricsAddress { address, source })
}

fn accept(listener: &UnixListener) -> Option<UnixStream> {
    accepted_one(listener.accept()).map(|(stream, _)| stream)
}

fn accepted_one<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(accepted) => Some(accepted),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => {
            log::error!("cannot accept a connection: {error}");
            std::thread::sleep(BREATHER);
            None
        }
    }
}

/// Accepts a connection if it comes from the VM's own process. That it lives is looked at when it is
/// known who has connected: until then somebody else may have come to its number.
fn accept_from(listener: &UnixListener, vm: &Vm) -> Option<UnixStream> {
    let stream = accept(listener)?;
    match peer(&stream) {
        Ok(peer) if vm.process.is(peer.pid.as_raw_nonzero().get()) => Some(stream),
        Ok(peer) => {
            log::warn!(
                "process {} tried to connect as VM {} ({}), which is process {}{}",
                peer.pid.as_raw_nonzero(),
                vm.number,
                vm.name,
                vm.process.pid(),
                if vm.process.has_ended() {
                    " and has ended"
                } else {
                    ""
                }
            );
            None
        }
        Err(error) => {
            log::warn!("cannot tell who connected as VM {}: {error}", vm.number);
            None
        }
    }
}

/// Works again and again, until the answer is dropped.
fn every(
    interval: Duration,
    name: &str,
    mut work: impl FnMut() + Send + 'static,
) -> mpsc::Sender<()> {
    let (running, until) = mpsc::channel();
    spawn(name, move || {
        while until.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
            work();
        }
    });
    running
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    if let Err(error) = std::thread::Builder::new().name(name.into()).spawn(work) {
        // The connection is closed with the closure; the other side tries again.
        log::error!("cannot start a thread: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_lead_back_to_their_source() {
        let sources = [
            Source::Stop,
            Source::Admin,
            Source::Metrics,
            Source::MetricsTcp,
            Source::Vm(0, Part::Process),
            Source::Vm(u32::MAX, Part::Engine),
            Source::Vm(7, Part::Ivshmem),
        ];
        for source in sources {
            assert_eq!(Source::from_token(source.to_token()), Some(source));
        }
    }
}
