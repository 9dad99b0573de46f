// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A VMM in a process of its own, with the library in it as `pagefusionctl run` puts it there:
//! real memory, a real daemon, and a guest that reports. It has no processors.

use crate::guest::Guest;
use pagefusion_abi::wire::Outcome;
use pagefusion_host::daemon::{Config, Daemon, PressureThresholds};
use pagefusion_host::protocol::{AdminClient, StoreClient, VmStatus};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(crate) const PAGE: usize = 4096;
/// Pages of the file; guest memory has it twice, one copy for each of two names.
pub(crate) const FILE: usize = 64;
pub(crate) const PAGES: usize = 2 * FILE;

pub(crate) const RUNTIME: &str = "PAGEFUSION_TEST_RUNTIME";
pub(crate) const DIRECTORY: &str = "PAGEFUSION_TEST_DIRECTORY";
pub(crate) const NUMBER: &str = "PAGEFUSION_TEST_NUMBER";
const USER: &str = "PAGEFUSION_TEST_USER";
const SCRIPT: &str = "PAGEFUSION_TEST_SCRIPT";

/// Runs `play` in a VMM of its own; `test` is the name of the test that this is.
pub(crate) fn in_vmm(test: &str, play: impl FnOnce(&mut Machine)) {
    in_each_vmm(test, None, 1, |vmm, _| play(vmm));
}

/// The same as an ordinary user, from when on the VMM is started.
pub(crate) fn in_vmm_of(test: &str, user: u32, play: impl FnOnce(&mut Machine)) {
    in_each_vmm(test, Some(user), 1, |vmm, _| play(vmm));
}

/// The same in a VMM that is a shell script first, which runs another program before it becomes
/// the VMM.
pub(crate) fn in_vmm_by_script(test: &str, play: impl FnOnce(&mut Machine)) {
    if std::env::var_os(RUNTIME).is_some() {
        // SAFETY: the only test of this process, and its only thread that looks at the environment.
        unsafe { std::env::set_var(SCRIPT, "1") };
    }
    in_vmm(test, play);
}

/// The same in so many VMMs, one after the other, each with its number.
pub(crate) fn in_each_vmm(
    test: &str,
    user: Option<u32>,
    count: usize,
    play: impl FnOnce(&mut Machine, usize),
) {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        let number = std::env::var(NUMBER).unwrap().parse().unwrap();
        play(&mut Machine::new(Path::new(&directory)), number);
    } else if let Some(runtime) = std::env::var_os(RUNTIME) {
        panic!("{}", become_vmm(test, Path::new(&runtime)));
    } else {
        (0..count).for_each(|number| start(test, user, number));
    }
}

/// In the test's own process: a daemon, and a process that is to be the VMM.
fn start(test: &str, user: Option<u32>, number: usize) {
    // On a tmpfs because of the store, and short because of the sockets.
    let host = tempfile::Builder::new()
        .prefix("pf")
        .tempdir_in("/dev/shm")
        .unwrap();
    let daemon = Daemon::start(&config(host.path())).unwrap();
    let (stop, stopper) = rustix::pipe::pipe().unwrap();
    let served = std::thread::spawn(move || daemon.run(stop).unwrap());
    let mut program = std::env::current_exe().unwrap();
    if user.is_some() {
        // Whoever is not root must find its sockets, and what it runs.
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(host.path(), PermissionsExt::from_mode(0o755)).unwrap();
        for from in [program.clone(), library().into()] {
            let to = host.path().join(from.file_name().unwrap());
            std::fs::copy(&from, &to).unwrap();
        }
        program = host.path().join(program.file_name().unwrap());
    }
    let status = Command::new(program)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(RUNTIME, host.path().join("run"))
        .env(NUMBER, number.to_string())
        .envs(user.map(|user| (USER, user.to_string())))
        .status()
        .unwrap();
    drop(stopper);
    served.join().unwrap();
    assert!(status.success(), "{test} in VMM {number}: {status}");
}

/// What a daemon of these tests is told.
pub(crate) fn config(host: &Path) -> Config {
    Config {
        runtime_dir: host.join("run"),
        store_dir: host.join("store"),
        max_store: None,
        tidy: None,
        metrics: None,
        pressure: PressureThresholds::default(),
    }
}

