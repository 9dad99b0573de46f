// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Layout of the shared memory and encoding of what travels through it.
//!
//! The shared memory is one power-of-two block (BAR2 of the device). Every byte has one
//! writer; the table is in `docs/abi.md` and repeated on each `area` module below:
//!
//! | area             | writer | holds                                                  |
//! |------------------|--------|--------------------------------------------------------|
//! | [`header`]       | host   | magic, version, where everything else is; constant     |
//! | [`host_area`]    | host   | instance, claim and acknowledge positions, policy      |
//! | [`guest_area`]   | guest  | epoch, ring head, revocation, state                    |
//! | request slots    | host   | ring of [`Request`]s, host to guest                    |
//! | outcome words    | host   | one [`Outcome`] per ring slot                          |
//! | ring slots       | guest  | ring of [`Record`]s, guest to host                     |
//!
//! Everything is little-endian and aligned to 8 bytes. A *position* counts slots since the
//! guest attached and never wraps (64 bits); position modulo ring size is the slot's index.
//!
//! This file allocates nothing, has no dependency and no `crate::` path.

/// Bytes of one wire page; gfns and page indices count these whatever the guest's page size.
pub const PAGE_SIZE: u64 = 4096;
/// First eight bytes of the shared memory.
pub const MAGIC: u64 = u64::from_le_bytes(*b"PgFusion");
/// Incompatible changes. Both sides must agree.
pub const VERSION_MAJOR: u16 = 1;
/// Compatible additions. Each side ignores what it does not know.
pub const VERSION_MINOR: u16 = 0;

/// Feature bits, offered in [`header::FEATURES`], accepted in [`guest_area::FEATURES`].
pub mod feature {
    /// The guest may append file names to [`super::Record::File`].
    pub const FILE_NAMES: u64 = 1 << 0;
    /// The host may send [`super::Request`]s.
    pub const REQUESTS: u64 = 1 << 1;
    /// All that this version knows.
    pub const ALL: u64 = FILE_NAMES | REQUESTS;
}

/// Byte offsets of the constant header. Written by the host before the guest sees the device.
pub mod header {
    /// `u64`, [`super::MAGIC`].
    pub const MAGIC: usize = 0x00;
    /// `u64`: major in bits 0–15, minor in 16–31, the rest zero.
    pub const VERSION: usize = 0x08;
    /// `u64`, [`super::feature`] bits the host offers.
    pub const FEATURES: usize = 0x10;
    /// `u64`, size of the whole shared memory in bytes.
    pub const TOTAL_BYTES: usize = 0x18;
    /// `u64`, byte offset of the host area.
    pub const HOST_AREA: usize = 0x20;
    /// `u64`, byte offset of the guest area.
    pub const GUEST_AREA: usize = 0x28;
    /// `u64`, byte offset of the request slots.
    pub const REQUESTS: usize = 0x30;
    /// `u64`, number of request slots, a power of two.
    pub const REQUEST_SLOTS: usize = 0x38;
    /// `u64`, byte offset of the outcome words.
    pub const OUTCOMES: usize = 0x40;
    /// `u64`, byte offset of the ring slots.
    pub const RING: usize = 0x48;
    /// `u64`, number of ring slots, a power of two; also the number of outcome words.
    pub const RING_SLOTS: usize = 0x50;
    /// `u64`, the device's own peer id (doorbell target of the guest).
    pub const HOST_PEER: usize = 0x58;
    /// Bytes of the header; the rest of its page is zero.
    pub const BYTES: usize = 0x60;
}

/// Byte offsets within the host area. Written by the host only.
pub mod host_area {
    /// `u64`, non-zero and new for every host instance; zero while no host is there.
    pub const INSTANCE: usize = 0x00;
    /// `u64`, the epoch this host has attached to; [`CLAIM`] and [`ACK`] belong to it.
    pub const EPOCH: usize = 0x08;
    /// `u64` position: the host may be working on records before it.
    pub const CLAIM: usize = 0x10;
    /// `u64` position: records before it are answered, their pages may be let go.
    pub const ACK: usize = 0x18;
    /// `u64` position of the next request to be written.
    pub const REQUEST_HEAD: usize = 0x20;
    /// `u64`, [`super::policy`] bits.
    pub const POLICY: usize = 0x28;
    /// `u64`, the most pages that may be reported and not acknowledged.
    pub const MAX_INFLIGHT_PAGES: usize = 0x30;
    /// `u64`, pages of this guest that are shared now.
    pub const PAGES_SHARED: usize = 0x38;
    /// Bytes of the area that are defined; the rest of its page is zero.
    pub const BYTES: usize = 0x40;
}

