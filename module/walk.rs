// SPDX-License-Identifier: GPL-2.0

//! From processes to the file ranges that their VMAs map.
//!
//! Locks, never more than shown:
//!
//! - an address space's mmap lock, then `s_umount` of superblocks for reading, both by trylock:
//!   copying references to up to [`BATCH`] files. Nothing is allocated, no page cache is looked
//!   at, nothing sleeps;
//! - `s_umount` alone, until the batch has been worked on.
//!
//! Between batches nothing is held: the walk goes on by process id and address.

use crate::address_space::{AddressSpace, Vma};
use crate::file::CachedFile;
use crate::list::List;
use crate::ranges::{self, Range};
use crate::recent::Recent;
use crate::superblock::{NotHeld, Superblocks};
use crate::thread::{self, give_way};
use crate::values::Scope;
use kernel::mm::virt::{flags, vm_flags_t};
use kernel::prelude::*;

/// Most file references held at a time.
pub(crate) const BATCH: usize = 64;
/// VMAs looked at under one hold of an mmap lock.
const VMAS_PER_HOLD: usize = 16;
/// Processes whose mmap lock was taken that are tried again at the end of a walk.
const MOST_SKIPPED: usize = 256;

/// VMAs with any of these are not looked at.
const SKIP: vm_flags_t =
    flags::WRITE | flags::IO | flags::PFNMAP | flags::MIXEDMAP | flags::HUGETLB;

/// A file and the pages of it that are mapped.
pub(crate) struct Candidate<'a> {
    key: usize,
    pub(crate) file: CachedFile<'a>,
    pub(crate) range: Range,
}

/// File ranges found together, joined per file.
pub(crate) struct Batch<'a> {
    list: List<Candidate<'a>>,
}

impl<'a> Batch<'a> {
    pub(crate) fn new() -> Result<Self> {
        let mut list = List::new();
        list.reserve(BATCH).map_err(|_| ENOMEM)?;
        Ok(Self { list })
    }

    /// Lets go of all files.
    pub(crate) fn clear(&mut self) {
        self.list.truncate();
    }

    pub(crate) fn candidates(&self) -> &[Candidate<'a>] {
        &self.list
    }

    fn is_full(&self) -> bool {
        self.list.len() >= BATCH
    }

    /// Joins the ranges of each file and lets go of what is not needed for that.
    fn join(&mut self) {
        let kept = ranges::join(
            &mut self.list,
            |candidate| candidate.key,
            |candidate| &mut candidate.range,
        );
        while self.list.len() > kept {
            drop(self.list.pop());
        }
    }
}

/// Where a walk stopped inside a process.
struct Place {
    pid: c_int,
    /// To notice that the process has another mm now.
    mm: usize,
    address: usize,
}

/// What a walk has seen.
#[derive(Clone, Copy, Default)]
pub(crate) struct Seen {
    pub(crate) mms: u64,
    pub(crate) vmas: u64,
    /// Processes that could not be looked at.
    pub(crate) skipped: u64,
    /// Whether there was a file system that could not be held.
    pub(crate) busy: bool,
    /// Longest hold of an mmap lock, in nanoseconds.
    pub(crate) longest_hold_ns: u64,
}

/// One walk over all processes.
pub(crate) struct Walk {
    next_pid: c_int,
    place: Option<Place>,
    /// Address spaces that several processes share and that have been visited.
    shared: List<usize>,
    skipped: List<c_int>,
    retrying: bool,
    /// What other processes map, too.
    recent: Recent,
    scope: Scope,
    pub(crate) seen: Seen,
}

impl Walk {
    /// A walk that finds what `scope` wants of mapped files.
    pub(crate) fn new(scope: Scope) -> Self {
        Self {
            next_pid: 1,
            place: None,
            shared: List::new(),
            skipped: List::new(),
            retrying: false,
            recent: Recent::new(),
            scope,
            seen: Seen {
                mms: 0,
                vmas: 0,
                skipped: 0,
                busy: false,
                longest_hold_ns: 0,
            },
        }
    }