/// In the process that is to be the VMM: goes on as another program, with the library.
fn become_vmm(test: &str, runtime: &Path) -> std::io::Error {
    let user = std::env::var(USER).ok().map(|user| user.parse().unwrap());
    let mut daemon = AdminClient::connect(runtime).unwrap();
    let vm = daemon.create_vm_for(None, None, user).unwrap();
    let program = std::env::current_exe().unwrap();
    let mut command = match std::env::var_os(SCRIPT) {
        None => Command::new(program),
        Some(_) => {
            let mut command = Command::new("sh");
            let script = "/bin/true || exit 9; exec \"$0\" \"$@\"";
            command.args(["-c", script]).arg(program);
            command
        }
    };
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("PAGEFUSION_PROCESS", std::process::id().to_string())
        .env("LD_PRELOAD", library())
        .env("PAGEFUSION_ENGINE_SOCKET", vm.directory.join("engine.sock"))
        .env("PAGEFUSION_QMP_SOCKET", vm.directory.join("qmp.sock"))
        .env(DIRECTORY, &vm.directory);
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    command.exec()
}

/// The library as cargo has just built it.
pub(crate) fn library() -> OsString {
    let test = std::env::current_exe().unwrap();
    let directories = test.ancestors().skip(1).take(2);
    let found = directories
        .map(|it| it.join("libpagefusion_preload.so"))
        .filter_map(|it| Some((it.metadata().ok()?.modified().ok()?, it)))
        .max();
    found.expect("the library has been built").1.into()
}

/// What the VMM has.
pub(crate) struct Machine {
    pub(crate) ram: Ram,
    pub(crate) directory: PathBuf,
    monitor: Option<Monitor>,
    guest: Option<Guest>,
    bytes: Vec<u8>,
}

impl Machine {
    fn new(directory: &Path) -> Self {
        let ram = Ram::new(PAGES);
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut word = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed.to_ne_bytes()
        };
        let bytes = (0..FILE * PAGE / 8).flat_map(|_| word()).collect();
        Self {
            ram,
            directory: directory.into(),
            monitor: None,
            guest: None,
            bytes,
        }
    }

    /// Fills memory with the file, twice.
    pub(crate) fn load(&self) {
        for page in 0..PAGES {
            self.ram.write_page(page, self.content(page));
        }
    }

    /// What `load` puts there.
    pub(crate) fn content(&self, page: usize) -> &[u8] {
        &self.bytes[page % FILE * PAGE..][..PAGE]
    }

    /// Has a monitor say where memory is, as QEMU's does, and boots a guest.
    pub(crate) fn boot(&mut self) {
        let monitor = Monitor::listen(&self.directory.join("qmp.sock"));
        monitor.show(&[(0, self.ram.base, self.ram.pages)]);
        self.monitor = Some(monitor);
        self.boot_without_monitor();
    }

    /// Boots a guest where the library knows memory otherwise.
    pub(crate) fn boot_without_monitor(&mut self) {
        let (_client, welcome) = StoreClient::connect(&self.directory.join("engine.sock")).unwrap();
        let mut guest = Guest::attach(welcome.device.expect("a device"));
        guest.announce(1, FILE as u64);
        guest.announce(2, FILE as u64);
        self.guest = Some(guest);
    }

    pub(crate) fn monitor(&self) -> &Monitor {
        self.monitor.as_ref().expect("booted")
    }

    pub(crate) fn guest(&self) -> &Guest {
        self.guest.as_ref().expect("booted")
    }

    /// The guest reports the file at `gfn` under one of its two names.
    pub(crate) fn report(&mut self, name: u32, gfn: usize) -> Outcome {
        self.report_part(name, gfn, FILE)
    }

    /// The same with so many pages of it.
    pub(crate) fn report_part(&mut self, name: u32, gfn: usize, pages: usize) -> Outcome {
        let guest = self.guest.as_mut().expect("booted");
        guest.run(name, gfn as u64, pages as u32)
    }

    /// The guest reports all of it. Answers how many pages are shared then.
    pub(crate) fn share(&mut self) -> usize {
        self.report(1, 0);
        let second = self.report(2, FILE);
        let first = self.report(1, 0);
        usize::from(first.shared) + usize::from(second.shared)
    }

    /// As `share`, of all of it.
    pub(crate) fn share_all(&mut self) {
        assert_eq!(self.share(), PAGES);
        assert!(self.is_overlaid(0..PAGES));
    }

    /// Every page is as `load` left it.
    #[track_caller]
    pub(crate) fn check(&self, pages: std::ops::Range<usize>) {
        for page in pages {
            assert_eq!(self.ram.read_page(page), self.content(page), "page {page}");
        }
    }

    /// Whether all of these pages lie on the store, as the kernel says.
    pub(crate) fn is_overlaid(&self, pages: std::ops::Range<usize>) -> bool {
        self.overlaid(pages.clone()) == pages.len()
    }

    /// How many of these pages lie on the store.
    pub(crate) fn overlaid(&self, pages: std::ops::Range<usize>) -> usize {
        let wanted = self.ram.at(pages.start)..self.ram.at(pages.end);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut overlaid = 0;
        for line in maps.lines().filter(|line| line.contains(".pages")) {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            let (start, end) = (number(start), number(end));
            overlaid += end.min(wanted.end).saturating_sub(start.max(wanted.start));
        }
        overlaid / PAGE
    }

    /// What the daemon says of this VM.
    pub(crate) fn status(&self) -> VmStatus {
        let runtime = self.directory.ancestors().nth(2).unwrap();
        let pid = std::process::id() as i32;
        // The engine's other connection may have been made first.
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let status = AdminClient::connect(runtime).unwrap().status().unwrap();
            let vm = status.vms.into_iter().find(|vm| vm.pid == pid).unwrap();
            if vm.connected {
                return vm;
            }
            assert!(Instant::now() < deadline, "no engine is connected");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Why this VM shares nothing.
    pub(crate) fn refusal(&self) -> String {
        self.status().engine.disabled.unwrap_or_default()
    }
}