/// Byte offsets within the guest area. Written by the guest only.
pub mod guest_area {
    /// `u64`: major in bits 0–15, minor in 16–31.
    pub const VERSION: usize = 0x00;
    /// `u64`, the accepted subset of the offered features.
    pub const FEATURES: usize = 0x08;
    /// `u64`, the host instance this guest has attached to.
    pub const INSTANCE: usize = 0x10;
    /// `u64`, non-zero, larger at every attach.
    pub const EPOCH: usize = 0x18;
    /// `u64` position of the next record to be written.
    pub const HEAD: usize = 0x20;
    /// `u64`, the epoch in which the guest takes back what the host has not claimed; zero is none.
    pub const REVOKED: usize = 0x28;
    /// `u64` position of the next request to be read.
    pub const REQUEST_TAIL: usize = 0x30;
    /// `u64`, [`super::guest_state`].
    pub const STATE: usize = 0x38;
    /// `u64` position: the host rings when `ACK` reaches it; zero is never.
    pub const NOTIFY_AT: usize = 0x40;
    /// Bytes of the area that are defined; the rest of its page is zero.
    pub const BYTES: usize = 0x48;
}

/// Bits of [`host_area::POLICY`].
pub mod policy {
    /// The guest stops reporting until the bit is cleared.
    pub const PAUSE: u64 = 1 << 0;
}

/// Values of [`guest_area::STATE`].
pub mod guest_state {
    /// No module is there, or it has said goodbye.
    pub const ABSENT: u64 = 0;
    /// A module is there and its epoch, head and features are valid.
    pub const ATTACHED: u64 = 1;
}

/// Packs a version the way [`header::VERSION`] holds it.
pub const fn pack_version(major: u16, minor: u16) -> u64 {
    major as u64 | (minor as u64) << 16
}

/// Undoes [`pack_version`]; bits above 31 are ignored.
pub const fn unpack_version(word: u64) -> (u16, u16) {
    (word as u16, (word >> 16) as u16)
}

/// Words of one slot of the ring and of the request ring.
pub const SLOT_WORDS: usize = 4;
/// Bytes of one slot.
pub const SLOT_BYTES: usize = SLOT_WORDS * 8;
/// Bytes of one outcome.
pub const OUTCOME_BYTES: usize = 8;
/// One slot, words in host order; in memory each word is little-endian.
pub type Slot = [u64; SLOT_WORDS];
/// Most slots one record may have.
pub const MAX_RECORD_SLOTS: usize = 11;
/// Longest file name, bytes; longer names lose their beginning.
pub const MAX_NAME: usize = 256;
/// Longest run, pages; longer ones are cut by the guest.
pub const MAX_RUN_PAGES: u32 = 4096;
/// Largest file id plus one; a guest that needs more forgets old files first.
pub const MAX_FILES: u32 = 1 << 20;

const FILE_SLOTS: usize = 3;

/// Where everything is in one shared memory, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Size of the whole shared memory, bytes.
    pub total_bytes: u64,
    /// Byte offset of the host area.
    pub host_area: u64,
    /// Byte offset of the guest area.
    pub guest_area: u64,
    /// Byte offset of the request slots.
    pub requests: u64,
    /// Number of request slots, a power of two.
    pub request_slots: u64,
    /// Byte offset of the outcome words.
    pub outcomes: u64,
    /// Byte offset of the ring slots.
    pub ring: u64,
    /// Number of ring slots, a power of two.
    pub ring_slots: u64,
}

impl Layout {
    /// Smallest shared memory that [`Layout::for_size`] can use.
    pub const MIN_BYTES: u64 = 64 * 1024;
    /// Largest shared memory that [`Layout::for_size`] can use.
    pub const MAX_BYTES: u64 = 256 * 1024 * 1024;

