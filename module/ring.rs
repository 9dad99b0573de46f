// SPDX-License-Identifier: GPL-2.0

//! The guest's side of the ring: attaching, producing records, taking answers, revoking.
//!
//! No locks: one thread owns the ring. The other side is another machine; what orders the two:
//!
//! - slots, then write barrier, then `HEAD`; the host reads them the other way round;
//! - outcomes, then `ACK` by the host; here `ACK`, then read barrier, then outcomes;
//! - `REVOKED`, full barrier, read `CLAIM` here against `CLAIM`, full barrier, read `REVOKED`
//!   there: one of the two always sees the other, so that no record is both revoked here and
//!   worked on there unnoticed.
//!
//! All that the host writes is read once and checked; a host that lies harms nobody but the
//! sharing of this guest's memory.

use crate::wire::{
    feature, guest_area, guest_state, host_area, pack_version, Layout, Outcome, Record,
    RecordBuffer, Request, EMPTY_RECORD, OUTCOME_BYTES, SLOT_BYTES, SLOT_WORDS, VERSION_MAJOR,
    VERSION_MINOR,
};

/// Shared memory as 64-bit words at byte offsets, and the doorbell beside it.
pub(crate) trait Memory {
    /// Reads a word; zero when there is none at that offset.
    fn read(&self, offset: u64) -> u64;
    /// Writes a word; nothing when there is none at that offset.
    fn write(&self, offset: u64, value: u64);
    /// Orders reads before it with reads after it.
    fn read_barrier(&self);
    /// Orders writes before it with writes after it.
    fn write_barrier(&self);
    /// Orders everything before it with everything after it.
    fn full_barrier(&self);
    /// Tells the host to look.
    fn doorbell(&self);
}

/// Where the guest stands with the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Not attached to any host.
    Detached,
    /// Attached, and the host has not answered yet.
    Attaching,
    /// Records may be produced.
    Attached,
    /// Everything from `claim` on was taken back; the host may be working on what is before.
    Revoked {
        /// Position up to which records must stay valid until acknowledged.
        claim: u64,
    },
}

/// What [`Ring::poll`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Nothing that changes where we stand.
    None,
    /// The host has answered; an epoch begins.
    Attached,
    /// The host has gone or another has taken its place, or it has met another guest here; it
    /// works on nothing of ours any more.
    HostChanged,
    /// All that was claimed before a revocation has been acknowledged.
    Settled,
}

/// No room for a record until the host acknowledges more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// The guest's side of one shared memory.
pub(crate) struct Ring<M> {
    memory: M,
    layout: Layout,
    features: u64,
    state: State,
    instance: u64,
    epoch: u64,
    head: u64,
    published: u64,
    ack: u64,
    request_tail: u64,
    lies: u64,
}

impl<M: Memory> Ring<M> {
    /// `layout` has been checked against the size of `memory`, `offered` are the host's features.
    pub(crate) fn new(memory: M, layout: Layout, offered: u64) -> Self {
        Self {
            memory,
            layout,
            features: offered & feature::ALL,
            state: State::Detached,
            instance: 0,
            epoch: 0,
            head: 0,
            published: 0,
            ack: 0,
            request_tail: 0,
            lies: 0,
        }
    }

    fn host(&self, field: usize) -> u64 {
        self.memory.read(self.layout.host_area + field as u64)
    }

    fn guest(&self, field: usize) -> u64 {
        self.memory.read(self.layout.guest_area + field as u64)
    }

    fn set(&self, field: usize, value: u64) {
        self.memory
            .write(self.layout.guest_area + field as u64, value);
    }

    pub(crate) const fn state(&self) -> State {
        self.state
    }

    /// The host attached to, or zero.
    pub(crate) const fn instance(&self) -> u64 {
        self.instance
    }

    pub(crate) const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether file names may be sent.
    pub(crate) const fn sends_names(&self) -> bool {
        self.features & feature::FILE_NAMES != 0
    }

