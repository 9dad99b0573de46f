//! Everything one run of the tests has going: directories, a cgroup, a daemon, guests.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::{
    artifacts::Artifacts,
    cgroup::MemoryCgroup,
    daemon::{Daemon, Site, Status},
    guest::{Accelerator, Config, Guest, Mode},
    initramfs, interrupt,
    manifest::Manifest,
    services::{self, Load},
    workdir::{self, Store},
};

/// The trust group the guests are in.
const GROUP: &str = "tests";

/// What a kernel is called that other users may read.
pub const KERNEL: &str = "vmlinuz";

/// How long an engine may take until it answers the daemon.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// How long things may take on one kind of host.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From QEMU's start to the agent.
    pub boot: Duration,
    /// From the agent to all services.
    pub services: Duration,
    /// Until sharing settles.
    pub settle: Duration,
}

impl Limits {
    fn of(accelerator: Accelerator, nested: bool, debug: bool) -> Self {
        let factor = match (accelerator, nested) {
            (Accelerator::Kvm, false) => 1,
            (Accelerator::Tcg, _) => 3,
            (Accelerator::Counted, _) => 10,
            (Accelerator::Kvm, true) => 6,
        };
        // Every access to memory and every lock is looked at.
        let factor = if debug { 5 * factor } else { factor };
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes * factor);
        Self {
            boot: minutes(1),
            services: minutes(2),
            settle: minutes(1),
        }
    }
}

/// What kind of host the guests run on.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// How guests' CPUs run.
    pub accelerator: Accelerator,
    /// The host is itself a machine under TCG.
    pub nested: bool,
}

impl Host {
    /// What its Debian guests boot into. Under a nested host systemd's boot alone would take minutes.
    fn mode(self) -> Mode {
        if self.nested {
            Mode::Bare
        } else {
            Mode::Systemd
        }
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match (self.accelerator, self.nested) {
            (Accelerator::Tcg, _) => "tcg",
            (Accelerator::Counted, _) => "tcg-icount",
            (Accelerator::Kvm, true) => "kvm-lab",
            (Accelerator::Kvm, false) => "kvm",
        }
    }
}

/// A guest with nothing but the agent in it, and what this adds.
#[derive(Clone, Debug, Default)]
pub struct Small {
    /// Disks, each written to only in a copy that goes with the machine.
    pub disks: Vec<PathBuf>,
    /// Further drivers.
    pub modules: &'static [&'static str],
    /// Further arguments of the kernel.
    pub kernel_arguments: String,
    /// Further QEMU arguments.
    pub arguments: Vec<String>,
    /// Whose QEMU it is, if not root's, and where this user finds all that is needed.
    pub user: Option<(u32, PathBuf)>,
}

/// The whole set-up. Fields are dropped in this order: nothing goes before what uses it.
#[derive(Debug)]
pub struct World {
    /// The running guests.
    pub guests: Vec<Guest>,
    /// The daemon, while one runs.
    pub daemon: Option<Daemon>,
    /// Everything in it counts.
    pub cgroup: MemoryCgroup,
    /// Where the daemon is at home.
    pub site: Site,
    /// What the files must contain.
    pub manifest: Manifest,
    /// Time limits.
    pub limits: Limits,
    /// What provisioning made.
    pub artifacts: Artifacts,
    /// What runs in Debian guests started from now on.
    pub load: Load,
    /// Guests started from now on have nothing of ours in their QEMU.
    pub plain: bool,
    host: Host,
    initramfs: PathBuf,
    logs: PathBuf,
    started: u32,
    _store: Store,
    directory: TempDir,
}

impl World {
    /// Sets up directories and starts the daemon. Logs go to `logs` if it is given, else they vanish.
    pub fn new(artifacts: &Artifacts, host: Host, logs: Option<&Path>) -> Result<Self> {
        let directory = workdir::create()?;
        let store = Store::create()?;
        let runtime = directory.path().join("run");
        let logs = logs.map_or_else(|| directory.path().join("logs"), Path::to_owned);
        for path in [&runtime, &logs] {
            std::fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
        }
        let initramfs = directory.path().join("guest.cpio");
        initramfs::build_guest(artifacts, &[], &initramfs)?;
        let cgroup = MemoryCgroup::create()?;
        let site = Site::new(artifacts, &runtime, store.path(), &logs)?;
        let daemon = site.start(&cgroup)?;
        Ok(Self {
            guests: Vec::new(),
            daemon: Some(daemon),
            cgroup,
            site,
            manifest: Manifest::read(&artifacts.guest_manifest)?,
            limits: Limits::of(host.accelerator, host.nested, artifacts.debug),
            artifacts: artifacts.clone(),
            load: Load::Whole,
            plain: false,
            host,
            initramfs,
            logs,
            started: 0,
            _store: store,
            directory,
        })
    }