    /// The layout the host writes for a shared memory of `total_bytes`, a power of two
    /// between [`Layout::MIN_BYTES`] and [`Layout::MAX_BYTES`].
    pub const fn for_size(total_bytes: u64) -> Option<Layout> {
        if !total_bytes.is_power_of_two()
            || total_bytes < Self::MIN_BYTES
            || total_bytes > Self::MAX_BYTES
        {
            return None;
        }
        // Half of it is ring; its outcomes take a quarter of that; the first pages the rest.
        let ring_slots = total_bytes / 2 / SLOT_BYTES as u64;
        Some(Layout {
            total_bytes,
            host_area: PAGE_SIZE,
            guest_area: 2 * PAGE_SIZE,
            requests: 3 * PAGE_SIZE,
            request_slots: PAGE_SIZE / SLOT_BYTES as u64,
            outcomes: total_bytes / 4,
            ring: total_bytes / 2,
            ring_slots,
        })
    }

    /// The layout as header words, each with its byte offset.
    pub const fn header_words(&self) -> [(usize, u64); 8] {
        [
            (header::TOTAL_BYTES, self.total_bytes),
            (header::HOST_AREA, self.host_area),
            (header::GUEST_AREA, self.guest_area),
            (header::REQUESTS, self.requests),
            (header::REQUEST_SLOTS, self.request_slots),
            (header::OUTCOMES, self.outcomes),
            (header::RING, self.ring),
            (header::RING_SLOTS, self.ring_slots),
        ]
    }

    /// Reads a layout from header words and checks it against the real size of the shared
    /// memory: everything inside, page-aligned, no two areas in one page.
    pub fn from_header(
        mut word: impl FnMut(usize) -> u64,
        real_bytes: u64,
    ) -> Result<Layout, LayoutError> {
        if real_bytes < header::BYTES as u64 || word(header::MAGIC) != MAGIC {
            return Err(LayoutError::Magic);
        }
        let (major, minor) = unpack_version(word(header::VERSION));
        if major != VERSION_MAJOR {
            return Err(LayoutError::Version(major, minor));
        }
        let layout = Layout {
            total_bytes: word(header::TOTAL_BYTES),
            host_area: word(header::HOST_AREA),
            guest_area: word(header::GUEST_AREA),
            requests: word(header::REQUESTS),
            request_slots: word(header::REQUEST_SLOTS),
            outcomes: word(header::OUTCOMES),
            ring: word(header::RING),
            ring_slots: word(header::RING_SLOTS),
        };
        if layout.is_sound(real_bytes) {
            Ok(layout)
        } else {
            Err(LayoutError::Areas)
        }
    }

    fn is_sound(&self, real_bytes: u64) -> bool {
        if self.total_bytes > real_bytes
            || self.total_bytes > Self::MAX_BYTES
            || !self.ring_slots.is_power_of_two()
            || self.ring_slots < 2 * MAX_RECORD_SLOTS as u64
            || self.ring_slots > Self::MAX_BYTES
            || !self.request_slots.is_power_of_two()
            || self.request_slots > Self::MAX_BYTES
        {
            return false;
        }
        let slot = SLOT_BYTES as u64;
        let areas = [
            (0, PAGE_SIZE),
            (self.host_area, PAGE_SIZE),
            (self.guest_area, PAGE_SIZE),
            (self.requests, self.request_slots * slot),
            (self.outcomes, self.ring_slots * OUTCOME_BYTES as u64),
            (self.ring, self.ring_slots * slot),
        ];
        let mut i = 0;
        while i < areas.len() {
            let (start, bytes) = areas[i];
            if start % PAGE_SIZE != 0
                || start > self.total_bytes
                || bytes > self.total_bytes - start
            {
                return false;
            }
            let mut j = 0;
            while j < i {
                let (other, other_bytes) = areas[j];
                // Rounded up to pages: two writers never meet in one page.
                let end = start + bytes.next_multiple_of(PAGE_SIZE);
                let other_end = other + other_bytes.next_multiple_of(PAGE_SIZE);
                if start < other_end && other < end {
                    return false;
                }
                j += 1;
            }
            i += 1;
        }
        true
    }

    /// Byte offset of the ring slot at `position`.
    pub const fn ring_slot(&self, position: u64) -> u64 {
        self.ring + (position & (self.ring_slots - 1)) * SLOT_BYTES as u64
    }