/// Guest memory.
pub(crate) struct Ram {
    pub(crate) base: usize,
    pub(crate) pages: usize,
}

impl Ram {
    pub(crate) fn new(pages: usize) -> Self {
        // Borders on nothing that it could be joined with.
        let guard = PAGE;
        let bytes = pages * PAGE + 2 * guard;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: fresh memory.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        let ram = Self {
            base: base as usize + guard,
            pages,
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a part of it.
        let made = unsafe { libc::mprotect(ram.base as *mut _, pages * PAGE, protection) };
        assert_eq!(made, 0);
        ram
    }

    pub(crate) fn at(&self, page: usize) -> usize {
        self.base + page * PAGE
    }

    /// One word of guest memory, as a processor sees it.
    pub(crate) fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        assert!(page < self.pages && word < PAGE / 8);
        // SAFETY: mapped for the process's whole life and only reached through atomics.
        unsafe { &*((self.at(page) + word * 8) as *const AtomicU64) }
    }

    pub(crate) fn write_page(&self, page: usize, bytes: &[u8]) {
        for (i, word) in bytes.chunks_exact(8).enumerate() {
            let value = u64::from_ne_bytes(word.try_into().unwrap());
            self.word(page, i).store(value, Ordering::Relaxed);
        }
    }

    pub(crate) fn read_page(&self, page: usize) -> Vec<u8> {
        let word = |i| self.word(page, i).load(Ordering::Relaxed).to_ne_bytes();
        (0..PAGE / 8).flat_map(word).collect()
    }
}

/// First frame, address and pages of memory.
type Shown = (u64, usize, usize);

/// Says where guest memory is, as QEMU's monitor would.
pub(crate) struct Monitor {
    shown: Arc<Mutex<Vec<Shown>>>,
}

impl Monitor {
    fn listen(path: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let shown = Arc::<Mutex<Vec<Shown>>>::default();
        let monitor = Self {
            shown: shown.clone(),
        };
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let mut answers = stream.try_clone().unwrap();
                let mut say = |line: &str| writeln!(answers, "{line}");
                let greeting = r#"{"QMP":{"version":{"qemu":{"micro":0,"minor":0,"major":10},"package":""},"capabilities":[]}}"#;
                if say(greeting).is_err() {
                    continue;
                }
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    let request: serde_json::Value = serde_json::from_str(&line).unwrap();
                    let asked = request["arguments"]["command-line"].as_str();
                    let text = asked.map(|asked| answer(asked, &shown.lock().unwrap()));
                    let value = text.map_or(serde_json::json!({}), serde_json::Value::String);
                    let mut reply = serde_json::json!({ "return": value });
                    if let Some(id) = request.get("id") {
                        reply["id"] = id.clone();
                    }
                    if say(&reply.to_string()).is_err() {
                        break;
                    }
                }
            }
        });
        monitor
    }

    /// From now on memory is there.
    pub(crate) fn show(&self, shown: &[Shown]) {
        *self.shown.lock().unwrap() = shown.to_vec();
    }
}

fn answer(asked: &str, shown: &[Shown]) -> String {
    if asked == "info mtree -f" {
        let mut text =
            "FlatView #0\r\n AS \"memory\", root: system\r\n Root memory region: system\r\n"
                .to_owned();
        for (gfn, _, pages) in shown {
            let start = gfn * PAGE as u64;
            let end = start + (pages * PAGE) as u64 - 1;
            text += &format!("  {start:016x}-{end:016x} (prio 0, ram): pc.ram\r\n");
        }
        return text;
    }
    let asked = asked.strip_prefix("gpa2hva 0x").expect("a known command");
    let address = u64::from_str_radix(asked, 16).unwrap();
    for (gfn, base, pages) in shown {
        let start = gfn * PAGE as u64;
        if (start..start + (pages * PAGE) as u64).contains(&address) {
            let host = *base as u64 + address - start;
            return format!("Host virtual address for {address:#x} (pc.ram) is {host:#x}\r\n");
        }
    }
    format!("No memory is mapped at address {address:#x}\r\n")
}
