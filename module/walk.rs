// SPDX-License-Identifier: GPL-2.0

//! From tasks to the file ranges that their VMAs map.
//!
//! Locks, never more than shown and never any two of our own:
//!
//! - RCU read lock: finding the next process and taking a reference to its mm (which takes and
//!   releases its `alloc_lock`);
//! - mmap read lock, by trylock and without preemption: copying up to [`BATCH`] file references.
//!   Nothing is allocated, no page cache is looked at, nothing sleeps; and as this thread has
//!   the lowest priority, being put aside here would make others wait for the lock.
//!
//! Between batches nothing is held: the walk goes on by process id and address.

use crate::bindings as helpers;
use crate::file::MappedFile;
use crate::list::List;
use crate::ranges::{self, Range};
use crate::thread::{give_way, NoPreemption};
use core::mem::MaybeUninit;
use core::ptr::{addr_of, addr_of_mut, NonNull};
use kernel::bindings;
use kernel::mm::virt::{flags, vm_flags_t, VmaRef};
use kernel::mm::{MmWithUser, MmWithUserAsync};
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::rcu;

/// Most file references held at a time.
pub(crate) const BATCH: usize = 64;
/// VMAs looked at under one hold of an mmap lock.
const VMAS_PER_HOLD: usize = 64;
/// Processes whose mmap lock was taken that are tried again at the end of a walk.
const MOST_SKIPPED: usize = 256;

/// VMAs with any of these are not looked at.
const SKIP: vm_flags_t =
    flags::WRITE | flags::IO | flags::PFNMAP | flags::MIXEDMAP | flags::HUGETLB;

/// A file and the pages of it that are mapped.
pub(crate) struct Candidate {
    key: usize,
    pub(crate) file: MappedFile,
    pub(crate) range: Range,
}

/// File ranges found together, joined per file.
pub(crate) struct Batch {
    list: List<Candidate>,
}

impl Batch {
    pub(crate) fn new() -> Result<Self> {
        let mut list = List::new();
        list.reserve(BATCH).map_err(|_| ENOMEM)?;
        Ok(Self { list })
    }

    /// Lets go of all files.
    pub(crate) fn clear(&mut self) {
        self.list.truncate();
    }

    pub(crate) fn candidates(&self) -> &[Candidate] {
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
    /// To notice that the process has another mm now; never followed.
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
    pub(crate) seen: Seen,
}

/// An address space that will not go away, and whether several processes share it.
struct Found {
    pid: c_int,
    mm: ARef<MmWithUserAsync>,
    is_shared: bool,
}

impl Walk {
    pub(crate) const fn new() -> Self {
        Self {
            next_pid: 1,
            place: None,
            shared: List::new(),
            skipped: List::new(),
            retrying: false,
            seen: Seen {
                mms: 0,
                vmas: 0,
                skipped: 0,
                longest_hold_ns: 0,
            },
        }
    }

    /// Fills an empty batch. Returns whether there is more to come.
    pub(crate) fn fill(&mut self, batch: &mut Batch) -> bool {
        let more = loop {
            if batch.is_full() {
                break true;
            }
            match self.next() {
                None => break false,
                Some((found, address)) => self.copy(&found, address, batch),
            }
            give_way();
        };
        batch.join();
        more
    }

    /// The next address space and where to go on in it.
    fn next(&mut self) -> Option<(Found, usize)> {
        if let Some(place) = self.place.take() {
            if let Some(found) = find(place.pid).filter(|found| found.pid == place.pid) {
                let same = found.mm.as_raw() as usize == place.mm;
                return Some((found, if same { place.address } else { 0 }));
            }
        }
        loop {
            let found = if self.retrying {
                let pid = self.skipped.pop()?;
                find(pid).filter(|found| found.pid == pid)
            } else if let Some(found) = find(self.next_pid) {
                self.next_pid = found.pid.checked_add(1)?;
                Some(found)
            } else {
                self.retrying = true;
                None
            };
            let Some(found) = found else { continue };
            if found.is_shared {
                let mm = found.mm.as_raw() as usize;
                if self.shared.contains(&mm) {
                    continue;
                }
                // Without memory to remember it, it is visited once for each of its processes.
                let _ = self.shared.push(mm);
            }
            self.seen.mms += 1;
            return Some((found, 0));
        }
    }