    /// Byte offset of the outcome of the record that starts at `position`.
    pub const fn outcome(&self, position: u64) -> u64 {
        self.outcomes + (position & (self.ring_slots - 1)) * OUTCOME_BYTES as u64
    }

    /// Byte offset of the request slot at `position`.
    pub const fn request_slot(&self, position: u64) -> u64 {
        self.requests + (position & (self.request_slots - 1)) * SLOT_BYTES as u64
    }
}

/// Why a shared memory is not one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// The magic is missing: the device belongs to somebody else.
    Magic,
    /// A major version that this side does not speak.
    Version(u16, u16),
    /// Areas overlap, are unaligned or lie outside.
    Areas,
}

/// What a file is, the same in guests cloned from one image. A hint, never proof.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIdentity {
    /// UUID of the file system, or its device number and magic where it has none.
    pub fs_uuid: [u8; 16],
    /// Inode number.
    pub inode: u64,
    /// Size, bytes.
    pub size: u64,
    /// Modification time, nanoseconds since 1970; wraps in 2554.
    pub mtime_ns: u64,
    /// Inode generation.
    pub generation: u32,
    /// [`file_kind`].
    pub kind: u32,
}

/// Values of [`FileIdentity::kind`].
pub mod file_kind {
    /// A regular file.
    pub const REGULAR: u32 = 0;
    /// Text of the guest kernel.
    pub const KERNEL_TEXT: u32 = 1;
    /// Read-only data of the guest kernel.
    pub const KERNEL_RODATA: u32 = 2;
}

/// Pages that are contiguous in a file and in guest frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The file, as announced by [`Record::File`].
    pub file: u32,
    /// Number of pages, 1 to [`MAX_RUN_PAGES`].
    pub pages: u32,
    /// Index of the first page in the file.
    pub page: u64,
    /// Guest frame of the first page.
    pub gfn: u64,
}

/// Guest to host. A record takes one or more slots; the first word of the first slot is
/// `kind | slots << 8 | file << 32`, its bits 16–31 are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// First record of an epoch.
    Hello {
        /// The epoch, as in [`guest_area::EPOCH`].
        epoch: u64,
        /// One more than the highest guest frame.
        memory_pages: u64,
        /// The guest kernel's page size in wire pages, a power of two.
        pages_per_guest_page: u64,
    },
    /// Gives an identity to a file id, for this epoch or until the whole file is retracted.
    File {
        /// Id chosen by the guest, below [`MAX_FILES`].
        file: u32,
        /// What the file is.
        identity: FileIdentity,
        /// Its name, or nothing; at most [`MAX_NAME`] bytes of no particular encoding.
        name: &'a [u8],
    },
    /// Reports a run. Its pages stay pinned and unchanged until acknowledged or revoked.
    Run(Run),
    /// Pages of a file are no longer what was reported; all of it when `pages` is 0.
    Retract {
        /// The file.
        file: u32,
        /// First page.
        page: u64,
        /// Number of pages; 0 forgets the whole file and frees its id.
        pages: u64,
    },
    /// A pass over all processes has ended.
    EndOfPass {
        /// Number of the pass, from 1.
        pass: u64,
        /// Pages that were eligible in it.
        eligible: u64,
    },
    /// Last record of an epoch.
    Goodbye,
}

/// Record kinds, bits 0–7 of a record's first word.
pub mod record_kind {
    /// [`super::Record::Hello`]
    pub const HELLO: u8 = 1;
    /// [`super::Record::File`]
    pub const FILE: u8 = 2;
    /// [`super::Record::Run`]
    pub const RUN: u8 = 3;
    /// [`super::Record::Retract`]
    pub const RETRACT: u8 = 4;
    /// [`super::Record::EndOfPass`]
    pub const END_OF_PASS: u8 = 5;
    /// [`super::Record::Goodbye`]
    pub const GOODBYE: u8 = 6;
}

/// Why a record or request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// A kind this version does not know.
    Kind(u8),
    /// The wrong number of slots for its kind, or more than there are.
    Slots,
    /// Reserved bits are not zero.
    Reserved,
    /// A number outside its range.
    Range,
}

