// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The bytes of the wire format, spelled out: a change here is a change of the format.

use pagefusion_abi::wire::*;
use proptest::prelude::*;

fn encode(record: &Record<'_>) -> Vec<Slot> {
    let mut buffer = EMPTY_RECORD;
    let slots = record.encode(&mut buffer);
    buffer[..slots].to_vec()
}

fn bytes(slots: &[Slot]) -> Vec<u8> {
    slots
        .iter()
        .flatten()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

const IDENTITY: FileIdentity = FileIdentity {
    fs_uuid: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    inode: 0x1122,
    size: 0x0123_4567,
    mtime_ns: 0x0807_0605_0403_0201,
    generation: 0xaabb_ccdd,
    kind: file_kind::KERNEL_RODATA,
};

#[test]
fn every_record_has_its_golden_bytes() {
    let cases: [(Record<'_>, &str); 7] = [
        (
            Record::Hello {
                epoch: 5,
                memory_pages: 0x4_0000,
                pages_per_guest_page: 1,
            },
            "01 01 0000 00000000 | 0500000000000000 | 0000040000000000 | 0100000000000000",
        ),
        (
            Record::File {
                file: 7,
                identity: IDENTITY,
                name: b"libc.so.6",
            },
            "02 04 0000 07000000 | 0001020304050607 | 08090a0b0c0d0e0f | 2211000000000000
             6745230100000000 | 0102030405060708 | ddccbbaa02000000 | 0900000000000000
             0000000000000000 | 0000000000000000 | 0000000000000000 | 0000000000000000
             6c6962632e736f2e | 3600000000000000 | 0000000000000000 | 0000000000000000",
        ),
        (
            Record::Run(Run {
                file: 7,
                pages: 16,
                page: 3,
                gfn: 0x1_0000,
            }),
            "03 01 0000 07000000 | 0300000000000000 | 0000010000000000 | 1000000000000000",
        ),
        (
            Record::Retract {
                file: 7,
                page: 3,
                pages: 2,
                unshare: false,
            },
            "04 01 0000 07000000 | 0300000000000000 | 0200000000000000 | 0000000000000000",
        ),
        (
            Record::Retract {
                file: 7,
                page: 0,
                pages: 0,
                unshare: true,
            },
            "04 01 0000 07000000 | 0000000000000000 | 0000000000000000 | 0100000000000000",
        ),
        (
            Record::EndOfPass {
                pass: 9,
                eligible: 6133,
            },
            "05 01 0000 00000000 | 0900000000000000 | f517000000000000 | 0000000000000000",
        ),
        (
            Record::Goodbye,
            "06 01 0000 00000000 | 0000000000000000 | 0000000000000000 | 0000000000000000",
        ),
    ];
    for (record, golden) in cases {
        let slots = encode(&record);
        assert_eq!(bytes(&slots), hex(golden), "{record:?}");
        let mut name = [0; MAX_NAME];
        assert_eq!(Record::decode(&slots, &mut name), Ok(record));
    }
}

#[test]
fn requests_and_outcomes_have_their_golden_bytes() {
    let report = Request::Report {
        file: 7,
        page: 3,
        pages: 2,
    };
    let golden = "01 00 0000 07000000 | 0300000000000000 | 0200000000000000 | 0000000000000000";
    assert_eq!(bytes(&[report.encode()]), hex(golden));
    assert_eq!(Request::decode(&report.encode()), Ok(report));
    assert_eq!(
        Request::decode(&Request::Rescan.encode()),
        Ok(Request::Rescan)
    );
    assert_eq!(Request::decode(&[9, 0, 0, 0]), Err(DecodeError::Kind(9)));
    let outcome = Outcome {
        reason: reason::STORE_FULL,
        shared: 0x102,
        remembered: 3,
    };
    assert_eq!(outcome.to_word(), 0x0000_0003_0102_0701);
    assert_eq!(Outcome::from_word(outcome.to_word()), Some(outcome));
    assert_eq!(Outcome::from_word(0), None);
}

#[test]
fn the_shared_memory_has_its_golden_layout() {
    assert_eq!(MAGIC.to_le_bytes(), *b"PgFusion");
    assert_eq!(pack_version(1, 2), 0x2_0001);
    let layout = Layout::for_size(1 << 20).unwrap();
    let expected = Layout {
        total_bytes: 0x10_0000,
        host_area: 0x1000,
        guest_area: 0x2000,
        requests: 0x3000,
        request_slots: 128,
        outcomes: 0x4_0000,
        ring: 0x8_0000,
        ring_slots: 0x4000,
    };
    assert_eq!(layout, expected);
    let fields = [
        header::MAGIC,
        header::VERSION,
        header::FEATURES,
        header::TOTAL_BYTES,
        header::HOST_AREA,
        header::GUEST_AREA,
        header::REQUESTS,
        header::REQUEST_SLOTS,
        header::OUTCOMES,
        header::RING,
        header::RING_SLOTS,
        header::HOST_PEER,
        header::BYTES,
    ];
    assert!(
        fields
            .iter()
            .enumerate()
            .all(|(i, offset)| *offset == i * 8)
    );
    let host = [
        host_area::INSTANCE,
        host_area::EPOCH,
        host_area::CLAIM,
        host_area::ACK,
        host_area::REQUEST_HEAD,
        host_area::POLICY,
        host_area::MAX_INFLIGHT_PAGES,
        host_area::PAGES_SHARED,
        host_area::BYTES,
    ];
    assert!(host.iter().enumerate().all(|(i, offset)| *offset == i * 8));
    let guest = [
        guest_area::VERSION,
        guest_area::FEATURES,
        guest_area::INSTANCE,
        guest_area::EPOCH,
        guest_area::HEAD,
        guest_area::REVOKED,
        guest_area::REQUEST_TAIL,
        guest_area::STATE,
        guest_area::NOTIFY_AT,
        guest_area::BYTES,
    ];
    assert!(guest.iter().enumerate().all(|(i, offset)| *offset == i * 8));
}

fn header_of(layout: &Layout) -> Vec<u64> {
    let mut words = vec![0; header::BYTES / 8];
    words[header::MAGIC / 8] = MAGIC;
    words[header::VERSION / 8] = pack_version(VERSION_MAJOR, VERSION_MINOR);
    for (offset, value) in layout.header_words() {
        words[offset / 8] = value;
    }
    words
}

#[test]
fn every_layout_made_is_accepted_and_unsound_ones_are_refused() {
    for shift in 16..=28 {
        let layout = Layout::for_size(1 << shift).unwrap();
        let words = header_of(&layout);
        assert_eq!(
            Layout::from_header(|at| words[at / 8], 1 << shift),
            Ok(layout)
        );
        let smaller = Layout::from_header(|at| words[at / 8], (1 << shift) - 4096);
        assert_eq!(smaller, Err(LayoutError::Areas));
    }
    assert_eq!(Layout::for_size(1 << 15), None);
    assert_eq!(Layout::for_size((1 << 20) + 4096), None);
    let good = Layout::for_size(1 << 20).unwrap();
    let bad = [
        Layout {
            guest_area: good.host_area,
            ..good
        },
        Layout {
            ring: good.ring + 8,
            ..good
        },
        Layout {
            ring: u64::MAX - 4095,
            ..good
        },
        Layout {
            ring_slots: 0,
            ..good
        },
        Layout {
            ring_slots: good.ring_slots - 1,
            ..good
        },
        Layout {
            ring_slots: 1 << 60,
            ..good
        },
        Layout {
            request_slots: 1 << 63,
            ..good
        },
        Layout {
            outcomes: good.ring - 4096,
            ..good
        },
        Layout {
            host_area: 0,
            ..good
        },
        Layout {
            total_bytes: 1 << 40,
            ..good
        },
    ];
    for layout in bad {
        let words = header_of(&layout);
        let found = Layout::from_header(|at| words[at / 8], 1 << 20);
        assert_eq!(found, Err(LayoutError::Areas), "{layout:?}");
    }
    assert_eq!(Layout::from_header(|_| 0, 1 << 20), Err(LayoutError::Magic));
    let mut words = header_of(&good);
    words[header::VERSION / 8] = pack_version(2, 0);
    let other = Layout::from_header(|at| words[at / 8], 1 << 20);
    assert_eq!(other, Err(LayoutError::Version(2, 0)));
}

#[test]
fn malformed_records_are_refused_by_name() {
    let mut name = [0; MAX_NAME];
    let mut decode = |slots: &[Slot]| Record::decode(slots, &mut name).map(drop);
    let run = |page: u64, gfn: u64, pages: u64| [3 | 1 << 8 | 7 << 32, page, gfn, pages];
    assert_eq!(decode(&[]), Err(DecodeError::Slots));
    assert_eq!(
        decode(&[[99 | 1 << 8, 0, 0, 0]]),
        Err(DecodeError::Kind(99))
    );
    assert_eq!(decode(&[[3, 0, 0, 1]]), Err(DecodeError::Slots));
    assert_eq!(
        decode(&[[3 | 1 << 8 | 1 << 16, 0, 0, 1]]),
        Err(DecodeError::Reserved)
    );
    assert_eq!(decode(&[run(0, 0, 0)]), Err(DecodeError::Range));
    assert_eq!(
        decode(&[run(0, 0, u64::from(MAX_RUN_PAGES) + 1)]),
        Err(DecodeError::Range)
    );
    assert_eq!(decode(&[run(u64::MAX, 0, 2)]), Err(DecodeError::Range));
    assert_eq!(decode(&[run(0, u64::MAX, 2)]), Err(DecodeError::Range));
    assert_eq!(
        decode(&[[3 | 1 << 8 | (1 << 20) << 32, 0, 0, 1]]),
        Err(DecodeError::Range)
    );
    assert_eq!(decode(&[[6 | 1 << 8, 1, 0, 0]]), Err(DecodeError::Reserved));
    let mut file = encode(&Record::File {
        file: 1,
        identity: IDENTITY,
        name: b"x",
    });
    file[1][3] = u64::MAX;
    assert_eq!(decode(&file), Err(DecodeError::Slots));
}

#[test]
fn a_long_name_keeps_its_end() {
    let long: Vec<u8> = (0..600).map(|i| (i % 251) as u8).collect();
    let slots = encode(&Record::File {
        file: 1,
        identity: IDENTITY,
        name: &long,
    });
    assert_eq!(slots.len(), MAX_RECORD_SLOTS);
    let mut buffer = [0; MAX_NAME];
    let Ok(Record::File { name, .. }) = Record::decode(&slots, &mut buffer) else {
        panic!("not a file record");
    };
    assert_eq!(name, &long[600 - MAX_NAME..]);
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(
        file in 0..MAX_FILES, words in any::<[u64; 3]>(), uuid in any::<[u8; 16]>(),
        numbers in any::<[u32; 2]>(), text in prop::collection::vec(any::<u8>(), 0..=MAX_NAME),
    ) {
        let identity = FileIdentity {
            fs_uuid: uuid, inode: words[0], size: words[1], mtime_ns: words[2],
            generation: numbers[0], kind: numbers[1],
        };
        let record = Record::File { file, identity, name: &text };
        let slots = encode(&record);
        let mut name = [0; MAX_NAME];
        prop_assert_eq!(Record::decode(&slots, &mut name), Ok(record));
    }

    #[test]
    fn no_slots_make_decoding_panic(
        slots in prop::collection::vec(any::<[u64; 4]>(), 0..14), kind in 0_u64..9, fix in any::<bool>()
    ) {
        let mut slots = slots;
        if fix && !slots.is_empty() {
            slots[0][0] = kind | (slots.len() as u64) << 8 | (slots[0][0] >> 44) << 32;
        }
        let mut name = [0; MAX_NAME];
        if let Ok(record) = Record::decode(&slots, &mut name) {
            prop_assert_eq!(encode(&record), slots);
        }
    }
}
