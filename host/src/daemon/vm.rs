// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One VM as the daemon sees it: a process, its sockets, its device, its store.

use super::control::Control;
use super::device::Device;
use super::process::Process;
use super::runtime::{Runtime, VmRecord};
use crate::store::Group;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most connections of an engine at one time.
const MAX_CONNECTIONS: usize = 4;

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
    pub(super) device: Option<Device>,
    pub(super) store: Arc<Mutex<Group>>,
    pub(super) control: Control,
    record: Mutex<VmRecord>,
    device_connection: Mutex<Option<UnixStream>>,
    engine_connections: Mutex<Vec<UnixStream>>,
}

impl Vm {
    /// Makes directory and sockets of a VM. A `new` VM gets a device, an adopted one has one.
    pub(super) fn new(
        runtime: &Runtime,
        record: VmRecord,
        process: Process,
        store: Arc<Mutex<Group>>,
        new: bool,
    ) -> io::Result<Self> {
        let directory = runtime.vm_directory(record.number, record.uid)?;
        let ivshmem = runtime.listen(&directory.join("ivshmem.sock"), record.uid)?;
        let engine = runtime.listen(&directory.join("engine.sock"), record.uid)?;
        let device = if new { Some(Device::new()?) } else { None };
        Ok(Self {
            number: record.number,
            name: record.name.clone(),
            group: record.group.clone(),
            process,
            directory,
            ivshmem,
            engine,
            device,
            store,
            control: Control::default(),
            record: Mutex::new(record),
            device_connection: Mutex::default(),
            engine_connections: Mutex::default(),
        })
    }

    pub(super) fn store(&self) -> MutexGuard<'_, Group> {
        lock(&self.store)
    }

    pub(super) fn is_paused(&self) -> bool {
        lock(&self.record).paused
    }

    pub(super) fn set_paused(&self, runtime: &Runtime, paused: bool) -> io::Result<()> {
        self.update(runtime, |record| record.paused = paused)
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
            *record = changed;
        }
        Ok(())
    }
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
