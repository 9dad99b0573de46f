// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lock order: `Runtime::slots`, then the locks of [`Sharing`]; `Runtime::unmapped` last.
//!
//! What the interposed functions and the engine's threads have in common.

#![expect(unsafe_code, reason = "tells the engine where guest memory is")]

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use pagefusion_host::engine::{Memory, Region, Sharing, Unsuitable};
use rustix::process::{Pid, getpid};

use crate::kvm::{MemoryRegion, UffdRange};
use crate::service;
use crate::unmapped::Unmapped;

static ACTIVE: AtomicBool = AtomicBool::new(false);
static RUNTIME: OnceLock<Runtime> = OnceLock::new();

/// Where the daemon and QEMU's monitor are.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) engine_socket: PathBuf,
    pub(crate) qmp_socket: Option<PathBuf>,
}

/// State of the one engine of this process.
#[derive(Debug)]
pub(crate) struct Runtime {
    process: Pid,
    slots: Mutex<Slots>,
    unmapped: Unmapped,
}

/// Memory slots as KVM knows them; kept from the first on, before there is an engine.
#[derive(Debug, Default)]
struct Slots {
    regions: BTreeMap<u64, Slot>,
    disabled: Option<&'static str>,
    sharing: Option<Arc<Sharing>>,
    /// What the VMM is doing to its memory now.
    changing: Vec<Range<usize>>,
    /// What its own `userfaultfd` has got (`true`) and let go since the beginning; kept until
    /// there is an engine to be told.
    userfaultfd: Vec<(Range<usize>, bool)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    region: Region,
    /// Whether it is left alone, since the guest has pages of it that are nowhere in this process.
    private: bool,
}

impl Slot {
    /// Guest memory of this slot, if it is some.
    fn of(slot: &MemoryRegion) -> Option<Self> {
        const PAGE: u64 = 4096;
        let aligned = (slot.guest_phys_addr | slot.memory_size | slot.userspace_addr) % PAGE == 0;
        let region = Region {
            gfn: slot.guest_phys_addr / PAGE,
            pages: slot.memory_size / PAGE,
            hva: slot.userspace_addr as usize,
        };
        let private = slot.is_private();
        (slot.is_memory() && aligned).then_some(Self { region, private })
    }

    fn add_to(&self, memory: &mut Memory, key: u64) {
        let added = if self.private {
            memory.leave_out(key, self.region, Unsuitable::GuestMemfd)
        } else {
            // SAFETY: KVM has taken it as the memory of a guest. The VMM's calls that unmap, move or
            // replace memory come by this library, which tells the engine before.
            unsafe { memory.insert_region(key, self.region) }
        };
        report(added, "adding guest memory");
    }
}

impl Runtime {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        lock(&self.slots)
    }

    /// Gives the engine what KVM has said so far, and everything after it.
    pub(crate) fn attach(&self, sharing: &Arc<Sharing>) {
        let mut slots = self.slots();
        for (key, slot) in &slots.regions {
            slot.add_to(&mut sharing.memory(), *key);
        }
        for range in &slots.changing {
            report(sharing.memory().begin_change(range), "leaving memory alone");
        }
        for (range, taken) in slots.userfaultfd.drain(..) {
            let mut memory = sharing.memory();
            if taken {
                report(memory.take_userfaultfd(&range), "leaving memory alone");
            } else {
                memory.give_userfaultfd_back(&range);
            }
        }
        if let Some(why) = slots.disabled {
            log::warn!("sharing ends: {why}");
            report(sharing.memory().disable(why), "ending sharing");
        }
        slots.sharing = Some(sharing.clone());
    }

    /// There will be no engine, and the operator is told so: from now on every call of the VMM goes
    /// straight on, and nothing is kept of those before.
    pub(crate) fn give_up(&self, why: &dyn Error) {
        let mut slots = self.slots();
        ACTIVE.store(false, Ordering::Relaxed);
        let kept = std::mem::take(&mut *slots);
        drop(slots);
        drop(kept);
        log::warn!("pagefusion is off for this VM: {why}");
    }

    /// QEMU's monitor is about to be asked where guest memory is.
    pub(crate) fn begin_search(&self) {
        self.unmapped.begin();
    }

    /// What was unmapped meanwhile. No more can be while `_memory` is locked.
    pub(crate) fn end_search(&self, _memory: &Memory) -> Vec<Range<usize>> {
        self.unmapped.end()
    }

    /// Whether KVM has said anything.
    pub(crate) fn has_kvm_slots(&self) -> bool {
        !self.slots().regions.is_empty()
    }
}

/// Whether this process has an engine; a relaxed load, for the fast path.
#[inline]
pub(crate) fn is_active() -> bool {
    ACTIVE.load(Ordering::Relaxed)
}

/// The runtime, unless this is a child that the VMM has forked.
fn current() -> Option<&'static Runtime> {
    RUNTIME.get().filter(|runtime| runtime.process == getpid())
}

