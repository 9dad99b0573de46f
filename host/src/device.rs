// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device that a guest reports through, for VMMs that have no ivshmem: the registers and
//! the shared memory of QEMU's `ivshmem-doorbell`, as `docs/abi.md` describes them.

use crate::engine::{Guest, SharedMemory};
use crate::protocol::DeviceDescriptors;
use pagefusion_abi::wire::{self, Layout, header};
use rustix::event::EventfdFlags;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};

/// Bytes of shared memory (BAR2): 16,384 ring slots.
pub const MEMORY_BYTES: u64 = 1 << 20;
/// Bytes of registers (BAR0).
pub const REGISTER_BYTES: u64 = 256;
/// PCI vendor and device of `ivshmem`.
pub const PCI_ID: (u16, u16) = (0x1af4, 0x1110);
/// Peer id of the VM. Each VM has a memory of its own, so all have the same.
const VM_PEER: i64 = 0;
/// Peer id of the engine.
const HOST_PEER: i64 = 1;
/// Version of the ivshmem client-server protocol.
const PROTOCOL: i64 = 0;
/// What announces the shared memory in place of a peer.
const MEMORY: i64 = -1;

/// Offsets of the registers that do something, each 32 bits wide.
mod register {
    pub(super) const POSITION: u64 = 8;
    pub(super) const DOORBELL: u64 = 12;
}

/// Shared memory with a header and nothing else in it, whose size cannot change.
fn new_memory() -> io::Result<OwnedFd> {
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
    Ok(memory)
}

/// An eventfd that never blocks.
fn new_event() -> io::Result<OwnedFd> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    Ok(rustix::event::eventfd(0, flags)?)
}

/// The device of one VM.
///
/// The VMM shows it to the guest as a PCI device [`PCI_ID`] and does three things:
///
/// * BAR0, [`REGISTER_BYTES`] long, goes to [`DeviceMmio`]; or it registers [`Self::doorbell`]
///   as an ioeventfd at offset 12.
/// * BAR2 is a memory slot over a shared mapping of [`Self::memory`]. It is not guest memory
///   in the sense of [`crate::engine::Memory`].
/// * [`Self::interrupt`] is the irqfd of MSI-X vector 0. A guest without interrupts polls.
///
/// A VMM in another process that has QEMU's `ivshmem-doorbell` gets all of it by
/// [`Self::introduce`].
///
/// ```
/// use pagefusion_host::device::PagefusionDevice;
/// use vm_device::{DeviceMmio, bus::MmioAddress};
///
/// let device = PagefusionDevice::new()?;
/// // The guest rings peer 1, vector 0.
/// device.mmio_write(MmioAddress(0xfe00_0000), 12, &(1_u32 << 16).to_le_bytes());
/// assert!(device.take_doorbell()?);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct PagefusionDevice {
    memory: OwnedFd,
    doorbell: OwnedFd,
    interrupt: OwnedFd,
}

