// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One guest behind its ring: turns records into work for [`Sharing`] and its results into
//! outcomes and requests.

use std::collections::{BTreeMap, HashMap};

use pagefusion_abi::wire::{Layout, MAX_NAME, Outcome, Record, Request, reason};

use super::attributes::Unsuitable;
use super::memory::Memory;
use super::requests::Requests;
use super::ring::{Attachment, Batch, RingConsumer};
use super::shared_memory::Words;
use super::sharing::{Progress, ReportedRun, Sharing};
use crate::protocol::{EngineStatus, FileKey, FileSpan};

/// Records in one batch: bounds how long a guest that wants its pages back waits, and how
/// often the store is asked.
const BATCH_RECORDS: usize = 256;
/// Windows undone in one call once the guest has left: milliseconds, for which others wait.
const WITHDRAW_WINDOWS: usize = 64;
/// Files one guest may have announced at a time.
const MAX_FILES: usize = 1 << 16;

/// What a call of [`Guest::progress`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progressed {
    /// The guest is to be rung.
    pub ring: bool,
    /// There was something to do; there may be more.
    pub busy: bool,
    /// Something could not be done, or was left for later; it is tried again when this is called
    /// again, which should be in a moment even if the guest does not ring.
    pub retry: bool,
}

/// A guest, its ring and what it has announced.
#[derive(Debug)]
pub struct Guest<M> {
    ring: RingConsumer<M>,
    files: HashMap<u32, Announced>,
    numbers: HashMap<FileKey, u32>,
    requests: Requests,
    attached: bool,
    withdrawal: Option<Withdrawal>,
    paused: bool,
    counts: Counts,
    /// How often its ring made no sense.
    ignored: u64,
    /// How often what it wanted to be shared no more could not be undone.
    still_shared: u64,
    progress: Progress,
}

/// The guest has said goodbye, or is gone: its memory becomes ordinary, a part in every call,
/// so that whoever else asks for the guest meanwhile does not wait for all of it.
#[derive(Debug, Default)]
struct Withdrawal {
    /// The batch with the goodbye, acknowledged in the end. None when the guest is gone: it
    /// waits half a second for that, and for nothing when it could not say goodbye.
    goodbye: Option<Batch>,
    /// An undo is under way.
    undoing: bool,
    /// How often that failed.
    failures: u64,
}

impl Withdrawal {
    /// It is tried again many times a second.
    fn complain(&mut self, error: &std::io::Error) {
        self.failures += 1;
        if self.failures.is_power_of_two() {
            log::warn!(
                "the guest withdrew its pages, and undoing failed: {error}; trying again ({} times so far)",
                self.failures
            );
        }
    }
}

/// A file as the guest has announced it.
#[derive(Clone, Debug)]
struct Announced {
    key: FileKey,
    /// For the operator; what a guest calls a file proves nothing.
    name: Box<str>,
}

/// Records of a batch that can be handled at once: first it forgets, then it shares. A guest whose
/// page has moved takes the old report back just before the new one; done the other way round, the
/// store would forget what the guest believes it remembers.
#[derive(Debug, Default)]
struct Step {
    forgotten: Vec<FileSpan>,
    /// Those of them that must not stay shared.
    unshared: Vec<FileSpan>,
    runs: Vec<(u64, ReportedRun)>,
}

impl Step {
    /// Whether one of its runs has a page of `span`, so that forgetting must come after it.
    fn reports(&self, span: &FileSpan) -> bool {
        let end = span.end();
        self.runs.iter().any(|(_, run)| {
            run.file == span.file
                && run.page < end
                && span.page < run.page.saturating_add(u64::from(run.pages))
        })
    }
}

