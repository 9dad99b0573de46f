// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A process that stays the same process even when its number is used again.

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
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
    /// The process that has `pid` now. [`io::ErrorKind::NotFound`] means that there certainly is
    /// none; with any other error nobody knows.
    pub(super) fn open(pid: i32) -> io::Result<Self> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, format!("process {pid} is gone"));
        let raw = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw);
        let raw = raw.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{pid} is no process"))
        })?;
        let pidfd =
            rustix::process::pidfd_open(raw, PidfdFlags::empty()).map_err(|error| match error {
                // The last two, by version of the kernel: the number is that of a mere thread of
                // another process now.
                Errno::SRCH | Errno::NOENT | Errno::INVAL => gone(),
                error => error.into(),
            })?;
        let start_time = start_time(pid);
        // Living now, it was living between the two steps above.
        if has_ended(&pidfd)? {
            return Err(gone());
        }
        let start_time = start_time.map_err(|error| {
            // Not even NotFound means that it has ended: /proc may be missing, or hide it.
            io::Error::other(format!("/proc/{pid}/stat: {error}"))
        })?;
        Ok(Self {
            pid,
            start_time,
            pidfd,
        })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// When it was started, clock ticks since the host was.
    pub(super) fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Whether whoever has `pid` now is this process. One that has ended leaves its number to others.
    pub(super) fn is(&self, pid: i32) -> bool {
        pid == self.pid && has_ended(&self.pidfd).is_ok_and(|ended| !ended)
    }

    pub(super) fn has_ended(&self) -> bool {
        has_ended(&self.pidfd).unwrap_or(false)
    }
}

impl AsFd for Process {
    /// Readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

fn has_ended(pidfd: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    loop {
        match rustix::event::poll(&mut fds, Some(&now)) {
            Err(Errno::INTR) => {}
            ready => return Ok(ready? > 0),
        }
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
        assert!(process.is(pid) && !process.is(pid + 1));
        assert_eq!(
            process.start_time(),
            Process::open(pid).unwrap().start_time()
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.has_ended());
        assert!(!process.is(pid), "another's by now");
        let error = Process::open(pid).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_number_that_is_a_threads_now_is_no_process() {
        let (send, receive) = std::sync::mpsc::channel();
        let (end, until) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            send.send(rustix::thread::gettid()).unwrap();
            until.recv().unwrap_err();
        });
        let number = receive.recv().unwrap().as_raw_nonzero().get();
        let error = Process::open(number).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        drop(end);
        thread.join().unwrap();
    }

    #[test]
    fn what_is_no_number_of_a_process_tells_nothing() {
        for pid in [0, -1, i32::MIN] {
            let error = Process::open(pid).unwrap_err();
            assert_ne!(error.kind(), io::ErrorKind::NotFound, "{pid}");
        }
    }
}