/// Room for the longest record.
pub type RecordBuffer = [Slot; MAX_RECORD_SLOTS];
/// An empty [`RecordBuffer`].
pub const EMPTY_RECORD: RecordBuffer = [[0; SLOT_WORDS]; MAX_RECORD_SLOTS];

const fn head_word(kind: u8, slots: usize, file: u32) -> u64 {
    kind as u64 | (slots as u64) << 8 | (file as u64) << 32
}

/// Number of slots that a record claims in its first word; check it before copying the rest.
pub const fn record_slots(first_word: u64) -> usize {
    (first_word >> 8) as usize & 0xff
}

impl<'a> Record<'a> {
    /// Slots that [`Record::encode`] will fill.
    pub const fn slots(&self) -> usize {
        match self {
            Record::File { name, .. } => {
                let len = if name.len() > MAX_NAME {
                    MAX_NAME
                } else {
                    name.len()
                };
                FILE_SLOTS + len.div_ceil(SLOT_BYTES)
            }
            _ => 1,
        }
    }

    /// Encodes into `buffer` and returns the number of slots. A name that is too long keeps
    /// its last [`MAX_NAME`] bytes, where the telling part of a path is.
    pub fn encode(&self, buffer: &mut RecordBuffer) -> usize {
        let slots = self.slots();
        let mut i = 0;
        while i < slots {
            buffer[i] = [0; SLOT_WORDS];
            i += 1;
        }
        match *self {
            Record::Hello {
                epoch,
                memory_pages,
                pages_per_guest_page,
            } => {
                let head = head_word(record_kind::HELLO, 1, 0);
                buffer[0] = [head, epoch, memory_pages, pages_per_guest_page];
            }
            Record::File {
                file,
                identity,
                name,
            } => {
                let name = if name.len() > MAX_NAME {
                    &name[name.len() - MAX_NAME..]
                } else {
                    name
                };
                let (low, high) = split_uuid(&identity.fs_uuid);
                buffer[0] = [
                    head_word(record_kind::FILE, slots, file),
                    low,
                    high,
                    identity.inode,
                ];
                buffer[1] = [
                    identity.size,
                    identity.mtime_ns,
                    u64::from(identity.generation) | u64::from(identity.kind) << 32,
                    name.len() as u64,
                ];
                // buffer[2] is reserved for what identifies content in a later minor version.
                for (chunk, i) in name.chunks(8).zip(0..) {
                    let mut word = [0; 8];
                    word[..chunk.len()].copy_from_slice(chunk);
                    buffer[FILE_SLOTS + i / SLOT_WORDS][i % SLOT_WORDS] = u64::from_le_bytes(word);
                }
            }
            Record::Run(run) => {
                let head = head_word(record_kind::RUN, 1, run.file);
                buffer[0] = [head, run.page, run.gfn, u64::from(run.pages)];
            }
            Record::Retract { file, page, pages } => {
                buffer[0] = [head_word(record_kind::RETRACT, 1, file), page, pages, 0];
            }
            Record::EndOfPass { pass, eligible } => {
                buffer[0] = [head_word(record_kind::END_OF_PASS, 1, 0), pass, eligible, 0];
            }
            Record::Goodbye => {
                buffer[0] = [head_word(record_kind::GOODBYE, 1, 0), 0, 0, 0];
            }
        }
        slots
    }

