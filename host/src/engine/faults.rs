// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Reads what `userfaultfd` has to say.
//!
//! Undoing an overlay moves memory, and the kernel holds the mover until the event is read:
//! somebody must read. Faults need no answer as a rule, since whoever closes a window wakes
//! its waiters; a fault outside of any window means that a protection was left behind by an
//! error, and is lifted here so that no vCPU waits for ever.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::sharing::Sharing;
use super::uffd::{Event, Uffd};

/// How often it is tried to look after a waiter while the engine is busy with a window, should nobody
/// take the lock after that.
const BUSY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Serves events of `uffd` until `stop` becomes readable or is hung up.
pub fn serve_faults(uffd: &Uffd, sharing: &Sharing, stop: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        let mut fds = [
            PollFd::new(uffd, PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        let timeout = sharing.has_waiters().then_some(&BUSY);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if !fds[1].revents().is_empty() {
            return Ok(());
        }
        while let Some(event) = uffd.next_event()? {
            if let Event::Fault(address) = event {
                sharing.add_waiter(address);
            }
        }
        // Never block on the lock here: its holder may be waiting for us to read an event. Whoever
        // takes the lock next looks after waiters first.
        if sharing.has_waiters() {
            drop(sharing.try_memory());
        }
    }
}

impl Uffd {
    /// Another handle for the same `userfaultfd`.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::from_owned(self.as_fd().try_clone_to_owned()?))
    }
}
