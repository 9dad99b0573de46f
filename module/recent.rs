// SPDX-License-Identifier: GPL-2.0

//! What many processes map alike: file ranges that a walk has found already.

use crate::list::List;
use crate::ranges::Range;

/// How many are remembered, each in the one place its hash gives it.
const SLOTS: usize = 1 << SLOT_BITS;
const SLOT_BITS: u32 = 9;

#[derive(Clone, Copy)]
struct Slot {
    key: usize,
    range: Range,
}

/// File ranges found lately. It forgets, but never knows what it was not told.
pub(crate) struct Recent {
    /// Empty without memory for it.
    slots: List<Slot>,
}

impl Recent {
    pub(crate) fn new() -> Self {
        let mut slots = List::new();
        let nothing = Slot {
            key: 0,
            range: Range { start: 0, end: 0 },
        };
        // Without memory every range is looked at as often as it is found.
        let _ = slots.fill(SLOTS, nothing);
        Self { slots }
    }

    /// Whether this very range was noted.
    pub(crate) fn knows(&self, key: usize, range: Range) -> bool {
        let slot = self.slots.get(place(key, range));
        !range.is_empty() && slot.is_some_and(|slot| slot.key == key && slot.range == range)
    }

    /// Notes a range.
    pub(crate) fn note(&mut self, key: usize, range: Range) {
        if let Some(slot) = self.slots.get_mut(place(key, range)) {
            *slot = Slot { key, range };
        }
    }
}

fn place(key: usize, range: Range) -> usize {
    let mixed = (key as u64).wrapping_add(range.start.wrapping_mul(0xff51_afd7_ed55_8ccd));
    // The highest bits depend on all of both.
    (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - SLOT_BITS)) as usize
}
