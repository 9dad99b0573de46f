// SPDX-License-Identifier: GPL-2.0

//! A host that keeps to the protocol, the memory it shares with the guest, and the guest's pages.

use crate::ring::Memory;
use crate::wire::{self, guest_area, host_area, record_slots, Layout};
use crate::wire::{Outcome, Record, Request, Slot, MAX_NAME, SLOT_BYTES};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

pub(super) struct Shared {
    words: RefCell<Vec<u64>>,
    pub(super) doorbells: Cell<u64>,
}

impl Shared {
    pub(super) fn new() -> Rc<Self> {
        let words = RefCell::new(vec![0; Layout::MIN_BYTES as usize / 8]);
        Rc::new(Self {
            words,
            doorbells: Cell::new(0),
        })
    }

    pub(super) fn get(&self, offset: u64) -> u64 {
        self.words.borrow()[offset as usize / 8]
    }

    pub(super) fn set(&self, offset: u64, value: u64) {
        self.words.borrow_mut()[offset as usize / 8] = value;
    }
}

impl Memory for Rc<Shared> {
    fn read(&self, offset: u64) -> u64 {
        self.get(offset)
    }
    fn write(&self, offset: u64, value: u64) {
        self.set(offset, value);
    }
    fn read_barrier(&self) {}
    fn write_barrier(&self) {}
    fn full_barrier(&self) {}
    fn doorbell(&self) {
        self.doorbells.set(self.doorbells.get() + 1);
    }
}

/// Counts how often each frame is held.
#[derive(Clone, Default)]
pub(super) struct Held(Rc<RefCell<BTreeMap<u64, u64>>>);

impl Held {
    pub(super) fn hold(&self, frame: u64, pages: u64) -> Hold {
        for frame in frame..frame + pages {
            *self.0.borrow_mut().entry(frame).or_default() += 1;
        }
        Hold {
            held: self.clone(),
            frame,
            pages,
        }
    }

    pub(super) fn is_held(&self, frame: u64) -> bool {
        self.0.borrow().get(&frame).is_some_and(|count| *count != 0)
    }

    pub(super) fn total(&self) -> u64 {
        self.0.borrow().values().sum()
    }
}

pub(super) struct Hold {
    held: Held,
    frame: u64,
    pages: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        for frame in self.frame..self.frame + self.pages {
            *self.held.0.borrow_mut().get_mut(&frame).expect("held") -= 1;
        }
    }
}

/// A host that keeps to the protocol.
pub(super) struct Host {
    shared: Rc<Shared>,
    pub(super) layout: Layout,
    instance: u64,
    epoch: u64,
    claim: u64,
    ack: u64,
    requests: u64,
    greeted: bool,
    /// Starts of records before `claim`, with the frames they report.
    claimed: Vec<(u64, Option<wire::Run>)>,
    files: BTreeSet<u32>,
    runs: u64,
}

impl Host {
    pub(super) fn new(shared: &Rc<Shared>) -> Self {
        let layout = Layout::for_size(Layout::MIN_BYTES).expect("smallest size");
        let mut host = Self {
            shared: shared.clone(),
            layout,
            instance: 0,
            epoch: 0,
            claim: 0,
            ack: 0,
            requests: 0,
            greeted: false,
            claimed: Vec::new(),
            files: BTreeSet::new(),
            runs: 0,
        };
        host.restart();
        host
    }

    pub(super) fn set(&self, field: usize, value: u64) {
        self.shared.set(self.layout.host_area + field as u64, value);
    }

    pub(super) fn guest(&self, field: usize) -> u64 {
        self.shared.get(self.layout.guest_area + field as u64)
    }

    pub(super) fn restart(&mut self) {
        self.claimed.clear();
        self.epoch = 0;
        self.instance += 1;
        self.set(host_area::MAX_INFLIGHT_PAGES, 4096);
        self.set(host_area::INSTANCE, self.instance);
    }

