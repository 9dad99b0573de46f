// SPDX-License-Identifier: GPL-2.0

//! The thread that does it all: it owns the session, so nothing in it needs a lock.

use crate::compat;
use crate::control::CONTROL;
use crate::ivshmem::Ivshmem;
use crate::pass::{self, GuestSession, Rules, Workshop};
use crate::policy::{self, Schedule};
use crate::ring::{Ring, State};
use crate::session::{Geometry, Session, Totals};
use crate::shrinker;
use crate::sysfs;
use crate::thread::{self, Work};
use crate::tracepoints;
use crate::wire::{MAX_FILES, PAGE_SIZE};
use kernel::prelude::*;

/// Longest sleep with an interrupt to end it.
const LONGEST_SLEEP_MS: u64 = 3_600_000;

/// The worker of one device.
pub(crate) struct Worker {
    session: GuestSession,
    workshop: Workshop,
    schedule: Schedule,
    /// Of the last pass.
    rules: Option<Rules>,
    /// They are others than before, and what does not belong to them any more is still reported.
    are_new: bool,
    has_interrupt: bool,
    /// Everything was taken back, and stays so.
    withdrawn: bool,
    warned: bool,
    /// Errors of hosts of devices that are gone.
    earlier_errors: u64,
}

impl Worker {
    pub(crate) fn new(device: Ivshmem) -> Result<Self> {
        let scale = kernel::page::PAGE_SIZE as u64 / PAGE_SIZE;
        let geometry = Geometry {
            memory_pages: compat::memory_pages(),
            scale,
        };
        let has_interrupt = device.has_interrupt();
        let (layout, features) = (device.layout(), device.features());
        let ring = Ring::new(device, layout, features);
        let mut session = Session::new(ring, geometry, MAX_FILES as usize);
        session.totals = totals();
        Ok(Self {
            session,
            workshop: Workshop::new()?,
            schedule: Schedule::new(),
            rules: None,
            are_new: false,
            has_interrupt,
            withdrawn: false,
            warned: false,
            earlier_errors: CONTROL.host_errors.get(),
        })
    }

    /// Makes a pass; returns whether it came to its end.
    fn pass(&mut self) -> bool {
        let began = thread::now_us();
        let scans = CONTROL.full_scans.get() + 1;
        let rules = Rules::now();
        let last = self.rules.replace(rules);
        self.are_new |= last.is_some_and(|last| last != rules);
        let (session, workshop) = (&mut self.session, &mut self.workshop);
        let result = pass::run(session, workshop, scans, rules, self.are_new);
        let now = thread::now_ms();
        let took = thread::now_us().saturating_sub(began);
        let (mut due, ended) = (None, result.is_ok());
        let news = match result {
            Ok(findings) => {
                self.are_new &= !findings.has_judged;
                CONTROL.last_pass_usecs.set(took);
                CONTROL.max_pass_usecs.raise(took);
                CONTROL.pages_seen.set(findings.pages);
                CONTROL.pages_eligible.set(findings.eligible);
                CONTROL.mms_visited.set(findings.seen.mms);
                CONTROL.vmas_visited.set(findings.seen.vmas);
                CONTROL.mms_skipped.set(findings.seen.skipped);
                CONTROL
                    .max_mmap_lock_nsecs
                    .raise(findings.seen.longest_hold_ns);
                if findings.again {
                    self.schedule.hurry();
                    return true;
                }
                let skipped = (findings.seen.skipped != 0).then_some(policy::SKIPPED_MS);
                due = [findings.due_ms, skipped].into_iter().flatten().min();
                findings.news
            }
            Err(_) => true,
        };
        let (sleep, most) = (
            CONTROL.sleep_millisecs.get(),
            CONTROL.max_sleep_millisecs.get(),
        );
        self.schedule.pass_ended(now, news, sleep, most);
        if let Some(due) = due {
            self.schedule.due_in(now, due);
        }
        ended
    }

    /// How long nothing needs to be done, unless somebody wakes us.
    fn idle_ms(&self, now_ms: u64) -> u64 {
        let runs = CONTROL.run.get() == 1 && self.session.is_open();
        let pass = if runs {
            self.schedule.wait_ms(now_ms)
        } else {
            LONGEST_SLEEP_MS
        };
        let host = match self.session.ring().state() {
            State::Detached => policy::ATTACH_POLL_MS,
            // Interrupts may get lost with a host that dies, so look now and then.
            _ if self.has_interrupt && self.session.is_waiting() => policy::ATTACH_POLL_MS,
            State::Attaching => policy::ATTACH_POLL_MS,
            State::Attached if self.has_interrupt => LONGEST_SLEEP_MS,
            _ => policy::poll_ms(self.session.is_waiting(), self.session.waited_ms(now_ms)),
        };
        pass.min(host)
    }

    /// These take a look at every file, so they are published when a pass has done that anyway.
    fn publish_tracker(&self) {
        let tracker = &self.session.tracker;
        CONTROL.pages_tracked.set(tracker.pages());
        CONTROL.tracker_bytes.set(tracker.bytes() as u64);
        shrinker::set_held(tracker.page_bytes() as u64);
        CONTROL.files_tracked.set(tracker.files() as u64);
        CONTROL.files_excluded.set(tracker.excluded() as u64);
    }

