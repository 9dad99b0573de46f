// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The arithmetic of the ring, tried everywhere: on the smallest ring there may be, from every
//! place in it, with every length of record and every head.

mod common;

use std::sync::atomic::Ordering;

use common::guest_side::Shared;
use pagefusion_abi::wire::{
    EMPTY_RECORD, FileIdentity, Layout, MAX_RECORD_SLOTS, Outcome, Record, Run, guest_area,
    host_area,
};
use pagefusion_host::engine::{Attachment, RingConsumer, RingError};

/// The smallest power of two that holds two records.
const SLOTS: u64 = 32;

fn small_ring() -> Shared {
    let mut shared = Shared::new();
    shared.layout = Layout {
        ring_slots: SLOTS,
        ..shared.layout
    };
    shared
}

/// A guest attached to a host at a place in the ring, with nothing between them.
fn at(shared: &Shared, place: u64) -> RingConsumer<&[std::sync::atomic::AtomicU64]> {
    let mut host = shared.host();
    shared.attach(place + 1);
    assert_eq!(host.attach(), Attachment::New);
    while shared.head() < place {
        shared.produce(&RUN);
        let batch = host.claim(1, |_| ()).unwrap().unwrap();
        host.acknowledge(batch);
    }
    host
}

const RUN: Record<'static> = Record::Run(Run {
    file: 3,
    page: 1,
    gfn: 2,
    pages: 4,
});

/// A record of each length that one can have.
fn of_every_length(names: &[u8]) -> Vec<(usize, Record<'_>)> {
    let mut records = vec![(1, RUN)];
    for length in 0..=names.len() {
        let record = Record::File {
            file: 3,
            identity: FileIdentity::default(),
            name: &names[..length],
        };
        let slots = record.encode(&mut EMPTY_RECORD.clone());
        if records.iter().all(|(known, _)| *known != slots) {
            records.push((slots, record));
        }
    }
    records
}

#[test]
fn records_of_every_length_arrive_from_every_place() {
    let names = vec![b'n'; pagefusion_abi::wire::MAX_NAME];
    let records = of_every_length(&names);
    let lengths: Vec<usize> = records.iter().map(|(slots, _)| *slots).collect();
    assert_eq!(lengths.first(), Some(&1));
    assert_eq!(lengths.last(), Some(&MAX_RECORD_SLOTS));
    let shared = small_ring();
    for place in 0..SLOTS {
        for (first, one) in &records {
            for (second, two) in &records {
                for together in 1..=2 {
                    let mut host = at(&shared, place);
                    let wanted = [(place, *one), (place + *first as u64, *two)];
                    for (_, record) in &wanted {
                        shared.produce(record);
                    }
                    let mut seen = 0;
                    while seen < 2 {
                        let mut at = wanted[seen..].iter();
                        let batch = host
                            .claim(together, |claimed| {
                                let (position, record) = at.next().unwrap();
                                assert_eq!(claimed.position, *position);
                                assert_eq!(claimed.record.unwrap(), *record);
                            })
                            .unwrap()
                            .unwrap();
                        for (position, _) in &wanted[seen..seen + together.min(2 - seen)] {
                            host.set_outcome(*position, OUTCOME);
                            assert_eq!(shared.outcome(*position), Some(OUTCOME));
                        }
                        seen += together;
                        host.acknowledge(batch);
                    }
                    let end = place + (first + second) as u64;
                    assert_eq!(shared.host_word(host_area::ACK), end);
                    assert_eq!(shared.host_word(host_area::CLAIM), end);
                    assert!(host.claim(1, |_| ()).unwrap().is_none());
                }
            }
        }
    }
}

const OUTCOME: Outcome = Outcome {
    reason: 0,
    shared: 3,
    remembered: 1,
};

#[test]
fn every_head_is_believed_or_ends_the_epoch() {
    let shared = small_ring();
    for place in 0..SLOTS {
        for head in (0..=place + SLOTS + 2).chain([u64::MAX - 1, u64::MAX, 1 << 63]) {
            let mut host = at(&shared, place);
            // Single slots, wherever one looks.
            for slot in 0..SLOTS {
                let mut record = EMPTY_RECORD;
                RUN.encode(&mut record);
                shared.put_slot(slot, record[0]);
            }
            shared.set_head(head);
            let mut claimed = 0;
            let result = host.claim(SLOTS as usize + 8, |_| claimed += 1);
            match head.checked_sub(place) {
                Some(0) => assert!(result.unwrap().is_none()),
                Some(there) if there <= SLOTS => {
                    assert!(result.unwrap().is_some());
                    assert_eq!(claimed, there);
                }
                _ => {
                    assert_eq!(result.unwrap_err(), RingError::Head);
                    assert_eq!(claimed, 0);
                    assert_eq!(shared.host_word(host_area::ACK), place);
                }
            }
            shared
                .guest(guest_area::HEAD)
                .store(place, Ordering::SeqCst);
        }
    }
}

#[test]
fn every_length_that_a_record_claims_fits_or_ends_the_epoch() {
    let shared = small_ring();
    for place in 0..SLOTS {
        for there in 1..=SLOTS {
            for claims in 0..=u8::MAX {
                let mut host = at(&shared, place);
                let mut record = EMPTY_RECORD;
                RUN.encode(&mut record);
                record[0][0] = record[0][0] & !0xff00 | u64::from(claims) << 8;
                shared.put_slot(place, record[0]);
                shared.set_head(place + there);
                let mut claimed = 0;
                let result = host.claim(1, |_| claimed += 1);
                let fits = (1..=MAX_RECORD_SLOTS as u64).contains(&u64::from(claims))
                    && u64::from(claims) <= there;
                if fits {
                    host.acknowledge(result.unwrap().unwrap());
                    assert_eq!(claimed, 1);
                    let end = place + u64::from(claims);
                    assert_eq!(shared.host_word(host_area::ACK), end);
                } else {
                    assert_eq!(result.unwrap_err(), RingError::Length);
                    assert_eq!(claimed, 0);
                    assert_eq!(shared.host_word(host_area::ACK), place);
                }
            }
        }
    }
}
