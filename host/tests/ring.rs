// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The ring consumer against guests that behave, and against guests that lie.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};

use common::guest_side::Shared;
use pagefusion_abi::wire::{
    FileIdentity, Outcome, Record, Request, Run, guest_area, host_area, policy,
};
use pagefusion_host::engine::{Attachment, RingConsumer, RingError};
use proptest::prelude::*;

const RUN: Record<'static> = Record::Run(Run {
    file: 3,
    pages: 2,
    page: 0,
    gfn: 100,
});

fn all_kinds() -> [Record<'static>; 6] {
    let name: &[u8] = b"/usr/lib/x86_64-linux-gnu/libcrypto.so.3";
    let identity = FileIdentity {
        inode: 9,
        ..FileIdentity::default()
    };
    [
        Record::Hello {
            epoch: 1,
            memory_pages: 4096,
            pages_per_guest_page: 1,
        },
        Record::File {
            file: 3,
            identity,
            name,
        },
        RUN,
        Record::Retract {
            file: 3,
            page: 0,
            pages: 1,
            unshare: false,
        },
        Record::EndOfPass {
            pass: 1,
            eligible: 2,
        },
        Record::Goodbye,
    ]
}

#[test]
fn every_record_type_arrives_in_order_and_is_acknowledged() {
    let shared = Shared::new();
    let mut host = shared.host();
    assert_eq!(host.attach(), Attachment::Absent);
    shared.attach(5);
    assert_eq!(host.attach(), Attachment::New);
    assert_eq!(host.attach(), Attachment::Same);
    assert_eq!(shared.host_word(host_area::EPOCH), 5);
    let positions: Vec<u64> = all_kinds().iter().map(|r| shared.produce(r)).collect();
    let mut seen = Vec::new();
    let batch = host
        .claim(64, |c| {
            seen.push(c.position);
            assert_eq!(c.record, Ok(all_kinds()[seen.len() - 1]));
        })
        .unwrap()
        .unwrap();
    assert_eq!(seen, positions);
    assert_eq!(shared.host_word(host_area::CLAIM), shared.head());
    assert_eq!(
        shared.host_word(host_area::ACK),
        0,
        "not before the work is done"
    );
    host.set_outcome(
        positions[2],
        Outcome {
            shared: 2,
            ..Outcome::default()
        },
    );
    host.acknowledge(batch);
    assert_eq!(shared.host_word(host_area::ACK), shared.head());
    assert_eq!(shared.outcome(positions[2]).unwrap().shared, 2);
    assert!(
        host.claim(64, |_| panic!("nothing is left"))
            .unwrap()
            .is_none()
    );
}

#[test]
fn records_that_wrap_around_arrive_whole() {
    let shared = Shared::new();
    let mut host = shared.host();
    shared.attach(1);
    host.attach();
    let (mut sent, mut received) = (0_u64, 0_u64);
    while shared.head() < 5 * shared.layout.ring_slots {
        shared.produce(&all_kinds()[(sent % 6) as usize]);
        sent += 1;
        if sent % 7 == 0 {
            while let Some(batch) = host
                .claim(3, |c| {
                    assert_eq!(c.record, Ok(all_kinds()[(received % 6) as usize]));
                    received += 1;
                })
                .unwrap()
            {
                host.acknowledge(batch);
            }
            assert_eq!(received, sent);
        }
    }
}

#[test]
fn a_full_ring_is_read_to_its_end() {
    let shared = Shared::new();
    let mut host = shared.host();
    shared.attach(1);
    host.attach();
    for _ in 0..shared.layout.ring_slots {
        shared.produce(&RUN);
    }
    let mut seen = 0;
    while let Some(batch) = host
        .claim(100, |c| seen += u64::from(c.record.is_ok()))
        .unwrap()
    {
        host.acknowledge(batch);
    }
    assert_eq!(seen, shared.layout.ring_slots);
}

#[test]
fn a_head_out_of_range_or_going_backwards_ends_the_epoch() {
    for lie in [u64::MAX, 1 << 40, 1] {
        let shared = Shared::new();
        let mut host = shared.host();
        shared.attach(1);
        host.attach();
        shared.produce(&RUN);
        shared.produce(&RUN);
        let batch = host.claim(8, |_| ()).unwrap().unwrap();
        host.acknowledge(batch);
        shared.set_head(lie);
        assert_eq!(
            host.claim(8, |_| panic!("nothing to give")),
            Err(RingError::Head)
        );
        assert_eq!(
            host.claim(8, |_| panic!("nothing to give")),
            Ok(None),
            "ignored from now on"
        );
        assert!(!host.post(Request::Rescan));
        shared.attach(2);
        assert_eq!(host.attach(), Attachment::New);
        shared.produce(&RUN);
        assert!(
            host.claim(8, |c| assert!(c.record.is_ok()))
                .unwrap()
                .is_some()
        );
    }
}