    /// Decodes a record from exactly its slots. `name` takes a file's name.
    pub fn decode(slots: &[Slot], name: &'a mut [u8; MAX_NAME]) -> Result<Record<'a>, DecodeError> {
        let Some(first) = slots.first() else {
            return Err(DecodeError::Slots);
        };
        let head = first[0];
        let kind = head as u8;
        if record_slots(head) != slots.len() {
            return Err(DecodeError::Slots);
        }
        if head >> 16 & 0xffff != 0 {
            return Err(DecodeError::Reserved);
        }
        let file = (head >> 32) as u32;
        let needs_file = matches!(
            kind,
            record_kind::FILE | record_kind::RUN | record_kind::RETRACT
        );
        if needs_file && file >= MAX_FILES {
            return Err(DecodeError::Range);
        }
        if !needs_file && (record_kind::HELLO..=record_kind::GOODBYE).contains(&kind) && file != 0 {
            return Err(DecodeError::Reserved);
        }
        if kind != record_kind::FILE
            && (record_kind::HELLO..=record_kind::GOODBYE).contains(&kind)
            && slots.len() != 1
        {
            return Err(DecodeError::Slots);
        }
        match kind {
            record_kind::HELLO => {
                if first[1] == 0 || !first[3].is_power_of_two() || first[3] > 16 {
                    return Err(DecodeError::Range);
                }
                Ok(Record::Hello {
                    epoch: first[1],
                    memory_pages: first[2],
                    pages_per_guest_page: first[3],
                })
            }
            record_kind::FILE => Self::decode_file(slots, file, name),
            record_kind::RUN => {
                let (page, gfn, pages) = (first[1], first[2], first[3]);
                if pages == 0
                    || pages > u64::from(MAX_RUN_PAGES)
                    || page.checked_add(pages).is_none_or(|end| end > 1 << 52)
                    || gfn.checked_add(pages).is_none_or(|end| end > 1 << 52)
                {
                    return Err(DecodeError::Range);
                }
                Ok(Record::Run(Run {
                    file,
                    pages: pages as u32,
                    page,
                    gfn,
                }))
            }
            record_kind::RETRACT => {
                if first[3] != 0 {
                    return Err(DecodeError::Reserved);
                }
                if first[1].checked_add(first[2]).is_none() {
                    return Err(DecodeError::Range);
                }
                Ok(Record::Retract {
                    file,
                    page: first[1],
                    pages: first[2],
                })
            }
            record_kind::END_OF_PASS => {
                if first[3] != 0 {
                    return Err(DecodeError::Reserved);
                }
                Ok(Record::EndOfPass {
                    pass: first[1],
                    eligible: first[2],
                })
            }
            record_kind::GOODBYE => {
                if first[1] | first[2] | first[3] != 0 {
                    return Err(DecodeError::Reserved);
                }
                Ok(Record::Goodbye)
            }
            other => Err(DecodeError::Kind(other)),
        }
    }

    fn decode_file(
        slots: &[Slot],
        file: u32,
        name: &'a mut [u8; MAX_NAME],
    ) -> Result<Record<'a>, DecodeError> {
        if slots.len() < FILE_SLOTS {
            return Err(DecodeError::Slots);
        }
        let (first, second) = (slots[0], slots[1]);
        let len = second[3];
        if len > MAX_NAME as u64 || slots.len() != FILE_SLOTS + (len as usize).div_ceil(SLOT_BYTES)
        {
            return Err(DecodeError::Slots);
        }
        if slots[2] != [0; SLOT_WORDS] {
            return Err(DecodeError::Reserved);
        }
        let len = len as usize;
        for i in 0..len.div_ceil(8) {
            let word = slots[FILE_SLOTS + i / SLOT_WORDS][i % SLOT_WORDS].to_le_bytes();
            let end = len.min(i * 8 + 8);
            name[i * 8..end].copy_from_slice(&word[..end - i * 8]);
        }
        Ok(Record::File {
            file,
            identity: FileIdentity {
                fs_uuid: join_uuid(first[1], first[2]),
                inode: first[3],
                size: second[0],
                mtime_ns: second[1],
                generation: second[2] as u32,
                kind: (second[2] >> 32) as u32,
            },
            name: &name[..len],
        })
    }
}

fn split_uuid(uuid: &[u8; 16]) -> (u64, u64) {
    let all = u128::from_le_bytes(*uuid);
    (all as u64, (all >> 64) as u64)
}

fn join_uuid(low: u64, high: u64) -> [u8; 16] {
    (u128::from(low) | u128::from(high) << 64).to_le_bytes()
}

/// What became of a record, one word per ring slot. Only the first slot of a record has one.
///
/// `status | reason << 8 | shared << 16 | remembered << 32`, bits 48–63 zero; `shared` and
/// `remembered` count pages of a run, what is missing to its length was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Outcome {
    /// [`reason`]: why pages were refused, 0 when none was.
    pub reason: u8,
    /// Pages that are shared now.
    pub shared: u16,
    /// Pages noted, because no other reporter had them yet.
    pub remembered: u16,
}

/// Status of an outcome that is there, bits 0–7.
pub const OUTCOME_VALID: u8 = 1;

