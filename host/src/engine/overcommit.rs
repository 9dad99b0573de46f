// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whether the kernel charges in full for what is only mapped (`vm.overcommit_memory=2`).
//!
//! A private writable mapping could then be refused half-way: before Linux 6.12 what lay there is
//! unmapped first, and guest memory would have a hole.

use std::fs;
use std::time::{Duration, Instant};

/// After which the operator may have changed it.
const OLD: Duration = Duration::from_secs(1);

/// What of it is known.
#[derive(Debug)]
pub(super) struct Overcommit {
    strict: bool,
    looked_at: Instant,
}

impl Overcommit {
    pub(super) fn now() -> Self {
        let mode = fs::read_to_string("/proc/sys/vm/overcommit_memory");
        Self {
            strict: mode.is_ok_and(|mode| mode.trim() == "2"),
            looked_at: Instant::now(),
        }
    }

    /// Whether it is strict, as of a second ago at most.
    pub(super) fn is_strict(&mut self) -> bool {
        if self.looked_at.elapsed() > OLD {
            *self = Self::now();
        }
        self.strict
    }

    /// Why nothing is shared, as of the last look.
    pub(super) fn complaint(&self) -> Option<String> {
        const STRICT: &str = "vm.overcommit_memory is 2, under which every overlay is charged as if \
                              it were a copy; set it to 0 or 1";
        self.strict.then(|| STRICT.to_owned())
    }
}