    /// How often the host has written what cannot be.
    pub(crate) const fn lies(&self) -> u64 {
        self.lies
    }

    /// The host's policy bits.
    pub(crate) fn policy(&self) -> u64 {
        self.host(host_area::POLICY)
    }

    /// The most pages the host lets be in flight.
    pub(crate) fn most_in_flight(&self) -> u64 {
        self.host(host_area::MAX_INFLIGHT_PAGES)
    }

    /// Pages of this guest that the host says are shared.
    pub(crate) fn pages_shared(&self) -> u64 {
        self.host(host_area::PAGES_SHARED)
    }

    /// Whether the host attached to has gone, or another kernel has attached to it since, as one
    /// that woke this one from its disk.
    pub(crate) fn is_orphaned(&self) -> bool {
        self.host(host_area::INSTANCE) != self.instance
            || self.guest(guest_area::EPOCH) != self.epoch
    }

    /// Looks at the host and takes the next step of attaching or of settling a revocation.
    pub(crate) fn poll(&mut self) -> Event {
        if self.state != State::Detached && self.is_orphaned() {
            self.state = State::Detached;
            self.instance = 0;
            return Event::HostChanged;
        }
        match self.state {
            State::Detached => {
                let instance = self.host(host_area::INSTANCE);
                if instance != 0 {
                    self.attach(instance);
                }
                Event::None
            }
            State::Attaching if self.host(host_area::EPOCH) == self.epoch => {
                // The positions the host has reset are read after its epoch.
                self.memory.read_barrier();
                self.state = State::Attached;
                Event::Attached
            }
            State::Revoked { claim } => {
                if self.acknowledged() < claim {
                    return Event::None;
                }
                self.state = State::Detached;
                self.instance = 0;
                Event::Settled
            }
            _ => Event::None,
        }
    }

    fn attach(&mut self, instance: u64) {
        let last = self
            .guest(guest_area::EPOCH)
            .max(self.host(host_area::EPOCH));
        self.epoch = last.checked_add(1).unwrap_or(1);
        self.instance = instance;
        (self.head, self.published, self.ack, self.request_tail) = (0, 0, 0, 0);
        self.set(guest_area::STATE, guest_state::ABSENT);
        self.set(
            guest_area::VERSION,
            pack_version(VERSION_MAJOR, VERSION_MINOR),
        );
        self.set(guest_area::FEATURES, self.features);
        self.set(guest_area::HEAD, 0);
        self.set(guest_area::REVOKED, 0);
        self.set(guest_area::REQUEST_TAIL, 0);
        self.set(guest_area::NOTIFY_AT, 0);
        self.set(guest_area::INSTANCE, instance);
        self.memory.write_barrier();
        self.set(guest_area::EPOCH, self.epoch);
        self.memory.write_barrier();
        self.set(guest_area::STATE, guest_state::ATTACHED);
        self.state = State::Attaching;
        self.memory.doorbell();
    }

    /// Position of the next record.
    pub(crate) const fn head(&self) -> u64 {
        self.head
    }

    /// Position before which the host has answered everything. Never goes back.
    pub(crate) fn acknowledged(&mut self) -> u64 {
        if matches!(self.state, State::Attached | State::Revoked { .. }) {
            let ack = self.host(host_area::ACK);
            if ack > self.published || ack < self.ack {
                self.lies += 1;
            } else {
                self.ack = ack;
            }
        }
        self.ack
    }

    /// What became of the record at `position`, which has been acknowledged.
    pub(crate) fn outcome(&self, position: u64) -> Outcome {
        self.memory.read_barrier();
        let word = self.memory.read(self.layout.outcome(position));
        Outcome::from_word(word).unwrap_or_default()
    }

