// SPDX-License-Identifier: GPL-2.0

//! The guest's side of the ring against the host's, both as they are, in every order in which
//! two processors may run them and see each other's writes.
//!
//! `loom` goes through all executions that the memory model allows with at most three preemptions.
//! What the guest's kernel does with volatile accesses and barriers is here relaxed accesses and
//! fences.

use crate::ring::{Event, Memory, Ring, State};
use crate::wire::{
    feature, guest_area, host_area, Layout, Outcome, Record, Request, Run, OUTCOME_BYTES,
    PAGE_SIZE, SLOT_BYTES,
};
use loom::sync::atomic::{fence, AtomicU64};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use pagefusion_abi::wire as host_wire;
use pagefusion_host::engine::{Attachment, RingConsumer, Words};
use std::sync::atomic::Ordering;

const LAYOUT: Layout = Layout {
    total_bytes: 6 * PAGE_SIZE,
    host_area: PAGE_SIZE,
    guest_area: 2 * PAGE_SIZE,
    requests: 3 * PAGE_SIZE,
    request_slots: 1,
    outcomes: 4 * PAGE_SIZE,
    ring: 5 * PAGE_SIZE,
    ring_slots: 32,
};
/// Records that these tests write.
const RECORDS: u64 = 2;

fn host_layout() -> host_wire::Layout {
    let Layout {
        total_bytes,
        host_area,
        guest_area,
        requests,
        request_slots,
        outcomes,
        ring,
        ring_slots,
    } = LAYOUT;
    host_wire::Layout {
        total_bytes,
        host_area,
        guest_area,
        requests,
        request_slots,
        outcomes,
        ring,
        ring_slots,
    }
}

/// An event that stays set until somebody has seen it.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    ring: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.ring.notify_one();
    }

    fn take(&self) -> bool {
        std::mem::take(&mut *self.rung.lock().unwrap())
    }

    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.ring.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// Those words of the shared memory that are used, and what each side rings.
struct Shared {
    /// First byte, words.
    areas: [(u64, u64); 5],
    words: Vec<AtomicU64>,
    host_bell: Bell,
}

impl Shared {
    fn new() -> Arc<Self> {
        let areas = [
            (LAYOUT.host_area, host_area::BYTES as u64 / 8),
            (LAYOUT.guest_area, guest_area::BYTES as u64 / 8),
            (LAYOUT.requests, SLOT_BYTES as u64 / 8),
            (LAYOUT.outcomes, RECORDS * OUTCOME_BYTES as u64 / 8),
            (LAYOUT.ring, RECORDS * SLOT_BYTES as u64 / 8),
        ];
        let count = areas.iter().map(|(_, words)| words).sum();
        Arc::new(Self {
            areas,
            words: (0..count).map(|_: u64| AtomicU64::new(0)).collect(),
            host_bell: Bell::default(),
        })
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        let mut before = 0;
        for (first, words) in self.areas {
            if (first..first + words * 8).contains(&offset) {
                return &self.words[(before + (offset - first) / 8) as usize];
            }
            before += words;
        }
        panic!("nobody has business at {offset:#x}");
    }
}

/// The guest's processor.
#[derive(Clone)]
struct Guest(Arc<Shared>);

impl Memory for Guest {
    fn read(&self, offset: u64) -> u64 {
        self.0.word(offset).load(Ordering::Relaxed)
    }
    fn write(&self, offset: u64, value: u64) {
        self.0.word(offset).store(value, Ordering::Relaxed);
    }
    fn read_barrier(&self) {
        fence(Ordering::Acquire);
    }
    fn write_barrier(&self) {
        fence(Ordering::Release);
    }
    fn full_barrier(&self) {
        fence(Ordering::SeqCst);
    }
    fn doorbell(&self) {
        self.0.host_bell.ring();
    }
}

/// The host's processor.
struct Host(Arc<Shared>);

impl Words for Host {
    fn count(&self) -> usize {
        LAYOUT.total_bytes as usize / 8
    }
    fn load(&self, index: usize, order: Ordering) -> u64 {
        self.0.word(index as u64 * 8).load(order)
    }
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.0.word(index as u64 * 8).store(value, order);
    }
    fn full_barrier(&self) {
        fence(Ordering::SeqCst);
    }
}

/// Both sides, attached.
fn pair() -> (Ring<Guest>, RingConsumer<Host>, Arc<Shared>) {
    let shared = Shared::new();
    let mut host = RingConsumer::new(Host(shared.clone()), host_layout(), 77, 1024);
    let mut guest = Ring::new(Guest(shared.clone()), LAYOUT, feature::ALL);
    assert_eq!(guest.poll(), Event::None);
    assert_eq!(host.attach(), Attachment::New);
    assert_eq!(guest.poll(), Event::Attached);
    shared.host_bell.take();
    (guest, host, shared)
}

fn run(page: u64) -> Record<'static> {
    Record::Run(Run {
        file: 1,
        pages: 1,
        page,
        gfn: 100 + page,
    })
}

/// The page that a record reports.
fn page_of(record: &Result<host_wire::Record<'_>, host_wire::DecodeError>) -> usize {
    match record {
        Ok(host_wire::Record::Run(run)) => run.page as usize,
        other => panic!("not what the guest has written: {other:?}"),
    }
}

/// `LOOM_MAX_PREEMPTIONS` looks further.
fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.check(model);
}

