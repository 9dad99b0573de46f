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
//! These files allocate nothing, have no dependency and no `crate::` path.

mod answer;
mod layout;
mod record;

pub use self::answer::{OUTCOME_VALID, Outcome, Request, reason, request_kind};
pub use self::layout::{Layout, LayoutError};
pub use self::record::{
    DecodeError, EMPTY_RECORD, FileIdentity, Record, RecordBuffer, Run, file_kind, record_kind,
    record_slots,
};

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
