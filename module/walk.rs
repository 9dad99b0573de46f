// SPDX-License-Identifier: GPL-2.0

//! From tasks to the file ranges that their VMAs map.
//!
//! Locks, never more than shown:
//!
//! - RCU read lock, then a task's `alloc_lock`: finding the next process and taking a reference to
//!   its mm;
//! - mmap read lock, then `s_umount` of superblocks for reading, both by trylock and without
//!   preemption: copying references to up to [`BATCH`] files. Nothing is allocated, no page cache
//!   is looked at, nothing sleeps; and as this thread has the lowest priority, being put aside here
//!   would make others wait for the lock;
//! - `s_umount` alone, until the batch has been worked on.
//!
//! No process is kept: a reference to its mm keeps the `mm_struct` but not what it maps, which is
//! gone as soon as the process is. So an unmount right after finds no file in use.
//!
//! Between batches nothing is held: the walk goes on by process id and address.

use crate::bindings as helpers;
use crate::file::CachedFile;
use crate::list::List;
use crate::ranges::{self, Range};
use crate::recent::Recent;
use crate::superblock::{NotHeld, Superblocks};
use crate::thread::{give_way, NoPreemption};
use crate::values::Scope;
use core::mem::MaybeUninit;
use core::ptr::{addr_of, addr_of_mut, NonNull};
use kernel::bindings;
use kernel::mm::virt::{flags, vm_flags_t, VmaRef};
use kernel::mm::Mm;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::rcu;

/// Most file references held at a time.
pub(crate) const BATCH: usize = 64;
/// VMAs looked at under one hold of an mmap lock.
const VMAS_PER_HOLD: usize = 32;
/// Processes whose mmap lock was taken that are tried again at the end of a walk.
const MOST_SKIPPED: usize = 256;

/// VMAs with any of these are not looked at.
const SKIP: vm_flags_t =
    flags::WRITE | flags::IO | flags::PFNMAP | flags::MIXEDMAP | flags::HUGETLB;

const S_IFMT: u16 = 0o170_000;
const S_IFREG: u16 = 0o100_000;

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
    /// What other processes map, too.
    recent: Recent,
    scope: Scope,
    pub(crate) seen: Seen,
}

/// An address space that will not go away, and whether several processes share it.
struct Found {
    pid: c_int,
    mm: ARef<Mm>,
    is_shared: bool,
}

/// An mm's lock, held for reading, and preemption switched off.
///
/// # Invariants
///
/// The lock is held, and the mm had users after it was taken: its VMAs stay until it is released,
/// even when the last user leaves meanwhile, since `exit_mmap` takes the lock for writing first.
struct ReadLocked<'a> {
    mm: &'a Mm,
    _undisturbed: NoPreemption,
}

impl<'a> ReadLocked<'a> {
    /// Takes the lock if nobody has it for writing. `None` also when the process is gone.
    fn try_new(mm: &'a Mm) -> Option<Self> {
        let undisturbed = NoPreemption::new();
        // SAFETY: The mm is valid.
        if !unsafe { bindings::mmap_read_trylock(mm.as_raw()) } {
            return None;
        }
        // INVARIANT: The lock was just taken; without users this is dropped before it is used.
        let locked = Self {
            mm,
            _undisturbed: undisturbed,
        };
        (users(mm) != 0).then_some(locked)
    }
}

