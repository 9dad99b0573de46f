// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device: the header of its memory, its registers, and the handshake that hands it out.

use crate::input::Input;
use pagefusion_abi::wire::{
    self, Layout, OUTCOME_BYTES, PAGE_SIZE, SLOT_BYTES, header, pack_version,
};
use pagefusion_host::device::{PagefusionDevice, REGISTER_BYTES};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, SendFlags, SocketType,
};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;

const SEND: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);
const BASE: MmioAddress = MmioAddress(0xfe00_0000);

/// A guest at the registers, another host's header, and a VMM that connects for the device.
pub fn ivshmem(data: &[u8]) {
    let mut input = Input(data);
    match input.below(4) {
        0 | 1 => check_header(&mut input),
        2 => check_registers(&mut input),
        _ => check_handshake(&mut input),
    }
}

/// A header is refused, or everything that follows from it is inside the memory and no two
/// areas share a page.
fn check_header(input: &mut Input<'_>) {
    let mut words = [0; header::BYTES / 8];
    if let Some(layout) = Layout::for_size(1 << (16 + input.below(13))) {
        for (offset, word) in layout.header_words() {
            words[offset / 8] = word;
        }
    }
    words[header::MAGIC / 8] = wire::MAGIC;
    words[header::VERSION / 8] = pack_version(wire::VERSION_MAJOR, wire::VERSION_MINOR);
    let real_bytes = match input.below(4) {
        0 => input.number(),
        _ => words[header::TOTAL_BYTES / 8],
    };
    while !input.is_empty() {
        let at = usize::from(input.below(words.len() as u8));
        words[at] = match input.below(4) {
            0 => words[at].wrapping_add(PAGE_SIZE * u64::from(input.u8())),
            1 => words[at].wrapping_sub(PAGE_SIZE * u64::from(input.u8())),
            2 => 1 << input.below(64),
            _ => input.number(),
        };
    }
    let Ok(layout) = Layout::from_header(|offset| words[offset / 8], real_bytes) else {
        return;
    };
    let mut areas = vec![
        (0, header::BYTES as u64),
        (layout.host_area, wire::host_area::BYTES as u64),
        (layout.guest_area, wire::guest_area::BYTES as u64),
    ];
    // First and last of each ring, at positions that have gone around.
    for position in [0, 1, u64::MAX, 1 << 63, layout.ring_slots, input.number()] {
        areas.push((layout.ring_slot(position), SLOT_BYTES as u64));
        areas.push((layout.outcome(position), OUTCOME_BYTES as u64));
        areas.push((layout.request_slot(position), SLOT_BYTES as u64));
    }
    for (start, bytes) in areas {
        assert!(start % 8 == 0 && start + bytes <= real_bytes, "{layout:?}");
    }
    // Of two writers none writes to the other's pages.
    let pages = |start: u64, bytes: u64| start / PAGE_SIZE..(start + bytes).div_ceil(PAGE_SIZE);
    let slot = SLOT_BYTES as u64;
    let owned = [
        pages(0, PAGE_SIZE),
        pages(layout.host_area, PAGE_SIZE),
        pages(layout.guest_area, PAGE_SIZE),
        pages(layout.requests, layout.request_slots * slot),
        pages(layout.outcomes, layout.ring_slots * OUTCOME_BYTES as u64),
        pages(layout.ring, layout.ring_slots * slot),
    ];
    for (i, one) in owned.iter().enumerate() {
        for other in &owned[..i] {
            assert!(one.end <= other.start || other.end <= one.start);
        }
    }
}

/// The doorbell rings when ours is written to, and nothing else does anything.
fn check_registers(input: &mut Input<'_>) {
    let device = PagefusionDevice::new().expect("descriptors");
    let mut rung = false;
    while !input.is_empty() {
        let offset = match input.below(4) {
            0 => u64::from(input.u8()) % REGISTER_BYTES,
            1 => input.number(),
            _ => 12,
        };
        let length = usize::from(input.below(10));
        match input.below(4) {
            0 => {
                let mut data = vec![0xff; length];
                device.mmio_read(BASE, offset, &mut data);
                assert!(data.iter().all(|byte| *byte == 0));
            }
            1 => {
                device.mmio_write(BASE, offset, &(1_u32 << 16).to_le_bytes());
                rung |= offset == 12;
            }
            _ => {
                let data = input.bytes(length);
                device.mmio_write(BASE, offset, data);
                rung |= offset == 12 && data == (1_u32 << 16).to_le_bytes();
            }
        }
        if input.below(4) == 0 {
            assert_eq!(device.take_doorbell().expect("an eventfd"), rung);
            rung = false;
        }
    }
    assert_eq!(device.take_doorbell().expect("an eventfd"), rung);
}

/// Whatever the VMM sends, however full its socket is and whenever it closes: the handshake
/// does not wait, and comes in order as far as it comes.
fn check_handshake(input: &mut Input<'_>) {
    let device = PagefusionDevice::new().expect("descriptors");
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .expect("descriptors");
    let mut theirs = Some(theirs);
    let mut rubbish = 0;
    while !input.is_empty() {
        match (input.below(4), &theirs) {
            (0, Some(theirs)) => {
                let length = usize::from(input.u8());
                let _ = rustix::net::send(theirs, input.bytes(length), SEND);
            }
            (1, Some(_)) => {
                // What was in the socket before; a daemon would have put nothing there.
                let size = usize::from(input.u8()) << 10;
                let sent = rustix::net::send(&ours, &vec![7; size], SEND);
                rubbish += sent.unwrap_or(0);
            }
            (2, Some(theirs)) => {
                let how = [
                    rustix::net::Shutdown::Read,
                    rustix::net::Shutdown::Write,
                    rustix::net::Shutdown::Both,
                ];
                let _ = rustix::net::shutdown(theirs, how[usize::from(input.below(3))]);
            }
            (3, Some(_)) if input.below(4) == 0 => theirs = None,
            _ => {}
        }
    }
    let introduced = device.introduce(ours.as_fd());
    drop(ours);
    let Some(theirs) = theirs else {
        assert!(introduced.is_err());
        return;
    };
    let (numbers, descriptors) = received(&theirs, rubbish);
    if introduced.is_ok() {
        assert_eq!(numbers, [0, 0, -1, 1, 0]);
        assert_eq!(descriptors, 3);
    } else {
        assert!([0, 0, -1, 1, 0].starts_with(&numbers));
    }
}

/// Numbers behind the rubbish, and how many descriptors came with them.
fn received(from: &OwnedFd, rubbish: usize) -> (Vec<i64>, usize) {
    let (mut bytes, mut descriptors) = (Vec::new(), 0);
    loop {
        let mut buffer = [0; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = rustix::net::RecvFlags::DONTWAIT | rustix::net::RecvFlags::CMSG_CLOEXEC;
        let Ok(message) = rustix::net::recvmsg(from, &mut parts, &mut ancillary, flags) else {
            break;
        };
        for one in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = one {
                descriptors += rights.count();
            }
        }
        if message.bytes == 0 {
            break;
        }
        bytes.extend(&buffer[..message.bytes]);
    }
    let numbers = bytes.get(rubbish..).unwrap_or_default();
    let numbers = numbers.chunks_exact(8);
    (
        numbers
            .map(|word| i64::from_le_bytes(word.try_into().expect("eight bytes")))
            .collect(),
        descriptors,
    )
}