    pub(super) fn attach(&mut self) {
        let epoch = self.guest(guest_area::EPOCH);
        let wants = self.guest(guest_area::STATE) == wire::guest_state::ATTACHED
            && self.guest(guest_area::INSTANCE) == self.instance;
        if wants && epoch != self.epoch {
            assert!(epoch > self.epoch);
            (self.claim, self.ack, self.requests, self.greeted) = (0, 0, 0, false);
            self.claimed.clear();
            self.files.clear();
            for field in [host_area::CLAIM, host_area::ACK, host_area::REQUEST_HEAD] {
                self.set(field, 0);
            }
            self.epoch = epoch;
            self.set(host_area::EPOCH, epoch);
        }
    }

    pub(super) fn is_attached(&self) -> bool {
        self.epoch != 0 && self.guest(guest_area::EPOCH) == self.epoch
    }

    pub(super) fn claim(&mut self, held: &Held) {
        if !self.is_attached() {
            return;
        }
        let head = self.guest(guest_area::HEAD);
        assert!(head >= self.claim && head - self.ack <= self.layout.ring_slots);
        self.set(host_area::CLAIM, head);
        let revoked = self.guest(guest_area::REVOKED) == self.epoch;
        while self.claim < head {
            let first = self.slot(self.claim);
            let slots: Vec<Slot> = (0..record_slots(first[0]) as u64)
                .map(|i| self.slot(self.claim + i))
                .collect();
            let mut name = [0; MAX_NAME];
            let record = Record::decode(&slots, &mut name).expect("a sound record");
            assert_eq!(self.greeted, !matches!(record, Record::Hello { .. }));
            self.greeted = true;
            let mut pages = None;
            match record {
                Record::File { file, .. } => assert!(self.files.insert(file)),
                Record::Run(run) => {
                    assert!(self.files.contains(&run.file));
                    self.runs += 1;
                    if !revoked {
                        for gfn in run.gfn..run.gfn + u64::from(run.pages) {
                            assert!(held.is_held(gfn), "{gfn} is worked on and not held");
                        }
                        pages = Some(run);
                    }
                }
                Record::Retract { file, pages: 0, .. } => assert!(self.files.remove(&file)),
                _ => {}
            }
            self.claimed.push((self.claim, pages));
            self.claim += slots.len() as u64;
        }
    }

    pub(super) fn slot(&self, position: u64) -> Slot {
        let offset = self.layout.ring_slot(position);
        std::array::from_fn(|i| self.shared.get(offset + (i * SLOT_BYTES / 4) as u64))
    }

    pub(super) fn acknowledge(&mut self, refuse: bool) {
        if !self.is_attached() {
            return;
        }
        for (position, run) in self.claimed.drain(..) {
            let pages = run.map_or(0, |run| run.pages as u16);
            let outcome = if refuse && run.is_some() {
                Outcome {
                    reason: wire::reason::NO_STORE,
                    shared: 0,
                    remembered: 0,
                }
            } else {
                Outcome {
                    reason: 0,
                    shared: 0,
                    remembered: pages,
                }
            };
            self.shared
                .set(self.layout.outcome(position), outcome.to_word());
        }
        self.ack = self.claim;
        self.set(host_area::ACK, self.ack);
    }

    pub(super) fn request(&mut self, request: Request) {
        if self.is_attached() && self.requests < 100 {
            let offset = self.layout.request_slot(self.requests);
            for (i, word) in request.encode().iter().enumerate() {
                self.shared.set(offset + 8 * i as u64, *word);
            }
            self.requests += 1;
            self.set(host_area::REQUEST_HEAD, self.requests);
        }
    }

    /// All that this host is working on must be held.
    pub(super) fn check(&self, held: &Held) {
        for (_, run) in &self.claimed {
            if let Some(run) = run {
                for gfn in run.gfn..run.gfn + u64::from(run.pages) {
                    assert!(held.is_held(gfn), "{gfn} is worked on and not held");
                }
            }
        }
    }
}
