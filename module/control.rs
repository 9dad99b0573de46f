// SPDX-License-Identifier: GPL-2.0

//! Knobs and statistics, shared between the worker and sysfs. Each is one atomic number; no two
//! of them need to agree, so that any may be written at any moment of a pass.
//!
//! The one lock is that of the list of excluded names. It is held for one edit or for comparing
//! one name, and nothing else is taken or waited for meanwhile.

use crate::exclude::{EditError, Patterns};
use crate::thread;
use crate::values::{self, Invalid, Scope, Text};
use crate::wire::reason;
use core::fmt::{self, Write};
use core::ops::RangeInclusive;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Full, ordering::Relaxed, Atomic};

/// What a file in sysfs shows, and takes if it can be written.
pub(crate) trait Value: Sync {
    /// Writes the value as text.
    fn show(&self, text: &mut Text<'_>) -> fmt::Result;

    /// Takes a new value; refuses what makes no sense and then changes nothing.
    fn store(&self, _text: &[u8]) -> Result {
        Err(EINVAL)
    }
}

impl From<Invalid> for Error {
    fn from(_: Invalid) -> Self {
        EINVAL
    }
}

impl From<EditError> for Error {
    fn from(error: EditError) -> Self {
        match error {
            EditError::Invalid => EINVAL,
            EditError::TooLong => ENOSPC,
            EditError::NoMemory => ENOMEM,
        }
    }
}

/// One number.
pub(crate) struct Number(Atomic<u64>);

impl Number {
    const fn new(value: u64) -> Self {
        Self(Atomic::new(value))
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// Adds to a number that one thread writes.
    pub(crate) fn add(&self, more: u64) {
        self.set(self.get().wrapping_add(more));
    }

    pub(crate) fn raise(&self, value: u64) {
        if value > self.get() {
            self.set(value);
        }
    }
}

impl Value for Number {
    fn show(&self, text: &mut Text<'_>) -> fmt::Result {
        writeln!(text, "{}", self.get())
    }
}

/// A number that may be written.
pub(crate) struct Knob {
    value: Number,
    default: u64,
    allowed: RangeInclusive<u64>,
}

impl Knob {
    const fn new(default: u64, allowed: RangeInclusive<u64>) -> Self {
        Self {
            value: Number::new(default),
            default,
            allowed,
        }
    }

    /// Sets it; refuses what is out of range and then changes nothing.
    pub(crate) fn set(&self, value: u64) -> Result {
        if !self.allowed.contains(&value) {
            return Err(EINVAL);
        }
        self.value.set(value);
        Ok(())
    }

    /// Sets a knob that has its default, which does not suit this kernel.
    pub(crate) fn replace_default(&self, value: u64) {
        let _ = self.value.0.cmpxchg(self.default, value, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.value.get()
    }
}

impl Value for Knob {
    fn show(&self, text: &mut Text<'_>) -> fmt::Result {
        self.value.show(text)
    }

    fn store(&self, text: &[u8]) -> Result {
        self.set(values::number(text)?)
    }
}

/// The knob that takes one word of [`Scope`].
pub(crate) struct ScopeKnob(Number);

impl ScopeKnob {
    const fn new(scope: Scope) -> Self {
        Self(Number::new(scope as u64))
    }

    pub(crate) fn get(&self) -> Scope {
        Scope::from_index(self.0.get() as usize)
    }
}

impl Value for ScopeKnob {
    fn show(&self, text: &mut Text<'_>) -> fmt::Result {
        values::show_words(text, Scope::WORDS, self.get() as usize)
    }

