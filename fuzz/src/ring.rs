// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest that writes what it likes into the shared memory, and the host's consumer.

use crate::input::Input;
use pagefusion_abi::wire::{
    self, EMPTY_RECORD, FileIdentity, Layout, MAX_NAME, Outcome, PAGE_SIZE, Record, Request, Run,
    guest_area, guest_state, host_area, record_slots,
};
use pagefusion_host::engine::{Attachment, Batch, RingConsumer};
use std::sync::atomic::{AtomicU64, Ordering};

/// So small that positions go around often.
const LAYOUT: Layout = Layout {
    total_bytes: 6 * PAGE_SIZE,
    host_area: PAGE_SIZE,
    guest_area: 2 * PAGE_SIZE,
    requests: 3 * PAGE_SIZE,
    request_slots: 4,
    outcomes: 4 * PAGE_SIZE,
    ring: 5 * PAGE_SIZE,
    ring_slots: 32,
};
const WORDS: usize = (LAYOUT.total_bytes / 8) as usize;
const GUEST_FIELDS: [usize; 9] = [
    guest_area::VERSION,
    guest_area::FEATURES,
    guest_area::INSTANCE,
    guest_area::EPOCH,
    guest_area::HEAD,
    guest_area::REVOKED,
    guest_area::REQUEST_TAIL,
    guest_area::STATE,
    guest_area::NOTIFY_AT,
];

/// The shared memory, and what the guest has written there last: the host must not change it.
struct Guest<'a> {
    words: &'a [AtomicU64],
    own: Vec<u64>,
}

impl Guest<'_> {
    fn write(&mut self, offset: u64, value: u64) {
        let index = (offset / 8) as usize;
        self.words[index].store(value, Ordering::Relaxed);
        self.own[index] = value;
    }

    fn read(&self, offset: u64) -> u64 {
        self.words[(offset / 8) as usize].load(Ordering::Relaxed)
    }

    fn set(&mut self, field: usize, value: u64) {
        self.write(LAYOUT.guest_area + field as u64, value);
    }

    fn head(&self) -> u64 {
        self.read(LAYOUT.guest_area + guest_area::HEAD as u64)
    }

    fn host(&self, field: usize) -> u64 {
        self.read(LAYOUT.host_area + field as u64)
    }

    fn attach(&mut self, epoch: u64) {
        for field in [
            guest_area::HEAD,
            guest_area::REVOKED,
            guest_area::REQUEST_TAIL,
        ] {
            self.set(field, 0);
        }
        self.set(guest_area::INSTANCE, self.host(host_area::INSTANCE));
        self.set(guest_area::EPOCH, epoch);
        self.set(guest_area::STATE, guest_state::ATTACHED);
    }

    fn write_slot(&mut self, position: u64, slot: [u64; 4]) {
        for (word, at) in slot.into_iter().zip(0..) {
            self.write(LAYOUT.ring_slot(position) + at * 8, word);
        }
    }

    fn push(&mut self, record: &Record<'_>) {
        let mut buffer = EMPTY_RECORD;
        let slots = record.encode(&mut buffer);
        let head = self.head();
        for (slot, position) in buffer[..slots].iter().zip(0..) {
            self.write_slot(head.wrapping_add(position), *slot);
        }
        self.set(guest_area::HEAD, head.wrapping_add(slots as u64));
    }

    /// Everything that is not the host's is what the guest has left there.
    fn check(&self) {
        let host = [
            (LAYOUT.host_area, PAGE_SIZE),
            (LAYOUT.requests, LAYOUT.request_slots * 32),
            (LAYOUT.outcomes, LAYOUT.ring_slots * 8),
        ];
        for (index, (word, own)) in self.words.iter().zip(&self.own).enumerate() {
            let offset = index as u64 * 8;
            let is_host = |&(start, bytes): &(u64, u64)| (start..start + bytes).contains(&offset);
            if !host.iter().any(is_host) {
                assert_eq!(word.load(Ordering::Relaxed), *own, "the host wrote here");
            }
        }
    }
}

/// What is known of the consumer.
#[derive(Default)]
struct Known {
    /// Up to where it has acknowledged; `None` when the guest has written into the host's
    /// area, which may keep it from that.
    tail: Option<u64>,
    broken: bool,
    pending: Option<(Batch, u64, u64)>,
}

impl Known {
    /// The consumer takes a batch, and acknowledges it unless that is left for later.
    fn claim(&mut self, guest: &Guest<'_>, host: &mut RingConsumer<&[AtomicU64]>, most: usize) {
        if self.pending.is_some() {
            return;
        }
        let head = guest.head();
        let (mut first, mut next) = (None, self.tail);
        let mut count = 0;
        let claimed = host.claim(most, |claimed| {
            let position = *next.get_or_insert(claimed.position);
            assert_eq!(claimed.position, position, "records follow each other");
            first.get_or_insert(position);
            let slots = record_slots(guest.read(LAYOUT.ring_slot(position)));
            next = Some(position + slots as u64);
            count += 1;
            if let Ok(record) = claimed.record {
                check_record(&record, slots);
            }
        });
        match claimed {
            Ok(Some(batch)) => {
                assert!((1..=most).contains(&count) && !self.broken);
                let (start, end) = (first.unwrap(), next.unwrap());
                assert!(end <= head && head - start <= LAYOUT.ring_slots);
                assert_eq!(guest.host(host_area::CLAIM), end);
                self.pending = Some((batch, start, end));
            }
            Ok(None) => assert_eq!(count, 0),
            Err(_) => {
                assert_eq!(count, 0, "nothing is handed out with an error");
                self.broken = true;
            }
        }
        assert_eq!(host.is_broken(), self.broken);
    }

