// SPDX-License-Identifier: GPL-2.0

//! File systems that stay while their inodes are looked at.
//!
//! What holds them is `s_umount`, for reading: an unmount then waits for us, as it waits for
//! `sync` and `drop_caches`. References would not do: to an open file or a mount, the unmount
//! fails with `EBUSY`; to the active superblock, it returns before the data is on the disk and
//! the device is free; to an inode alone, the inode is left behind and that is an error.
//!
//! Locks: `s_umount` of up to [`MOST`] superblocks, each by trylock alone, so that there is no
//! order among them or with the locks that are held meanwhile, and none is waited for.

use crate::bindings as helpers;
use core::cell::Cell;
use core::ptr::{addr_of, addr_of_mut, NonNull};
use kernel::bindings;

/// Most superblocks held at a time.
pub(crate) const MOST: usize = 8;

/// `SB_*` of `linux/fs.h`, which `helpers.c` compares with these.
const DYING: usize = 1 << 24;
const BORN: usize = 1 << 29;
const ACTIVE: usize = 1 << 30;

/// Places for the superblocks that are held.
///
/// Those who wait for one are not kept waiting: see [`Superblocks::are_wanted`].
pub(crate) struct Superblocks {
    slots: [Slot; MOST],
}

// SAFETY: Whoever has it as a whole has no [`HeldSuper`] borrowed from it, so all places are
// free and the pointers in them are never used.
unsafe impl Send for Superblocks {}

/// # Invariants
///
/// While `uses` is not zero, `sb` is valid, and its `s_umount` is held for reading once.
struct Slot {
    sb: Cell<*mut bindings::super_block>,
    uses: Cell<usize>,
}

/// Why a superblock is not held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotHeld {
    /// Others have or want it for themselves, or it is frozen or not in use.
    Busy,
    /// All places are taken.
    NoPlace,
}

impl Superblocks {
    pub(crate) const fn new() -> Self {
        // INVARIANT: No place is in use.
        Self {
            slots: [const {
                Slot {
                    sb: Cell::new(core::ptr::null_mut()),
                    uses: Cell::new(0),
                }
            }; MOST],
        }
    }

    /// The one in the place `index`, if any is.
    pub(crate) fn at(&self, index: usize) -> Option<HeldSuper<'_>> {
        let slot = self.slots.get(index).filter(|slot| slot.uses.get() != 0)?;
        slot.uses.set(slot.uses.get() + 1);
        Some(HeldSuper(slot))
    }

    /// Whether somebody waits for one of them, to unmount, remount or freeze it. They should all
    /// be let go then.
    pub(crate) fn are_wanted(&self) -> bool {
        let mut held = self.slots.iter().filter(|slot| slot.uses.get() != 0);
        held.any(|slot| {
            // SAFETY: By the invariants the superblock is valid.
            unsafe { helpers::pagefusion_rwsem_is_contended(slot.s_umount()) }
        })
    }

    /// Holds a superblock, once more if it is held already. Never sleeps.
    ///
    /// # Safety
    ///
    /// `sb` must be valid during this call.
    pub(crate) unsafe fn hold(
        &self,
        sb: NonNull<bindings::super_block>,
    ) -> Result<HeldSuper<'_>, NotHeld> {
        let in_use = |slot: &&Slot| slot.uses.get() != 0;
        let mut slots = self.slots.iter();
        if let Some(slot) = slots.find(|slot| in_use(slot) && slot.sb.get() == sb.as_ptr()) {
            slot.uses.set(slot.uses.get() + 1);
            return Ok(HeldSuper(slot));
        }
        let free = self.slots.iter().find(|slot| !in_use(slot));
        let slot = free.ok_or(NotHeld::NoPlace)?;
        slot.sb.set(sb.as_ptr());
        // SAFETY: Valid by this function's requirements.
        if unsafe { bindings::down_read_trylock(slot.s_umount()) } == 0 {
            return Err(NotHeld::Busy);
        }
        // INVARIANT: The lock was just taken. Until it is released nobody shuts the superblock
        // down if nobody has yet, so it stays valid; that is what is looked at next.
        slot.uses.set(1);
        let held = HeldSuper(slot);
        if held.is_usable() {
            Ok(held)
        } else {
            Err(NotHeld::Busy)
        }
    }
}

impl Slot {
    fn s_umount(&self) -> *mut bindings::rw_semaphore {
        // SAFETY: Our callers know that the superblock is valid.
        unsafe { addr_of_mut!((*self.sb.get()).s_umount) }
    }
}

/// A superblock that is not shut down, remounted or frozen while this exists. Inodes of it that
/// are got meanwhile must be put before.
pub(crate) struct HeldSuper<'a>(&'a Slot);

impl HeldSuper<'_> {
    pub(crate) fn as_ptr(&self) -> *mut bindings::super_block {
        self.0.sb.get()
    }

    /// Whether it is mounted and may be written. Putting the last reference to an inode of a
    /// frozen file system may wait for the thaw, which would wait for us.
    fn is_usable(&self) -> bool {
        let sb = self.as_ptr();
        // SAFETY: The superblock is valid by the invariants; the flags that count and the state
        // only change under the lock that is held.
        let (flags, frozen) = unsafe {
            (
                addr_of!((*sb).s_flags).read_volatile(),
                addr_of!((*sb).s_writers.frozen).read_volatile(),
            )
        };
        flags & (BORN | ACTIVE | DYING) == BORN | ACTIVE && frozen == 0
    }
}

impl Clone for HeldSuper<'_> {
    fn clone(&self) -> Self {
        self.0.uses.set(self.0.uses.get() + 1);
        Self(self.0)
    }
}

impl Drop for HeldSuper<'_> {
    fn drop(&mut self) {
        let uses = self.0.uses.get() - 1;
        self.0.uses.set(uses);
        if uses == 0 {
            // SAFETY: By the invariants it is held; nobody uses the superblock after this.
            unsafe { bindings::up_read(self.0.s_umount()) };
        }
    }
}