/// The slots, unless there is no engine, nor will be one: what is noted then would be kept for nobody.
fn slots(runtime: &Runtime) -> Option<MutexGuard<'_, Slots>> {
    let slots = runtime.slots();
    is_active().then_some(slots)
}

/// Starts the engine if the environment asks for one.
pub(crate) fn start() {
    let Some(engine_socket) = env::var_os("PAGEFUSION_ENGINE_SOCKET") else {
        return;
    };
    if !crate::environment::is_vmm() {
        return;
    }
    let qmp_socket = env::var_os("PAGEFUSION_QMP_SOCKET").map(PathBuf::from);
    let config = Config {
        engine_socket: engine_socket.into(),
        qmp_socket,
    };
    crate::environment::forget();
    env_logger::Builder::from_env(
        env_logger::Env::new().filter_or("PAGEFUSION_LOG", "pagefusion=warn,pagefusion_host=warn"),
    )
    .format_target(false)
    .init();
    if let Some(allocator) = crate::environment::allocator(crate::interpose::object_of) {
        log::warn!(
            "this VM shares nothing: its memory allocator is {allocator}, which calls mmap and madvise where \
             waiting for the engine would wait for ever; use one with glibc's"
        );
        return;
    }
    let runtime = Runtime {
        process: getpid(),
        slots: Mutex::default(),
        unmapped: Unmapped::new(),
    };
    let runtime = RUNTIME.get_or_init(|| runtime);
    // Before the threads, which may find that there is nothing to be active for.
    ACTIVE.store(true, Ordering::Relaxed);
    service::spawn(config, runtime);
}

/// A slot is about to be set: what it replaces becomes ordinary memory first.
pub(crate) fn before_slot(slot: &MemoryRegion) {
    let Some(runtime) = current().filter(|_| slot.is_main_address_space()) else {
        return;
    };
    let key = u64::from(slot.slot);
    let replaced = |slots: &Slots| {
        let old = slots.regions.get(&key).copied();
        old.filter(|old| Slot::of(slot) != Some(*old))
    };
    let Some(old) = replaced(&runtime.slots()) else {
        return;
    };
    make_ordinary(&old.region.addresses());
    let mut slots = runtime.slots();
    if replaced(&slots) == Some(old) {
        slots.regions.remove(&key);
        if let Some(sharing) = &slots.sharing {
            report(sharing.memory().remove_region(key), "removing guest memory");
        }
    }
}

/// A slot was set.
pub(crate) fn after_slot(slot: &MemoryRegion) {
    let Some(runtime) = current().filter(|_| slot.is_main_address_space()) else {
        return;
    };
    let key = u64::from(slot.slot);
    let Some(slot) = Slot::of(slot) else { return };
    let Some(mut slots) = slots(runtime) else {
        return;
    };
    slots.regions.insert(key, slot);
    if let Some(sharing) = &slots.sharing {
        slot.add_to(&mut sharing.memory(), key);
    }
}

/// Something gets hold of guest pages: share nothing any more. An error means that overlays
/// are left, and that nothing may get hold of the pages beneath them.
pub(crate) fn disable(why: &'static str) -> io::Result<()> {
    let Some(runtime) = current() else {
        return Ok(());
    };
    if runtime.slots().disabled.is_some() {
        return Ok(());
    }
    make_ordinary(&(0..usize::MAX));
    let Some(mut slots) = slots(runtime).filter(|slots| slots.disabled.is_none()) else {
        return Ok(());
    };
    // Before there is an engine it is not known whether anything is to end.
    if let Some(sharing) = &slots.sharing {
        sharing.memory().disable(why)?;
        log::warn!("sharing ends: {why}");
    }
    slots.disabled = Some(why);
    Ok(())
}

/// The VMM registers memory with a `userfaultfd` of its own. An error means that overlays are
/// left, and that it must not.
pub(crate) fn take_userfaultfd(range: &UffdRange) -> io::Result<()> {
    let Some(runtime) = current() else {
        return Ok(());
    };
    let range = range.addresses();
    make_ordinary(&range);
    let Some(mut slots) = slots(runtime) else {
        return Ok(());
    };
    match &slots.sharing {
        Some(sharing) => sharing.memory().take_userfaultfd(&range),
        None => {
            slots.userfaultfd.push((range, true));
            Ok(())
        }
    }
}

/// The VMM's `userfaultfd` has let go of memory.
pub(crate) fn give_userfaultfd_back(range: &UffdRange) {
    let Some(mut slots) = current().and_then(slots) else {
        return;
    };
    let range = range.addresses();
    match &slots.sharing {
        Some(sharing) => sharing.memory().give_userfaultfd_back(&range),
        None => slots.userfaultfd.push((range, false)),
    }
}

