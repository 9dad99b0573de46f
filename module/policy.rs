// SPDX-License-Identifier: GPL-2.0

//! Decisions, and nothing but decisions: when to look, when to try again, when to give up.

use crate::wire::reason;

/// A host that acknowledges nothing for this long has its reports revoked. A machine that is to
/// sleep waits as long for it, and must not for the 20 s after which the kernel gives up sleeping.
pub(crate) const STALL_MS: u64 = 10_000;
/// A pass that waits this long for the host is given up, so that it keeps no file busy.
pub(crate) const PASS_WAIT_MS: u64 = 2_000;
/// How long unloading waits for records that the host has claimed.
pub(crate) const UNLOAD_WAIT_MS: u64 = 10_000;
/// How long a restart of the machine waits for the thread to end its work.
pub(crate) const RESTART_WAIT_MS: u64 = UNLOAD_WAIT_MS + 2 * GOODBYE_WAIT_MS;
/// How long unloading waits for the host to take note of it.
pub(crate) const GOODBYE_WAIT_MS: u64 = 500;
/// Without interrupts the host's answers are looked for this often, at first.
pub(crate) const POLL_MS: u64 = 10;
/// Without interrupts the host's requests are looked for this often; every pass does so, too.
const IDLE_POLL_MS: u64 = 5_000;
/// How often a host that is not there yet is looked for.
pub(crate) const ATTACH_POLL_MS: u64 = 500;
/// From the first touch of a new file to the pass that looks for it: programs touch more of it,
/// and other files, meanwhile.
const SETTLE_MS: u64 = 100;
/// How long nothing is looked for after memory was short.
const REST_MS: u64 = 10_000;
/// Processes that a pass could not look at are looked for again after this time at the latest.
pub(crate) const SKIPPED_MS: u64 = 5_000;
/// Longest sleep in a kernel that does not tell of new files.
pub(crate) const POLLING_SLEEP_MS: u64 = 5_000;
/// A file that was found by none of this many passes is forgotten.
pub(crate) const KEEP_PASSES: u32 = 16;
/// Refused pages are tried again after at most two to the power of this many passes.
const MAX_BACKOFF: u8 = 6;

/// Whether this guest has anything to tell its host; if not, why.
pub(crate) const fn may_load(is_confidential: bool) -> Result<(), &'static str> {
    if is_confidential {
        return Err(
            "refused: this guest's memory is encrypted (SEV, TDX), so its host cannot compare and \
             share pages; load pagefusion in guests that are not confidential only",
        );
    }
    Ok(())
}

/// Most pages that may be held for the host: what it and the operator allow, but not more than a
/// sixteenth of memory, and one page at least.
pub(crate) fn most_in_flight(host_limit: u64, knob: u64, memory_pages: u64) -> u64 {
    host_limit.min(knob).min(memory_pages / 16).max(1)
}

/// A moment, to a sixteenth of a second, in little memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment(u32);

impl Moment {
    const SHIFT: u32 = 6;
    pub(crate) const BOOT: Self = Self(0);

    /// The moment `now_ms` falls in.
    pub(crate) const fn at(now_ms: u64) -> Self {
        Self((now_ms >> Self::SHIFT) as u32)
    }

    /// Milliseconds from the end of that moment until something is `age_ms` old; 0 when it is.
    pub(crate) const fn until_age(self, age_ms: u64, now_ms: u64) -> u64 {
        let since = (self.0 as u64 + 1) << Self::SHIFT;
        (since + age_ms).saturating_sub(now_ms)
    }
}

/// Without interrupts, when to look at what the host has written; `waited_ms` is how long it has
/// not answered.
pub(crate) fn poll_ms(is_waiting: bool, waited_ms: u64) -> u64 {
    if is_waiting {
        (waited_ms / 4).clamp(POLL_MS, ATTACH_POLL_MS)
    } else {
        IDLE_POLL_MS
    }
}

/// Whether refused pages may be accepted later.
pub(crate) const fn is_retryable(why: u8) -> bool {
    !matches!(why, reason::MALFORMED | reason::UNSUITABLE_MEMORY)
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
    /// No pass before this, whatever happens.
    rest_until_ms: u64,
    /// No pass has ended since that rest began.
    rested: bool,
    /// When the last pass ended, and how long to sleep after it at least.
    ended_ms: u64,
    sleep_ms: u64,
}

impl Schedule {
    /// The first pass is due at once.
    pub(crate) const fn new() -> Self {
        Self {
            next_ms: 0,
            idle: 0,
            rest_until_ms: 0,
            rested: false,
            ended_ms: 0,
            sleep_ms: 0,
        }
    }

    /// Makes a pass due now.
    pub(crate) fn hurry(&mut self) {
        self.next_ms = 0;
        self.idle = 0;
    }

    /// A knob was written: a pass is due now, so that what it says holds. Sleeps stay as long as
    /// they have become.
    pub(crate) fn knob_written(&mut self) {
        self.next_ms = 0;
    }

    /// A new file was touched: makes a pass due soon, when more of it has been.
    pub(crate) fn news(&mut self, now_ms: u64) {
        let soon = (now_ms + SETTLE_MS).max(self.ended_ms + self.sleep_ms);
        self.next_ms = self.next_ms.min(soon);
        self.idle = 0;
    }

    /// Memory is short: what was forgotten is not to be remembered at once. One rest for each pass:
    /// a kernel whose page cache fills its memory asks for some all the time.
    pub(crate) fn rest(&mut self, now_ms: u64) {
        if !self.rested {
            self.rest_until_ms = now_ms + REST_MS;
            self.rested = true;
        }
    }

    /// A pass has ended; after one that found nothing new the time doubles.
    pub(crate) fn pass_ended(&mut self, now_ms: u64, news: bool, sleep_ms: u64, most_ms: u64) {
        self.idle = if news { 0 } else { (self.idle + 1).min(16) };
        let doubled = sleep_ms.saturating_mul(1 << self.idle);
        self.next_ms = now_ms + doubled.min(most_ms.max(sleep_ms));
        self.ended_ms = now_ms;
        self.sleep_ms = sleep_ms;
        self.rested = false;
    }

    /// Something is due in so many milliseconds that cannot wait for the next pass.
    pub(crate) fn due_in(&mut self, now_ms: u64, ms: u64) {
        self.next_ms = self.next_ms.min(now_ms + ms);
    }

    /// Milliseconds until the next pass is due.
    pub(crate) fn wait_ms(&self, now_ms: u64) -> u64 {
        self.next_ms.max(self.rest_until_ms).saturating_sub(now_ms)
    }
}
