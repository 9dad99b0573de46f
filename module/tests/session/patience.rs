// SPDX-License-Identifier: GPL-2.0

//! What is waited for, and how long.

use super::host::{Host, Shared};
use super::{attached, report, GEOMETRY};
use crate::policy::{KEEP_PASSES, STALL_MS};
use crate::ranges::Range;
use crate::ring::{Memory, Ring, State};
use crate::session::Session;
use crate::wire::{feature, guest_area, host_area, Layout, Request};
use std::cell::Cell;
use std::rc::Rc;

const RANGE: Range = Range { start: 0, end: 10 };

#[test]
fn a_host_has_its_time_from_when_it_is_looked_for_first() {
    let (_, held, mut host, mut session) = attached();
    host.claim(&held);
    host.acknowledge(false);
    session.service(1);
    // Nobody has looked for long.
    let now = 3 * STALL_MS;
    report(&mut session, &held, 64, RANGE, 500);
    session.publish();
    assert!(!session.service(now).restarted);
    assert!(!session.service(now + STALL_MS).restarted);
    assert_eq!(session.ring().state(), State::Attached);
    assert!(session.service(now + STALL_MS + 1).restarted);
}

#[test]
fn a_goodbye_that_nobody_hears_is_not_waited_for_for_ever() {
    let (_, held, mut host, mut session) = attached();
    host.claim(&held);
    host.acknowledge(false);
    session.service(1);
    assert!(!session.withdraw());
    session.service(2);
    assert!(session.is_leaving() && !session.withdraw());
    session.service(2 + STALL_MS);
    assert!(session.is_leaving());
    session.service(3 + STALL_MS);
    // It has claimed nothing, so there is nothing to wait for.
    assert!(session.service(3 + STALL_MS).restarted);
    assert!(!session.is_leaving());
}

/// A host that asks for something whenever it is looked whether it has.
struct Eager {
    shared: Rc<Shared>,
    layout: Layout,
    looks: Cell<u32>,
}

impl Memory for Eager {
    fn read(&self, offset: u64) -> u64 {
        if offset != self.layout.host_area + host_area::REQUEST_HEAD as u64 {
            return self.shared.get(offset);
        }
        self.looks.set(self.looks.get() + 1);
        assert!(self.looks.get() < 100_000, "there is no end");
        let tail = self.layout.guest_area + guest_area::REQUEST_TAIL as u64;
        self.shared.get(tail) + 1
    }
    fn write(&self, offset: u64, value: u64) {
        self.shared.set(offset, value);
    }
    fn read_barrier(&self) {}
    fn write_barrier(&self) {}
    fn full_barrier(&self) {}
    fn doorbell(&self) {}
}

#[test]
fn requests_without_end_are_not_looked_at_without_end() {
    let shared = Shared::new();
    let mut host = Host::new(&shared);
    let layout = Layout::for_size(Layout::MIN_BYTES).expect("smallest size");
    for slot in 0..layout.request_slots {
        let words = Request::Rescan.encode();
        for (word, at) in words.iter().zip((layout.request_slot(slot)..).step_by(8)) {
            shared.set(at, *word);
        }
    }
    let memory = Eager {
        shared: shared.clone(),
        layout,
        looks: Cell::new(0),
    };
    let ring = Ring::new(memory, layout, feature::ALL);
    let mut session: Session<_, ()> = Session::new(ring, GEOMETRY, 64);
    session.service(0);
    host.attach();
    session.service(1);
    assert_eq!(session.ring().state(), State::Attached);
    assert!(session.service(2).wants_pass);
}

#[test]
fn what_nobody_could_look_at_is_not_gone_for_a_while() {
    let (_, held, _, mut session) = attached();
    let mut pass = |is_whole, keys: &[usize]| {
        let number = session.begin_pass();
        for &key in keys {
            report(&mut session, &held, key, RANGE, 500);
            let id = session.tracker.find(key).expect("reported");
            session.tracker.touch(id, number);
        }
        let judges = session.judges(is_whole);
        session.end_pass(1, 10).expect("room");
        session.shrink(0);
        (judges, session.tracker.files())
    };
    assert_eq!(pass(true, &[64, 128]), (true, 2));
    for _ in 0..KEEP_PASSES {
        assert_eq!(pass(false, &[64]), (false, 2));
    }
    assert!(pass(false, &[64]).0);
    assert_eq!(pass(true, &[64]), (true, 1));
    assert_eq!(pass(false, &[]), (false, 1));
}