    /// The kind of host.
    pub fn host(&self) -> Host {
        self.host
    }

    /// Starts QEMU for one more Debian guest; it boots while others do.
    pub fn start_guest(&mut self) -> Result<()> {
        let image = self.artifacts.guest_image.clone();
        let (memory_mib, kernel_arguments) = match self.load {
            Load::Whole => (1024, ""),
            Load::Light => (512, "transparent_hugepage=never"),
        };
        let mut config = self.config(self.host.mode(), memory_mib, vec![image]);
        config.kernel_arguments = kernel_arguments.to_owned();
        self.launch(&config)
    }

    /// Starts QEMU for one more guest of the group.
    pub fn start(&mut self, mode: Mode, memory_mib: u32, disks: Vec<PathBuf>) -> Result<()> {
        let config = self.config(mode, memory_mib, disks);
        self.launch(&config)
    }

    /// Starts QEMU for one more guest of the group with Debian's files and, in place of services, the agent.
    pub fn start_files(&mut self, cpus: u32, kernel_arguments: &str) -> Result<()> {
        self.start_files_with(cpus, kernel_arguments, &[])
    }

    /// The same with further arguments of QEMU.
    pub fn start_files_with(
        &mut self,
        cpus: u32,
        kernel_arguments: &str,
        arguments: &[&str],
    ) -> Result<()> {
        let image = self.artifacts.guest_image.clone();
        let mut config = self.config(Mode::Bare, 768, vec![image]);
        config.cpus = cpus;
        config.kernel_arguments = kernel_arguments.to_owned();
        config.arguments = arguments.iter().map(Into::into).collect();
        self.launch(&config)
    }

    fn launch(&mut self, config: &Config) -> Result<()> {
        let qemu = &self.artifacts.qemu;
        let launcher = if self.plain {
            Command::new(qemu)
        } else {
            self.site.launcher(GROUP, &config.name, qemu)
        };
        let guest = Guest::start(config, launcher, Some(&self.cgroup), &self.logs)?;
        self.guests.push(guest);
        Ok(())
    }

    /// Waits until every guest has booted and its services run. Returns how long they were up then.
    pub fn wait_booted(&mut self, from: usize) -> Result<Vec<f64>> {
        let mut uptimes = Vec::new();
        for guest in &mut self.guests[from..] {
            uptimes.push(guest.wait_agent(self.limits.boot)?);
        }
        for guest in &mut self.guests[from..] {
            match self.host.mode() {
                Mode::Bare => services::start(guest, self.load, self.limits.services)?,
                _ => services::wait(guest, self.limits.services)?,
            }
        }
        Ok(uptimes)
    }

    /// A machine with nothing but the agent and further `arguments`, started by `launcher`.
    pub fn start_small(&mut self, launcher: Command, arguments: &[&str]) -> Result<Guest> {
        let mut config = self.config(Mode::Agent, 256, Vec::new());
        config.arguments = arguments.iter().map(Into::into).collect();
        let mut guest = Guest::start(&config, launcher, Some(&self.cgroup), &self.logs)?;
        guest.wait_agent(self.limits.boot)?;
        Ok(guest)
    }

    /// Guests that share, with nothing but the agent and what `small` adds; they boot at the same time.
    pub fn start_small_sharers(&mut self, small: &Small, count: usize) -> Result<()> {
        let from = self.guests.len();
        for _ in 0..count {
            let guest = self.launch_small_sharer(small)?;
            self.guests.push(guest);
        }
        for guest in &mut self.guests[from..] {
            guest.wait_agent(self.limits.boot)?;
        }
        Ok(())
    }