    fn store(&self, text: &[u8]) -> Result {
        self.0.set(values::word(text, Scope::WORDS)? as u64);
        Ok(())
    }
}

kernel::sync::global_lock! {
    // SAFETY: [`Exclusions::new`] initialises it before there is anybody to use it.
    unsafe(uninit) static PATTERNS: Mutex<Patterns> = Patterns::new();
}

/// The memory of the list of excluded names; dropping it empties the list.
pub(crate) struct Exclusions(());

impl Exclusions {
    /// # Safety
    ///
    /// Must be called once, before the list is used.
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: By this function's requirements.
        unsafe { PATTERNS.init() };
        Self(())
    }
}

impl Drop for Exclusions {
    fn drop(&mut self) {
        *PATTERNS.lock() = Patterns::new();
    }
}

/// The knob that takes patterns of names.
pub(crate) struct ExcludeKnob {
    /// Counts the lists there have been. The first is empty.
    version: Number,
}

impl ExcludeKnob {
    const fn new() -> Self {
        Self {
            version: Number::new(0),
        }
    }

    /// Differs when the list does. 0 is a list on which no file is.
    pub(crate) fn version(&self) -> u32 {
        self.version.get() as u32
    }

    /// Whether a file of this name is on the list.
    pub(crate) fn has(&self, path: &[u8]) -> bool {
        PATTERNS.lock().has(path)
    }
}

impl Value for ExcludeKnob {
    fn show(&self, text: &mut Text<'_>) -> fmt::Result {
        let patterns = PATTERNS.lock();
        if patterns.is_empty() {
            return text.append(b"\n");
        }
        text.append(patterns.as_text())
    }

