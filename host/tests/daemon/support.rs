// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A daemon and VMM processes under the control of a test.

use pagefusion_host::protocol::{AdminClient, FileKey, Status};
use pagefusion_host::store::PAGE;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;
use tempfile::TempDir;

/// Longest wait for anything; only reached when a test fails.
const LIMIT: Duration = Duration::from_secs(30);

/// Directories of a host.
pub(crate) struct Host {
    // Dropped first: the directory cannot be removed while it is there.
    mounted: Option<Tmpfs>,
    directory: TempDir,
}

/// A small tmpfs that only this thread and its children see; gone when dropped or when all of
/// them have ended.
struct Tmpfs(PathBuf);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

impl Host {
    pub(crate) fn new() -> Self {
        // Short, because of the sockets, and on a tmpfs, because of the store.
        let directory = tempfile::Builder::new()
            .prefix("pf")
            .tempdir_in("/dev/shm")
            .unwrap();
        Self {
            mounted: None,
            directory,
        }
    }

    /// A host whose stores have room for so many pages. `None` without the privilege to mount.
    #[expect(unsafe_code, reason = "a mount namespace for this thread")]
    pub(crate) fn with_room_for(pages: usize) -> Option<Self> {
        use rustix::mount::{MountFlags, MountPropagationFlags};
        // SAFETY: nothing else relies on the mounts of a test's own thread.
        let alone = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) };
        if alone == Err(rustix::io::Errno::PERM) {
            return None;
        }
        alone.unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        let mut host = Self::new();
        let store = host.store();
        std::fs::create_dir(&store).unwrap();
        let size = std::ffi::CString::new(format!("mode=700,size={}", pages * PAGE)).unwrap();
        rustix::mount::mount("tmpfs", &store, "tmpfs", MountFlags::empty(), &*size).unwrap();
        host.mounted = Some(Tmpfs(store));
        Some(host)
    }

    pub(crate) fn runtime(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    pub(crate) fn daemon_command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagefusiond"));
        command.arg("--runtime-dir").arg(self.runtime());
        command.arg("--store-dir").arg(self.store());
        command
    }

    /// Starts a daemon that refuses to run; what it says.
    pub(crate) fn refused_start(&self) -> String {
        let daemon = self.daemon_command();
        let mut command = Command::new("timeout");
        command.arg("20").arg(daemon.get_program());
        let output = command.args(daemon.get_args()).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        text
    }

    /// Names of the records of VMs, in order.
    pub(crate) fn records(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.runtime().join("records")).unwrap();
        let name = |it: std::fs::DirEntry| it.file_name().into_string().unwrap();
        let mut names: Vec<_> = entries.map(|it| name(it.unwrap())).collect();
        names.sort();
        names
    }

    /// `pagefusionctl` with these words; exit status, output, errors.
    pub(crate) fn ctl(&self, words: &str) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_pagefusionctl"))
            .arg("--runtime-dir")
            .arg(self.runtime())
            .args(words.split(' '))
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let status = output.status.code().unwrap();
        (status, text(output.stdout), text(output.stderr))
    }

    pub(crate) fn status(&self) -> Status {
        AdminClient::connect(&self.runtime())
            .unwrap()
            .status()
            .unwrap()
    }

    /// Pages that all stores take.
    pub(crate) fn stored_pages(&self) -> u64 {
        self.store_files()
            .iter()
            .map(|path| path.metadata().unwrap().blocks() * 512 / 4096)
            .sum()
    }

    pub(crate) fn store_files(&self) -> Vec<PathBuf> {
        let paths = std::fs::read_dir(self.store())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        paths
            .filter(|path| path.extension().is_some_and(|it| it == "pages"))
            .collect()
    }

    pub(crate) fn is_clean(&self) -> bool {
        let is_empty = |path: &Path| std::fs::read_dir(path).unwrap().next().is_none();
        self.store_files().is_empty()
            && is_empty(&self.runtime().join("vms"))
            && is_empty(&self.runtime().join("records"))
    }
}

/// A running daemon; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    lines: Receiver<String>,
}

impl Daemon {
    /// Starts one and waits until it says, the way systemd hears it, that it is ready.
    pub(crate) fn start(host: &Host) -> Self {
        Self::start_with(host, &[])
    }

    /// The same with more arguments.
    pub(crate) fn start_with(host: &Host, arguments: &[&str]) -> Self {
        let path = host.directory.path().join("notify");
        let _ = std::fs::remove_file(&path);
        let notify = UnixDatagram::bind(&path).unwrap();
        notify.set_read_timeout(Some(LIMIT)).unwrap();
        let mut child = host
            .daemon_command()
            .args(arguments)
            .env("NOTIFY_SOCKET", &path)
            .env("RUST_LOG", "info")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines(child.stderr.take().unwrap());
        let mut message = [0; 64];
        let length = notify.recv(&mut message).expect("the daemon gets ready");
        assert!(message[..length].starts_with(b"READY=1"));
        Self { child, lines }
    }

    /// Niceness of each of its threads.
    pub(crate) fn niceness(&self) -> Vec<i32> {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let pid = |it: std::fs::DirEntry| it.file_name().to_str().unwrap().parse().unwrap();
        let nice = |pid| {
            let pid = rustix::process::Pid::from_raw(pid);
            rustix::process::getpriority_process(pid).ok()
        };
        // Some end while they are looked at.
        threads.filter_map(|it| nice(pid(it.unwrap()))).collect()
    }

    /// Waits for a line of the log.
    pub(crate) fn expect(&self, text: &str) {
        self.line(text);
    }

    /// Waits for a line of the log with this text.
    pub(crate) fn line(&self, text: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(LIMIT);
            let line = line.unwrap_or_else(|_| panic!("the daemon never said: {text}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Waits until a VM has been cleaned up after.
    pub(crate) fn expect_end(&self, name: &str) {
        self.expect(&format!("({name}) has ended"));
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn terminate(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that is a VMM and does what it is told, see `vmm.rs`; killed when dropped.
pub(crate) struct Vmm {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    pub(crate) directory: PathBuf,
}

impl Vmm {
    pub(crate) fn start(host: &Host, name: &str, group: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "vmm::process", "--nocapture"])
            .env("PF_RUNTIME", host.runtime())
            .env("PF_NAME", name)
            .env("PF_GROUP", group)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let lines = lines(child.stdout.take().unwrap());
        let mut vmm = Self {
            child,
            input,
            lines,
            directory: PathBuf::new(),
        };
        vmm.directory = vmm.answer().into();
        vmm
    }

    /// Has it do something and returns what it says.
    pub(crate) fn tell(&mut self, command: &str) -> String {
        self.order(command);
        self.answer()
    }

    /// Has it do something, without waiting.
    pub(crate) fn order(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    pub(crate) fn answer(&self) -> String {
        loop {
            let line = self.lines.recv_timeout(LIMIT).expect("the VMM answers");
            if let Some((_, answer)) = line.split_once("> ") {
                return answer.into();
            }
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(from: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

pub(crate) fn key(inode: u64) -> FileKey {
    let size = 1000 * PAGE as u64;
    FileKey {
        fs_uuid: [3; 16],
        inode,
        size,
        mtime_ns: 5,
        generation: 1,
        kind: 1,
    }
}

/// Every page of these tests has content that follows from file and page.
pub(crate) fn content(inode: u64, page: u64) -> [u8; PAGE] {
    let mut bytes = [inode as u8; PAGE];
    bytes[..8].copy_from_slice(&(page * 0x1_0001).to_le_bytes());
    bytes[PAGE - 8..].copy_from_slice(&(inode << 32 | page).to_le_bytes());
    bytes
}
