// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Daemons that are killed while a VMM shares, and the next ones.

use crate::machine::{DIRECTORY, FILE, Machine, NUMBER, PAGES, RUNTIME, config, in_vmm};
use pagefusion_host::daemon::Daemon;
use pagefusion_host::protocol::{AdminClient, GroupStatus};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Where the daemon works, in the process that is one.
const DAEMON: &str = "PAGEFUSION_TEST_DAEMON";
/// Longest wait; only reached when a test fails.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs `play` in a VMM of its own whose daemons are processes of their own.
fn in_vmm_of_daemons(test: &str, play: impl FnOnce(&mut Machine)) {
    if let Some(host) = std::env::var_os(DAEMON) {
        be_daemon(Path::new(&host));
    } else if [RUNTIME, DIRECTORY]
        .iter()
        .any(|it| std::env::var_os(it).is_some())
    {
        in_vmm(test, play);
    } else {
        start(test);
    }
}

fn be_daemon(host: &Path) {
    // SAFETY: ends with the process that is to kill it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let (never, _kept) = rustix::pipe::pipe().unwrap();
    Daemon::start(&config(host)).unwrap().run(never).unwrap();
}

fn itself(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command
}

/// Starts a daemon, and waits until it has taken over what there is.
fn daemon(test: &str, host: &Path) -> Child {
    let daemon = itself(test).env(DAEMON, host).spawn().unwrap();
    let deadline = Instant::now() + LIMIT;
    while AdminClient::connect(&host.join("run")).is_err() {
        assert!(Instant::now() < deadline, "no daemon comes");
        std::thread::sleep(Duration::from_millis(5));
    }
    daemon
}

const NEXT: u8 = b'n';
const END: u8 = b'e';

/// In the test's own process: daemons, one after the other as the VMM asks for them.
fn start(test: &str) {
    let host = tempfile::Builder::new()
        .prefix("pf")
        .tempdir_in("/dev/shm")
        .unwrap();
    let asks = UnixListener::bind(host.path().join("asks")).unwrap();
    let mut serving = daemon(test, host.path());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for stream in asks.incoming() {
                let (mut stream, mut said) = (stream.unwrap(), [END]);
                let _ = stream.read(&mut said);
                serving.kill().unwrap();
                serving.wait().unwrap();
                if said[0] == END {
                    return;
                }
                serving = daemon(test, host.path());
                stream.write_all(&[NEXT]).unwrap();
            }
        });
        let status = itself(test)
            .env(RUNTIME, host.path().join("run"))
            .env(NUMBER, "0")
            .status();
        ask(host.path()).write_all(&[END]).unwrap();
        let status = status.unwrap();
        assert!(status.success(), "{test}: {status}");
    });
}

fn ask(host: &Path) -> UnixStream {
    UnixStream::connect(host.join("asks")).unwrap()
}

/// Has the daemon killed and another one started, while `vmm` is without one.
fn kill_daemon(vmm: &Machine) {
    let mut stream = ask(vmm.directory.ancestors().nth(3).unwrap());
    stream.write_all(&[NEXT]).unwrap();
    stream.read_exact(&mut [0]).unwrap();
}

fn group(vmm: &Machine) -> GroupStatus {
    let runtime = vmm.directory.ancestors().nth(2).unwrap();
    let status = AdminClient::connect(runtime).unwrap().status().unwrap();
    status.groups.into_iter().next().unwrap()
}

#[test]
fn sharing_goes_on_with_the_next_daemon_and_nothing_is_stored_twice() {
    const HALF: usize = FILE / 2;
    let name = "restarts::sharing_goes_on_with_the_next_daemon_and_nothing_is_stored_twice";
    in_vmm_of_daemons(name, |vmm| {
        vmm.load();
        vmm.boot();
        for (name, gfn) in [(1, 0), (2, FILE), (1, 0)] {
            vmm.report_part(name, gfn, HALF);
        }
        let halves = [0..HALF, FILE..FILE + HALF];
        assert!(halves.iter().all(|it| vmm.is_overlaid(it.clone())));
        assert_eq!(group(vmm).store_pages, HALF as u64);

        let asked = vmm.guest().requests();
        kill_daemon(vmm);
        vmm.guest().wait_for_request(asked);
        vmm.check(0..PAGES);
        // It knows what the other one had granted.
        assert_eq!(vmm.status().pages_granted, HALF as u64);
        vmm.share_all();
        vmm.check(0..PAGES);
        let group = group(vmm);
        assert_eq!(group.store_pages, FILE as u64);
        assert_eq!(group.pages_shared, PAGES as u64);
        // Each has its own copy of what it writes, as ever.
        vmm.ram.word(0, 0).store(7, Ordering::Relaxed);
        vmm.check(1..PAGES);
    });
}