/// For each of `runs`, whether it has a frame as another page than an earlier one that is believed. A guest holds what it
/// has reported until that is answered, so no frame can have become another page meanwhile. It may say the same twice, and
/// its file may have been written to in between.
fn contradictions(runs: &[ReportedRun]) -> Vec<bool> {
    // Frames by the first one of each range, with what was said of them; ranges that overlap say the same and are one.
    let mut believed = BTreeMap::new();
    let contradicts = |run: &ReportedRun| {
        let file = &run.file;
        let inode = (file.fs_uuid, file.inode, file.generation, file.kind);
        let said = (inode, run.gfn.wrapping_sub(run.page));
        let (mut first, mut end) = (run.gfn, run.gfn.saturating_add(u64::from(run.pages)));
        let before = believed.range(..end).rev();
        let overlapping: Vec<u64> = before
            .take_while(|(_, (end, _))| *end > first)
            .map(|(first, _)| *first)
            .collect();
        if overlapping.iter().any(|it| believed[it].1 != said) {
            return true;
        }
        for it in overlapping {
            if let Some((its_end, _)) = believed.remove(&it) {
                (first, end) = (first.min(it), end.max(its_end));
            }
        }
        believed.insert(first, (end, said));
        false
    };
    runs.iter().map(contradicts).collect()
}

/// Sums since the engine started.
#[derive(Clone, Debug, Default)]
struct Counts {
    reported: u64,
    /// Spared ones included.
    remembered: u64,
    spared: u64,
    refused: u64,
    refusals: BTreeMap<&'static str, u64>,
    errors: u64,
    passes: u64,
}

impl<M: Words> Guest<M> {
    /// A guest behind the shared memory `memory` of this `layout`. `instance` is new for
    /// every host that takes over the same memory.
    pub fn new(memory: M, layout: Layout, instance: u64, max_inflight_pages: u64) -> Self {
        Self {
            ring: RingConsumer::new(memory, layout, instance, max_inflight_pages),
            files: HashMap::new(),
            numbers: HashMap::new(),
            requests: Requests::default(),
            attached: false,
            withdrawal: None,
            paused: false,
            counts: Counts::default(),
            ignored: 0,
            still_shared: 0,
            progress: Progress::start(),
        }
    }

    /// Handles at most one batch of what the guest has reported.
    pub fn progress(&mut self, sharing: &Sharing) -> Progressed {
        let mut done = self.step(sharing);
        done.retry |= sharing.split_cut();
        done
    }

