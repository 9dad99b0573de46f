// SPDX-License-Identifier: GPL-2.0

//! Before the machine restarts (reboot, kexec) the thread ends its work: the next kernel takes
//! all memory over, and does not know of pages that the host may be working on.

use crate::bindings as helpers;
use crate::policy;
use crate::thread::{self, Thread, Work};
use core::ptr::addr_of_mut;
use kernel::alloc::KBox;
use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering, Atomic};

/// Set once a restart is near; never cleared, as nothing calls a restart off.
static NEAR: Atomic<u32> = Atomic::new(0);
/// Set when the thread has ended its work.
static ENDED: Atomic<u32> = Atomic::new(0);

/// Whether the machine is about to restart.
pub(crate) fn is_near() -> bool {
    NEAR.load(ordering::Acquire) != 0
}

/// The thread works from here on.
pub(crate) fn begin() {
    ENDED.store(0, ordering::Release);
}

/// The thread has ended its work.
pub(crate) fn end() {
    ENDED.store(1, ordering::Release);
}

#[repr(C)]
struct Block {
    notifier: bindings::notifier_block,
    thread: *mut bindings::task_struct,
}

/// As long as it exists, restarts wait for a thread.
///
/// # Invariants
///
/// The block is registered, and not moved or used by us until it no longer is.
pub(crate) struct Notifier(*mut Block);

// SAFETY: The kernel's list of notifiers has a lock of its own.
unsafe impl Send for Notifier {}

impl Notifier {
    /// `thread` must be dropped after what this returns.
    pub(crate) fn new<W: Work>(thread: &Thread<W>) -> Result<Self> {
        // SAFETY: All zeroes are a notifier that is in no list, and no function.
        let mut notifier: bindings::notifier_block = unsafe { core::mem::zeroed() };
        notifier.notifier_call = Some(notified);
        let thread = thread.task();
        let block = KBox::into_raw(KBox::new(Block { notifier, thread }, GFP_KERNEL)?);
        // SAFETY: The block stays where it is until it is unregistered.
        let registered = to_result(unsafe {
            helpers::register_reboot_notifier(addr_of_mut!((*block).notifier))
        });
        if let Err(error) = registered {
            // SAFETY: Made above, and nobody else knows it.
            drop(unsafe { KBox::from_raw(block) });
            return Err(error);
        }
        // INVARIANT: Registered just now.
        Ok(Self(block))
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        // SAFETY: Registered, by the invariants; waits for a call that is under way.
        unsafe { helpers::unregister_reboot_notifier(addr_of_mut!((*self.0).notifier)) };
        // SAFETY: By the invariants, and nobody else knows it any more.
        drop(unsafe { KBox::from_raw(self.0) });
    }
}

/// # Safety
///
/// `notifier` must be the first field of a [`Block`] whose thread exists.
unsafe extern "C" fn notified(
    notifier: *mut bindings::notifier_block,
    action: c_ulong,
    _: *mut c_void,
) -> c_int {
    // When the machine is switched off, its memory is gone.
    if action == helpers::SYS_RESTART {
        // SAFETY: By this function's requirements.
        let thread = unsafe { (*notifier.cast::<Block>()).thread };
        NEAR.store(1, ordering::Release);
        // SAFETY: The thread exists, by this function's requirements.
        unsafe { thread::hurry(thread) };
        thread::kick();
        let began = thread::now_ms();
        // SAFETY: The thread exists, by this function's requirements. One that is frozen, as
        // after hibernation, holds what the image holds, and cannot answer.
        while ENDED.load(ordering::Acquire) == 0 && !unsafe { helpers::pagefusion_freezing(thread) }
        {
            if thread::now_ms().saturating_sub(began) > policy::RESTART_WAIT_MS {
                pr_warn!("the machine restarts before the host has answered\n");
                break;
            }
            thread::sleep(2);
        }
    }
    bindings::NOTIFY_DONE as c_int
}
