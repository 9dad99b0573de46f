// SPDX-License-Identifier: GPL-2.0

//! A queue of what was reported and not yet acknowledged, oldest first.

use crate::list::{List, NoMemory};

/// First in, first out. Gives its memory back when it runs empty.
pub(crate) struct Fifo<T> {
    slots: List<Option<T>>,
    head: usize,
    len: usize,
}

impl<T> Fifo<T> {
    /// Up to this many slots are kept while empty.
    const KEEP: usize = 64;

    pub(crate) const fn new() -> Self {
        Self {
            slots: List::new(),
            head: 0,
            len: 0,
        }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room for one more item.
    pub(crate) fn reserve(&mut self) -> Result<(), NoMemory> {
        if self.len < self.slots.len() {
            return Ok(());
        }
        let mut slots = List::new();
        let wanted = (self.len * 2).max(16);
        slots.reserve(wanted)?;
        for i in 0..self.len {
            let slot = (self.head + i) % self.slots.len();
            slots.push(self.slots[slot].take())?;
        }
        for _ in self.len..wanted {
            slots.push(None)?;
        }
        self.slots = slots;
        self.head = 0;
        Ok(())
    }

    /// Appends an item; hands it back when there is no memory.
    pub(crate) fn push(&mut self, item: T) -> Result<(), T> {
        if self.reserve().is_err() {
            return Err(item);
        }
        let slot = (self.head + self.len) % self.slots.len();
        self.slots[slot] = Some(item);
        self.len += 1;
        Ok(())
    }

    /// The oldest item.
    pub(crate) fn front(&self) -> Option<&T> {
        if self.len == 0 {
            return None;
        }
        self.slots[self.head].as_ref()
    }

    /// Removes the oldest item.
    pub(crate) fn pop(&mut self) -> Option<T> {
        if self.len == 0 {
            return None;
        }
        let item = self.slots[self.head].take();
        self.head = (self.head + 1) % self.slots.len();
        self.len -= 1;
        self.shrink();
        item
    }

    /// Removes the newest item.
    pub(crate) fn pop_newest(&mut self) -> Option<T> {
        if self.len == 0 {
            return None;
        }
        self.len -= 1;
        let slot = (self.head + self.len) % self.slots.len();
        let item = self.slots[slot].take();
        self.shrink();
        item
    }

    /// The newest item.
    pub(crate) fn newest(&self) -> Option<&T> {
        if self.len == 0 {
            return None;
        }
        self.slots[(self.head + self.len - 1) % self.slots.len()].as_ref()
    }

    fn shrink(&mut self) {
        if self.len == 0 {
            self.head = 0;
            if self.slots.len() > Self::KEEP {
                self.slots.clear();
            }
        }
    }
}
