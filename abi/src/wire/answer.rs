// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What hosts send: outcomes of records, and requests.

use super::{DecodeError, MAX_FILES, Slot};

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
    /// Sharing is paused by the operator, or disabled for this VM.
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