impl Drop for ReadLocked<'_> {
    fn drop(&mut self) {
        // SAFETY: By the invariants the lock is held.
        unsafe { bindings::mmap_read_unlock(self.mm.as_raw()) };
    }
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
            if superblocks.are_wanted() {
                break true;
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

    /// Copies what an address space maps from `address` on. Returns whether there is room for
    /// another file system.
    fn copy<'a>(
        &mut self,
        found: &Found,
        address: usize,
        batch: &mut Batch<'a>,
        superblocks: &'a Superblocks,
    ) -> bool {
        let mm = found.mm.as_raw();
        let Some(lock) = ReadLocked::try_new(&found.mm) else {
            self.skip(found);
            return true;
        };
        let began = now_ns();
        let mut iterator = MaybeUninit::<bindings::vma_iterator>::uninit();
        // SAFETY: The mm is valid, and the iterator is initialised by this.
        let state = unsafe {
            helpers::pagefusion_vma_iter_init(iterator.as_mut_ptr(), mm, address);
            addr_of_mut!((*iterator.as_mut_ptr()).mas)
        };
        self.place = None;
        let mut has_place = true;
        for looked in 0.. {
            // SAFETY: The iterator is initialised, and its mm's lock is held.
            let vma = unsafe { bindings::mas_find(state, usize::MAX) };
            let Some(vma) = NonNull::new(vma.cast::<bindings::vm_area_struct>()) else {
                break;
            };
            // SAFETY: The VMA is valid while the mmap lock is held.
            let area = unsafe { VmaRef::from_raw(vma.as_ptr()) };
            let full = batch.is_full() || looked == VMAS_PER_HOLD;
            let candidate = if full {
                Ok(None)
            } else {
                // SAFETY: The mmap lock is held.
                unsafe { candidate(area, self.scope, &self.recent, superblocks) }
            };
            has_place = candidate.is_ok();
            if full || !has_place {
                self.place = Some(Place {
                    pid: found.pid,
                    mm: mm as usize,
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
        self.seen.longest_hold_ns = self.seen.longest_hold_ns.max(now_ns() - began);
        drop(lock);
        has_place
    }

    /// Leaves a process for later whose lock could not be had, unless it is gone.
    fn skip(&mut self, found: &Found) {
        if users(&found.mm) == 0 {
            return;
        }
        let later = !self.retrying && self.skipped.len() < MOST_SKIPPED;
        if !later || self.skipped.push(found.pid).is_err() {
            self.seen.skipped += 1;
        }
    }
}

/// What a VMA maps, if its pages may be reported and no other VMA has led to them. Fails without a place for its file system.
///
/// # Safety
///
/// The mmap lock of the VMA's mm must be held.
unsafe fn candidate<'a>(
    area: &VmaRef,
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
    let vma = area.as_ptr();
    // SAFETY: The VMA is valid by this function's requirements.
    let (file, first) = unsafe { (addr_of!((*vma).vm_file).read(), (*vma).vm_pgoff) };
    if file.is_null() {
        return Ok(None);
    }
    // SAFETY: The VMA holds a reference to its file, and the lock keeps the VMA. A file's mapping
    // and its host are valid while the file is.
    let inode = unsafe { (*(*file).f_mapping).host };
    let Some(inode) = NonNull::new(inode) else {
        return Ok(None);
    };
    let start = first as u64;
    let pages = (area.end() - area.start()) / kernel::page::PAGE_SIZE;
    let range = match scope {
        Scope::Exec | Scope::Readonly => Range {
            start,
            end: start.saturating_add(pages as u64),
        },
        Scope::Cached | Scope::Clean => Range {
            start: 0,
            end: u64::MAX,
        },
    };
    if recent.knows(inode.as_ptr() as usize, range) {
        return Ok(None);
    }
    // SAFETY: As above.
    if unsafe { addr_of!((*inode.as_ptr()).i_mode).read() } & S_IFMT != S_IFREG {
        return Ok(None);
    }
    // SAFETY: An inode in use has a superblock, which lives as long as it.
    let held = unsafe {
        let superblock = NonNull::new_unchecked((*inode.as_ptr()).i_sb);
        superblocks.hold(superblock)
    };
    let held = match held {
        Ok(held) => held,
        Err(NotHeld::Busy) => return Ok(None),
        Err(no_place) => return Err(no_place),
    };
    // SAFETY: The file has a reference to the inode, and its superblock is held.
    let file = unsafe { CachedFile::get(inode, held) };
    Ok(Some(Candidate {
        key: file.key(),
        file,
        range,
    }))
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
/// RCU must be held for reading since `leader` was found.
unsafe fn mm_of(leader: NonNull<bindings::task_struct>) -> Option<(ARef<Mm>, bool)> {
    let mut task = leader.as_ptr();
    let mm = loop {
        // SAFETY: By this function's requirements the task is valid, and so is each that follows
        // it in its process.
        let mm = unsafe { grab_mm(task) };
        if mm.is_some() {
            break mm?;
        }
        // A leader that has ended leaves the others behind.
        // SAFETY: As above.
        task = unsafe { helpers::pagefusion_next_thread(task) };
        if task.is_null() {
            return None;
        }
    };
    // SAFETY: The task is valid, and with it its signal structure.
    let threads = unsafe { addr_of!((*(*leader.as_ptr()).signal).nr_threads).read_volatile() };
    let is_shared = users(&mm) > threads;
    Some((mm, is_shared))
}

/// The address space of a task.
///
/// # Safety
///
/// `task` must be valid.
unsafe fn grab_mm(task: *mut bindings::task_struct) -> Option<ARef<Mm>> {
    // SAFETY: The task is valid by this function's requirements. While its lock is held it keeps
    // its mm. A kernel thread only borrows one.
    unsafe {
        helpers::pagefusion_task_lock(task);
        let is_kernel = addr_of!((*task).flags).read_volatile() & bindings::PF_KTHREAD != 0;
        let mm = NonNull::new((*task).mm).filter(|_| !is_kernel);
        if let Some(mm) = mm {
            bindings::mmgrab(mm.as_ptr());
        }
        helpers::pagefusion_task_unlock(task);
        // `Mm` is a transparent wrapper, and owns the reference just taken.
        mm.map(|mm| ARef::from_raw(mm.cast()))
    }
}

/// Those who use an address space; 0 when its process has ended.
fn users(mm: &Mm) -> c_int {
    // SAFETY: The `mm_struct` is valid; the counter is read once.
    unsafe { addr_of!((*mm.as_raw()).__bindgen_anon_1.mm_users.counter).read_volatile() }
}

fn now_ns() -> u64 {
    // SAFETY: Always callable.
    unsafe { bindings::ktime_get_mono_fast_ns() }
}
