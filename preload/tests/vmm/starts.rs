// SPDX-License-Identifier: Apache-2.0 OR MIT

//! VMMs in which the engine cannot start, or has nothing to do: they say so once, and are as they
//! were without the library.

use crate::machine::{PAGE, PAGES, Ram, in_vmm, library};
use crate::{ZEROS, advise};
use pagefusion_host::protocol::{Connection, Encoding, Hello, HelloReply, SplitHugePages, Welcome};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Where the sockets are, in the process that is the VMM.
const SOCKETS: &str = "PAGEFUSION_TEST_SOCKETS";
/// Longest wait; only reached when a test fails.
const LIMIT: Duration = Duration::from_secs(120);

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whoever connects.
fn accept(listener: &UnixListener) -> UnixStream {
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: LIMIT.as_secs() as i64,
        tv_nsec: 0,
    };
    let ready = rustix::event::poll(&mut fds, Some(&limit)).unwrap();
    assert_eq!(ready, 1, "the VMM does not connect");
    listener.accept().unwrap().0
}

/// What a VMM says on standard error whose engine gets this `answer` to its greeting, or finds a
/// socket where nobody listens. The answer comes after the VMM has given its memory to a device.
fn said(test: &str, answer: Option<impl FnOnce(Connection)>) -> Vec<String> {
    if let Some(sockets) = std::env::var_os(SOCKETS) {
        live(Path::new(&sockets));
        // The rest is for the process that waits for this one.
        std::process::exit(0);
    }
    let sockets = tempfile::tempdir().unwrap();
    let engine = UnixListener::bind(sockets.path().join("engine.sock")).unwrap();
    let started = UnixListener::bind(sockets.path().join("started.sock")).unwrap();
    let engine = answer.is_some().then_some(engine);
    let mut vmm = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(SOCKETS, sockets.path())
        .env("LD_PRELOAD", library())
        .env(
            "PAGEFUSION_ENGINE_SOCKET",
            sockets.path().join("engine.sock"),
        )
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(vmm.stderr.take().unwrap());
    let mut text = String::new();
    match engine.zip(answer) {
        Some((engine, answer)) => {
            let stream = accept(&engine);
            let mut connection = Connection::new(stream, Encoding::Postcard, LIMIT).unwrap();
            let _: Hello = connection.receive().unwrap();
            // Goes on when this is dropped.
            let vmm = accept(&started);
            answer(connection);
            drop(vmm);
        }
        None => {
            said.read_line(&mut text).unwrap();
            drop(accept(&started));
        }
    }
    said.read_to_string(&mut text).unwrap();
    assert!(vmm.wait().unwrap().success(), "{text}");
    text.lines().map(str::to_owned).collect()
}

/// The life of the VMM.
fn live(sockets: &Path) {
    let ram = Ram::new(PAGES);
    change(&ram);
    let mut answered = UnixStream::connect(sockets.join("started.sock")).unwrap();
    answered.read_to_end(&mut Vec::new()).unwrap();
    let is_engines = |task: io::Result<std::fs::DirEntry>| {
        let name = std::fs::read_to_string(task.unwrap().path().join("comm"));
        name.is_ok_and(|name| name.starts_with("pf-"))
    };
    let threads = || std::fs::read_dir("/proc/self/task").unwrap();
    wait_until("a thread of the engine stays", || {
        !threads().any(is_engines)
    });
    change(&ram);
}

/// What an engine would have to know of.
fn change(ram: &Ram) {
    ram.word(3, 0).store(7, Ordering::Relaxed);
    let at = ram.at(0);
    // SAFETY: locks memory, which changes nothing in it.
    assert_eq!(unsafe { libc::mlock(at as *const _, PAGE) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlock(at as *const _, PAGE) }, 0);
    let nobody = rustix::pipe::pipe().unwrap().0;
    for request in [0x3b71, 0x4020_aa00] {
        let mut argument = [0_u64; 32];
        let argument = argument.as_mut_ptr();
        // SAFETY: a pipe knows neither VFIO_IOMMU_MAP_DMA nor UFFDIO_REGISTER.
        let result = unsafe { libc::ioctl(nobody.as_raw_fd(), request, argument) };
        let error = io::Error::last_os_error().raw_os_error();
        assert_eq!((result, error), (-1, Some(libc::ENOTTY)), "{request:#x}");
    }
    advise(ram, 0..PAGES, libc::MADV_DONTNEED).unwrap();
    assert_eq!(ram.read_page(3), ZEROS);
}

#[track_caller]
fn assert_one_line(said: &[String], words: &str) {
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains(words), "{said:?}");
}

#[test]
fn a_vmm_without_a_daemon_says_so_once() {
    let name = "starts::a_vmm_without_a_daemon_says_so_once";
    let said = said(name, None::<fn(Connection)>);
    assert_one_line(&said, "pagefusion is off for this VM");
}

#[test]
fn a_vmm_whose_daemon_speaks_another_version_says_so_once() {
    let name = "starts::a_vmm_whose_daemon_speaks_another_version_says_so_once";
    let refuse = |mut connection: Connection| {
        let reason = "the engine speaks version 1 and the daemon version 2".to_owned();
        connection.send(&HelloReply::Refused(reason)).unwrap();
    };
    assert_one_line(&said(name, Some(refuse)), "the daemon version 2");
}

#[test]
fn a_vmm_whose_device_is_an_earlier_daemons_says_so_once() {
    let name = "starts::a_vmm_whose_device_is_an_earlier_daemons_says_so_once";
    let welcome = |mut connection: Connection| {
        let store = tempfile::tempfile().unwrap();
        let welcome = Welcome {
            vm: 1,
            name: "vm1".into(),
            group: None,
            hash_seed: 1,
            has_device: false,
            has_uffd_device: false,
            paused: false,
            split_huge_pages: SplitHugePages::Always,
        };
        let reply = HelloReply::Welcome(Box::new(welcome));
        let sent = connection.send_with_descriptors(&reply, &[store.as_fd()]);
        sent.unwrap();
    };
    assert_one_line(&said(name, Some(welcome)), "started after this VM's device");
}

/// Has what this process says on standard error be in a file instead, until the answer is dropped.
struct Said {
    path: PathBuf,
    before: OwnedFd,
}

impl Said {
    fn from_now_on(path: PathBuf) -> Self {
        let file = std::fs::File::create(&path).unwrap();
        let before = io::stderr().as_fd().try_clone_to_owned().unwrap();
        become_stderr(file.as_fd());
        Self { path, before }
    }

    fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.path).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

impl Drop for Said {
    fn drop(&mut self) {
        become_stderr(self.before.as_fd());
    }
}

fn become_stderr(fd: BorrowedFd<'_>) {
    // SAFETY: what was standard error is nobody's own.
    let done = unsafe { libc::dup2(fd.as_raw_fd(), libc::STDERR_FILENO) };
    assert_eq!(done, libc::STDERR_FILENO);
}

/// Half a minute, in which it might yet come.
#[test]
fn a_vmm_without_the_device_says_so_once_and_shares_when_it_has_one() {
    let name = "starts::a_vmm_without_the_device_says_so_once_and_shares_when_it_has_one";
    in_vmm(name, |vmm| {
        let said = Said::from_now_on(vmm.directory.join("said"));
        wait_until("it is silent", || !said.lines().is_empty());
        vmm.load();
        vmm.boot();
        vmm.share_all();
        vmm.check(0..PAGES);
        let lines = said.lines();
        drop(said);
        assert_one_line(&lines, "has no pagefusion device");
    });
}
