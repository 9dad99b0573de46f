// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A process that stays the same process even when its number is used again.

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A living process, or one that was living when this was made.
#[derive(Debug)]
pub(super) struct Process {
    pid: i32,
    start_time: u64,
    pidfd: OwnedFd,
}

impl Process {
    /// The process that has `pid` now.
    pub(super) fn open(pid: i32) -> io::Result<Self> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, format!("process {pid} is gone"));
        let raw = Pid::from_raw(pid).ok_or_else(gone)?;
        let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty())?;
        let start_time = start_time(pid)?;
        let process = Self {
            pid,
            start_time,
            pidfd,
        };
        // Living now, it was living between the two steps above.
        if process.has_ended() {
            Err(gone())
        } else {
            Ok(process)
        }
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// When it was started, clock ticks since the host was.
    pub(super) fn start_time(&self) -> u64 {
        self.start_time
    }

    pub(super) fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(1..))
    }
}

impl AsFd for Process {
    /// Readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command in parentheses may hold anything; field 3 comes after the last one.
    let after_command = stat.rsplit_once(')').map(|(_, rest)| rest);
    after_command
        .and_then(|rest| rest.split_ascii_whitespace().nth(19))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unknown form of /proc/PID/stat"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_ends_and_is_known_to_have() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let process = Process::open(pid).unwrap();
        assert!(!process.has_ended());
        assert_eq!(
            process.start_time(),
            Process::open(pid).unwrap().start_time()
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.has_ended());
        assert!(Process::open(pid).is_err());
    }
}
