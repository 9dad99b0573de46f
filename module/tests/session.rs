// SPDX-License-Identifier: GPL-2.0

//! The session against a host that keeps to the protocol, step by step in any order, and
//! against one that writes whatever it likes.

use crate::list::deny;
use crate::pages::{Cursor, PieceState};
use crate::policy;
use crate::ranges::Range;
use crate::ring::{Memory, Ring, State};
use crate::runs::PinnedRun;
use crate::session::{Geometry, Refusal, Session};
use crate::wire::{self, feature, guest_area, host_area, record_slots, FileIdentity, Layout};
use crate::wire::{Outcome, Record, Request, Slot, MAX_NAME, SLOT_BYTES};
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

struct Shared {
    words: RefCell<Vec<u64>>,
    doorbells: Cell<u64>,
}

impl Shared {
    fn new() -> Rc<Self> {
        let words = RefCell::new(vec![0; Layout::MIN_BYTES as usize / 8]);
        Rc::new(Self {
            words,
            doorbells: Cell::new(0),
        })
    }

    fn get(&self, offset: u64) -> u64 {
        self.words.borrow()[offset as usize / 8]
    }

    fn set(&self, offset: u64, value: u64) {
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
struct Held(Rc<RefCell<BTreeMap<u64, u64>>>);

impl Held {
    fn hold(&self, frame: u64, pages: u64) -> Hold {
        for frame in frame..frame + pages {
            *self.0.borrow_mut().entry(frame).or_default() += 1;
        }
        Hold {
            held: self.clone(),
            frame,
            pages,
        }
    }

    fn is_held(&self, frame: u64) -> bool {
        self.0.borrow().get(&frame).is_some_and(|count| *count != 0)
    }

    fn total(&self) -> u64 {
        self.0.borrow().values().sum()
    }
}

struct Hold {
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
struct Host {
    shared: Rc<Shared>,
    layout: Layout,
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
    fn new(shared: &Rc<Shared>) -> Self {
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

    fn set(&self, field: usize, value: u64) {
        self.shared.set(self.layout.host_area + field as u64, value);
    }

    fn guest(&self, field: usize) -> u64 {
        self.shared.get(self.layout.guest_area + field as u64)
    }

    fn restart(&mut self) {
        self.claimed.clear();
        self.epoch = 0;
        self.instance += 1;
        self.set(host_area::MAX_INFLIGHT_PAGES, 4096);
        self.set(host_area::INSTANCE, self.instance);
    }

    fn attach(&mut self) {
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

    fn is_attached(&self) -> bool {
        self.epoch != 0 && self.guest(guest_area::EPOCH) == self.epoch
    }

    fn claim(&mut self, held: &Held) {
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

    fn slot(&self, position: u64) -> Slot {
        let offset = self.layout.ring_slot(position);
        std::array::from_fn(|i| self.shared.get(offset + (i * SLOT_BYTES / 4) as u64))
    }

    fn acknowledge(&mut self, refuse: bool) {
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

    fn request(&mut self, request: Request) {
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
    fn check(&self, held: &Held) {
        for (_, run) in &self.claimed {
            if let Some(run) = run {
                for gfn in run.gfn..run.gfn + u64::from(run.pages) {
                    assert!(held.is_held(gfn), "{gfn} is worked on and not held");
                }
            }
        }
    }
}

const GEOMETRY: Geometry = Geometry {
    memory_pages: 1 << 20,
    scale: 1,
};

fn session(shared: &Rc<Shared>) -> Session<Rc<Shared>, Hold> {
    let layout = Layout::for_size(Layout::MIN_BYTES).expect("smallest size");
    Session::new(
        Ring::new(shared.clone(), layout, feature::ALL),
        GEOMETRY,
        64,
    )
}

/// Reports what is new of a file's pages, as a pass does. Returns the pages reported.
fn report(
    session: &mut Session<Rc<Shared>, Hold>,
    held: &Held,
    key: usize,
    range: Range,
    frame: u64,
) -> u64 {
    let known = session.tracker.find(key);
    let Some(id) = known.or_else(|| session.tracker.add(key, 0)) else {
        return 0;
    };
    let (mut rest, mut cursor, mut reported) = (range, Cursor::default(), 0);
    while !rest.is_empty() {
        let at = frame + (rest.start - range.start);
        let retry = session.retries(id);
        let Some(file) = session.tracker.get_mut(id) else {
            return reported;
        };
        let piece = file.pages.compare(rest, at, retry, &mut cursor);
        if piece.state != PieceState::Known {
            if piece.state == PieceState::Moved && session.retract(id, piece.range).is_err() {
                return reported;
            }
            let identity = FileIdentity {
                inode: key as u64,
                ..Default::default()
            };
            if session.needs_announcement(id)
                && session.announce(id, identity, b"/some/name").is_err()
            {
                return reported;
            }
            let pages = piece.range.end - piece.range.start;
            let pin = held.hold(at, pages);
            let run = PinnedRun {
                page: rest.start,
                frame: at,
                pages,
                pin,
            };
            if session.report(id, run).is_err() {
                return reported;
            }
            reported += pages;
        }
        rest.start = piece.range.end;
    }
    reported
}

#[derive(Clone, Debug)]
enum Step {
    Report(usize, u64, u64, u64),
    Retire(usize),
    Publish,
    Service(u64),
    Pass,
    Revoke,
    Attach,
    Claim,
    Acknowledge(bool),
    Request(u32, u64, u64),
    Rescan,
    Restart,
    /// Some of the next allocations fail.
    Deny(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1..80_usize, 0..50_u64, 1..40_u64, 0..3_u64).prop_map(|(k, p, n, f)| Step::Report(k, p, n, f)),
        2 => (1..80_usize).prop_map(Step::Retire),
        4 => Just(Step::Publish),
        6 => (0..300_u64).prop_map(Step::Service),
        2 => Just(Step::Pass),
        1 => Just(Step::Revoke),
        4 => Just(Step::Attach),
        4 => Just(Step::Claim),
        4 => any::<bool>().prop_map(Step::Acknowledge),
        1 => (0..80_u32, 0..50_u64, 0..50_u64).prop_map(|(f, p, n)| Step::Request(f, p, n)),
        1 => Just(Step::Rescan),
        1 => Just(Step::Restart),
        1 => any::<u64>().prop_map(Step::Deny),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn nothing_the_host_works_on_is_let_go(steps in prop::collection::vec(step(), 0..300)) {
        let (shared, held) = (Shared::new(), Held::default());
        let (mut host, mut session) = (Host::new(&shared), session(&shared));
        let mut now = 0;
        for step in steps {
            match step {
                Step::Report(key, page, pages, choice) => {
                    let range = Range { start: page, end: page + pages };
                    let frame = key as u64 * 1000 + choice * 200_000 + page;
                    report(&mut session, &held, key * 64, range, frame);
                }
                Step::Retire(key) => {
                    if let Some(id) = session.tracker.find(key * 64) {
                        let _ = session.retire(id);
                    }
                }
                Step::Publish => session.publish(),
                Step::Service(ms) => {
                    now += ms;
                    session.service(now);
                }
                Step::Pass => {
                    session.begin_pass();
                }
                Step::Revoke => session.revoke(),
                Step::Attach => host.attach(),
                Step::Claim => host.claim(&held),
                Step::Acknowledge(refuse) => host.acknowledge(refuse),
                Step::Request(file, page, pages) => host.request(Request::Report { file, page, pages }),
                Step::Rescan => host.request(Request::Rescan),
                Step::Restart => host.restart(),
                Step::Deny(allocations) => deny(allocations),
            }
            host.check(&held);
            prop_assert!(session.pages_in_flight() <= 4096);
            prop_assert_eq!(session.pages_in_flight(), held.total());
            prop_assert_eq!(session.ring().lies(), 0);
        }
        deny(0);
        // A host that answers gets the guest to let go of everything.
        for _ in 0..4 {
            session.publish();
            session.service(now);
            host.attach();
            host.claim(&held);
            host.acknowledge(false);
        }
        session.service(now);
        prop_assert_eq!(held.total(), 0);
        prop_assert_eq!(session.ring().state(), State::Attached);
        // And all that is new is reported then.
        let range = Range { start: 0, end: 10 };
        prop_assert_eq!(report(&mut session, &held, 12_345 * 64, range, 7), 10);
        prop_assert_eq!(report(&mut session, &held, 12_345 * 64, range, 7), 0);
    }

    #[test]
    fn a_host_that_writes_anything_breaks_nothing(
        steps in prop::collection::vec((step(), 0..600_usize, prop_oneof![any::<u64>(), 0..50_u64]), 0..200),
    ) {
        let (shared, held) = (Shared::new(), Held::default());
        let mut session = session(&shared);
        let layout = Layout::for_size(Layout::MIN_BYTES).expect("smallest size");
        let mut now = 0;
        for (step, at, value) in steps {
            match step {
                Step::Report(key, page, pages, choice) => {
                    let range = Range { start: page, end: page + pages };
                    report(&mut session, &held, key * 64, range, key as u64 * 1000 + choice * 200_000);
                }
                Step::Publish => session.publish(),
                Step::Revoke => session.revoke(),
                Step::Service(ms) => {
                    now += ms * 100;
                    session.service(now);
                }
                Step::Deny(allocations) => deny(allocations),
                // Every other word goes into the positions, the rest anywhere in pages it owns.
                _ if at % 2 == 0 => shared.set(layout.host_area + at as u64 / 2 % 8 * 8, value),
                _ => shared.set((layout.requests + at as u64 * 8) & !7, value),
            }
            prop_assert_eq!(session.pages_in_flight(), held.total());
        }
        deny(0);
        session.abandon();
    }
}

#[test]
fn the_whole_way() {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    let range = Range { start: 0, end: 100 };
    session.service(0);
    assert_eq!(session.ring().state(), State::Attaching);
    assert_eq!(report(&mut session, &held, 64, range, 500), 0);
    host.attach();
    assert!(session.service(0).wants_pass);
    session.begin_pass();
    assert_eq!(report(&mut session, &held, 64, range, 500), 100);
    assert_eq!(session.end_pass(1, 100), Ok(true));
    assert_eq!(held.total(), 100);
    assert!(session.ask_to_be_woken(true));
    host.claim(&held);
    host.acknowledge(false);
    assert!(!session.ask_to_be_woken(true));
    session.service(1);
    assert_eq!((held.total(), session.totals.remembered), (0, 100));

    // Nothing new, nothing said.
    let doorbells = shared.doorbells.get();
    session.begin_pass();
    assert_eq!(report(&mut session, &held, 64, range, 500), 0);
    assert_eq!(session.end_pass(2, 100), Ok(false));
    assert_eq!(shared.doorbells.get(), doorbells);

    // The host asks for a part.
    host.request(Request::Report {
        file: 0,
        page: 10,
        pages: 5,
    });
    assert!(session.service(2).wants_pass);
    session.begin_pass();
    assert_eq!(report(&mut session, &held, 64, range, 500), 5);
    session.publish();
    host.claim(&held);
    host.acknowledge(true);
    session.service(3);
    assert_eq!(session.totals.refused, 5);

    // Refused pages come again after a pass or more, less and less often.
    let mut tries = Vec::new();
    for pass in 0..100 {
        session.begin_pass();
        if report(&mut session, &held, 64, range, 500) != 0 {
            tries.push(pass);
        }
        session.publish();
        host.claim(&held);
        host.acknowledge(true);
        session.service(4);
    }
    assert!(tries.len() >= 4 && tries.len() <= 8, "{tries:?}");

    // Unloading.
    session.say_goodbye();
    assert!(!session.is_settled());
    host.claim(&held);
    host.acknowledge(false);
    assert!(session.is_settled());
    session.leave();
    assert_eq!(host.guest(guest_area::STATE), wire::guest_state::ABSENT);
}

#[test]
fn a_full_ring_and_a_full_house_say_busy() {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    session.service(0);
    host.attach();
    session.service(0);
    let id = session.tracker.add(64, 0).expect("room");
    session
        .announce(id, FileIdentity::default(), &[])
        .expect("room");
    let mut reported = 0;
    loop {
        let pin = held.hold(reported, 1);
        match session.report(
            id,
            PinnedRun {
                page: reported * 2,
                frame: reported,
                pages: 1,
                pin,
            },
        ) {
            Ok(()) => reported += 1,
            Err((refusal, _)) => {
                assert_eq!(refusal, Refusal::Busy);
                break;
            }
        }
    }
    // Hello takes one slot, the file three.
    assert_eq!(reported, host.layout.ring_slots - 4);
    session.publish();
    host.claim(&held);
    host.acknowledge(false);
    session.service(0);
    assert_eq!(held.total(), 0);
    let pin = held.hold(9, 4096);
    assert!(session
        .report(
            id,
            PinnedRun {
                page: 0,
                frame: 9,
                pages: 4096,
                pin
            }
        )
        .is_ok());
    let pin = held.hold(0, 1);
    let refused = session.report(
        id,
        PinnedRun {
            page: 9999,
            frame: 0,
            pages: 1,
            pin,
        },
    );
    assert_eq!(
        refused.err().map(|(refusal, _)| refusal),
        Some(Refusal::Busy)
    );
}

#[test]
fn a_host_that_stalls_loses_what_it_has_not_claimed() {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    session.service(0);
    host.attach();
    session.service(0);
    let range = Range { start: 0, end: 10 };
    report(&mut session, &held, 64, range, 500);
    session.publish();
    host.claim(&held);
    report(&mut session, &held, 128, range, 900);
    session.publish();
    session.service(1);
    assert_eq!(held.total(), 20);
    session.service(policy::STALL_MS + 2);
    assert!(matches!(session.ring().state(), State::Revoked { .. }));
    assert!(held.is_held(500) && !held.is_held(900));
    assert!(!session.is_settled());
    host.acknowledge(false);
    assert!(session.is_settled());
    assert_eq!(held.total(), 0);
}

#[test]
fn an_answer_is_owed_by_who_is_there_and_does_not_stand_still() {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    assert!(!session.is_owed());
    session.service(0);
    host.attach();
    session.service(0);
    // It has not answered the greeting, but that holds no page.
    assert!(!session.is_owed());
    let range = Range { start: 0, end: 10 };
    let again = |session: &mut _, key| {
        assert_eq!(report(session, &held, key, range, 500), 10);
        session.publish();
        assert!(session.is_owed());
    };

    again(&mut session, 64);
    host.claim(&held);
    assert!(session.is_owed());
    host.acknowledge(false);
    assert!(!session.is_owed());

    again(&mut session, 128);
    host.claim(&held);
    session.revoke();
    assert!(!session.is_owed());
    assert!(held.is_held(500));
    host.acknowledge(false);
    session.service(1);
    host.attach();
    session.service(2);

    again(&mut session, 192);
    shared.set(host.layout.host_area, 0);
    assert!(!session.is_owed());
}

#[test]
fn memory_is_given_back_of_files_that_no_whole_pass_has_found_since() {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    session.service(0);
    host.attach();
    session.service(0);
    let range = Range { start: 0, end: 10 };
    let pass = |session: &mut Session<_, _>, keys: &[usize], is_whole| {
        let number = session.begin_pass();
        for &key in keys {
            report(session, &held, key, range, 500);
            let id = session.tracker.find(key).expect("reported");
            session.tracker.touch(id, number);
        }
        if is_whole {
            session.end_pass(1, 10).expect("room");
        }
    };
    pass(&mut session, &[64, 128], true);
    // One that was interrupted says nothing of what it has not come to.
    pass(&mut session, &[64], false);
    session.shrink(0);
    assert_eq!(session.tracker.files(), 2);
    pass(&mut session, &[64], true);
    session.shrink(0);
    assert_eq!(session.tracker.files(), 1);
    assert_eq!(session.tracker.find(128), None);
}

/// As after a kernel that has attached, too, has woken this one from the disk of the same machine.
#[test]
fn a_memory_that_another_kernel_has_used_is_attached_to_anew() {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    session.service(0);
    host.attach();
    session.service(0);
    let range = Range { start: 0, end: 10 };
    report(&mut session, &held, 64, range, 500);
    session.publish();
    assert!(!session.is_settled());

    let mut other = self::session(&shared);
    other.service(0);
    host.attach();
    other.service(0);

    assert!(session.is_settled());
    assert!(session.service(1).restarted);
    assert_eq!((held.total(), session.tracker.files()), (0, 0));
    host.attach();
    assert!(session.service(2).wants_pass);
    assert!(session.is_open());
}

#[test]
fn withdrawing_ends_when_the_host_has_undone_everything() {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    session.service(0);
    // A host that has not answered yet may share from the time before.
    assert!(!session.withdraw());
    host.attach();
    session.service(0);
    let range = Range { start: 0, end: 10 };
    assert_eq!(report(&mut session, &held, 64, range, 500), 10);
    session.publish();
    assert!(!session.is_leaving());
    assert!(!session.withdraw());
    session.service(1);
    assert!(!session.withdraw());
    // There is no way back: the host will have forgotten what was reported.
    assert!(session.is_leaving());
    assert!(held.is_held(500));
    host.claim(&held);
    host.acknowledge(false);
    session.service(2);
    assert!(session.withdraw());
    assert_eq!((held.total(), session.tracker.files()), (0, 0));
    assert_eq!(host.guest(guest_area::STATE), wire::guest_state::ABSENT);

    assert!(!session.is_leaving());

    // It attaches anew, and a host that is gone needs nothing.
    session.service(3);
    host.attach();
    assert!(session.service(3).wants_pass);
    assert_eq!(report(&mut session, &held, 64, range, 500), 10);
    session.publish();
    shared.set(host.layout.host_area, 0);
    session.service(4);
    assert!(session.withdraw());
    assert_eq!(held.total(), 0);
}
