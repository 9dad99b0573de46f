// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's side of a ring, in the test's own memory or in a device's.

use std::borrow::Borrow;
use std::sync::atomic::{AtomicU64, Ordering};

use pagefusion_abi::wire::{
    EMPTY_RECORD, Layout, Outcome, Record, Request, guest_area, guest_state, host_area,
};
use pagefusion_host::device::PagefusionDevice;
use pagefusion_host::engine::{RingConsumer, SharedMemory};

/// Shared memory, and the guest's side of it.
pub(crate) struct Shared<W = Vec<AtomicU64>> {
    pub(crate) words: W,
    pub(crate) layout: Layout,
}

impl Shared {
    pub(crate) fn new() -> Self {
        let layout = Layout::for_size(Layout::MIN_BYTES).unwrap();
        let words = (0..layout.total_bytes / 8)
            .map(|_| AtomicU64::new(0))
            .collect();
        Self { words, layout }
    }

    pub(crate) fn host(&self) -> RingConsumer<&[AtomicU64]> {
        RingConsumer::new(&self.words, self.layout, 77, 1024)
    }
}

impl Shared<SharedMemory> {
    pub(crate) fn of(device: &PagefusionDevice) -> Self {
        let words = SharedMemory::map(device.memory()).unwrap();
        let layout = words.layout().unwrap();
        Self { words, layout }
    }
}

impl<W: Borrow<[AtomicU64]>> Shared<W> {
    pub(crate) fn at(&self, offset: u64) -> &AtomicU64 {
        &self.words.borrow()[(offset / 8) as usize]
    }

    pub(crate) fn guest(&self, field: usize) -> &AtomicU64 {
        self.at(self.layout.guest_area + field as u64)
    }

    pub(crate) fn host_word(&self, field: usize) -> u64 {
        self.at(self.layout.host_area + field as u64)
            .load(Ordering::SeqCst)
    }

    pub(crate) fn attach(&self, epoch: u64) {
        self.guest(guest_area::STATE)
            .store(guest_state::ABSENT, Ordering::SeqCst);
        for field in [
            guest_area::HEAD,
            guest_area::REVOKED,
            guest_area::REQUEST_TAIL,
        ] {
            self.guest(field).store(0, Ordering::SeqCst);
        }
        self.guest(guest_area::INSTANCE)
            .store(self.host_word(host_area::INSTANCE), Ordering::SeqCst);
        self.guest(guest_area::EPOCH).store(epoch, Ordering::SeqCst);
        self.guest(guest_area::STATE)
            .store(guest_state::ATTACHED, Ordering::SeqCst);
    }

    pub(crate) fn head(&self) -> u64 {
        self.guest(guest_area::HEAD).load(Ordering::SeqCst)
    }

    pub(crate) fn set_head(&self, head: u64) {
        self.guest(guest_area::HEAD).store(head, Ordering::SeqCst);
    }

    pub(crate) fn put_slot(&self, position: u64, slot: [u64; 4]) {
        for (i, word) in (0..).zip(slot) {
            self.at(self.layout.ring_slot(position) + i * 8)
                .store(word, Ordering::SeqCst);
        }
    }

    pub(crate) fn produce(&self, record: &Record<'_>) -> u64 {
        let mut buffer = EMPTY_RECORD;
        let slots = record.encode(&mut buffer);
        let head = self.head();
        for (i, slot) in (0..).zip(&buffer[..slots]) {
            self.put_slot(head + i, *slot);
        }
        self.set_head(head + slots as u64);
        head
    }

    /// Takes the host's next request off its ring.
    pub(crate) fn take_request(&self) -> Option<Request> {
        let tail = self.guest(guest_area::REQUEST_TAIL);
        let position = tail.load(Ordering::SeqCst);
        if position == self.host_word(host_area::REQUEST_HEAD) {
            return None;
        }
        let at = self.layout.request_slot(position);
        let slot = [0, 8, 16, 24].map(|i| self.at(at + i).load(Ordering::SeqCst));
        tail.store(position + 1, Ordering::SeqCst);
        Some(Request::decode(&slot).unwrap())
    }

    pub(crate) fn outcome(&self, position: u64) -> Option<Outcome> {
        Outcome::from_word(
            self.at(self.layout.outcome(position))
                .load(Ordering::SeqCst),
        )
    }
}
