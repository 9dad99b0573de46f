// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A VM's device: shared memory, two eventfds, and the ivshmem handshake that hands them to
//! the VMM.

use pagefusion_abi::wire::{self, Layout, header};
use rustix::event::EventfdFlags;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes of shared memory: 16,384 ring slots.
const MEMORY_BYTES: u64 = 1 << 20;
/// Version of the ivshmem client-server protocol.
const PROTOCOL: i64 = 0;
/// Peer id of the VM. Each VM has a memory of its own, so all have the same.
const VM_PEER: i64 = 0;
/// Peer id of the engine.
const HOST_PEER: i64 = 1;
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
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("pagefusion-device", flags)?;
        rustix::fs::ftruncate(&memory, MEMORY_BYTES)?;
        let layout = Layout::for_size(MEMORY_BYTES).expect("a size that has a layout");
        let version = wire::pack_version(wire::VERSION_MAJOR, wire::VERSION_MINOR);
        let mut bytes = [0; header::BYTES];
        let own = [
            (header::MAGIC, wire::MAGIC),
            (header::VERSION, version),
            (header::FEATURES, wire::feature::ALL),
            (header::HOST_PEER, HOST_PEER as u64),
        ];
        for (at, word) in own.into_iter().chain(layout.header_words()) {
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        if rustix::io::pwrite(&memory, &bytes, 0)? != bytes.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        // Nobody who holds it can pull it from under the others.
        rustix::fs::fcntl_add_seals(
            &memory,
            SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
        )?;
        let eventfd = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            memory,
            from_guest: eventfd()?,
            to_guest: eventfd()?,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_one_that_guests_accept() {
        let device = Device::new().unwrap();
        let word = |at: usize| {
            let mut bytes = [0; 8];
            rustix::io::pread(&device.memory, &mut bytes, at as u64).unwrap();
            u64::from_le_bytes(bytes)
        };
        let layout = Layout::from_header(word, MEMORY_BYTES).unwrap();
        assert_eq!(Some(layout), Layout::for_size(MEMORY_BYTES));
        assert_eq!(word(header::HOST_PEER), 1);
    }

    #[test]
    fn the_memory_cannot_shrink() {
        let device = Device::new().unwrap();
        assert_eq!(
            rustix::fs::ftruncate(&device.memory, 0),
            Err(rustix::io::Errno::PERM)
        );
    }
}
