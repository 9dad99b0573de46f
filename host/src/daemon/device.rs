// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A VM's device: shared memory, two eventfds, and the ivshmem handshake that hands them to
//! the VMM.

use crate::device::{HOST_PEER, VM_PEER, new_event, new_memory};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Version of the ivshmem client-server protocol.
const PROTOCOL: i64 = 0;
/// What announces the shared memory in place of a peer.
const MEMORY: i64 = -1;

/// Device of one VM.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) memory: OwnedFd,
    /// What the guest rings.
    pub(super) from_guest: OwnedFd,
    /// What rings the guest.
    pub(super) to_guest: OwnedFd,
}

impl Device {
    /// A device with a header and nothing else in its memory.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            memory: new_memory()?,
            from_guest: new_event()?,
            to_guest: new_event()?,
        })
    }

    /// The server's part of the handshake, which is all of it. It fits into an empty socket
    /// buffer and never waits.
    pub(super) fn introduce(&self, to: BorrowedFd<'_>) -> io::Result<()> {
        say(to, PROTOCOL, None)?;
        say(to, VM_PEER, None)?;
        say(to, MEMORY, Some(self.memory.as_fd()))?;
        say(to, HOST_PEER, Some(self.from_guest.as_fd()))?;
        say(to, VM_PEER, Some(self.to_guest.as_fd()))
    }

    /// Memory that the device takes, bytes.
    pub(super) fn allocated_bytes(&self) -> u64 {
        rustix::fs::fstat(&self.memory).map_or(0, |stat| stat.st_blocks as u64 * 512)
    }
}

fn say(to: BorrowedFd<'_>, number: i64, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_slice();
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = number.to_le_bytes();
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = rustix::net::sendmsg(to, &[IoSlice::new(&bytes)], &mut ancillary, flags)?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}