    /// Copies what an address space maps from `address` on.
    fn copy(&mut self, found: &Found, address: usize, batch: &mut Batch) {
        let mm: &MmWithUser = &found.mm;
        let undisturbed = NoPreemption::new();
        let Some(lock) = mm.mmap_read_trylock() else {
            drop(undisturbed);
            self.skip(found.pid);
            return;
        };
        let began = now_ns();
        let mut iterator = MaybeUninit::<bindings::vma_iterator>::uninit();
        // SAFETY: The mm is valid, and the iterator is initialised by this.
        let state = unsafe {
            helpers::pagefusion_vma_iter_init(iterator.as_mut_ptr(), mm.as_raw(), address);
            addr_of_mut!((*iterator.as_mut_ptr()).mas)
        };
        self.place = None;
        for looked in 0.. {
            // SAFETY: The iterator is initialised, and its mm's lock is held.
            let vma = unsafe { bindings::mas_find(state, usize::MAX) };
            let Some(vma) = NonNull::new(vma.cast::<bindings::vm_area_struct>()) else {
                break;
            };
            // SAFETY: The VMA is valid while the mmap lock is held.
            let area = unsafe { VmaRef::from_raw(vma.as_ptr()) };
            if batch.is_full() || looked == VMAS_PER_HOLD {
                self.place = Some(Place {
                    pid: found.pid,
                    mm: mm.as_raw() as usize,
                    address: area.start(),
                });
                break;
            }
            self.seen.vmas += 1;
            // SAFETY: As above.
            if let Some(candidate) = unsafe { candidate(area) } {
                // There is room: the batch is not full.
                let _ = batch.list.push(candidate);
            }
        }
        drop(lock);
        self.seen.longest_hold_ns = self.seen.longest_hold_ns.max(now_ns() - began);
        drop(undisturbed);
    }

    fn skip(&mut self, pid: c_int) {
        let later = !self.retrying && self.skipped.len() < MOST_SKIPPED;
        if !later || self.skipped.push(pid).is_err() {
            self.seen.skipped += 1;
        }
    }
}

/// What a VMA maps, if its pages may be reported.
///
/// # Safety
///
/// The mmap lock of the VMA's mm must be held.
unsafe fn candidate(area: &VmaRef) -> Option<Candidate> {
    let bits = area.flags();
    if bits & flags::READ == 0 || bits & SKIP != 0 {
        return None;
    }
    let vma = area.as_ptr();
    // SAFETY: The VMA is valid by this function's requirements.
    let (file, first) = unsafe { (addr_of!((*vma).vm_file).read(), (*vma).vm_pgoff) };
    let file = NonNull::new(file)?;
    // SAFETY: The VMA holds a reference to its file, and the lock keeps the VMA.
    let file = unsafe { MappedFile::get(file) };
    let pages = (area.end() - area.start()) / kernel::page::PAGE_SIZE;
    let start = first as u64;
    Some(Candidate {
        key: file.key(),
        file,
        range: Range {
            start,
            end: start.saturating_add(pages as u64),
        },
    })
}

/// The address space of the first process whose id is at least `pid`.
fn find(mut pid: c_int) -> Option<Found> {
    loop {
        let guard = rcu::read_lock();
        // SAFETY: The initial namespace always exists, and its ids may be looked up under RCU.
        let entry = unsafe {
            let ids = addr_of_mut!(bindings::init_pid_ns.idr);
            bindings::idr_get_next(ids, &mut pid).cast::<bindings::pid>()
        };
        if entry.is_null() {
            return None;
        }
        // SAFETY: `entry` is valid under RCU; a task found through it is as well.
        let mm = unsafe {
            let task = bindings::pid_task(entry, bindings::pid_type_PIDTYPE_TGID);
            NonNull::new(task).and_then(|task| mm_of(task))
        };
        drop(guard);
        if let Some((mm, is_shared)) = mm {
            return Some(Found { pid, mm, is_shared });
        }
        pid = pid.checked_add(1)?;
    }
}

/// The address space of a process, if it has one, and whether others share it.
///
/// # Safety
///
/// `task` must be valid, which it is under the RCU lock it was found under.
unsafe fn mm_of(task: NonNull<bindings::task_struct>) -> Option<(ARef<MmWithUserAsync>, bool)> {
    // SAFETY: By this function's requirements.
    let mm = NonNull::new(unsafe { bindings::get_task_mm(task.as_ptr()) })?;
    // SAFETY: `get_task_mm` gave us a reference that counts as a user.
    let mm = unsafe { ARef::<MmWithUser>::from_raw(mm.cast()) };
    // SAFETY: The task is valid, and with it its signal structure; the mm has users.
    let (users, threads) = unsafe {
        (
            addr_of!((*mm.as_raw()).__bindgen_anon_1.mm_users.counter).read_volatile(),
            addr_of!((*(*task.as_ptr()).signal).nr_threads).read_volatile(),
        )
    };
    // Besides its threads we are a user.
    Some((MmWithUser::into_mmput_async(mm), users > threads + 1))
}

fn now_ns() -> u64 {
    // SAFETY: Always callable.
    unsafe { bindings::ktime_get_mono_fast_ns() }
}
