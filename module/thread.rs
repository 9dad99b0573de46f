// SPDX-License-Identifier: GPL-2.0

//! A freezable kernel thread at the lowest priority, the event it sleeps on, and how much CPU time
//! it has taken.
//!
//! The one lock, `CPU`, is held for a few instructions, and nothing is taken meanwhile.

use crate::bindings as helpers;
use crate::restart;
use core::marker::PhantomData;
use core::ptr::{addr_of, NonNull};
use kernel::alloc::KBox;
use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::task::Task;

/// CPU time of threads that have ended, and the one that runs.
struct Cpu {
    before_ns: u64,
    running: Option<ARef<Task>>,
}

impl Cpu {
    fn ns(&self) -> u64 {
        let now = self.running.as_ref().map_or(0, |task| {
            // SAFETY: The reference keeps the task; the number may change while it is read.
            unsafe { addr_of!((*task.as_ptr()).se.sum_exec_runtime).read_volatile() }
        });
        self.before_ns + now
    }
}

kernel::sync::global_lock! {
    // SAFETY: [`init`] initialises it before there is anybody to use it.
    unsafe(uninit) static CPU: Mutex<Cpu> = Cpu { before_ns: 0, running: None };
}

/// # Safety
///
/// Must be called once, before anything else of this file.
pub(crate) unsafe fn init() {
    // SAFETY: By this function's requirements.
    unsafe { CPU.init() };
}

/// CPU time that threads have taken since the module was loaded, nanoseconds.
pub(crate) fn cpu_ns() -> u64 {
    CPU.lock().ns()
}

/// What a [`Thread`] does.
pub(crate) trait Work: Send + 'static {
    /// Runs in the thread; returns soon after [`must_stop`] says so.
    fn run(&mut self);
}

/// A running thread, one at a time. Dropping it stops the thread, waits for it, and drops its work.
///
/// # Invariants
///
/// `task` was created by `kthread_create_on_node` and has not been stopped; `work` came from
/// `KBox::into_raw`, and nothing but the thread uses it until the thread has been stopped.
pub(crate) struct Thread<W: Work> {
    task: NonNull<bindings::task_struct>,
    work: *mut W,
}

// SAFETY: The thread may be stopped from any context that may sleep, and `W` is `Send`.
unsafe impl<W: Work> Send for Thread<W> {}

impl<W: Work> Thread<W> {
    /// Starts a thread.
    pub(crate) fn start(work: KBox<W>, name: &'static CStr) -> Result<Self> {
        let work = KBox::into_raw(work);
        // SAFETY: `entry::<W>` takes a `*mut W`, which lives until the thread has been stopped;
        // the name is a literal without conversions.
        let task = unsafe {
            bindings::kthread_create_on_node(
                Some(entry::<W>),
                work.cast(),
                bindings::NUMA_NO_NODE,
                name.as_char_ptr(),
            )
        };
        match kernel::error::from_err_ptr(task).map(NonNull::new) {
            Ok(Some(task)) => {
                // SAFETY: `Task` is a `task_struct`, and this one is not gone before it is stopped.
                let reference = unsafe { task.cast::<Task>().as_ref() };
                CPU.lock().running = Some(reference.into());
                // SAFETY: The thread was just created and waits to be woken.
                unsafe { bindings::wake_up_process(task.as_ptr()) };
                // INVARIANT: Created above; `work` is left to the thread from here on.
                Ok(Self { task, work })
            }
            other => {
                // SAFETY: No thread was created, so this is the only owner.
                drop(unsafe { KBox::from_raw(work) });
                Err(other.err().unwrap_or(ENOMEM))
            }
        }
    }
}

impl<W: Work> Thread<W> {
    /// The task, which exists until this is dropped.
    pub(crate) fn task(&self) -> *mut bindings::task_struct {
        self.task.as_ptr()
    }
}

impl<W: Work> Drop for Thread<W> {
    fn drop(&mut self) {
        // SAFETY: By the invariants the thread exists.
        unsafe { hurry(self.task.as_ptr()) };
        // SAFETY: By the invariants the thread exists and has not been stopped; it never exits
        // by itself, as `entry` waits to be stopped.
        unsafe { bindings::kthread_stop(self.task.as_ptr()) };
        let ended = {
            let mut cpu = CPU.lock();
            cpu.before_ns = cpu.ns();
            cpu.running.take()
        };
        drop(ended);
        // SAFETY: By the invariants this is the work, and its only other user has ended.
        drop(unsafe { KBox::from_raw(self.work) });
    }
}

