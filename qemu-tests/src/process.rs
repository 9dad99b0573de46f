//! Processes that never outlive the harness.
#![expect(unsafe_code, reason = "what happens between fork and exec")]

use std::{
    fs::File,
    io::Write,
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{FdFlags, fcntl_setfd},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, set_parent_process_death_signal},
};

/// A child that is killed and reaped when it is dropped, and that the kernel kills when the harness dies.
///
/// The kernel's part is bound to the thread that started the child: start children from the main thread.
#[derive(Debug)]
pub struct Process {
    child: Child,
    reaped: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`, in the memory cgroup whose `cgroup.procs` is given, with `inherited` left open in it.
    pub fn spawn(
        command: &mut Command,
        cgroup_procs: Option<File>,
        inherited: Vec<OwnedFd>,
    ) -> Result<Self> {
        let enter = move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            for descriptor in &inherited {
                fcntl_setfd(descriptor, FdFlags::empty())?;
            }
            if let Some(mut procs) = cgroup_procs.as_ref() {
                procs.write_all(b"0")?;
            }
            Ok(())
        };
        // SAFETY: `enter` only makes system calls on what was prepared before the fork; it neither allocates nor
        // locks.
        let command = unsafe { command.pre_exec(enter) };
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self {
            child,
            reaped: None,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its standard streams.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends a signal, unless it has been reaped.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.reaped.is_some() {
            return Ok(());
        }
        kill_process(Pid::from_child(&self.child), signal)
            .with_context(|| format!("signal {}", self.pid()))
    }

    /// Waits for its end; `None` when it has not ended within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        if self.reaped.is_none() {
            let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())
                .context("pidfd_open")?;
            let limit = Timespec {
                tv_sec: limit.as_secs() as i64,
                tv_nsec: limit.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
                Ok(_) => self.reaped = Some(self.child.wait().context("reap a child")?),
                Err(error) => return Err(error).context("wait for a child"),
            }
        }
        Ok(self.reaped)
    }

    /// Whether it has ended, without waiting.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.wait(Duration::ZERO)
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        if self.reaped.is_none() {
            self.signal(Signal::KILL)?;
            self.reaped = Some(self.child.wait().context("reap a child")?);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("process {}: {error:#}", self.pid());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_process_is_gone() {
        let process = Process::spawn(Command::new("sleep").arg("1000"), None, Vec::new()).unwrap();
        let path = format!("/proc/{}", process.pid());
        assert!(std::path::Path::new(&path).exists());
        drop(process);
        assert!(!std::path::Path::new(&path).exists());
    }

    #[test]
    fn waiting_sees_the_exit_status() {
        let mut process =
            Process::spawn(Command::new("sh").args(["-c", "exit 3"]), None, Vec::new()).unwrap();
        assert_eq!(
            process
                .wait(Duration::from_secs(10))
                .unwrap()
                .unwrap()
                .code(),
            Some(3)
        );
        let mut process =
            Process::spawn(Command::new("sleep").arg("1000"), None, Vec::new()).unwrap();
        assert_eq!(process.wait(Duration::from_millis(1)).unwrap(), None);
    }
}