    fn store(&self, text: &[u8]) -> Result {
        let mut patterns = PATTERNS.lock();
        let edited = patterns.edit(text)?;
        *patterns = edited;
        self.version.add(1);
        Ok(())
    }
}

/// CPU time of the worker threads there have been.
pub(crate) struct CpuTime;

impl Value for CpuTime {
    fn show(&self, text: &mut Text<'_>) -> fmt::Result {
        writeln!(text, "{}", thread::cpu_ns() / 1000)
    }
}

macro_rules! control {
    (
        knobs { $($(#[$knob_doc:meta])* $knob:ident: $type:ident = $new:expr;)* }
        statistics { $($(#[$stat_doc:meta])* $stat:ident;)* }
        refusals { $($refusal:ident: $reason:ident;)* }
    ) => {
        /// All knobs and statistics.
        pub(crate) struct Control {
            $($(#[$knob_doc])* pub(crate) $knob: $type,)*
            $($(#[$stat_doc])* pub(crate) $stat: Number,)*
            $(pub(crate) $refusal: Number,)*
            pub(crate) cpu_usecs: CpuTime,
            owner: Number,
        }

        /// The one set of them: there is one worker and one directory.
        pub(crate) static CONTROL: Control = Control {
            $($knob: $new,)*
            $($stat: Number::new(0),)*
            $($refusal: Number::new(0),)*
            cpu_usecs: CpuTime,
            owner: Number::new(0),
        };

        impl Control {
            /// Shows how many pages the host refused for each reason.
            pub(crate) fn set_refusals(&self, pages: &[u64; reason::COUNT]) {
                $(self.$refusal.set(pages[usize::from(reason::$reason)]);)*
            }

            /// How many pages the host refused for each reason, as shown.
            pub(crate) fn refusals(&self) -> [u64; reason::COUNT] {
                let mut pages = [0; reason::COUNT];
                $(pages[usize::from(reason::$reason)] = self.$refusal.get();)*
                pages
            }
        }

        /// Calls `$with!` with the names of all knobs and of all statistics.
        macro_rules! for_each_value {
            ($with:ident) => { $with! { [$($knob)*] [$($stat)* $($refusal)* cpu_usecs] } };
        }
        pub(crate) use for_each_value;
    };
}

control! {
    knobs {
        /// 0 stops, 1 runs, 2 stops and withdraws everything.
        run: Knob = Knob::new(1, 0..=2);
        /// Sleep between two passes, milliseconds.
        sleep_millisecs: Knob = Knob::new(1000, 10..=3_600_000);
        /// Longest sleep between two passes that find nothing new, milliseconds.
        max_sleep_millisecs: Knob = Knob::new(60_000, 10..=3_600_000);
        /// After so many pages have been looked at, a pass sleeps for 10 milliseconds.
        pages_to_scan: Knob = Knob::new(65_536, 1..=1 << 32);
        /// Which pages are looked at.
        scope: ScopeKnob = ScopeKnob::new(Scope::Readonly);
        /// 1 reports the kernel's text and read-only data, too.
        kernel_text: Knob = Knob::new(1, 0..=1);
        /// Shorter runs are not reported, pages.
        min_run_pages: Knob = Knob::new(1, 1..=4096);
        /// Files are reported when they have been known for this long, milliseconds.
        min_age_millisecs: Knob = Knob::new(0, 0..=3_600_000);
        /// Most pages held for the host, if it and the size of memory allow that.
        max_inflight_pages: Knob = Knob::new(8192, 1..=65_536);
        /// 1 tells the host the names of files.
        report_names: Knob = Knob::new(1, 0..=1);
        /// Names of files that are not reported.
        exclude: ExcludeKnob = ExcludeKnob::new();
    }
    statistics {
        /// Passes that have ended.
        full_scans;
        /// Address spaces visited in the last pass.
        mms_visited;
        /// Processes the last pass could not look at, because they held their mmap lock.
        mms_skipped;
        /// VMAs looked at in the last pass.
        vmas_visited;
        /// Pages of files looked for in the last pass, cached or not.
        pages_seen;
        /// Pages that were eligible in the last pass.
        pages_eligible;
        /// Files in the tracker.
        files_tracked;
        /// Files in the tracker that are excluded by name.
        files_excluded;
        /// Pages remembered as reported.
        pages_tracked;
        /// Memory of the tracker.
        tracker_bytes;
        /// Pages reported, each time it was.
        pages_reported;
        /// Runs reported.
        runs_reported;
        /// Reported pages that the host has answered for.
        pages_acknowledged;
        /// Pages of this guest that are shared now, as the host says.
        pages_shared;
        /// Pages the host noted because nobody else had them yet.
        pages_remembered;
        /// Pages the host refused, for whatever reason.
        pages_refused;
        /// Pages withdrawn because they are not what was reported any more.
        pages_retracted;
        /// Pages held for the host now.
        pages_in_flight;
        /// Times a new file that was touched woke the worker.
        wakeups;
        /// Times memory was given back because the kernel was short of it.
        shrinks;
        /// Times a pass waited because the ring was full or too much in flight.
        ring_full_waits;
        /// Length of the last pass, microseconds.
        last_pass_usecs;
        /// Length of the longest pass, microseconds.
        max_pass_usecs;
        /// Longest hold of an mmap lock, nanoseconds.
        max_mmap_lock_nsecs;
        /// The host attached to; 0 is none.
        host_instance;
        /// Times that reports were taken back.
        revocations;
        /// What the host wrote that cannot be.
        host_errors;
    }
    refusals {
        pages_refused_malformed: MALFORMED;
        pages_refused_unknown_file: UNKNOWN_FILE;
        pages_refused_outside_memory: OUTSIDE_MEMORY;
        pages_refused_unsuitable_memory: UNSUITABLE_MEMORY;
        pages_refused_different: DIFFERENT;
        pages_refused_mapping_limit: MAPPING_LIMIT;
        pages_refused_store_full: STORE_FULL;
        pages_refused_paused: PAUSED;
        pages_refused_no_store: NO_STORE;
        pages_refused_host_error: HOST_ERROR;
        pages_refused_too_many_files: TOO_MANY_FILES;
        pages_refused_revoked: REVOKED;
    }
}

impl Control {
    /// Takes the one place for a worker. False when there is one already.
    pub(crate) fn claim(&self) -> bool {
        self.owner.0.cmpxchg(0, 1, Full).is_ok()
    }

    /// Gives the place back.
    pub(crate) fn release(&self) {
        self.owner.set(0);
    }
}