    /// Fills an empty batch with files of superblocks that are held. Returns whether there is more
    /// to come.
    pub(crate) fn fill<'a>(&mut self, batch: &mut Batch<'a>, superblocks: &'a Superblocks) -> bool {
        let more = loop {
            if batch.is_full() {
                break true;
            }
            let Some((found, address)) = self.next() else {
                break false;
            };
            if !self.copy(&found, address, batch, superblocks) {
                break true;
            }
            if superblocks.are_wanted() || thread::is_freezing() {
                break true;
            }
            give_way();
        };
        batch.join();
        more
    }

    /// The next address space and where to go on in it.
    fn next(&mut self) -> Option<(AddressSpace, usize)> {
        if let Some(place) = self.place.take() {
            let found = AddressSpace::first_from(place.pid);
            let found = found.filter(|found| found.pid() == place.pid);
            let same = found.as_ref().is_some_and(|it| it.key() == place.mm);
            if !same {
                // Whoever else has that one leads to the rest of it.
                self.forget_shared(place.mm);
            }
            if let Some(found) = found {
                return Some((found, if same { place.address } else { 0 }));
            }
        }
        loop {
            let found = if self.retrying {
                let pid = self.skipped.pop()?;
                AddressSpace::first_from(pid).filter(|found| found.pid() == pid)
            } else if let Some(found) = AddressSpace::first_from(self.next_pid) {
                self.next_pid = found.pid().checked_add(1)?;
                Some(found)
            } else {
                self.retrying = true;
                None
            };
            let Some(found) = found else { continue };
            if found.is_shared() && self.shared.contains(&found.key()) {
                continue;
            }
            return Some((found, 0));
        }
    }

    fn forget_shared(&mut self, mm: usize) {
        if let Some(at) = self.shared.iter().position(|it| *it == mm) {
            self.shared.remove(at, at + 1);
        }
    }

    /// Copies what an address space maps from `address` on. Returns whether there is room for
    /// another file system.
    fn copy<'a>(
        &mut self,
        found: &AddressSpace,
        address: usize,
        batch: &mut Batch<'a>,
        superblocks: &'a Superblocks,
    ) -> bool {
        let Some(locked) = found.try_lock() else {
            self.skip(found);
            return true;
        };
        let began = thread::now_ns();
        if address == 0 {
            self.seen.mms += 1;
        }
        let mut vmas = locked.vmas(address);
        self.place = None;
        let mut has_place = true;
        for looked in 0.. {
            let Some(area) = vmas.next() else { break };
            let full = batch.is_full() || looked == VMAS_PER_HOLD;
            let mut candidate = if full {
                Ok(None)
            } else {
                candidate(area, self.scope, &self.recent, superblocks)
            };
            if matches!(candidate, Err(NotHeld::Busy)) {
                self.seen.busy = true;
                candidate = Ok(None);
            }
            has_place = candidate.is_ok();
            if full || !has_place {
                self.place = Some(Place {
                    pid: found.pid(),
                    mm: found.key(),
                    address: area.start(),
                });
                break;
            }
            self.seen.vmas += 1;
            if let Ok(Some(candidate)) = candidate {
                self.recent.note(candidate.key, candidate.range);
                // There is room: the batch is not full.
                let _ = batch.list.push(candidate);
            }
        }
        // Once the lock is released others may run before this thread goes on.
        let held = thread::now_ns().saturating_sub(began);
        drop(locked);
        self.seen.longest_hold_ns = self.seen.longest_hold_ns.max(held);
        if address == 0 && found.is_shared() {
            // Without memory to remember it, it is visited once for each of its processes.
            let _ = self.shared.push(found.key());
        }
        has_place
    }

    /// Leaves a process for later whose lock could not be had, unless it is gone.
    fn skip(&mut self, found: &AddressSpace) {
        if found.is_gone() {
            return;
        }
        let later = !self.retrying && self.skipped.len() < MOST_SKIPPED;
        if !later || self.skipped.push(found.pid()).is_err() {
            self.seen.skipped += 1;
        }
    }
}

/// What a VMA maps, if its pages may be reported and no other VMA has led to them. Fails where its
/// file system cannot be held.
fn candidate<'a>(
    area: Vma<'_>,
    scope: Scope,
    recent: &Recent,
    superblocks: &'a Superblocks,
) -> Result<Option<Candidate<'a>>, NotHeld> {
    let wanted = match scope {
        Scope::Exec => flags::READ | flags::EXEC,
        Scope::Readonly | Scope::Cached | Scope::Clean => flags::READ,
    };
    let bits = area.flags();
    if bits & wanted != wanted || bits & SKIP != 0 {
        return Ok(None);
    }
    let Some(file) = area.file() else {
        return Ok(None);
    };
    let range = match scope {
        Scope::Exec | Scope::Readonly => {
            let start = area.first_page() as u64;
            let end = start.saturating_add(area.pages() as u64);
            Range { start, end }
        }
        Scope::Cached | Scope::Clean => Range {
            start: 0,
            end: u64::MAX,
        },
    };
    let key = file.key();
    if recent.knows(key, range) || !file.is_regular() {
        return Ok(None);
    }
    match file.hold(superblocks) {
        Ok(file) => Ok(Some(Candidate { key, file, range })),
        Err(why) => Err(why),
    }
}
