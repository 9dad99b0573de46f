// SPDX-License-Identifier: GPL-2.0

//! Gives the tracker's memory back when the kernel is short of memory.
//!
//! The callbacks run in whoever needs memory, with whatever locks it holds. They take none, look
//! at nothing but two numbers, and wake the worker, which alone touches the tracker.

use crate::thread;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Relaxed, Atomic};

/// What the kernel counts: an entry of the tracker.
const OBJECT_BYTES: u64 = 8;

/// Objects there are.
static HELD: Atomic<u64> = Atomic::new(0);
/// Objects the worker is to let go.
static WANTED: Atomic<u64> = Atomic::new(0);

/// Says how much memory the tracker can let go of now.
pub(crate) fn set_held(bytes: u64) {
    HELD.store(bytes / OBJECT_BYTES, Relaxed);
}

/// Bytes that are wanted back since the last time.
pub(crate) fn take_wanted() -> Option<u64> {
    if WANTED.load(Relaxed) == 0 {
        return None;
    }
    Some(WANTED.xchg(0, Relaxed).saturating_mul(OBJECT_BYTES))
}

/// What can still be asked for.
fn left() -> u64 {
    HELD.load(Relaxed).saturating_sub(WANTED.load(Relaxed))
}

/// # Safety
///
/// None: the arguments are not used.
unsafe extern "C" fn count(
    _: *mut bindings::shrinker,
    _: *mut bindings::shrink_control,
) -> c_ulong {
    left() as c_ulong
}

/// Promises to let go of what is asked for.
///
/// # Safety
///
/// Called by the kernel with a valid `control`.
unsafe extern "C" fn scan(
    _: *mut bindings::shrinker,
    control: *mut bindings::shrink_control,
) -> c_ulong {
    // SAFETY: By this function's requirements.
    let asked = unsafe { (*control).nr_to_scan } as u64;
    let granted = asked.min(left());
    if granted != 0 && WANTED.fetch_add(granted, Relaxed) == 0 {
        thread::kick();
    }
    granted as c_ulong
}

/// A registered shrinker. Dropping it removes it and waits until no callback runs.
///
/// # Invariants
///
/// Allocated by `shrinker_alloc` and registered.
pub(crate) struct Shrinker(NonNull<bindings::shrinker>);

// SAFETY: Any thread that may sleep may free it.
unsafe impl Send for Shrinker {}

impl Shrinker {
    /// Registers the callbacks.
    pub(crate) fn register() -> Result<Self> {
        // SAFETY: The name has no conversions.
        let shrinker = unsafe { bindings::shrinker_alloc(0, c"pagefusion".as_char_ptr()) };
        let shrinker = NonNull::new(shrinker).ok_or(ENOMEM)?;
        // SAFETY: Just allocated, and nobody else knows it.
        let fields = unsafe { &mut *shrinker.as_ptr() };
        fields.count_objects = Some(count);
        fields.scan_objects = Some(scan);
        // SAFETY: Allocated above, with both callbacks.
        unsafe { bindings::shrinker_register(shrinker.as_ptr()) };
        // INVARIANT: Just registered.
        Ok(Self(shrinker))
    }
}

impl Drop for Shrinker {
    fn drop(&mut self) {
        // SAFETY: By the invariants, and not used after this.
        unsafe { bindings::shrinker_free(self.0.as_ptr()) };
        set_held(0);
        take_wanted();
    }
}
