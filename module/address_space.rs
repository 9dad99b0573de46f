// SPDX-License-Identifier: GPL-2.0

//! Address spaces of processes, and the VMAs in them: what `for_each_process` and `for_each_vma`
//! are in C.
//!
//! Locks, never more than shown:
//!
//! - RCU read lock, then a task's `alloc_lock`: finding the next process and taking a reference to
//!   its mm;
//! - mmap read lock, by trylock and without preemption or softirqs, while there is a [`Locked`].
//!
//! No process is kept: a reference to its mm keeps the `mm_struct` but not what it maps, which is
//! gone as soon as the process is. So an unmount right after finds no file in use.

use crate::bindings as helpers;
use crate::file::CachedFile;
use crate::superblock::{NotHeld, Superblocks};
use crate::thread::Undisturbed;
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::ptr::{addr_of, addr_of_mut, NonNull};
use kernel::bindings;
use kernel::mm::virt::VmaRef;
use kernel::mm::Mm;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::rcu;

const S_IFMT: u16 = 0o170_000;
const S_IFREG: u16 = 0o100_000;

/// The address space of a process, which may end at any time.
pub(crate) struct AddressSpace {
    mm: ARef<Mm>,
    pid: c_int,
    is_shared: bool,
}

impl AddressSpace {
    /// That of the first process whose id is at least `pid`. Kernel threads have none.
    pub(crate) fn first_from(mut pid: c_int) -> Option<Self> {
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
                return Some(Self { mm, pid, is_shared });
            }
            pid = pid.checked_add(1)?;
        }
    }

    /// The process it was found by.
    pub(crate) const fn pid(&self) -> c_int {
        self.pid
    }

    /// Whether other processes have it, too.
    pub(crate) const fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Tells address spaces apart that exist at the same time.
    pub(crate) fn key(&self) -> usize {
        self.mm.as_raw() as usize
    }

    /// Whether its last process has ended.
    pub(crate) fn is_gone(&self) -> bool {
        users(&self.mm) == 0
    }

    /// Takes the mmap lock for reading if nobody has it for writing. `None` also when the process
    /// is gone.
    pub(crate) fn try_lock(&self) -> Option<Locked<'_>> {
        let undisturbed = Undisturbed::new();
        // SAFETY: The mm is valid.
        if !unsafe { bindings::mmap_read_trylock(self.mm.as_raw()) } {
            return None;
        }
        // INVARIANT: The lock was just taken; without users this is dropped before it is used.
        let locked = Locked {
            mm: &self.mm,
            _undisturbed: undisturbed,
        };
        (!self.is_gone()).then_some(locked)
    }
}

/// An mm's lock, held for reading, and preemption and softirqs switched off: this thread has the
/// lowest priority, and being put aside here would make others wait for the lock, as would the work
/// of others that an interrupt has brought.
///
/// # Invariants
///
/// The lock is held, and the mm had users after it was taken: its VMAs stay until it is released,
/// even when the last user leaves meanwhile, since `exit_mmap` takes the lock for writing first.
pub(crate) struct Locked<'a> {
    mm: &'a Mm,
    _undisturbed: Undisturbed,
}

impl Locked<'_> {
    /// The VMAs that end behind `address`, in ascending order.
    pub(crate) fn vmas(&self, address: usize) -> Vmas<'_> {
        let mut iterator = MaybeUninit::uninit();
        // SAFETY: The mm is valid, and this initialises the iterator.
        unsafe {
            helpers::pagefusion_vma_iter_init(iterator.as_mut_ptr(), self.mm.as_raw(), address);
        }
        Vmas {
            // SAFETY: Initialised above.
            iterator: unsafe { iterator.assume_init() },
            _locked: PhantomData,
        }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // SAFETY: By the invariants the lock is held.
        unsafe { bindings::mmap_read_unlock(self.mm.as_raw()) };
    }
}

