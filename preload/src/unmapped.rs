// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is unmapped while QEMU's monitor is asked where guest memory is: its answer may be older
//! than that.
//!
//! `tests/hand_off.rs` compiles this file again with `loom`'s types in place of those of
//! [`crate::primitives`].

use crate::primitives::Mutex;
use std::ops::Range;
use std::sync::PoisonError;

/// What was unmapped since the monitor was asked; nothing is kept while it is not.
#[derive(Debug)]
pub(crate) struct Unmapped(Mutex<Option<Vec<Range<usize>>>>);

impl Unmapped {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// The monitor is about to be asked.
    pub(crate) fn begin(&self) {
        self.with(|noted| *noted = Some(Vec::new()));
    }

    /// This was unmapped, by who has guest memory locked since before.
    pub(crate) fn note(&self, ranges: &[Range<usize>]) {
        self.with(|noted| {
            if let Some(noted) = noted {
                noted.extend_from_slice(ranges);
            }
        });
    }

    /// What was unmapped meanwhile. No more can be until who calls this unlocks guest memory.
    pub(crate) fn end(&self) -> Vec<Range<usize>> {
        self.with(Option::take).unwrap_or_default()
    }

    fn with<T>(&self, act: impl FnOnce(&mut Option<Vec<Range<usize>>>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