    fn step(&mut self, sharing: &Sharing) -> Progressed {
        let mut done = Progressed::default();
        match self.ring.attach() {
            Attachment::Absent => {
                if std::mem::take(&mut self.attached) {
                    log::info!("the guest has left");
                    // It may have gone without a goodbye, or without waiting for the answer.
                    self.forget_files(sharing);
                    self.withdrawal.get_or_insert_default().goodbye = None;
                }
                return self.withdraw_some(sharing);
            }
            Attachment::New => {
                log::info!("the guest attached, epoch {}", self.ring.epoch());
                self.attached = true;
                self.begin(sharing);
                done.ring = true;
            }
            Attachment::Restored => {
                log::info!("the machine was restored from a snapshot; beginning anew");
                self.attached = false;
                self.begin(sharing);
                done.ring = true;
                return done;
            }
            Attachment::Same => self.attached = true,
        }
        if self.withdrawal.is_some() {
            return self.withdraw_some(sharing);
        }
        done.ring |= self.requests.post(&mut self.ring);
        let mut steps = vec![Step::default()];
        let mut outcomes: Vec<(u64, Outcome)> = Vec::new();
        let mut withdrawn = false;
        let mut end_of_pass = false;
        let (files, numbers, counts) = (&mut self.files, &mut self.numbers, &mut self.counts);
        let claimed = self.ring.claim(BATCH_RECORDS, |claimed| {
            let answer = match claimed.record {
                Ok(Record::Run(run)) => match files.get(&run.file) {
                    Some(file) => {
                        counts.reported += u64::from(run.pages);
                        let (page, gfn, pages) = (run.page, run.gfn, run.pages);
                        log::trace!(
                            "{} pages from {page} of {:?} at gfn {gfn:#x}",
                            pages,
                            file.name
                        );
                        let file = file.key;
                        let run = ReportedRun {
                            file,
                            page,
                            gfn,
                            pages,
                        };
                        if let Some(step) = steps.last_mut() {
                            step.runs.push((claimed.position, run));
                        }
                        return;
                    }
                    None => {
                        counts.errors += 1;
                        refused(reason::UNKNOWN_FILE)
                    }
                },
                Ok(Record::File {
                    file,
                    identity,
                    name,
                }) => {
                    if files.len() >= MAX_FILES && !files.contains_key(&file) {
                        refused(reason::TOO_MANY_FILES)
                    } else {
                        let key = FileKey::from(identity);
                        let name = shown(name);
                        if let Some(old) = files.insert(file, Announced { key, name }) {
                            unlink(numbers, &old.key, file);
                        }
                        numbers.insert(key, file);
                        Outcome::default()
                    }
                }
                Ok(Record::Retract {
                    file,
                    page,
                    pages,
                    unshare,
                }) => {
                    match files.get(&file).map(|file| file.key) {
                        Some(key) => {
                            if pages == 0 {
                                files.remove(&file);
                                unlink(numbers, &key, file);
                            }
                            // Longer than any file: the store takes it as the whole file.
                            let pages = u32::try_from(pages).unwrap_or(0);
                            let span = FileSpan {
                                file: key,
                                page,
                                pages,
                            };
                            if steps.last().is_none_or(|step| step.reports(&span)) {
                                steps.push(Step::default());
                            }
                            if let Some(step) = steps.last_mut() {
                                step.forgotten.push(span);
                                step.unshared.extend(unshare.then_some(span));
                            }
                            Outcome::default()
                        }
                        None => refused(reason::UNKNOWN_FILE),
                    }
                }
                Ok(Record::EndOfPass { .. }) => {
                    counts.passes += 1;
                    end_of_pass = true;
                    Outcome::default()
                }
                Ok(Record::Goodbye) => {
                    withdrawn = true;
                    Outcome::default()
                }
                Ok(Record::Hello { .. }) => Outcome::default(),
                Err(_) => {
                    counts.errors += 1;
                    refused(reason::MALFORMED)
                }
            };
            outcomes.push((claimed.position, answer));
        });
        let batch = match claimed {
            Ok(Some(batch)) => batch,
            Ok(None) => return done,
            Err(e) => {
                self.counts.errors += 1;
                // It can do that as often as it likes.
                self.ignored += 1;
                if self.ignored.is_power_of_two() {
                    log::warn!(
                        "{e}; the guest is ignored until it attaches again ({} times so far)",
                        self.ignored
                    );
                }
                return done;
            }
        };
        done.busy = true;
        for step in steps {
            let Step {
                forgotten,
                unshared,
                runs,
            } = step;
            for span in forgotten {
                sharing.forget(span);
            }
            if !unshared.is_empty() {
                self.unshare(sharing, &unshared);
            }
            self.answer(sharing, batch.is_revoked(), &runs);
        }
        for (position, outcome) in outcomes {
            self.ring.set_outcome(position, outcome);
        }
        if end_of_pass {
            sharing.memory().look_away();
        }
        if withdrawn {
            self.forget_files(sharing);
            self.withdrawal = Some(Withdrawal {
                goodbye: Some(batch),
                ..Withdrawal::default()
            });
        } else {
            done.ring |= self.ring.acknowledge(batch);
        }
        done
    }

    /// Turns what is shared of these into ordinary memory, as far as that can be done.
    fn unshare(&mut self, sharing: &Sharing, spans: &[FileSpan]) {
        if let Err(e) = sharing.unshare(spans) {
            // It can ask as often as it likes.
            self.still_shared += 1;
            if self.still_shared.is_power_of_two() {
                log::warn!(
                    "the guest wants pages to be shared no more, and undoing failed: {e} ({} times so far)",
                    self.still_shared
                );
            }
        }
        self.ring.set_pages_shared(sharing.memory().pages_shared());
    }

