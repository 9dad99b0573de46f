// SPDX-License-Identifier: GPL-2.0

//! Learns at once when a process touches pages of a file that is new: by tracepoints in the
//! kernel's page faults of files.
//!
//! Callbacks run in the faulting process, holding its mmap or VMA lock, maybe under RCU, but no
//! spinlock. They take none of our locks; waking the worker takes those of its wait queue and of
//! the scheduler, under which no file is ever faulted. For a file that has been met before they
//! compute a hash and read three words.

use crate::bindings as helpers;
use crate::file::{self, CachedFile};
use crate::filter::{Met, Word, WORDS};
use crate::thread;
use core::ptr::{null_mut, NonNull};
use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Relaxed, Atomic};

impl Word for Atomic<u64> {
    fn load(&self) -> u64 {
        self.load(Relaxed)
    }

    fn store(&self, bits: u64) {
        self.store(bits, Relaxed);
    }
}

/// Files that a pass or a fault has met.
static MET: Met<Atomic<u64>> = Met::new(
    [const { Atomic::new(0) }; WORDS],
    [const { Atomic::new(0) }; WORDS],
    Atomic::new(0),
    Atomic::new(0),
    Atomic::new(0),
);
/// Whether there was a fault in a file not met before.
static NEWS: Atomic<u32> = Atomic::new(0);

/// A page of a file is wanted.
///
/// # Safety
///
/// Called by the kernel with the page cache of a file that is mapped.
unsafe extern "C" fn faulted(_: *mut c_void, mapping: *mut bindings::address_space, _: c_ulong) {
    // SAFETY: By this function's requirements.
    unsafe { meet(mapping) };
}

/// Cached pages of a file were mapped.
///
/// # Safety
///
/// As [`faulted`].
unsafe extern "C" fn mapped(
    _: *mut c_void,
    mapping: *mut bindings::address_space,
    _: c_ulong,
    _: c_ulong,
) {
    // SAFETY: By this function's requirements.
    unsafe { meet(mapping) };
}

/// # Safety
///
/// `mapping` must be that of a file in use.
unsafe fn meet(mapping: *mut bindings::address_space) {
    // SAFETY: By this function's requirements.
    let hash = unsafe { file::hash_of(mapping) };
    if MET.insert(hash) && NEWS.xchg(1, Relaxed) == 0 {
        thread::kick();
    }
}

/// Whether a file was touched that had not been met; asks once.
pub(crate) fn take_news() -> bool {
    NEWS.load(Relaxed) != 0 && NEWS.xchg(0, Relaxed) != 0
}

/// Notes that a pass found a file mapped, so that faults in it are no news.
pub(crate) fn note(file: &CachedFile<'_>) {
    MET.insert(file.hash());
}

/// A pass begins: it meets all that is mapped.
pub(crate) fn begin_pass() {
    MET.begin_pass();
}

/// It has come to its end.
pub(crate) fn end_pass() {
    MET.end_pass();
}

/// Files were forgotten, and are news when they come back after the next pass.
pub(crate) fn forget() {
    MET.forget();
}

/// A callback in place.
///
/// # Invariants
///
/// `point` is a tracepoint of the kernel's own, which never goes away, and has `probe`.
struct Attached {
    point: NonNull<bindings::tracepoint>,
    probe: *mut c_void,
}

// SAFETY: Any thread that may sleep may remove the callback.
unsafe impl Send for Attached {}

impl Attached {
    /// Adds a callback. `None` in a kernel without this tracepoint.
    ///
    /// # Safety
    ///
    /// `probe` must be a function with a data pointer and then the arguments of this tracepoint.
    unsafe fn new(name: &CStr, probe: *mut c_void) -> Option<Self> {
        let mut search = Search {
            name,
            found: null_mut(),
        };
        // SAFETY: `find` takes a pointer to a `Search`, which outlives the call.
        unsafe { bindings::for_each_kernel_tracepoint(Some(find), (&raw mut search).cast()) };
        let point = NonNull::new(search.found)?;
        // SAFETY: By this function's requirements; no callback uses its data.
        let added =
            unsafe { bindings::tracepoint_probe_register(point.as_ptr(), probe, null_mut()) };
        // INVARIANT: Just added. Only then is there one, whose end removes it.
        (added == 0).then(|| Self { point, probe })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: By the invariants.
        unsafe {
            bindings::tracepoint_probe_unregister(self.point.as_ptr(), self.probe, null_mut())
        };
    }
}

struct Search<'a> {
    name: &'a CStr,
    found: *mut bindings::tracepoint,
}

/// # Safety
///
/// `search` must point to a [`Search`], and `point` to a tracepoint.
unsafe extern "C" fn find(point: *mut bindings::tracepoint, search: *mut c_void) {
    // SAFETY: By this function's requirements.
    let search = unsafe { &mut *search.cast::<Search<'_>>() };
    // SAFETY: A tracepoint has a name.
    let name = unsafe { CStr::from_char_ptr((*point).name) };
    if name.to_bytes() == search.name.to_bytes() {
        search.found = point;
    }
}

/// Dropping it waits until no callback that was removed still runs.
struct Quiet;

impl Drop for Quiet {
    fn drop(&mut self) {
        // SAFETY: Our callers may sleep.
        unsafe { helpers::pagefusion_tracepoint_synchronize() };
        MET.clear();
        take_news();
    }
}

/// Both callbacks in place. The order of the fields is that in which they are undone.
pub(crate) struct Watch {
    _fault: Attached,
    _map: Attached,
    _quiet: Quiet,
}

impl Watch {
    /// Attaches to the tracepoints. `None` in a kernel that has not both of them.
    pub(crate) fn start() -> Option<Self> {
        // Dropped last, whatever fails.
        let quiet = Quiet;
        let probe = faulted as unsafe extern "C" fn(_, _, _);
        // SAFETY: That tracepoint has a mapping and an index.
        let fault = unsafe { Attached::new(c"mm_filemap_fault", probe as *mut c_void)? };
        let probe = mapped as unsafe extern "C" fn(_, _, _, _);
        // SAFETY: That tracepoint has a mapping, a first and a last index.
        let map = unsafe { Attached::new(c"mm_filemap_map_pages", probe as *mut c_void)? };
        Some(Self {
            _fault: fault,
            _map: map,
            _quiet: quiet,
        })
    }
}
