// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whose page must be looked after by whoever locks guest memory next.
//!
//! `tests/waiters.rs` compiles this file again with `loom`'s types in place of those of
//! [`super::primitives`].

use super::primitives::{AtomicBool, Mutex, Ordering};

/// Addresses where threads wait for the page, or to be let write.
#[derive(Debug)]
pub(super) struct Waiters {
    addresses: Mutex<Vec<usize>>,
    /// Whether there may be one, to be asked without the lock.
    any: AtomicBool,
}

impl Waiters {
    /// None.
    pub(super) fn new() -> Self {
        Self {
            addresses: Mutex::new(Vec::new()),
            any: AtomicBool::new(false),
        }
    }

    pub(super) fn add(&self, address: usize) {
        self.with_addresses(|addresses| addresses.push(address));
        // Only now: whoever sees it finds the address.
        self.any.store(true, Ordering::Release);
    }

    pub(super) fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// All that were added and not taken yet. None is missed: one that is added after they were
    /// taken is announced again.
    pub(super) fn take(&self) -> Vec<usize> {
        // A swap is a write to everybody's cache; nearly always there is none.
        if self.any() && self.any.swap(false, Ordering::AcqRel) {
            return self.with_addresses(std::mem::take);
        }
        Vec::new()
    }

    fn with_addresses<T>(&self, act: impl FnOnce(&mut Vec<usize>) -> T) -> T {
        // Whoever panicked with the lock left a list of addresses.
        let mut addresses = match self.addresses.lock() {
            Ok(addresses) => addresses,
            Err(poisoned) => poisoned.into_inner(),
        };
        act(&mut addresses)
    }
}