impl PagefusionDevice {
    /// A device that no guest has touched.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            memory: new_memory()?,
            doorbell: new_event()?,
            interrupt: new_event()?,
        })
    }

    /// What BAR2 shows, [`MEMORY_BYTES`] long.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// Readable when the guest has rung.
    pub fn doorbell(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }

    /// Written to interrupt the guest.
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        self.interrupt.as_fd()
    }

    /// Whether the guest has rung since this was last asked.
    pub fn take_doorbell(&self) -> io::Result<bool> {
        match rustix::io::read(&self.doorbell, &mut [0; 8]) {
            Ok(_) => Ok(true),
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Interrupts the guest.
    pub fn ring_guest(&self) -> io::Result<()> {
        match rustix::io::write(&self.interrupt, &1_u64.to_ne_bytes()) {
            // A full counter: it has been rung and has not looked yet.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The server's part of the ivshmem handshake, which is all of it, with a VMM at the other
    /// end of a stream socket. It fits into an empty socket buffer and never waits.
    pub fn introduce(&self, to: BorrowedFd<'_>) -> io::Result<()> {
        say(to, PROTOCOL, None)?;
        say(to, VM_PEER, None)?;
        say(to, MEMORY, Some(self.memory()))?;
        say(to, HOST_PEER, Some(self.doorbell()))?;
        say(to, VM_PEER, Some(self.interrupt()))
    }

    /// Memory that the device takes, bytes.
    pub fn allocated_bytes(&self) -> u64 {
        rustix::fs::fstat(&self.memory).map_or(0, |stat| stat.st_blocks as u64 * 512)
    }

    /// The engine's view of the guest behind this device. `instance` is not zero, and another
    /// one each time an engine takes the device over; at most `max_inflight_pages` are
    /// reported and not answered at a time.
    pub fn guest(&self, instance: u64, max_inflight_pages: u64) -> io::Result<Guest<SharedMemory>> {
        let memory = SharedMemory::map(&self.memory)?;
        let layout = memory
            .layout()
            .map_err(|error| io::Error::other(format!("the device's memory: {error:?}")))?;
        Ok(Guest::new(memory, layout, instance, max_inflight_pages))
    }
}

/// The device that a daemon has made for this VM.
impl From<DeviceDescriptors> for PagefusionDevice {
    fn from(descriptors: DeviceDescriptors) -> Self {
        Self {
            memory: descriptors.memory,
            doorbell: descriptors.from_guest,
            interrupt: descriptors.to_guest,
        }
    }
}

impl DeviceMmio for PagefusionDevice {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        data.fill(0);
        if let (register::POSITION, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            *data = (VM_PEER as u32).to_le_bytes();
        }
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        let Ok(word) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        if offset == register::DOORBELL && word == (HOST_PEER as u32) << 16 {
            // A full counter: it has been rung and nobody has looked yet.
            let _ = rustix::io::write(&self.doorbell, &1_u64.to_ne_bytes());
        }
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

    const BAR: MmioAddress = MmioAddress(0xfe00_0000);

    #[test]
    fn the_header_is_one_that_guests_accept() {
        let memory = new_memory().unwrap();
        let word = |at: usize| {
            let mut bytes = [0; 8];
            rustix::io::pread(&memory, &mut bytes, at as u64).unwrap();
            u64::from_le_bytes(bytes)
        };
        let layout = Layout::from_header(word, MEMORY_BYTES).unwrap();
        assert_eq!(Some(layout), Layout::for_size(MEMORY_BYTES));
        assert_eq!(word(header::HOST_PEER), 1);
    }

    #[test]
    fn the_memory_cannot_shrink() {
        let memory = new_memory().unwrap();
        assert_eq!(
            rustix::fs::ftruncate(&memory, 0),
            Err(rustix::io::Errno::PERM)
        );
    }

    #[test]
    fn only_our_doorbell_rings() {
        let device = PagefusionDevice::new().unwrap();
        let ring = |offset, word: u32| device.mmio_write(BAR, offset, &word.to_le_bytes());
        // Another peer, another vector, another register, another width.
        ring(12, 0);
        ring(12, 2 << 16);
        ring(12, 1 << 16 | 1);
        ring(0, 1 << 16);
        device.mmio_write(BAR, 12, &[0, 0, 1, 0, 0, 0, 0, 0]);
        device.mmio_write(BAR, 12, &[]);
        assert!(!device.take_doorbell().unwrap());
        for _ in 0..3 {
            ring(12, 1 << 16);
        }
        assert!(device.take_doorbell().unwrap());
        assert!(!device.take_doorbell().unwrap());
    }

    #[test]
    fn registers_read_as_those_of_ivshmem() {
        let device = PagefusionDevice::new().unwrap();
        for (offset, width) in [(0, 4), (4, 4), (8, 4), (12, 4), (8, 1), (200, 8)] {
            let mut data = vec![0xff; width];
            device.mmio_read(BAR, offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0), "{offset}");
        }
    }

    #[test]
    fn an_engine_finds_nobody_attached_and_the_guest_is_rung_without_end() {
        let device = PagefusionDevice::new().unwrap();
        device.guest(1, 1).unwrap();
        for _ in 0..3 {
            device.ring_guest().unwrap();
        }
        let mut counter = [0; 8];
        rustix::io::read(device.interrupt(), &mut counter).unwrap();
        assert_eq!(u64::from_ne_bytes(counter), 3);
    }
}