    /// The same, which is not waited for and none of the guests yet.
    pub fn launch_small_sharer(&mut self, small: &Small) -> Result<Guest> {
        let mut config = self.config(Mode::Agent, 384, small.disks.clone());
        if !small.modules.is_empty() {
            let name = format!("guest-{}.cpio", small.modules.join("-"));
            config.initramfs = self.initramfs.with_file_name(name);
            if !config.initramfs.exists() {
                initramfs::build_guest(&self.artifacts, small.modules, &config.initramfs)?;
            }
        }
        config.kernel_arguments = small.kernel_arguments.clone();
        config.arguments = small.arguments.iter().map(Into::into).collect();
        let qemu = &self.artifacts.qemu;
        let launcher = match &small.user {
            Some((user, directory)) => {
                config.kernel = directory.join(KERNEL);
                let mut launcher = self.site.launcher_of(*user, directory, GROUP, &config.name);
                launcher.arg(qemu);
                launcher
            }
            None => self.site.launcher(GROUP, &config.name, qemu),
        };
        Guest::start(&config, launcher, Some(&self.cgroup), &self.logs)
    }

    /// A directory for files of this run.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The initramfs that guests boot from.
    pub fn initramfs(&self) -> &Path {
        &self.initramfs
    }

    fn config(&mut self, mode: Mode, memory_mib: u32, disks: Vec<PathBuf>) -> Config {
        self.started += 1;
        // Detectors take an eighth for their shadow, and as much again for what they remember.
        let detectors = if self.artifacts.debug {
            memory_mib / 4 + 128
        } else {
            0
        };
        Config {
            name: format!("vm{}", self.started),
            mode,
            accelerator: self.host.accelerator,
            memory_mib: memory_mib + detectors,
            cpus: 1,
            cpu: if self.host.accelerator == Accelerator::Kvm {
                "host"
            } else {
                "max,la57=off"
            },
            kernel: self.artifacts.kernel.clone(),
            initramfs: self.initramfs.clone(),
            disks,
            kernel_arguments: String::new(),
            arguments: Vec::new(),
        }
    }

    /// The daemon's counters, in which every guest's engine has answered: one that is busy may take too long to be in
    /// the first answer, and would count for nothing there.
    pub fn status(&self) -> Result<Status> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            interrupt::check()?;
            let status = self.site.status()?;
            let answered = |guest: &Guest| status.vm(guest.name()).is_ok_and(|vm| vm.connected);
            let Some(silent) = self.guests.iter().find(|guest| !answered(guest)) else {
                return Ok(status);
            };
            ensure!(
                Instant::now() < deadline,
                "the engine of {} does not answer the daemon",
                silent.name()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What daemon and modules say of themselves, for whoever looks into a failure.
    pub fn account(&mut self) -> String {
        let told = |what: Result<String>| what.unwrap_or_else(|error| format!("{error:#}"));
        let mut text = told(self.site.ctl(&["status", "--json"]));
        for guest in &mut self.guests {
            let numbers = told(guest.numbers());
            let words = told(guest.device_words());
            text.push_str(&format!("\n{}: {numbers}\n    {words}", guest.name()));
        }
        text.push_str(&self.last_lines());
        text
    }

    /// How their logs end.
    fn last_lines(&self) -> String {
        const LINES: usize = 20;
        let mut text = String::new();
        let names = self
            .guests
            .iter()
            .flat_map(|guest| ["qemu", "console"].map(|kind| format!("{}.{kind}", guest.name())));
        for name in std::iter::once("pagefusiond".to_owned()).chain(names) {
            let log = std::fs::read(self.logs.join(&name)).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            for line in &lines[lines.len().saturating_sub(LINES)..] {
                text.push_str(&format!("\n{name}: {line}"));
            }
        }
        text
    }

    /// Every process whose memory counts.
    pub fn pids(&self) -> Vec<u32> {
        self.guests
            .iter()
            .map(Guest::pid)
            .chain(self.daemon.iter().map(Daemon::pid))
            .collect()
    }

    /// Fails when a guest or the daemon is not well.
    pub fn healthy(&mut self) -> Result<()> {
        for guest in &mut self.guests {
            guest.healthy()?;
        }
        if let Some(daemon) = &mut self.daemon {
            daemon.healthy()?;
        }
        Ok(())
    }

    /// Takes everything down; the daemon must end cleanly.
    pub fn close(mut self) -> Result<()> {
        for mut guest in self.guests.drain(..) {
            guest.kill()?;
        }
        if let Some(daemon) = self.daemon.take() {
            daemon.stop()?;
        }
        Ok(())
    }

    /// Two different guests at once.
    pub fn pair(&mut self) -> Result<(&mut Guest, &mut Guest)> {
        ensure!(self.guests.len() >= 2, "two guests are needed");
        let (first, rest) = self.guests.split_at_mut(1);
        Ok((&mut first[0], &mut rest[0]))
    }
}
