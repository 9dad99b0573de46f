//! `pagefusiond` and `pagefusionctl`, as an operator uses them.

use std::{
    fs::File,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde::Deserialize;

use crate::{artifacts::Artifacts, cgroup::MemoryCgroup, interrupt, process::Process};

const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Where the daemon lives; outlasts any one daemon process.
#[derive(Clone, Debug)]
pub struct Site {
    daemon: PathBuf,
    control: PathBuf,
    preload: PathBuf,
    runtime: PathBuf,
    store: PathBuf,
    logs: PathBuf,
    arguments: Vec<String>,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
}

/// `pagefusionctl status --json`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    /// All virtual machines the daemon knows.
    pub vms: Vec<VmStatus>,
    /// Bytes saved, metadata subtracted.
    pub bytes_saved: i64,
    /// What the sharing itself costs.
    pub bytes_metadata: u64,
    /// Guest pages that are mapped on the store now.
    pub pages_shared: u64,
    /// Canonical pages.
    pub store_pages: u64,
}

/// One machine in the status.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct VmStatus {
    /// The name it was started with.
    pub name: String,
    /// QEMU's process.
    pub pid: u32,
    /// Its library talks to the daemon now.
    pub connected: bool,
    /// Pages its guest reported.
    pub pages_reported: u64,
    /// Of these, those mapped on the store now.
    pub pages_shared: u64,
    /// Known by their content only, until a second machine has them.
    pub pages_remembered: u64,
    /// Not shared, for a reason.
    pub pages_refused: u64,
    /// Shared once, written to since.
    pub pages_broken: u64,
    /// Why its memory cannot be shared at all.
    pub disabled: Option<String>,
}

impl Site {
    /// Our programs on two directories; `store` is on tmpfs.
    pub fn new(artifacts: &Artifacts, runtime: &Path, store: &Path, logs: &Path) -> Result<Self> {
        Ok(Self {
            daemon: artifacts.program("pagefusiond")?,
            control: artifacts.program("pagefusionctl")?,
            preload: artifacts.program("libpagefusion_preload.so")?,
            runtime: runtime.to_owned(),
            store: store.to_owned(),
            logs: logs.to_owned(),
            arguments: Vec::new(),
        })
    }

    /// Has daemons that are started from now on look every so many seconds for overlays that save
    /// nothing, or as often as they do by themselves.
    pub fn tidy_every(&mut self, seconds: Option<u32>) {
        let argument = |it: u32| ["--tidy-interval".to_owned(), it.to_string()];
        self.arguments = seconds.map(argument).into_iter().flatten().collect();
    }

    /// Starts the daemon and waits until it is ready.
    pub fn start(&self, cgroup: &MemoryCgroup) -> Result<Daemon> {
        let notify = self.logs.join("notify.sock");
        // A daemon started before this one had its socket here.
        let _ = std::fs::remove_file(&notify);
        let socket = UnixDatagram::bind(&notify).context("bind the notification socket")?;
        socket
            .set_read_timeout(Some(Duration::from_millis(200)))
            .context("limit the wait")?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.logs.join("pagefusiond"))
            .context("open a log")?;
        let mut command = Command::new(&self.daemon);
        command
            .arg("--runtime-dir")
            .arg(&self.runtime)
            .arg("--store-dir")
            .arg(&self.store)
            .args(&self.arguments);
        command
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut process = Process::spawn(&mut command, Some(cgroup.procs()?), Vec::new())?;

        let deadline = Instant::now() + START_LIMIT;
        let mut message = [0; 1024];
        loop {
            interrupt::check()?;
            if let Ok(length) = socket.recv(&mut message) {
                if String::from_utf8_lossy(&message[..length])
                    .lines()
                    .any(|line| line == "READY=1")
                {
                    return Ok(Daemon { process });
                }
            }
            if let Some(status) = process.ended()? {
                bail!("pagefusiond ended with {status}:\n{}", self.log_tail());
            }
            ensure!(
                Instant::now() < deadline,
                "pagefusiond was not ready after {START_LIMIT:?}:\n{}",
                self.log_tail()
            );
        }
    }

    /// The beginning of a QEMU command line that shares memory within `group`.
    pub fn launcher(&self, group: &str, vm: &str, qemu: &Path) -> Command {
        let mut command = self.control();
        command
            .args(["run", "--group", group, "--name", vm, "--preload"])
            .arg(&self.preload)
            .arg("--")
            .arg(qemu);
        command
    }

    /// The same for a QEMU that runs as another user than root, who finds our library in `directory`.
    pub fn launcher_of(&self, user: u32, directory: &Path, group: &str, vm: &str) -> Command {
        let mut command = self.control();
        command
            .args(["run", "--user", &user.to_string()])
            .args(["--group", group, "--name", vm, "--preload"])
            .arg(directory.join("libpagefusion_preload.so"))
            // What the harness has asked the kernel for is forgotten with the change of the user.
            .args(["--", "setpriv", "--pdeathsig", "KILL"]);
        command
    }

    /// Our library.
    pub fn preload(&self) -> &Path {
        &self.preload
    }

    /// QEMU with our library in it and nothing else of ours.
    pub fn preloaded(&self, qemu: &Path) -> Command {
        let mut command = Command::new(qemu);
        command.env("LD_PRELOAD", &self.preload);
        command
    }

    /// Runs `pagefusionctl` and returns what it printed.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String> {
        let output = self
            .control()
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("run pagefusionctl")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "pagefusionctl {}: {}",
            arguments.join(" "),
            errors.trim()
        );
        String::from_utf8(output.stdout).context("pagefusionctl printed no text")
    }

    /// The daemon's counters.
    pub fn status(&self) -> Result<Status> {
        let text = self.ctl(&["status", "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("parse the status: {text}"))
    }

    fn control(&self) -> Command {
        let mut command = Command::new(&self.control);
        command.arg("--runtime-dir").arg(&self.runtime);
        command
    }

    fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.logs.join("pagefusiond")).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..]
            .iter()
            .map(|line| format!("    | {line}\n"))
            .collect()
    }
}

impl Status {
    /// The machine of that name.
    pub fn vm(&self, name: &str) -> Result<&VmStatus> {
        self.vms
            .iter()
            .find(|vm| vm.name == name)
            .with_context(|| format!("the daemon does not know {name}"))
    }
}

impl Daemon {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Fails when it has ended.
    pub fn healthy(&mut self) -> Result<()> {
        match self.process.ended()? {
            Some(status) => bail!("pagefusiond ended with {status}"),
            None => Ok(()),
        }
    }

    /// SIGKILL.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()
    }

    /// SIGTERM; it must end cleanly.
    pub fn stop(mut self) -> Result<()> {
        self.process.signal(Signal::TERM)?;
        let status = self.process.wait(STOP_LIMIT)?;
        ensure!(
            status.is_some_and(|status| status.success()),
            "pagefusiond did not end cleanly: {status:?}"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_and_missing_fields_of_the_status_do_no_harm() {
        let text = r#"{"vms":[{"id":1,"name":"a","pages_shared":5,"refusals":{"short":1}}],"bytes_saved":-3}"#;
        let status: Status = serde_json::from_str(text).unwrap();
        assert_eq!(status.vm("a").unwrap().pages_shared, 5);
        assert!(status.vm("b").is_err());
        assert_eq!((status.bytes_saved, status.store_pages), (-3, 0));
    }
}