    fn acknowledge(&mut self, guest: &Guest<'_>, host: &mut RingConsumer<&[AtomicU64]>) {
        let Some((batch, start, end)) = self.pending.take() else {
            return;
        };
        let outcome = Outcome {
            shared: 1,
            ..Outcome::default()
        };
        host.set_outcome(start, outcome);
        host.acknowledge(batch);
        if self.tail.is_some() {
            assert_eq!(guest.host(host_area::ACK), end);
            self.tail = Some(end);
        }
    }

    fn begin(&mut self) {
        *self = Self {
            tail: Some(0),
            ..Self::default()
        };
    }
}

/// A record that was accepted is within its bounds, and is what its encoding says.
fn check_record(record: &Record<'_>, slots: usize) {
    let mut buffer = EMPTY_RECORD;
    assert_eq!(record.encode(&mut buffer), slots);
    let mut name = [0; MAX_NAME];
    let again = Record::decode(&buffer[..slots], &mut name);
    assert_eq!(again.as_ref(), Ok(record));
    if let Record::Run(run) = record {
        let pages = u64::from(run.pages);
        assert!((1..=u64::from(wire::MAX_RUN_PAGES)).contains(&pages));
        assert!(run.page + pages <= 1 << 52 && run.gfn + pages <= 1 << 52);
        assert!(run.file < wire::MAX_FILES);
    }
}

fn step(
    input: &mut Input<'_>,
    guest: &mut Guest<'_>,
    host: &mut RingConsumer<&[AtomicU64]>,
    known: &mut Known,
) {
    match input.below(13) {
        0 => guest.attach(input.number()),
        1 => {
            let field = GUEST_FIELDS[usize::from(input.below(9))];
            guest.set(field, input.number());
        }
        2 => {
            let (file, pages) = (u32::from(input.u8()), u32::from(input.u8()));
            let (page, gfn) = (input.number(), input.number());
            guest.push(&Record::Run(Run {
                file,
                pages,
                page,
                gfn,
            }));
        }
        3 => {
            let identity = FileIdentity {
                inode: input.number(),
                ..FileIdentity::default()
            };
            let (file, length) = (u32::from(input.u8()), usize::from(input.u8()));
            let name = input.bytes(length);
            guest.push(&Record::File {
                file,
                identity,
                name,
            });
        }
        4 => {
            let slot = [(); 4].map(|()| input.number());
            let head = guest.head();
            guest.write_slot(head, slot);
            guest.set(guest_area::HEAD, head.wrapping_add(1));
        }
        5 => {
            // A head word that may be sound, with anything behind it.
            let kind = u64::from(input.below(8)) | u64::from(input.below(13)) << 8;
            let slot = [
                kind | input.number() << 32,
                input.number(),
                input.number(),
                input.number(),
            ];
            let head = guest.head();
            guest.write_slot(head, slot);
            guest.set(guest_area::HEAD, head.wrapping_add(1));
        }
        6 => {
            let head = guest.head().wrapping_add(u64::from(input.u8()));
            guest.set(guest_area::HEAD, head);
        }
        7 => {
            let epoch = guest.read(LAYOUT.guest_area + guest_area::EPOCH as u64);
            guest.set(guest_area::REVOKED, epoch);
        }
        8 => {
            known.claim(guest, host, 1 + usize::from(input.below(8)));
            known.acknowledge(guest, host);
        }
        9 => known.claim(guest, host, 1 + usize::from(input.below(8))),
        10 => known.acknowledge(guest, host),
        11 => {
            host.post(if input.below(2) == 0 {
                Request::Rescan
            } else {
                Request::Report {
                    file: 1,
                    page: input.number(),
                    pages: 1,
                }
            });
        }
        _ => {
            if input.below(4) == 0 {
                // All of the memory is the guest's to write to, whatever it has agreed to.
                let field = u64::from(input.below(8)) * 8;
                let value = input.number();
                guest.words[((LAYOUT.host_area + field) / 8) as usize]
                    .store(value, Ordering::Relaxed);
                known.tail = None;
            }
            known.acknowledge(guest, host);
            if let Attachment::New | Attachment::Restored = host.attach() {
                known.begin();
            }
        }
    }
}

/// A guest that writes what it likes, and the ring consumer: it reads what is there and
/// nothing else, in order, answers where it should, and ends.
pub fn ring(data: &[u8]) {
    let mut input = Input(data);
    let words: Vec<_> = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
    let instance = 1 + u64::from(input.u8());
    let mut host = RingConsumer::new(&words[..], LAYOUT, instance, 64);
    let mut guest = Guest {
        words: &words,
        own: vec![0; WORDS],
    };
    let mut known = Known::default();
    known.begin();
    while !input.is_empty() {
        step(&mut input, &mut guest, &mut host, &mut known);
    }
    guest.check();
}