/// Changes what memory is made of by `change`: nothing is shared there meanwhile.
pub(crate) fn change<T>(range: &Range<usize>, change: impl FnOnce() -> T) -> io::Result<T> {
    let Some(runtime) = current() else {
        return Ok(change());
    };
    make_ordinary(range);
    if let Some(mut slots) = slots(runtime) {
        if let Some(sharing) = &slots.sharing {
            sharing.memory().begin_change(range)?;
        }
        slots.changing.push(range.clone());
    }
    let result = change();
    let mut slots = runtime.slots();
    if let Some(index) = slots.changing.iter().position(|it| it == range) {
        slots.changing.swap_remove(index);
    }
    if let Some(sharing) = &slots.sharing {
        sharing.memory().end_change(range);
    }
    Ok(result)
}

/// Whether the kernel discards what it is asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Certainty {
    /// Perhaps.
    Unknown,
    /// Unless it is locked.
    Unlocked,
    /// Yes.
    Always,
}

/// Discards memory with `discard` after it was made ordinary; `succeeded` says whether that was
/// done. No overlay can come in between: discarding one would bring the canonical bytes back.
/// What is not discarded is not lost.
pub(crate) fn discard<T>(
    range: &Range<usize>,
    certainty: Certainty,
    mut discard: impl FnMut() -> T,
    succeeded: impl FnOnce(&T) -> bool,
) -> io::Result<T> {
    let Some(sharing) = sharing() else {
        return Ok(discard());
    };
    let mut memory = sharing.memory();
    if certainty != Certainty::Unknown {
        memory.before_discard(range, certainty == Certainty::Always)?;
        return Ok(discard());
    }
    memory.restore(range)?;
    let result = discard();
    if !succeeded(&result) {
        return Ok(result);
    }
    // What the guest has written stayed in a mapping of the store's file.
    memory.before_discard(range, true)?;
    Ok(discard())
}

/// Unmaps memory, or maps over it, with `unmap`; `succeeded` says whether that was done.
pub(crate) fn unmap<T>(
    ranges: &[Range<usize>],
    unmap: impl FnOnce() -> T,
    succeeded: impl FnOnce(&T) -> bool,
) -> io::Result<T> {
    unmap_and_move(ranges, &(0..0), unmap, succeeded)
}

/// As [`unmap`], where what is at `moved`, one of the ranges, may still be there afterwards, or
/// elsewhere.
pub(crate) fn unmap_and_move<T>(
    ranges: &[Range<usize>],
    moved: &Range<usize>,
    unmap: impl FnOnce() -> T,
    succeeded: impl FnOnce(&T) -> bool,
) -> io::Result<T> {
    let Some(sharing) = sharing() else {
        return Ok(unmap());
    };
    let mut memory = sharing.memory();
    for range in ranges {
        if range == moved {
            memory.before_move(range)?;
        } else {
            memory.before_unmap(range)?;
        }
    }
    let result = unmap();
    if succeeded(&result) {
        for range in ranges {
            memory.unmapped(range);
        }
        if let Some(runtime) = current() {
            runtime.unmapped.note(ranges);
        }
    }
    Ok(result)
}

/// Makes `range` ordinary memory while others of this VMM go on: whatever they unmap, protect or
/// discard needs the slots, which are locked for the rest only.
fn make_ordinary(range: &Range<usize>) {
    if let Some(sharing) = sharing() {
        sharing.make_ordinary(range);
    }
}

fn sharing() -> Option<Arc<Sharing>> {
    current().and_then(|runtime| runtime.slots().sharing.clone())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn report(result: io::Result<()>, what: &str) {
    if let Err(e) = result {
        log::error!("{what}: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The one test of this process that has an engine in it, or almost.
    #[test]
    fn nothing_is_kept_for_an_engine_that_could_not_start() {
        let runtime = RUNTIME.get_or_init(|| Runtime {
            process: getpid(),
            slots: Mutex::default(),
            unmapped: Unmapped::new(),
        });
        ACTIVE.store(true, Ordering::Relaxed);
        let memory = MemoryRegion {
            slot: 1,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: 4096,
            userspace_addr: 1 << 40,
        };
        let range = UffdRange {
            start: 1 << 40,
            length: 4096,
        };
        let calls = || {
            before_slot(&memory);
            after_slot(&memory);
            take_userfaultfd(&range).unwrap();
            give_userfaultfd_back(&range);
            disable("a device").unwrap();
            let slots = runtime.slots();
            let kept = (slots.regions.len(), slots.userfaultfd.len());
            (kept, slots.disabled.is_some())
        };
        assert_eq!(calls(), ((1, 2), true));
        assert_eq!(calls(), ((1, 4), true));
        runtime.give_up(&io::Error::from(io::ErrorKind::NotFound));
        assert!(!is_active());
        // Whoever was on the way here when it was given up.
        assert_eq!(calls(), ((0, 0), false));
        let changing = || runtime.slots().changing.len();
        assert_eq!(change(&(0..4096), changing).unwrap(), 0);
    }
}
