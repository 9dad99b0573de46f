// SPDX-License-Identifier: GPL-2.0

//! Decisions, and nothing but decisions: when to look, when to try again, when to give up.

use crate::wire::reason;

/// A host that acknowledges nothing for this long has its reports revoked.
pub(crate) const STALL_MS: u64 = 10_000;
/// A pass that waits this long for the host is given up, so that it keeps no file busy.
pub(crate) const PASS_WAIT_MS: u64 = 2_000;
/// How long unloading waits for records that the host has claimed.
pub(crate) const UNLOAD_WAIT_MS: u64 = 10_000;
/// How long unloading waits for the host to take note of it.
pub(crate) const GOODBYE_WAIT_MS: u64 = 500;
/// Without interrupts the host's answers are looked for this often.
pub(crate) const POLL_MS: u64 = 10;
/// How often a host that is not there yet is looked for.
pub(crate) const ATTACH_POLL_MS: u64 = 500;
/// A file that was found by none of this many passes is forgotten.
pub(crate) const KEEP_PASSES: u32 = 16;
/// Refused pages are tried again after at most two to the power of this many passes.
const MAX_BACKOFF: u8 = 6;

/// Most pages that may be held for the host: what it allows, but not more than a sixteenth of
/// memory, and one page at least.
pub(crate) fn most_in_flight(host_limit: u64, memory_pages: u64) -> u64 {
    host_limit.min(8192).min(memory_pages / 16).max(1)
}

/// Whether refused pages may be accepted later.
pub(crate) const fn is_retryable(why: u8) -> bool {
    !matches!(
        why,
        reason::MALFORMED | reason::OUTSIDE_MEMORY | reason::UNSUITABLE_MEMORY
    )
}

/// Passes to let go by after the `tries`-th refusal.
pub(crate) const fn backoff_passes(tries: u8) -> u32 {
    1 << (if tries < MAX_BACKOFF {
        tries
    } else {
        MAX_BACKOFF
    })
}

/// When the next pass is due.
pub(crate) struct Schedule {
    next_ms: u64,
    idle: u32,
}

impl Schedule {
    /// The first pass is due at once.
    pub(crate) const fn new() -> Self {
        Self {
            next_ms: 0,
            idle: 0,
        }
    }

    /// Makes a pass due now.
    pub(crate) fn hurry(&mut self) {
        self.next_ms = 0;
        self.idle = 0;
    }

    /// A pass has ended; after one that found nothing new the time doubles.
    pub(crate) fn pass_ended(&mut self, now_ms: u64, news: bool, sleep_ms: u64, most_ms: u64) {
        self.idle = if news { 0 } else { (self.idle + 1).min(16) };
        let doubled = sleep_ms.saturating_mul(1 << self.idle);
        self.next_ms = now_ms + doubled.min(most_ms.max(sleep_ms));
    }

    /// Milliseconds until the next pass is due.
    pub(crate) fn wait_ms(&self, now_ms: u64) -> u64 {
        self.next_ms.saturating_sub(now_ms)
    }
}
