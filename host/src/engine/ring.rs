// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The host's side of the ring: attaches to epochs, claims and acknowledges records, posts
//! requests. Reads nothing outside the areas, whatever the guest writes.
//!
//! Order of operations (the other side is the module's ring producer):
//!
//! * A batch is claimed before its pages are touched. `CLAIM` is written, then a full
//!   barrier, then `REVOKED` is read; the guest writes `REVOKED`, a full barrier, then reads
//!   `CLAIM`. At least one of the two sees the other, so that no page is both let go and
//!   looked at.
//! * Outcomes are written before `ACK`, which is a release store.

use std::sync::atomic::Ordering;

use pagefusion_abi::wire::{
    self, DecodeError, Layout, MAX_NAME, MAX_RECORD_SLOTS, Outcome, Record, Request, SLOT_BYTES,
    SLOT_WORDS, Slot, guest_area, guest_state, host_area, policy,
};

use super::shared_memory::Words;

/// What happened at the guest's side since the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// No guest module is there.
    Absent,
    /// The module attached anew; everything it had announced before is void.
    New,
    /// The same module as before.
    Same,
    /// The shared memory is not as this host left it: the machine was restored from a
    /// snapshot. This host is a new one from here on, and the guest is to be rung.
    Restored,
}

/// One record of a claimed batch.
#[derive(Debug)]
pub struct Claimed<'a> {
    /// Position of its first slot.
    pub position: u64,
    /// The record, or why it was refused.
    pub record: Result<Record<'a>, DecodeError>,
}

/// A batch between claim and acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    start: u64,
    end: u64,
    revoked: bool,
}

impl Batch {
    /// The guest took these records back: their pages must not be touched.
    pub fn is_revoked(&self) -> bool {
        self.revoked
    }
}

/// Ring violations that end an epoch: nothing after them can be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The head went backwards or further than the ring is long.
    #[error("the guest's ring head is out of range")]
    Head,
    /// A record claims no slot, too many, or more than there are.
    #[error("a record's length is out of range")]
    Length,
}

/// Consumer of one guest's ring over any memory that can be seen as words.
#[derive(Debug)]
pub struct RingConsumer<M> {
    memory: M,
    layout: Layout,
    instance: u64,
    max_inflight_pages: u64,
    epoch: u64,
    claim: u64,
    /// Everything before it is acknowledged.
    tail: u64,
    request_head: u64,
    /// The epoch broke the protocol; ignored until the guest attaches anew.
    broken: bool,
}

impl<M: Words> RingConsumer<M> {
    /// Takes over the host's side with a new, non-zero `instance`; the guest will attach.
    /// `layout` must be sound for `memory`, as [`Layout::from_header`] makes sure.
    pub fn new(memory: M, layout: Layout, instance: u64, max_inflight_pages: u64) -> Self {
        assert!(
            layout.total_bytes <= memory.count() as u64 * 8,
            "layout exceeds memory"
        );
        assert_ne!(instance, 0, "instance zero means that no host is there");
        let mut ring = Self {
            memory,
            layout,
            instance,
            max_inflight_pages,
            epoch: 0,
            claim: 0,
            tail: 0,
            request_head: 0,
            broken: false,
        };
        ring.take_over();
        ring
    }

    /// Writes the whole host area, of a host that knows no guest.
    fn take_over(&mut self) {
        self.begin_epoch(0);
        self.set_host(host_area::POLICY, 0);
        self.set_host(host_area::PAGES_SHARED, 0);
        self.set_host(host_area::MAX_INFLIGHT_PAGES, self.max_inflight_pages);
        self.set_host(host_area::INSTANCE, self.instance);
    }

