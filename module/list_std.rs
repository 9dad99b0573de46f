// SPDX-License-Identifier: GPL-2.0

//! The twin of `list.rs` for `cargo test`, over `std`. Memory can be made to run out.

use std::cell::Cell;

/// Memory could not be had. The caller drops what it was about to remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoMemory;

thread_local! {
    /// Which of the next allocations are denied, from the lowest bit on.
    static DENIED: Cell<u64> = const { Cell::new(0) };
}

/// Denies those of this thread's next 64 allocations whose bits are set, and none after them.
pub(crate) fn deny(allocations: u64) {
    DENIED.set(allocations);
}

fn may_allocate() -> bool {
    let denied = DENIED.get();
    DENIED.set(denied >> 1);
    denied & 1 == 0
}

/// A growable array that never grows by more than a quarter beyond what it holds.
pub(crate) struct List<T> {
    items: Vec<T>,
}

impl<T> List<T> {
    /// An empty list, which owns no memory.
    pub(crate) const fn new() -> Self {
        Self { items: Vec::new() }
    }

    fn reallocate(&mut self, capacity: usize) -> Result<(), NoMemory> {
        if !may_allocate() {
            return Err(NoMemory);
        }
        let mut items = Vec::new();
        items.reserve_exact(capacity);
        items.append(&mut self.items);
        self.items = items;
        Ok(())
    }

    fn append(&mut self, item: T) -> Result<(), NoMemory> {
        if self.items.len() == self.items.capacity() {
            return Err(NoMemory);
        }
        self.items.push(item);
        Ok(())
    }
}

include!("list_ops.rs");