/// Gives a thread that somebody waits for the usual priority: at the lowest, everybody else comes
/// before it, and before who waits.
///
/// # Safety
///
/// `task` must be that of a [`Thread`] that exists.
pub(crate) unsafe fn hurry(task: *mut bindings::task_struct) {
    // SAFETY: By this function's requirements; this takes no lock that our callers may hold.
    unsafe { bindings::sched_set_normal(task, 0) };
}

/// # Safety
///
/// `work` must be valid as a `*mut W` until the thread has been stopped, and be used by nobody
/// else until then.
unsafe extern "C" fn entry<W: Work>(work: *mut c_void) -> c_int {
    // SAFETY: This thread is new and belongs to us.
    unsafe { bindings::set_freezable() };
    // SAFETY: The current task is this thread.
    unsafe { bindings::sched_set_normal(Task::current_raw(), 19) };
    // SAFETY: By this function's requirements.
    let work = unsafe { &mut *work.cast::<W>() };
    restart::begin();
    work.run();
    restart::end();
    // `kthread_stop` wants a thread that still exists.
    while !is_stopped() {
        wait(1000);
    }
    0
}

/// Whether the current thread has to end its work, because it is stopped or the machine restarts.
/// Only for code that runs in a [`Thread`].
pub(crate) fn must_stop() -> bool {
    is_stopped() || restart::is_near()
}

fn is_stopped() -> bool {
    // SAFETY: Our callers run in a kthread.
    unsafe { bindings::kthread_should_stop() }
}

/// Sleeps until [`kick`]ed, asked to stop, or so many milliseconds have passed; may be frozen
/// meanwhile. Kicks while nobody sleeps are not lost. Only for code that runs in a [`Thread`].
pub(crate) fn wait(milliseconds: u64) {
    let milliseconds = milliseconds.min(3_600_000) as c_uint;
    // SAFETY: Our callers run in a kthread that may sleep.
    unsafe { helpers::pagefusion_wait(milliseconds) };
}

/// As [`wait`], but ends when the thread is to be frozen instead of freezing it, for those who have
/// something to do before.
pub(crate) fn wait_unfrozen(milliseconds: u64) {
    let milliseconds = milliseconds.min(3_600_000) as c_uint;
    // SAFETY: As in `wait`.
    unsafe { helpers::pagefusion_wait_unfrozen(milliseconds) };
}

/// Whether somebody waits for the current thread to [`freeze`]. Only for code that runs in a
/// [`Thread`].
pub(crate) fn is_freezing() -> bool {
    // SAFETY: The current task exists.
    unsafe { helpers::pagefusion_freezing(Task::current_raw()) }
}

/// Stays frozen as long as [`is_freezing`] says so. Only for code that runs in a [`Thread`].
pub(crate) fn freeze() {
    // SAFETY: Our callers run in a kthread that may sleep, and hold no lock.
    unsafe { helpers::pagefusion_try_to_freeze() };
}

/// Sleeps whatever happens.
pub(crate) fn sleep(milliseconds: u32) {
    // SAFETY: Our callers may sleep.
    unsafe { bindings::msleep(milliseconds) };
}

/// Wakes the thread that [`wait`]s. May be called in any context.
pub(crate) fn kick() {
    // SAFETY: The event is static and always valid; waking needs no context.
    unsafe { helpers::pagefusion_kick() };
}

/// Lets others run if they need to.
pub(crate) fn give_way() {
    // SAFETY: Our callers may sleep.
    unsafe { helpers::pagefusion_cond_resched() };
}

/// Milliseconds since boot, without time asleep.
pub(crate) fn now_ms() -> u64 {
    now_us() / 1000
}

/// Microseconds since boot, without time asleep.
pub(crate) fn now_us() -> u64 {
    now_ns() / 1000
}

/// Nanoseconds since boot, without time asleep.
pub(crate) fn now_ns() -> u64 {
    // SAFETY: Always callable once timekeeping runs, which is before any module is loaded.
    unsafe { bindings::ktime_get_mono_fast_ns() }
}

/// While this exists the current thread is not put aside for another, and what interrupts have left
/// to be done waits: no more than the interrupts themselves comes between.
pub(crate) struct Undisturbed(PhantomData<*mut ()>);

impl Undisturbed {
    pub(crate) fn new() -> Self {
        // SAFETY: Undone when this is dropped, on the same thread, as it is not `Send`.
        unsafe { helpers::pagefusion_local_bh_disable() };
        Self(PhantomData)
    }
}

impl Drop for Undisturbed {
    fn drop(&mut self) {
        // SAFETY: Disabled when this was made.
        unsafe { helpers::pagefusion_local_bh_enable() };
    }
}