    fn begin_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
        (self.claim, self.tail, self.request_head) = (0, 0, 0);
        self.broken = false;
        self.set_host(host_area::CLAIM, 0);
        self.set_host(host_area::ACK, 0);
        self.set_host(host_area::REQUEST_HEAD, 0);
        // Release: the guest that sees the epoch sees the positions of it.
        self.set_host(host_area::EPOCH, epoch);
    }

    /// Whether the host area says what this host has written there. Nobody else writes to it,
    /// but restoring a snapshot of the machine restores this memory as well.
    fn is_as_left(&self) -> bool {
        let written = [
            (host_area::INSTANCE, self.instance),
            (host_area::EPOCH, self.epoch),
            (host_area::CLAIM, self.claim),
            (host_area::ACK, self.tail),
            (host_area::REQUEST_HEAD, self.request_head),
        ];
        written
            .into_iter()
            .all(|(field, value)| self.host(field) == value)
    }

    /// Whether the guest that the last claimed batch came from is still there, and holds its
    /// pages: it was not restored from a snapshot and has not attached anew meanwhile.
    pub fn is_current(&self) -> bool {
        self.is_as_left() && self.is_attached_to(self.epoch)
    }

    fn is_attached_to(&self, epoch: u64) -> bool {
        // In this order: a guest that attaches anew shows its epoch before it says that it is there,
        // so whoever is found there is the guest of the epoch that is read afterwards, or a later one.
        self.guest(guest_area::STATE) == guest_state::ATTACHED
            && self.guest(guest_area::EPOCH) == epoch
    }

    fn load(&self, offset: u64, order: Ordering) -> u64 {
        u64::from_le(self.memory.load((offset / 8) as usize, order))
    }

    fn store(&self, offset: u64, value: u64, order: Ordering) {
        self.memory
            .store((offset / 8) as usize, value.to_le(), order);
    }

    fn set_host(&self, field: usize, value: u64) {
        let offset = self.layout.host_area + field as u64;
        self.store(offset, value, Ordering::Release);
    }

    fn host(&self, field: usize) -> u64 {
        self.load(self.layout.host_area + field as u64, Ordering::Acquire)
    }

    fn guest(&self, field: usize) -> u64 {
        self.load(self.layout.guest_area + field as u64, Ordering::Acquire)
    }

    fn slot(&self, offset: u64) -> Slot {
        let mut slot = [0; SLOT_WORDS];
        for (i, word) in slot.iter_mut().enumerate() {
            *word = self.load(offset + i as u64 * 8, Ordering::Relaxed);
        }
        slot
    }

    /// Whether there is something that nobody need have rung for: the memory was restored with a
    /// snapshot, in this VMM or from another one, or a guest without a doorbell has written.
    pub fn has_news(&self) -> bool {
        if !self.is_as_left() {
            return true;
        }
        let epoch = self.guest(guest_area::EPOCH);
        let is_new = epoch != self.epoch && epoch != 0;
        let has_written = !self.broken && self.guest(guest_area::HEAD) != self.claim;
        self.is_attached() && (is_new || has_written)
    }

    /// Whether a guest is there that has seen this host.
    pub(super) fn is_attached(&self) -> bool {
        self.guest(guest_area::STATE) == guest_state::ATTACHED
            && self.guest(guest_area::INSTANCE) == self.instance
    }

    /// Looks whether a guest is there, and attaches to a new epoch.
    pub fn attach(&mut self) -> Attachment {
        if !self.is_as_left() {
            // Larger than any that a snapshot can hold, so that the guest sees the change.
            let found = self.host(host_area::INSTANCE);
            self.instance = self.instance.max(found).checked_add(1).unwrap_or(1);
            self.take_over();
            return Attachment::Restored;
        }
        let epoch = self.guest(guest_area::EPOCH);
        // A guest that believes in another host has not seen this one yet.
        if self.guest(guest_area::STATE) != guest_state::ATTACHED
            || self.guest(guest_area::INSTANCE) != self.instance
            || epoch == 0
        {
            return Attachment::Absent;
        }
        if epoch == self.epoch {
            return Attachment::Same;
        }
        self.begin_epoch(epoch);
        Attachment::New
    }

    /// Claims at most `max_records` records and gives each to `each`, in order.
    ///
    /// `None` when there is nothing to do. After an error the epoch is dead and ignored; what
    /// the batch had given out before it must still not be touched, and is never
    /// acknowledged: such a guest keeps its pages pinned until it attaches anew.
    pub fn claim(
        &mut self,
        max_records: usize,
        mut each: impl FnMut(Claimed<'_>),
    ) -> Result<Option<Batch>, RingError> {
        if self.broken || self.epoch == 0 {
            return Ok(None);
        }
        let head = self.guest(guest_area::HEAD);
        // A guest attaching right now resets its head before it shows the new epoch.
        if !self.is_attached_to(self.epoch) {
            return Ok(None);
        }
        let Some(available) = head
            .checked_sub(self.tail)
            .filter(|n| *n <= self.layout.ring_slots)
        else {
            self.broken = true;
            return Err(RingError::Head);
        };
        if available == 0 {
            return Ok(None);
        }
        // First find the end of the batch, then claim it, and only then hand out records.
        let mut buffers: Vec<(u64, usize)> = Vec::with_capacity(max_records);
        let mut end = self.tail;
        while buffers.len() < max_records && end < head {
            let first = self.load(self.layout.ring_slot(end), Ordering::Relaxed);
            let slots = wire::record_slots(first);
            if slots == 0 || slots > MAX_RECORD_SLOTS || slots as u64 > head - end {
                if buffers.is_empty() {
                    self.broken = true;
                    return Err(RingError::Length);
                }
                break;
            }
            buffers.push((end, slots));
            end += slots as u64;
        }
        self.claim = end;
        self.set_host(host_area::CLAIM, end);
        self.memory.full_barrier();
        let revoked = self.guest(guest_area::REVOKED) == self.epoch;
        let batch = Batch {
            start: self.tail,
            end,
            revoked,
        };
        let mut name = [0; MAX_NAME];
        for (position, slots) in buffers {
            let mut copy = wire::EMPTY_RECORD;
            for (i, slot) in copy[..slots].iter_mut().enumerate() {
                *slot = self.slot(self.layout.ring_slot(position + i as u64));
            }
            let record = Record::decode(&copy[..slots], &mut name);
            each(Claimed { position, record });
        }
        Ok(Some(batch))
    }

    /// Writes the outcome of the record that started at `position`.
    pub fn set_outcome(&self, position: u64, outcome: Outcome) {
        let offset = self.layout.outcome(position);
        self.store(offset, outcome.to_word(), Ordering::Relaxed);
    }

    /// Acknowledges a batch; says whether the guest wants to be rung.
    pub fn acknowledge(&mut self, batch: Batch) -> bool {
        debug_assert_eq!(batch.start, self.tail);
        if !self.is_as_left() {
            // These positions mean nothing to the guest that was restored.
            return false;
        }
        self.tail = batch.end;
        self.set_host(host_area::ACK, batch.end);
        self.memory.full_barrier();
        let notify_at = self.guest(guest_area::NOTIFY_AT);
        notify_at != 0 && notify_at > batch.start && notify_at <= batch.end
    }

    /// Posts a request; `false` when the ring of requests is full or no guest is attached.
    pub fn post(&mut self, request: Request) -> bool {
        if self.epoch == 0 || self.broken {
            return false;
        }
        let tail = self.guest(guest_area::REQUEST_TAIL);
        let used = self.request_head.wrapping_sub(tail);
        if used >= self.layout.request_slots {
            return false;
        }
        let offset = self.layout.request_slot(self.request_head);
        for (i, word) in request.encode().into_iter().enumerate() {
            self.store(offset + i as u64 * 8, word, Ordering::Relaxed);
        }
        self.request_head += 1;
        self.set_host(host_area::REQUEST_HEAD, self.request_head);
        true
    }

    /// Tells the guest to pause or to go on.
    pub fn set_paused(&self, paused: bool) {
        self.set_host(host_area::POLICY, if paused { policy::PAUSE } else { 0 });
    }

    /// Tells the guest how many of its pages are shared; whether it was told another number before.
    pub fn set_pages_shared(&self, pages: u64) -> bool {
        let changed = self.host(host_area::PAGES_SHARED) != pages;
        if changed {
            self.set_host(host_area::PAGES_SHARED, pages);
        }
        changed
    }

    /// The epoch attached to, 0 before the first.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether the guest broke the protocol in this epoch.
    pub fn is_broken(&self) -> bool {
        self.broken
    }
}

const _: () = assert!(SLOT_BYTES == SLOT_WORDS * 8);
