// SPDX-License-Identifier: GPL-2.0

//! Knobs and statistics, shared between the worker and sysfs. Each is one atomic number; no two
//! of them need to agree.

use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Relaxed, Atomic};

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

    pub(crate) fn raise(&self, value: u64) {
        if value > self.get() {
            self.set(value);
        }
    }
}

/// A number that may be written.
pub(crate) struct Knob {
    value: Number,
    least: u64,
    most: u64,
}

impl Knob {
    const fn new(value: u64, least: u64, most: u64) -> Self {
        Self {
            value: Number::new(value),
            least,
            most,
        }
    }

    pub(crate) fn get(&self) -> u64 {
        self.value.get()
    }

    /// Sets the knob, unless the value is out of range.
    pub(crate) fn set(&self, value: u64) -> Result {
        if !(self.least..=self.most).contains(&value) {
            return Err(EINVAL);
        }
        self.value.set(value);
        Ok(())
    }
}

macro_rules! control {
    (
        knobs { $($(#[$knob_doc:meta])* $knob:ident: $default:expr, $least:expr, $most:expr;)* }
        statistics { $($(#[$stat_doc:meta])* $stat:ident;)* }
    ) => {
        /// All knobs and statistics.
        pub(crate) struct Control {
            $($(#[$knob_doc])* pub(crate) $knob: Knob,)*
            $($(#[$stat_doc])* pub(crate) $stat: Number,)*
            owner: Number,
        }

        /// The one set of them: there is one worker and one directory.
        pub(crate) static CONTROL: Control = Control {
            $($knob: Knob::new($default, $least, $most),)*
            $($stat: Number::new(0),)*
            owner: Number::new(0),
        };

        /// Calls `$with!` with the names of all knobs and all statistics.
        macro_rules! for_each_number {
            ($with:ident) => { $with! { [$($knob)*] [$($stat)*] } };
        }
        pub(crate) use for_each_number;
    };
}

control! {
    knobs {
        /// 0 stops, 1 runs.
        run: 1, 0, 1;
        /// Sleep between two passes, milliseconds.
        sleep_millisecs: 1000, 10, 3_600_000;
        /// Longest sleep between two passes that find nothing new, milliseconds.
        max_sleep_millisecs: 5000, 10, 3_600_000;
        /// After so many pages have been looked at, a pass sleeps for 10 milliseconds. It does so
        /// between batches of files, when it holds none of them.
        pages_to_scan: 65_536, 1, 1 << 32;
        /// 1 reports the kernel's text and read-only data, too.
        kernel_text: 1, 0, 1;
    }
    statistics {
        /// Passes that have ended.
        full_scans;
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
        /// Pages remembered as reported.
        pages_tracked;
        /// Pages that were eligible in the last pass.
        pages_eligible;
        /// Memory of the tracker.
        tracker_bytes;
        /// Files in the tracker.
        files_tracked;
        /// Address spaces visited in the last pass.
        mms_visited;
        /// VMAs looked at in the last pass.
        vmas_visited;
        /// Processes the last pass could not look at, because they held their mmap lock.
        mms_skipped;
        /// Length of the last pass, microseconds.
        last_pass_usecs;
        /// Longest hold of an mmap lock, nanoseconds.
        max_mmap_lock_nsecs;
        /// The host attached to; 0 is none.
        host_instance;
        /// Times that reports were taken back.
        revocations;
        /// What the host wrote that cannot be.
        host_errors;
    }
}

impl Control {
    /// Takes the one place for a worker. False when there is one already.
    pub(crate) fn claim(&self) -> bool {
        self.owner
            .0
            .cmpxchg(0, 1, kernel::sync::atomic::ordering::Full)
            .is_ok()
    }

    /// Gives the place back.
    pub(crate) fn release(&self) {
        self.owner.set(0);
    }
}
