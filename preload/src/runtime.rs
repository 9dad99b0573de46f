// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lock order: `Runtime::slots`, then the locks of [`Sharing`]; `Runtime::unmapped` last.
//!
//! What the interposed functions and the engine's threads have in common.

#![expect(unsafe_code, reason = "tells the engine where guest memory is")]

use std::collections::BTreeMap;
use std::env;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use pagefusion_host::engine::{Memory, Region, Sharing};
use rustix::process::{Pid, getpid};

use crate::kvm::{MemoryRegion, UffdRange};
use crate::service;

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
    /// What was unmapped since QEMU's monitor was asked where guest memory is; `None` while it
    /// is not asked.
    unmapped: Mutex<Option<Vec<Range<usize>>>>,
}

/// Memory slots as KVM knows them; kept from the first on, before there is an engine.
#[derive(Debug, Default)]
struct Slots {
    regions: BTreeMap<u64, Region>,
    disabled: Option<&'static str>,
    sharing: Option<Arc<Sharing>>,
    /// What the VMM is doing to its memory now.
    changing: Vec<Range<usize>>,
    /// What its own `userfaultfd` has got (`true`) and let go since the beginning; kept until
    /// there is an engine to be told.
    userfaultfd: Vec<(Range<usize>, bool)>,
}

impl Runtime {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        lock(&self.slots)
    }

    /// Gives the engine what KVM has said so far, and everything after it.
    pub(crate) fn attach(&self, sharing: &Arc<Sharing>) {
        let mut slots = self.slots();
        for (slot, region) in &slots.regions {
            insert(sharing, *slot, *region);
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
            report(sharing.memory().disable(why), "ending sharing");
        }
        slots.sharing = Some(sharing.clone());
    }

    /// QEMU's monitor is about to be asked where guest memory is.
    pub(crate) fn begin_search(&self) {
        *lock(&self.unmapped) = Some(Vec::new());
    }

    /// What was unmapped meanwhile. No more can be while `_memory` is locked.
    pub(crate) fn end_search(&self, _memory: &Memory) -> Vec<Range<usize>> {
        lock(&self.unmapped).take().unwrap_or_default()
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
        unmapped: Mutex::default(),
    };
    let runtime = RUNTIME.get_or_init(|| runtime);
    if service::spawn(config, runtime) {
        ACTIVE.store(true, Ordering::Relaxed);
    }
}

/// A slot is about to be set: what it replaces becomes ordinary memory first.
pub(crate) fn before_slot(slot: &MemoryRegion) {
    let Some(runtime) = current().filter(|_| slot.is_main_address_space()) else {
        return;
    };
    let key = u64::from(slot.slot);
    let replaced = |slots: &Slots| {
        let old = slots.regions.get(&key).copied();
        old.filter(|old| region(slot) != Some(*old))
    };
    let Some(old) = replaced(&runtime.slots()) else {
        return;
    };
    make_ordinary(&old.addresses());
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
    let Some(region) = region(slot) else { return };
    let mut slots = runtime.slots();
    let key = u64::from(slot.slot);
    slots.regions.insert(key, region);
    if let Some(sharing) = &slots.sharing {
        insert(sharing, key, region);
    }
}

/// A memory slot that KVM has.
fn insert(sharing: &Sharing, slot: u64, region: Region) {
    // SAFETY: KVM has taken it as the memory of a guest. The VMM's calls that unmap, move or
    // replace memory come by this library, which tells the engine before.
    let inserted = unsafe { sharing.memory().insert_region(slot, region) };
    report(inserted, "adding guest memory");
}

fn region(slot: &MemoryRegion) -> Option<Region> {
    const PAGE: u64 = 4096;
    let aligned = (slot.guest_phys_addr | slot.memory_size | slot.userspace_addr) % PAGE == 0;
    (slot.is_ordinary() && aligned).then_some(Region {
        gfn: slot.guest_phys_addr / PAGE,
        pages: slot.memory_size / PAGE,
        hva: slot.userspace_addr as usize,
    })
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
    let mut slots = runtime.slots();
    if slots.disabled.is_some() {
        return Ok(());
    }
    if let Some(sharing) = &slots.sharing {
        sharing.memory().disable(why)?;
    }
    log::warn!("sharing ends: {why}");
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
    let mut slots = runtime.slots();
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
    let Some(runtime) = current() else { return };
    let range = range.addresses();
    let mut slots = runtime.slots();
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
    {
        let mut slots = runtime.slots();
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
            if let Some(unmapped) = lock(&runtime.unmapped).as_mut() {
                unmapped.extend_from_slice(ranges);
            }
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