#[test]
fn lengths_that_overflow_are_refused() {
    for slots in [0_u64, 12, 200, 255] {
        let shared = Shared::new();
        let mut host = shared.host();
        shared.attach(1);
        host.attach();
        shared.put_slot(0, [2 | slots << 8, 0, 0, 0]);
        shared.set_head(20);
        assert_eq!(
            host.claim(8, |_| panic!("nothing to give")),
            Err(RingError::Length)
        );
    }
    // A record that reaches past the head: what stands before it is still answered.
    let shared = Shared::new();
    let mut host = shared.host();
    shared.attach(1);
    host.attach();
    shared.produce(&RUN);
    shared.put_slot(1, [2 | 4 << 8, 0, 0, 0]);
    shared.set_head(2);
    let mut seen = 0;
    let batch = host.claim(8, |_| seen += 1).unwrap().unwrap();
    host.acknowledge(batch);
    assert_eq!(seen, 1);
    assert_eq!(host.claim(8, |_| ()), Err(RingError::Length));
}

#[test]
fn unknown_types_and_malformed_runs_are_refused_one_by_one() {
    let shared = Shared::new();
    let mut host = shared.host();
    shared.attach(1);
    host.attach();
    shared.put_slot(0, [99 | 1 << 8, 0, 0, 0]);
    shared.put_slot(1, [3 | 1 << 8, 0, u64::MAX, 2]);
    shared.put_slot(2, [3 | 1 << 8 | 5 << 16, 0, 0, 2]);
    shared.set_head(3);
    shared.produce(&RUN);
    let mut good = Vec::new();
    host.claim(8, |c| good.push(c.record.is_ok()))
        .unwrap()
        .unwrap();
    assert_eq!(good, [false, false, false, true]);
}

#[test]
fn what_was_revoked_before_the_claim_is_not_touched() {
    let shared = Shared::new();
    let mut host = shared.host();
    shared.attach(4);
    host.attach();
    shared.produce(&RUN);
    shared.guest(guest_area::REVOKED).store(4, Ordering::SeqCst);
    assert!(host.claim(8, |_| ()).unwrap().unwrap().is_revoked());
    // An old epoch's revocation means nothing to a new one.
    shared.attach(5);
    shared.guest(guest_area::REVOKED).store(4, Ordering::SeqCst);
    host.attach();
    shared.produce(&RUN);
    assert!(!host.claim(8, |_| ()).unwrap().unwrap().is_revoked());
}

/// Two threads, the claim of one against the revocation of the other: a record is never both
/// worked on and let go.
#[test]
fn claim_and_revocation_never_both_win() {
    for epoch in 1..4000 {
        let shared = Shared::new();
        let mut host = shared.host();
        shared.attach(epoch);
        host.attach();
        shared.produce(&RUN);
        let barrier = std::sync::Barrier::new(2);
        let (let_go, worked_on) = std::thread::scope(|scope| {
            let guest = scope.spawn(|| {
                barrier.wait();
                shared
                    .guest(guest_area::REVOKED)
                    .store(epoch, Ordering::Relaxed);
                std::sync::atomic::fence(Ordering::SeqCst);
                let claim = shared.at(shared.layout.host_area + host_area::CLAIM as u64);
                claim.load(Ordering::Relaxed) == 0
            });
            barrier.wait();
            let batch = host.claim(8, |_| ()).unwrap().unwrap();
            (guest.join().unwrap(), !batch.is_revoked())
        });
        assert!(!(let_go && worked_on), "epoch {epoch}");
    }
}

#[test]
fn the_guest_is_rung_where_it_asked_to_be() {
    let shared = Shared::new();
    let mut host = shared.host();
    shared.attach(1);
    host.attach();
    shared.produce(&RUN);
    shared.produce(&RUN);
    let batch = host.claim(1, |_| ()).unwrap().unwrap();
    shared
        .guest(guest_area::NOTIFY_AT)
        .store(2, Ordering::SeqCst);
    assert!(!host.acknowledge(batch), "one of two");
    let batch = host.claim(1, |_| ()).unwrap().unwrap();
    assert!(host.acknowledge(batch));
}

#[test]
fn requests_arrive_until_their_ring_is_full() {
    let shared = Shared::new();
    let mut host = shared.host();
    assert!(!host.post(Request::Rescan), "nobody is there");
    shared.attach(1);
    host.attach();
    let report = Request::Report {
        file: 3,
        page: 1,
        pages: 4,
    };
    for _ in 0..shared.layout.request_slots {
        assert!(host.post(report));
    }
    assert!(!host.post(report));
    shared
        .guest(guest_area::REQUEST_TAIL)
        .store(1, Ordering::SeqCst);
    assert!(host.post(Request::Rescan));
    // A tail that lies only harms the guest.
    shared
        .guest(guest_area::REQUEST_TAIL)
        .store(u64::MAX, Ordering::SeqCst);
    host.post(Request::Rescan);
    host.set_paused(true);
    assert_eq!(shared.host_word(host_area::POLICY), policy::PAUSE);
}

