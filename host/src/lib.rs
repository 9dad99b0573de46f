// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Page fusion for Linux guests, host side.
//!
//! A kernel module in the guest tells which physical pages hold page cache of files that are
//! mapped for reading. This crate, in the process of the virtual machine monitor (VMM),
//! compares each of them with a store byte by byte, and maps one canonical copy over them,
//! copy-on-write. The guest's word decides where to look and nothing else.
//!
//! * [`engine`] lives in the VMM's process. It reads the guest's reports, compares every page
//!   with the store and maps the canonical copy over it.
//! * [`store`] holds the canonical pages of one trust group: VMs that may share.
//! * [`device`] is what the guest reports through, for VMMs that have no ivshmem.
//! * [`protocol`] is what engine and daemon say to each other.
//! * `daemon`, with the feature `cli`, serves stores and devices to many VMMs on one host.
//! * `operator`, with the feature `cli`, is what `pagefusionctl` does.
//!
//! # In a VMM of your own
//!
//! Without the feature `cli` (`default-features = false`) there is no command line, no set-up
//! of a logger and no global state, and no thread is started. Two are needed, and are yours:
//! one that serves faults, which must run before anything is shared, and one that looks after
//! the guest's ring.
//!
//! The guest finds its device by PCI id. [`device::PagefusionDevice`] has the registers and
//! the shared memory, which `docs/abi.md` describes, and the VMM shows it to the guest.
//!
//! ```no_run
//! use pagefusion_host::device::PagefusionDevice;
//! use pagefusion_host::engine::{Memory, Sharing, StoreView, Uffd, serve_faults};
//! use pagefusion_host::store::{Group, LocalStore};
//! use std::os::fd::{AsFd, OwnedFd};
//! use std::sync::{Arc, Mutex};
//! use vm_memory::GuestMemoryMmap;
//!
//! # fn wait_for(_: std::os::fd::BorrowedFd<'_>) {}
//! fn share(
//!     group: Arc<Mutex<Group>>,
//!     vm: u32,
//!     guest_memory: &GuestMemoryMmap,
//!     device: &PagefusionDevice,
//!     stop: OwnedFd,
//! ) -> Result<(), Box<dyn std::error::Error>> {
//!     // Guest memory: private and anonymous, and nobody else's. It is kept mapped.
//!     let uffd = Uffd::open(None)?;
//!     let events = uffd.try_clone()?;
//!     let mut memory = Memory::new(uffd)?;
//!     memory.set_guest_memory(guest_memory)?;
//!     let sharing = Arc::new(Sharing::new(memory));
//!
//!     // Faults first: who undoes an overlay waits for them.
//!     let faults = sharing.clone();
//!     std::thread::spawn(move || serve_faults(&events, &faults, stop.as_fd()));
//!
//!     // The store: in this process here; `protocol::StoreClient` reaches a daemon's.
//!     let store = LocalStore::new(group, vm);
//!     let (view, seed) = (StoreView::new(store.read_only()?)?, store.hash_seed());
//!     sharing.connect(Box::new(store), view, seed)?;
//!
//!     // The guest's reports.
//!     let mut guest = device.guest(1, 16_384)?;
//!     loop {
//!         let done = guest.progress(&sharing);
//!         if done.ring {
//!             device.ring_guest()?;
//!         }
//!         if !done.busy {
//!             // After `done.retry` for a tenth of a second at most.
//!             wait_for(device.doorbell());
//!             device.take_doorbell()?;
//!         }
//!     }
//! }
//! ```
//!
//! Before the VMM discards guest memory (a balloon, free page reporting), unmaps it, or gives
//! it to a device that holds on to pages, it must say so:
//! [`engine::Memory::before_discard`], [`engine::Memory::remove_region`] and
//! [`engine::Memory::disable`]. The lock of [`engine::Sharing::memory`] must be held until it
//! has discarded or unmapped the memory. Where that is much of the guest's memory,
//! [`engine::Sharing::make_ordinary`] before keeps the guest from waiting for all of it.
//!
//! # Versions
//!
//! Semantic versioning holds for what is public without the feature `cli`; while the version
//! begins with 0, the second number is the major one. `daemon` and `operator` are there for
//! the binaries and may change with every release. A newer compiler may be asked for with
//! a minor version. What is said between processes has versions of its own: the wire format
//! ([`pagefusion_abi::wire::VERSION_MAJOR`], minor versions only add) and the protocol
//! ([`protocol::VERSION`], which both sides must share).

#![deny(missing_docs)]

#[cfg(feature = "cli")]
pub mod daemon;
pub mod device;
pub mod engine;
#[cfg(feature = "cli")]
pub mod operator;
pub mod protocol;
pub mod store;