    /// Nothing is known of the guest, and it knows nothing of us.
    fn begin(&mut self, sharing: &Sharing) {
        // One that comes back has its pages where they were, as far as nobody wrote to them.
        self.end_withdrawal(sharing);
        self.files.clear();
        self.numbers.clear();
        self.requests.clear();
        sharing.memory().forget_spared();
        self.progress = Progress::start();
        self.ring.set_paused(self.paused);
        self.ring.set_pages_shared(sharing.memory().pages_shared());
    }

    /// The guest owns no file any more.
    fn forget_files(&mut self, sharing: &Sharing) {
        for file in self.files.values() {
            sharing.forget(FileSpan {
                file: file.key,
                page: 0,
                pages: 0,
            });
        }
        self.files.clear();
        self.numbers.clear();
    }

    /// Takes a step towards a guest that shares nothing.
    fn withdraw_some(&mut self, sharing: &Sharing) -> Progressed {
        let mut done = Progressed::default();
        let Some(withdrawal) = &mut self.withdrawal else {
            return done;
        };
        if !withdrawal.undoing {
            let begun = sharing.begin_undo();
            withdrawal.undoing = begun.inspect_err(|e| withdrawal.complain(e)).is_ok();
        }
        let some = withdrawal.undoing.then(|| {
            sharing
                .undo_some(WITHDRAW_WINDOWS)
                .inspect_err(|e| withdrawal.complain(e))
                .ok()
        });
        match some.flatten() {
            Some(true) => done.busy = true,
            Some(false) => {
                let goodbye = withdrawal.goodbye;
                self.end_withdrawal(sharing);
                sharing.memory().unregister_all();
                done.busy = goodbye.is_some();
                done.ring = goodbye.is_some_and(|batch| self.ring.acknowledge(batch));
            }
            // The guest has not been told that nothing is shared; sooner or later it leaves.
            None => done.retry = true,
        }
        self.ring.set_pages_shared(sharing.memory().pages_shared());
        done
    }

    /// It is done, or the guest is back.
    fn end_withdrawal(&mut self, sharing: &Sharing) {
        if self.withdrawal.take().is_some_and(|it| it.undoing) {
            sharing.end_undo();
        }
    }

    fn answer(&mut self, sharing: &Sharing, revoked: bool, runs: &[(u64, ReportedRun)]) {
        if runs.is_empty() {
            return;
        }
        let reported: Vec<ReportedRun> = runs.iter().map(|(_, run)| *run).collect();
        let results = if revoked {
            vec![refused(reason::REVOKED); runs.len()]
        } else {
            let lies = contradictions(&reported);
            let believed = reported.iter().zip(&lies).filter(|(_, lie)| !**lie);
            let believed: Vec<ReportedRun> = believed.map(|(run, _)| *run).collect();
            self.counts.errors += (reported.len() - believed.len()) as u64;
            let mut results = sharing
                .share_while(&believed, &|| self.ring.is_current())
                .into_iter();
            let answer = |lie: bool| {
                let believed = if lie { None } else { results.next() };
                believed.unwrap_or_else(|| refused(reason::MALFORMED))
            };
            lies.into_iter().map(answer).collect()
        };
        let spared = sharing.memory().take_spared();
        self.counts.spared += spared.pages;
        self.request_all(&spared.again);
        let mut shared = 0;
        for ((position, run), outcome) in runs.iter().zip(results) {
            self.ring.set_outcome(*position, outcome);
            let answered = u32::from(outcome.shared) + u32::from(outcome.remembered);
            let missing = u64::from(run.pages.saturating_sub(answered));
            shared += u64::from(outcome.shared);
            self.counts.remembered += u64::from(outcome.remembered);
            if missing > 0 {
                self.counts.refused += missing;
                let name = refusal_name(sharing, run, outcome.reason);
                *self.counts.refusals.entry(name).or_default() += missing;
            }
        }
        if shared > 0 {
            self.progress.shared();
            self.ring.set_pages_shared(sharing.memory().pages_shared());
        }
    }