/// The VMAs of an address space that is locked.
///
/// # Invariants
///
/// `iterator` was initialised for an mm whose lock is held for `'a`.
pub(crate) struct Vmas<'a> {
    iterator: bindings::vma_iterator,
    _locked: PhantomData<&'a Locked<'a>>,
}

impl<'a> Vmas<'a> {
    /// The next one.
    pub(crate) fn next(&mut self) -> Option<Vma<'a>> {
        // SAFETY: By the invariants.
        let vma = unsafe { bindings::mas_find(&mut self.iterator.mas, usize::MAX) };
        let vma = NonNull::new(vma.cast::<bindings::vm_area_struct>())?;
        // SAFETY: The VMA is valid while the mmap lock is held, which by the invariants it is
        // for `'a`.
        Some(Vma(unsafe { VmaRef::from_raw(vma.as_ptr()) }))
    }
}

/// A VMA of an address space that is locked for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Vma<'a>(&'a VmaRef);

impl<'a> Vma<'a> {
    /// Where it begins.
    pub(crate) fn start(&self) -> usize {
        self.0.start()
    }

    /// Its flags.
    pub(crate) fn flags(&self) -> kernel::mm::virt::vm_flags_t {
        self.0.flags()
    }

    /// How many pages it maps.
    pub(crate) fn pages(&self) -> usize {
        (self.0.end() - self.0.start()) / kernel::page::PAGE_SIZE
    }

    /// Which page of its file it maps first.
    pub(crate) fn first_page(&self) -> usize {
        // SAFETY: The VMA is valid while it is borrowed.
        unsafe { (*self.0.as_ptr()).vm_pgoff }
    }

    /// The file it maps, if it maps any.
    pub(crate) fn file(&self) -> Option<MappedFile<'a>> {
        // SAFETY: The VMA is valid while it is borrowed. It holds a reference to its file, and a
        // file's mapping and its host are valid while the file is.
        let inode = unsafe {
            let file = NonNull::new((*self.0.as_ptr()).vm_file)?;
            (*(*file.as_ptr()).f_mapping).host
        };
        // INVARIANT: As above.
        NonNull::new(inode).map(|inode| MappedFile {
            inode,
            _vma: PhantomData,
        })
    }
}

/// The inode that caches the pages of a file that is mapped.
///
/// # Invariants
///
/// A VMA that stays for `'a` keeps the inode.
#[derive(Clone, Copy)]
pub(crate) struct MappedFile<'a> {
    inode: NonNull<bindings::inode>,
    _vma: PhantomData<&'a VmaRef>,
}

impl MappedFile<'_> {
    /// Tells files apart, as [`CachedFile::key`] does.
    pub(crate) fn key(&self) -> usize {
        self.inode.as_ptr() as usize
    }

    /// Whether it is one, and not a device.
    pub(crate) fn is_regular(&self) -> bool {
        // SAFETY: Valid by the invariants.
        let mode = unsafe { addr_of!((*self.inode.as_ptr()).i_mode).read() };
        mode & S_IFMT == S_IFREG
    }

    /// Takes a reference, and holds the file system.
    pub(crate) fn hold<'s>(self, superblocks: &'s Superblocks) -> Result<CachedFile<'s>, NotHeld> {
        // SAFETY: An inode in use has a superblock, which lives as long as it.
        let held = unsafe {
            let superblock = NonNull::new_unchecked((*self.inode.as_ptr()).i_sb);
            superblocks.hold(superblock)
        }?;
        // SAFETY: The VMA's file has a reference to the inode, and its superblock is held.
        Ok(unsafe { CachedFile::get(self.inode, held) })
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
    // Not `nr_threads`: a leader that has ended is among those, and uses the address space no more.
    // A thread begins to use it before it counts here, and ends to afterwards.
    // SAFETY: The task is valid, and with it its signal structure.
    let threads = unsafe { addr_of!((*(*leader.as_ptr()).signal).live.counter).read_volatile() };
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
