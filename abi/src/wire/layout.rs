// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Where everything is in a shared memory of some size.

use super::{
    MAGIC, MAX_RECORD_SLOTS, OUTCOME_BYTES, PAGE_SIZE, SLOT_BYTES, VERSION_MAJOR, header,
    unpack_version,
};

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
