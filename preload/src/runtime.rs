// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lock order: `Runtime::slots`, then the locks of [`Sharing`].
//!
//! What the interposed functions and the engine's threads have in common.

use std::collections::BTreeMap;
use std::env;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use pagefusion_host::engine::{Region, Sharing};
use rustix::process::{Pid, getpid};

use crate::kvm::MemoryRegion;
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
}

/// Memory slots as KVM knows them; kept from the first on, before there is an engine.
#[derive(Debug, Default)]
struct Slots {
    regions: BTreeMap<u64, Region>,
    disabled: Option<&'static str>,
    sharing: Option<Arc<Sharing>>,
}

impl Runtime {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the engine what KVM has said so far, and everything after it.
    pub(crate) fn attach(&self, sharing: &Arc<Sharing>) {
        let mut slots = self.slots();
        for (slot, region) in &slots.regions {
            report(
                sharing.memory().insert_region(*slot, *region),
                "adding guest memory",
            );
        }
        if let Some(why) = slots.disabled {
            report(sharing.memory().disable(why), "ending sharing");
        }
        slots.sharing = Some(sharing.clone());
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
    let runtime = Runtime {
        process: getpid(),
        slots: Mutex::default(),
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
    let mut slots = runtime.slots();
    let key = u64::from(slot.slot);
    if slots
        .regions
        .get(&key)
        .is_some_and(|old| region(slot) != Some(*old))
    {
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
        report(
            sharing.memory().insert_region(key, region),
            "adding guest memory",
        );
    }
}

fn region(slot: &MemoryRegion) -> Option<Region> {
    const PAGE: u64 = 4096;
    let aligned = (slot.guest_phys_addr | slot.memory_size | slot.userspace_addr) % PAGE == 0;
    (slot.is_ordinary() && aligned).then(|| Region {
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

/// Discards memory with `discard` after it was made ordinary. No overlay can come in between:
/// discarding one would bring the canonical bytes back.
pub(crate) fn discard<T>(
    address: usize,
    length: usize,
    discard: impl FnOnce() -> T,
) -> io::Result<T> {
    let sharing = current().and_then(|runtime| runtime.slots().sharing.clone());
    let Some(sharing) = sharing else {
        return Ok(discard());
    };
    let mut memory = sharing.memory();
    memory.restore(&(address..address.saturating_add(length)))?;
    Ok(discard())
}

fn report(result: io::Result<()>, what: &str) {
    if let Err(e) = result {
        log::error!("{what}: {e}");
    }
}