    /// Whether a call of [`Guest::progress`] has something to do though nobody has rung: ask now and
    /// then, as a machine that was restored from a snapshot, or has come from another host, does not
    /// know that it has to ring, nor does one that has no doorbell, and leaves.
    pub fn has_news(&self) -> bool {
        self.ring.has_news() || self.attached && !self.ring.is_attached()
    }

    /// Asks the guest to report these file pages again; whether it is to be rung.
    pub fn request_report(&mut self, spans: &[FileSpan]) -> bool {
        self.request_all(spans);
        self.requests.post(&mut self.ring)
    }

    fn request_all(&mut self, spans: &[FileSpan]) {
        for span in spans {
            let Some(file) = self.numbers.get(&span.file) else {
                continue;
            };
            let (page, pages) = (span.page, u64::from(span.pages));
            self.requests.add(Request::Report {
                file: *file,
                page,
                pages,
            });
        }
    }

    /// Asks the guest to stop reporting, or to report everything again; it is to be rung.
    pub fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
        self.ring.set_paused(paused);
        if !paused {
            self.requests.add(Request::Rescan);
            self.requests.post(&mut self.ring);
        }
    }

    /// Asks the guest to report everything again; it is to be rung.
    pub fn request_rescan(&mut self) {
        self.requests.add(Request::Rescan);
        self.requests.post(&mut self.ring);
    }

    /// Tells the guest how much of it is shared; whether it is to be rung.
    pub fn publish_shared(&self, memory: &Memory) -> bool {
        self.ring.set_pages_shared(memory.pages_shared())
    }

    /// Pages reported so far that are not in guest memory as far as it is known.
    pub fn pages_outside(&self) -> u64 {
        let name = reason::name(reason::OUTSIDE_MEMORY);
        self.counts.refusals.get(name).copied().unwrap_or_default()
    }

    /// What the guest calls a file, if it has announced it.
    pub fn name_of(&self, file: &FileKey) -> Option<&str> {
        let number = self.numbers.get(file)?;
        self.files.get(number).map(|file| &*file.name)
    }

    /// Adds what is known here to `status`.
    pub fn fill_status(&self, status: &mut EngineStatus) {
        status.guest_attached = self.attached;
        status.pages_reported = self.counts.reported;
        status.pages_remembered = self.counts.remembered.saturating_sub(self.counts.spared);
        status.pages_spared = self.counts.spared;
        status.pages_refused = self.counts.refused;
        status.refusals = self
            .counts
            .refusals
            .iter()
            .map(|(name, n)| ((*name).to_owned(), *n))
            .collect();
        status.seconds_sharing = self.progress.seconds();
        status.guest_errors = self.counts.errors;
        status.guest_passes = self.counts.passes;
    }
}

/// Forgets that a file has this number. Another may have the same key, and keeps that.
fn unlink(numbers: &mut HashMap<FileKey, u32>, key: &FileKey, file: u32) {
    if numbers.get(key) == Some(&file) {
        numbers.remove(key);
    }
}

/// A name as it is shown, no longer than one that guests give: what is no UTF-8 takes more room than
/// before. Its end says most.
fn shown(name: &[u8]) -> Box<str> {
    let name = String::from_utf8_lossy(name);
    let least = name.len().saturating_sub(MAX_NAME);
    let begin = (least..=name.len()).find(|&at| name.is_char_boundary(at));
    name[begin.unwrap_or_default()..].into()
}

/// By what name pages of this run are counted that were refused for `why`.
fn refusal_name(sharing: &Sharing, run: &ReportedRun, why: u8) -> &'static str {
    let unsuitable = match why {
        reason::UNSUITABLE_MEMORY | reason::OUTSIDE_MEMORY => {
            sharing.memory().unsuitable(run.gfn, run.pages.into())
        }
        _ => None,
    };
    unsuitable.map_or(reason::name(why), Unsuitable::name)
}

fn refused(reason: u8) -> Outcome {
    Outcome {
        reason,
        ..Outcome::default()
    }
}