impl Outcome {
    /// The outcome as the word in shared memory.
    pub const fn to_word(self) -> u64 {
        OUTCOME_VALID as u64
            | (self.reason as u64) << 8
            | (self.shared as u64) << 16
            | (self.remembered as u64) << 32
    }

    /// Reads an outcome; `None` when the word holds none.
    pub const fn from_word(word: u64) -> Option<Outcome> {
        if word as u8 != OUTCOME_VALID {
            return None;
        }
        Some(Outcome {
            reason: (word >> 8) as u8,
            shared: (word >> 16) as u16,
            remembered: (word >> 32) as u16,
        })
    }
}

/// Why pages were refused, [`Outcome::reason`].
pub mod reason {
    /// Nothing was refused.
    pub const NONE: u8 = 0;
    /// The record was malformed.
    pub const MALFORMED: u8 = 1;
    /// The run names a file that was not announced.
    pub const UNKNOWN_FILE: u8 = 2;
    /// Guest frames outside of guest memory.
    pub const OUTSIDE_MEMORY: u8 = 3;
    /// Memory that cannot be shared: mapped by another process, locked, huge pages, a device.
    pub const UNSUITABLE_MEMORY: u8 = 4;
    /// The bytes changed while they were looked at, or are not what the store has.
    pub const DIFFERENT: u8 = 5;
    /// The host is at its limit of mappings.
    pub const MAPPING_LIMIT: u8 = 6;
    /// The store is full.
    pub const STORE_FULL: u8 = 7;
    /// Sharing is paused by the operator, or the VM has no trust group.
    pub const PAUSED: u8 = 8;
    /// The store cannot be reached now; the page may be reported again.
    pub const NO_STORE: u8 = 9;
    /// An error of the host's kernel.
    pub const HOST_ERROR: u8 = 10;
    /// Too many files announced.
    pub const TOO_MANY_FILES: u8 = 11;
    /// The guest revoked the report before the host claimed it.
    pub const REVOKED: u8 = 12;
    /// One more than the largest reason.
    pub const COUNT: usize = 13;

    /// The reason's name as the operator sees it.
    pub const fn name(reason: u8) -> &'static str {
        match reason {
            NONE => "none",
            MALFORMED => "malformed",
            UNKNOWN_FILE => "unknown-file",
            OUTSIDE_MEMORY => "outside-memory",
            UNSUITABLE_MEMORY => "unsuitable-memory",
            DIFFERENT => "different",
            MAPPING_LIMIT => "mapping-limit",
            STORE_FULL => "store-full",
            PAUSED => "paused",
            NO_STORE => "no-store",
            HOST_ERROR => "host-error",
            TOO_MANY_FILES => "too-many-files",
            REVOKED => "revoked",
            _ => "unknown",
        }
    }
}

/// Host to guest. Takes one slot; the first word is `kind | file << 32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Report these pages of a file again, if they are still there.
    Report {
        /// The file.
        file: u32,
        /// First page.
        page: u64,
        /// Number of pages; 0 is the whole file.
        pages: u64,
    },
    /// Forget everything that was reported and report it again.
    Rescan,
}

/// Request kinds, bits 0–7 of a request's first word.
pub mod request_kind {
    /// [`super::Request::Report`]
    pub const REPORT: u8 = 1;
    /// [`super::Request::Rescan`]
    pub const RESCAN: u8 = 2;
}

impl Request {
    /// Encodes into one slot.
    pub const fn encode(&self) -> Slot {
        match *self {
            Request::Report { file, page, pages } => [
                request_kind::REPORT as u64 | (file as u64) << 32,
                page,
                pages,
                0,
            ],
            Request::Rescan => [request_kind::RESCAN as u64, 0, 0, 0],
        }
    }

    /// Decodes one slot. A guest skips what it does not know.
    pub const fn decode(slot: &Slot) -> Result<Request, DecodeError> {
        let file = (slot[0] >> 32) as u32;
        match slot[0] as u8 {
            request_kind::REPORT if file < MAX_FILES && slot[1].checked_add(slot[2]).is_some() => {
                Ok(Request::Report {
                    file,
                    page: slot[1],
                    pages: slot[2],
                })
            }
            request_kind::REPORT => Err(DecodeError::Range),
            request_kind::RESCAN => Ok(Request::Rescan),
            other => Err(DecodeError::Kind(other)),
        }
    }
}
