// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of a daemon in which somebody keeps hold of a group's store.

use super::registry::{Caller, Registry};
use super::vm::Vm;
use super::{Config, Daemon, PressureThresholds};
use crate::protocol::{AdminClient, CreatedVm, StoreClient};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Longest wait for anything; only reached when a test fails.
const LIMIT: Duration = Duration::from_secs(20);
/// For as long something is seen not to happen.
const WHILE: Duration = Duration::from_millis(200);

/// A process that may become a VM; killed when dropped.
struct Process(Child);

impl Process {
    fn start() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn caller(&self) -> Caller {
        let uid = rustix::process::geteuid().as_raw();
        let pid = self.0.id() as i32;
        Caller { pid, uid }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Running {
    directory: tempfile::TempDir,
    daemon: Arc<Daemon>,
    stop: UnixStream,
    runs: JoinHandle<()>,
}

fn start() -> Running {
    let directory = tempfile::Builder::new()
        .prefix("pf")
        .tempdir_in("/dev/shm")
        .unwrap();
    let config = Config {
        runtime_dir: directory.path().join("run"),
        store_dir: directory.path().join("store"),
        max_store: None,
        metrics: None,
        pressure: PressureThresholds::default(),
        tidy: None,
    };
    let daemon = Arc::new(Daemon::start(&config).unwrap());
    let (stop, stopped) = UnixStream::pair().unwrap();
    let running = daemon.clone();
    let runs = thread::spawn(move || running.run(&stopped).unwrap());
    Running {
        directory,
        daemon,
        stop,
        runs,
    }
}

impl Running {
    fn create(&self, process: &Process, name: &str, group: &str) -> Receiver<Arc<Vm>> {
        let (daemon, caller) = (self.daemon.clone(), process.caller());
        let (name, group) = (Some(name.to_owned()), Some(group.to_owned()));
        sooner_or_later(move || {
            let vm = daemon.registry.create(caller, name, group).unwrap();
            daemon.events.watch_vm(&vm).unwrap();
            vm
        })
    }

    fn become_vm_of(&self, group: &str) -> CreatedVm {
        let client = AdminClient::connect(&self.directory.path().join("run"));
        client.unwrap().create_vm(None, Some(group.into())).unwrap()
    }
}

fn sooner_or_later<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (done, outcome) = mpsc::channel();
    thread::spawn(move || {
        let _ = done.send(work());
    });
    outcome
}

/// Waits for a VM to be gone while we have hold of its store.
fn seen_to_end(daemon: &Arc<Daemon>, number: u32) {
    let daemon = daemon.clone();
    let gone = sooner_or_later(move || wait_until_gone(&daemon.registry, number));
    gone.recv_timeout(LIMIT).expect("its end is seen");
}

fn wait_until_gone(registry: &Registry, number: u32) {
    let begin = Instant::now();
    while registry.vm(number).is_some() {
        assert!(begin.elapsed() < LIMIT, "VM {number} has not ended");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn vms_that_come_to_a_busy_store_and_leave_it_keep_no_other_group_waiting() {
    let host = start();
    let ours = host.become_vm_of("other");
    let processes = [(); 4].map(|()| Process::start());
    let [ends, stays, comes, passes] = processes;
    let first = host.create(&ends, "first", "busy").recv().unwrap();
    let stays_vm = host.create(&stays, "stays", "busy").recv().unwrap();

    let store = stays_vm.store();
    let coming = host.create(&comes, "comes", "busy");
    coming.recv_timeout(WHILE).unwrap_err();
    drop(ends);
    // The others: an engine is served, one VM comes, and its end is seen.
    let (daemon, number) = (host.daemon.clone(), first.number);
    let passing = host.create(&passes, "passes", "other");
    let served = sooner_or_later(move || {
        wait_until_gone(&daemon.registry, number);
        let connected = StoreClient::connect(&ours.directory.join("engine.sock"));
        connected.unwrap();
        let vm: Arc<Vm> = passing.recv().unwrap();
        drop(passes);
        wait_until_gone(&daemon.registry, vm.number);
    });
    served.recv_timeout(LIMIT).expect("others are served");

    drop(store);
    coming.recv_timeout(LIMIT).unwrap();
}

#[test]
fn a_name_is_free_and_a_daemon_stops_once_the_store_has_let_go_of_what_ended() {
    let host = start();
    let [ends, again] = [(); 2].map(|()| Process::start());
    let first = host.create(&ends, "web", "busy").recv().unwrap();
    let pages = host.directory.path().join("store/group-busy.pages");

    let store = first.store();
    drop(ends);
    seen_to_end(&host.daemon, first.number);
    let second = host.create(&again, "web", "busy");
    second.recv_timeout(WHILE).unwrap_err();
    assert!(pages.exists());
    drop(store);
    let second = second.recv_timeout(LIMIT).unwrap();
    assert_ne!(first.group_store.key(), second.group_store.key());
    assert!(pages.exists());

    let store = second.store();
    drop(again);
    seen_to_end(&host.daemon, second.number);
    // One byte does; whoever waits for it to be readable need not read it.
    rustix::io::write(&host.stop, &[0]).unwrap();
    let runs = host.runs;
    let stopped = sooner_or_later(move || runs.join().unwrap());
    stopped.recv_timeout(WHILE).unwrap_err();
    drop(store);
    stopped.recv_timeout(LIMIT).unwrap();
    assert!(!pages.exists());
}

#[test]
fn what_is_noted_while_a_vm_ends_brings_it_back_for_nobody() {
    let host = start();
    let [ends, stays] = [(); 2].map(|()| Process::start());
    let ended = host.create(&ends, "ends", "g").recv().unwrap();
    let stays = host.create(&stays, "stays", "g").recv().unwrap();
    drop(ends);
    let registry = &host.daemon.registry;
    wait_until_gone(registry, ended.number);
    registry.wait_for_ends();
    // As somebody does who has looked it up before.
    ended.apply_limits(ended.limits());
    let mut store = stays.store();
    store.end_vm(stays.number);
    assert!(store.forget(ended.number, span()).is_err(), "nobody's");
}

fn span() -> crate::protocol::FileSpan {
    crate::protocol::FileSpan {
        file: crate::protocol::FileKey {
            fs_uuid: [0; 16],
            inode: 1,
            size: 0,
            mtime_ns: 0,
            generation: 0,
            kind: 0,
        },
        page: 0,
        pages: 1,
    }
}