#[test]
fn no_page_is_both_let_go_and_looked_at() {
    explore(|| {
        let (mut guest, mut host, _) = pair();
        // What a page holds becomes 1 when the guest uses it for something else.
        let pages = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        guest.push(&run(0)).unwrap();
        guest.push(&run(1)).unwrap();
        guest.publish();
        let looker = {
            let pages = pages.clone();
            thread::spawn(move || {
                // One record at a time, so that a revocation may come in between.
                for _ in 0..RECORDS {
                    let mut claimed = Vec::new();
                    let claim = host.claim(1, |it| claimed.push(page_of(&it.record)));
                    let batch = claim.unwrap().unwrap();
                    if !batch.is_revoked() {
                        for page in claimed {
                            assert_eq!(pages[page].load(Ordering::Relaxed), 0);
                        }
                    }
                    host.acknowledge(batch);
                }
            })
        };
        let claim = guest.revoke();
        let reuse = |page: u64| pages[page as usize].store(1, Ordering::Relaxed);
        (claim..RECORDS).for_each(reuse);
        while guest.poll() != Event::Settled {
            assert!(matches!(guest.state(), State::Revoked { .. }));
            thread::yield_now();
        }
        (0..claim).for_each(reuse);
        looker.join().unwrap();
    });
}

#[test]
fn records_and_outcomes_arrive_whole() {
    explore(|| {
        let (mut guest, mut host, shared) = pair();
        let reader = thread::spawn(move || {
            shared.host_bell.wait();
            let mut seen = 0;
            while seen < RECORDS {
                let mut outcomes = Vec::new();
                let claim = host.claim(8, |it| {
                    assert_eq!(page_of(&it.record) as u64, seen);
                    seen += 1;
                    outcomes.push(it.position);
                });
                let Some(batch) = claim.unwrap() else {
                    thread::yield_now();
                    continue;
                };
                for position in outcomes {
                    let outcome = host_wire::Outcome {
                        shared: position as u16 + 5,
                        ..Default::default()
                    };
                    host.set_outcome(position, outcome);
                }
                host.acknowledge(batch);
            }
        });
        for page in 0..RECORDS {
            guest.push(&run(page)).unwrap();
            guest.publish();
        }
        let mut answered = 0;
        while answered < RECORDS {
            let acknowledged = guest.acknowledged();
            for position in answered..acknowledged {
                let expected = Outcome {
                    shared: position as u16 + 5,
                    ..Outcome::default()
                };
                assert_eq!(guest.outcome(position), expected);
            }
            answered = acknowledged;
            thread::yield_now();
        }
        assert_eq!(guest.lies(), 0);
        reader.join().unwrap();
    });
}

#[test]
fn a_guest_that_attaches_anew_is_never_misread() {
    explore(|| {
        let (mut guest, mut host, shared) = pair();
        guest.push(&run(0)).unwrap();
        guest.publish();
        let first = guest.epoch();
        shared.host_bell.take();
        let worker = thread::spawn(move || {
            // What it sees is the old guest, nobody, or the new one, and never a mixture.
            for _ in 0..2 {
                let new = host.attach() == Attachment::New;
                let mut pages = Vec::new();
                let claim = host.claim(8, |it| pages.push(page_of(&it.record)));
                match claim.expect("no broken ring") {
                    Some(batch) => {
                        assert!(!new && host.epoch() == first);
                        assert_eq!(pages, [0]);
                        host.acknowledge(batch);
                    }
                    None => assert!(pages.is_empty()),
                }
            }
            host
        });
        guest.detach();
        guest.poll();
        assert_eq!(guest.state(), State::Attaching);
        let mut host = worker.join().unwrap();
        host.attach();
        assert_eq!(host.epoch(), guest.epoch());
        assert_eq!(guest.poll(), Event::Attached);
        assert_eq!((guest.acknowledged(), guest.lies()), (0, 0));
    });
}

#[test]
fn a_guest_that_sleeps_until_it_is_answered_is_woken() {
    explore(|| {
        let (mut guest, mut host, _) = pair();
        guest.push(&run(0)).unwrap();
        guest.publish();
        let interrupt = Arc::new(Bell::default());
        let answerer = {
            let interrupt = interrupt.clone();
            thread::spawn(move || {
                let batch = host.claim(8, |_| ()).unwrap().unwrap();
                if host.acknowledge(batch) {
                    interrupt.ring();
                }
            })
        };
        guest.notify_at(1);
        // It may have been answered before it asked to be told.
        if guest.acknowledged() < 1 {
            // Deadlock, which loom reports, is a lost interrupt.
            interrupt.wait();
            assert_eq!(guest.acknowledged(), 1);
        }
        answerer.join().unwrap();
    });
}

#[test]
fn a_host_that_sleeps_is_woken_by_what_is_published() {
    explore(|| {
        let (mut guest, mut host, shared) = pair();
        let sleeper = thread::spawn(move || {
            let mut seen = 0;
            while seen < RECORDS {
                shared.host_bell.wait();
                while let Some(batch) = host.claim(1, |_| seen += 1).unwrap() {
                    host.acknowledge(batch);
                }
            }
        });
        for page in 0..RECORDS {
            guest.push(&run(page)).unwrap();
            guest.publish();
        }
        sleeper.join().unwrap();
    });
}

#[test]
fn requests_arrive_whole_in_a_ring_that_is_always_full() {
    explore(|| {
        let (mut guest, mut host, _) = pair();
        let poster = thread::spawn(move || {
            for page in 0..2 {
                let request = host_wire::Request::Report {
                    file: 1,
                    page,
                    pages: 10 + page,
                };
                while !host.post(request) {
                    thread::yield_now();
                }
            }
        });
        for page in 0..2 {
            let request = loop {
                match guest.take_request() {
                    Some(request) => break request,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(
                request,
                Request::Report {
                    file: 1,
                    page,
                    pages: 10 + page
                }
            );
        }
        assert_eq!(guest.lies(), 0);
        poster.join().unwrap();
    });
}