    /// Writes a record behind the last one and returns its position. The host sees it after
    /// [`Ring::publish`].
    pub(crate) fn push(&mut self, record: &Record<'_>) -> Result<u64, Full> {
        let mut buffer: RecordBuffer = EMPTY_RECORD;
        let slots = record.encode(&mut buffer);
        let used = self.head - self.ack;
        if self.state != State::Attached || used + slots as u64 > self.layout.ring_slots {
            return Err(Full);
        }
        for (slot, position) in buffer[..slots].iter().zip(self.head..) {
            self.write_slot(position, slot);
        }
        let position = self.head;
        self.head += slots as u64;
        Ok(position)
    }

    fn write_slot(&self, position: u64, slot: &[u64; SLOT_WORDS]) {
        let offset = self.layout.ring_slot(position);
        for (word, at) in slot.iter().zip((offset..).step_by(SLOT_BYTES / SLOT_WORDS)) {
            self.memory.write(at, *word);
        }
    }

    /// Shows all records to the host.
    pub(crate) fn publish(&mut self) {
        if self.head != self.published && self.state == State::Attached {
            self.memory.write_barrier();
            self.set(guest_area::HEAD, self.head);
            self.published = self.head;
            self.memory.doorbell();
        }
    }

    /// Asks for an interrupt when `position` is acknowledged, zero for none. The caller looks
    /// once more before it sleeps.
    pub(crate) fn notify_at(&self, position: u64) {
        self.set(guest_area::NOTIFY_AT, position);
        self.memory.full_barrier();
    }

    /// Requests there can be at one time.
    pub(crate) const fn most_requests(&self) -> u64 {
        self.layout.request_slots
    }

    /// The next request of the host; what cannot be understood is skipped.
    pub(crate) fn take_request(&mut self) -> Option<Request> {
        if self.state != State::Attached || self.features & feature::REQUESTS == 0 {
            return None;
        }
        let head = self.host(host_area::REQUEST_HEAD);
        // One look takes no more than there can be.
        while self.request_tail != head {
            if head.wrapping_sub(self.request_tail) > self.layout.request_slots {
                self.lies += 1;
                return None;
            }
            self.memory.read_barrier();
            let offset = self.layout.request_slot(self.request_tail);
            let mut slot = [0; SLOT_WORDS];
            for (word, at) in slot.iter_mut().zip((offset..).step_by(OUTCOME_BYTES)) {
                *word = self.memory.read(at);
            }
            self.request_tail += 1;
            // The slot has been read before the host may write it again.
            self.memory.full_barrier();
            self.set(guest_area::REQUEST_TAIL, self.request_tail);
            if let Ok(request) = Request::decode(&slot) {
                return Some(request);
            }
        }
        None
    }

    /// Takes back all that the host has not claimed; returns the position from which records
    /// are free. Nothing can be produced until the host has settled the rest.
    pub(crate) fn revoke(&mut self) -> u64 {
        match self.state {
            State::Attached => {}
            State::Revoked { claim } => return claim,
            State::Detached | State::Attaching => {
                self.state = State::Detached;
                self.instance = 0;
                return 0;
            }
        }
        self.set(guest_area::REVOKED, self.epoch);
        self.memory.full_barrier();
        let mut claim = self.host(host_area::CLAIM);
        if claim > self.published {
            // It cannot have claimed what it was not shown; all of it stays.
            self.lies += 1;
            claim = self.published;
        }
        let claim = claim.max(self.acknowledged());
        self.state = State::Revoked { claim };
        self.memory.doorbell();
        claim
    }

    /// Leaves the host. [`Ring::poll`] attaches anew, to whatever host is there then.
    pub(crate) fn detach(&mut self) {
        self.leave();
        self.state = State::Detached;
        self.instance = 0;
    }

    /// Tells the host that nobody is here any more.
    pub(crate) fn leave(&self) {
        self.set(guest_area::STATE, guest_state::ABSENT);
        self.memory.full_barrier();
        self.memory.doorbell();
    }
}