    fn publish_statistics(&mut self) {
        let (session, totals) = (&self.session, &self.session.totals);
        CONTROL.pages_reported.set(totals.reported);
        CONTROL.runs_reported.set(totals.runs);
        CONTROL.pages_acknowledged.set(totals.acknowledged);
        CONTROL.pages_remembered.set(totals.remembered);
        CONTROL.pages_refused.set(totals.refused);
        CONTROL.set_refusals(&totals.refused_by);
        CONTROL.pages_retracted.set(totals.retracted);
        CONTROL.revocations.set(totals.revocations);
        CONTROL.pages_in_flight.set(session.pages_in_flight());
        CONTROL.pages_shared.set(session.ring().pages_shared());
        let attached = session.ring().state() == State::Attached;
        CONTROL.host_instance.set(if attached {
            session.ring().instance()
        } else {
            0
        });
        let lies = session.ring().lies();
        CONTROL.host_errors.set(self.earlier_errors + lies);
        if lies != 0 && !self.warned {
            self.warned = true;
            pr_warn!("the host wrote positions that cannot be; they are ignored\n");
        }
    }

    /// Takes a step towards having nothing reported.
    fn withdraw(&mut self) {
        self.withdrawn = self.session.withdraw();
        self.publish_statistics();
        if self.withdrawn {
            self.schedule.hurry();
            self.publish_tracker();
        } else if self.session.ask_to_be_woken(true) {
            let waited = self.session.waited_ms(thread::now_ms());
            self.wait(policy::poll_ms(true, waited));
        }
    }

    /// Sleeps; is frozen meanwhile only while the host owes no answer.
    fn wait(&self, milliseconds: u64) {
        if self.session.is_waiting() {
            thread::wait_unfrozen(milliseconds);
        } else {
            thread::wait(milliseconds);
        }
    }

    /// Freezes when the host has answered, unless it stands still. Afterwards memory may belong to
    /// the kernel of an image, or this kernel be that of one, and what the host was still working
    /// on would be lost to it.
    fn freeze(&mut self) {
        let began = thread::now_ms();
        while thread::is_freezing() && self.session.is_owed() {
            if thread::now_ms().saturating_sub(began) > policy::STALL_MS {
                self.session.revoke();
                break;
            }
            thread::sleep(2);
        }
        self.publish_statistics();
        thread::freeze();
    }

    /// Waits until the host has answered, at most so long.
    fn settle(&mut self, most_ms: u64) -> bool {
        let began = thread::now_ms();
        while !self.session.is_settled() {
            if thread::now_ms().saturating_sub(began) > most_ms {
                return false;
            }
            thread::sleep(2);
        }
        true
    }

    /// Lets go of everything, or, when the host may still be working on a page, of all but that.
    fn farewell(&mut self) {
        if self.settle(policy::GOODBYE_WAIT_MS) {
            self.session.say_goodbye();
            self.settle(policy::GOODBYE_WAIT_MS);
        }
        if !self.session.is_settled() {
            self.session.revoke();
            // With nothing held there is nothing to be careful about.
            if self.session.pages_in_flight() != 0 && !self.settle(policy::UNLOAD_WAIT_MS) {
                let pages = self.session.abandon();
                pr_warn!(
                    "the host has claimed {} pages and does not answer: they stay\n",
                    pages
                );
            }
        }
        self.session.leave();
        self.publish_statistics();
    }
}

/// What has been shown so far: a device that is taken away and found again goes on with it.
fn totals() -> Totals {
    Totals {
        reported: CONTROL.pages_reported.get(),
        runs: CONTROL.runs_reported.get(),
        acknowledged: CONTROL.pages_acknowledged.get(),
        remembered: CONTROL.pages_remembered.get(),
        refused: CONTROL.pages_refused.get(),
        refused_by: CONTROL.refusals(),
        retracted: CONTROL.pages_retracted.get(),
        revocations: CONTROL.revocations.get(),
    }
}

impl Work for Worker {
    fn run(&mut self) {
        while !thread::must_stop() {
            if thread::is_freezing() {
                self.freeze();
            }
            let now = thread::now_ms();
            let withdraws = CONTROL.run.get() == 2;
            if self.withdrawn && withdraws {
                thread::wait(LONGEST_SLEEP_MS);
                continue;
            }
            self.withdrawn = false;
            let serviced = self.session.service(now);
            if serviced.wants_pass || serviced.restarted {
                self.schedule.hurry();
            }
            if serviced.restarted {
                self.publish_tracker();
            }
            if withdraws || self.session.is_leaving() {
                self.withdraw();
                continue;
            }
            if sysfs::take_changed() {
                self.schedule.knob_written();
            }
            if tracepoints::take_news() {
                CONTROL.wakeups.add(1);
                self.schedule.news(now);
            }
            if let Some(bytes) = shrinker::take_wanted() {
                self.session.shrink(bytes as usize);
                self.schedule.rest(now);
                self.publish_tracker();
                // Last: who sees it sees what it brought.
                CONTROL.shrinks.add(1);
            }
            let runs = CONTROL.run.get() == 1 && self.session.is_open();
            if runs && self.schedule.wait_ms(now) == 0 {
                let ended = self.pass();
                self.publish_tracker();
                self.publish_statistics();
                // Last: who sees it sees what it brought.
                CONTROL.full_scans.add(u64::from(ended));
            } else {
                self.publish_statistics();
                let idle = self.idle_ms(now);
                if self.session.ask_to_be_woken(true) {
                    self.wait(idle);
                }
            }
        }
        self.farewell();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        for number in [
            &CONTROL.host_instance,
            &CONTROL.pages_shared,
            &CONTROL.pages_in_flight,
            &CONTROL.pages_tracked,
            &CONTROL.tracker_bytes,
            &CONTROL.files_tracked,
            &CONTROL.files_excluded,
        ] {
            number.set(0);
        }
    }
}