/// What the memory holds, and what it is set back to when the machine is.
fn snapshot(shared: &Shared) -> Vec<u64> {
    let load = |word: &AtomicU64| word.load(Ordering::SeqCst);
    shared.words.iter().map(load).collect()
}

fn restore(shared: &Shared, snapshot: &[u64]) {
    for (word, value) in shared.words.iter().zip(snapshot) {
        word.store(*value, Ordering::SeqCst);
    }
}

#[test]
fn a_machine_restored_from_a_snapshot_meets_a_new_host() {
    let shared = Shared::new();
    let mut host = shared.host();
    shared.attach(1);
    host.attach();
    shared.produce(&RUN);
    let before = snapshot(&shared);
    // Twice: what the host has become after the first time must not pass for the old one.
    for _ in 0..2 {
        let old = shared.host_word(host_area::INSTANCE);
        shared.produce(&RUN);
        let batch = host.claim(8, |_| ()).unwrap().unwrap();
        assert!(host.is_current());
        restore(&shared, &before);
        assert!(
            !host.is_current(),
            "the batch is of a guest that is no more"
        );
        host.acknowledge(batch);
        assert_eq!(shared.host_word(host_area::ACK), 0, "not what it reported");
        assert_eq!(host.attach(), Attachment::Restored);
        assert!(shared.host_word(host_area::INSTANCE) > old);
        assert_eq!(
            host.attach(),
            Attachment::Absent,
            "the guest believes in the host of the snapshot"
        );
        assert_eq!(host.claim(8, |_| panic!("of another time")), Ok(None));
        // It sees the change, and its epoch is one that was there before.
        shared.attach(2);
        assert_eq!(host.attach(), Attachment::New);
        shared.produce(&RUN);
    }
}

#[test]
fn news_are_found_without_a_ring() {
    let shared = Shared::new();
    let mut host = shared.host();
    assert!(!host.has_news(), "nobody is there");
    shared.attach(1);
    assert!(host.has_news(), "a guest has come");
    host.attach();
    assert!(!host.has_news());
    let attached = snapshot(&shared);
    shared.produce(&RUN);
    assert!(host.has_news(), "there is a record");
    let batch = host.claim(8, |_| ()).unwrap().unwrap();
    host.acknowledge(batch);
    assert!(!host.has_news());
    restore(&shared, &attached);
    assert!(host.has_news(), "the machine was restored");
    assert_eq!(host.attach(), Attachment::Restored);
    assert!(!host.has_news(), "the guest believes in another host");
    // One that makes no sense is not looked at for ever.
    shared.attach(2);
    host.attach();
    shared.set_head(u64::MAX);
    assert!(host.has_news());
    assert_eq!(host.claim(8, |_| ()), Err(RingError::Head));
    assert!(!host.has_news());
}

#[test]
fn a_guest_of_another_host_is_none() {
    let shared = Shared::new();
    let mut former = shared.host();
    shared.attach(3);
    former.attach();
    shared.produce(&RUN);
    let mut host = RingConsumer::new(&shared.words[..], shared.layout, 78, 1024);
    assert_eq!(host.attach(), Attachment::Absent);
    assert_eq!(host.claim(8, |_| panic!("not shown to us")), Ok(None));
    shared.attach(4);
    assert_eq!(host.attach(), Attachment::New);
}

proptest! {
    /// Any bytes at all in the guest's areas: no panic, no endless loop, no access outside
    /// (which would panic on the slice).
    #[test]
    fn no_guest_makes_the_consumer_panic(
        slots in prop::collection::vec((0_u64..64, any::<[u64; 4]>(), any::<bool>()), 0..64),
        heads in prop::collection::vec(prop_oneof![0_u64..80, any::<u64>()], 1..8),
        tail in any::<u64>(), epochs in prop::collection::vec(0_u64..3, 1..8),
    ) {
        let shared = Shared::new();
        let mut host = shared.host();
        for (position, mut slot, plausible) in slots {
            if plausible {
                slot[0] = (slot[0] % 8) | (1 + slot[1] % 12) << 8 | (slot[0] >> 50) << 32;
            }
            shared.put_slot(position, slot);
        }
        for (head, epoch) in heads.iter().zip(epochs.iter().cycle()) {
            shared.attach(*epoch);
            shared.set_head(*head);
            shared.guest(guest_area::REQUEST_TAIL).store(tail, Ordering::SeqCst);
            host.attach();
            for _ in 0..100 {
                match host.claim(16, |_| ()) {
                    Ok(Some(batch)) => { host.acknowledge(batch); }
                    Ok(None) | Err(_) => break,
                }
            }
            host.post(Request::Rescan);
        }
    }
}
