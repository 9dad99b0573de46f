// SPDX-License-Identifier: GPL-2.0

//! A growable array over the kernel's allocator, with the few operations that the pure files
//! need. `list_std.rs` is its twin for `cargo test`; both include `list_ops.rs`.

use kernel::alloc::flags::{__GFP_NOWARN, GFP_KERNEL};
use kernel::alloc::{Flags, KVVec};
use kernel::bindings;

/// Rather no memory than that somebody is killed for it, which `GFP_KERNEL` alone may do.
// SAFETY: As large as a `u32`, which the compiler checks, and with a `u32` in it, `Flags` is nothing
// but that; any value of it may be. The crate has no name for this flag.
const NORETRY: Flags =
    unsafe { core::mem::transmute::<u32, Flags>(1 << bindings::___GFP_NORETRY_BIT) };

/// Memory could not be had. The caller drops what it was about to remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoMemory;

/// A growable array that never grows by more than a quarter beyond what it holds.
pub(crate) struct List<T> {
    items: KVVec<T>,
}

impl<T> List<T> {
    /// An empty list, which owns no memory.
    pub(crate) const fn new() -> Self {
        Self {
            items: KVVec::new(),
        }
    }

    /// Makes the capacity exactly `capacity`, which must hold all items.
    fn reallocate(&mut self, capacity: usize) -> Result<(), NoMemory> {
        let flags = GFP_KERNEL | __GFP_NOWARN | NORETRY;
        let mut items = KVVec::with_capacity(capacity, flags).map_err(|_| NoMemory)?;
        for item in self.items.drain_all() {
            // `capacity` holds all of them.
            let _ = items.push_within_capacity(item);
        }
        self.items = items;
        Ok(())
    }

    /// Appends an item for which there is room.
    fn append(&mut self, item: T) -> Result<(), NoMemory> {
        self.items.push_within_capacity(item).map_err(|_| NoMemory)
    }
}

include!("list_ops.rs");
