// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What guests send: files, runs of their pages, and what is taken back.

use super::{MAX_FILES, MAX_NAME, MAX_RECORD_SLOTS, MAX_RUN_PAGES, SLOT_BYTES, SLOT_WORDS, Slot};

const FILE_SLOTS: usize = 3;

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
        /// The epoch, as in [`super::guest_area::EPOCH`].
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
        /// Whether what is shared of them must not stay so.
        unshare: bool,
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
            Record::Retract {
                file,
                page,
                pages,
                unshare,
            } => {
                let head = head_word(record_kind::RETRACT, 1, file);
                buffer[0] = [head, page, pages, u64::from(unshare)];
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
                if first[3] > 1 {
                    return Err(DecodeError::Reserved);
                }
                if first[1].checked_add(first[2]).is_none() {
                    return Err(DecodeError::Range);
                }
                Ok(Record::Retract {
                    file,
                    page: first[1],
                    pages: first[2],
                    unshare: first[3] == 1,
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
