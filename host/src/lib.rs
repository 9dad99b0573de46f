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
//! of a logger and no global state, and no thread is started. [`engine::Engine`] is what shares
//! the memory of one VM, and takes five steps:
//!
//! 1. Guest memory is a [`vm_memory::GuestMemoryMmap`], private and anonymous, and nobody else's.
//!    The engine keeps its regions mapped as long as something lies over them.
//! 2. The guest's module finds its device by PCI id. [`device::PagefusionDevice`] has the registers
//!    and the shared memory, which `docs/abi.md` describes; the VMM shows them to the guest.
//! 3. A store: [`engine::Engine::join`] for one in this process, which all VMs of a trust group
//!    join, or [`engine::Engine::connect`] for that of a daemon.
//! 4. Two threads of the VMM serve faults and the guest's ring. An event loop can take the place of
//!    the second.
//! 5. In the end [`engine::Engine::stop`].
//!
//! ```no_run
//! use pagefusion_host::device::PagefusionDevice;
//! use pagefusion_host::engine::{Engine, Uffd};
//! use pagefusion_host::store::Group;
//! use std::sync::{Arc, Mutex};
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! # fn run_the_guest(_: &GuestMemoryMmap, _: &PagefusionDevice) {}
//! fn run(group: &Arc<Mutex<Group>>, vm: u32) -> Result<(), Box<dyn std::error::Error>> {
//!     let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 30)])?;
//!     let device = Arc::new(PagefusionDevice::new()?);
//!     let engine = Engine::new(Uffd::open(None)?, &memory, device.clone())?;
//!     engine.join(group, vm)?;
//!     std::thread::scope(|threads| {
//!         threads.spawn(|| engine.serve_faults());
//!         threads.spawn(|| engine.serve_ring());
//!         // With KVM, BAR0 on a bus of `vm-device`, BAR2 in a memory slot, and MSI-X.
//!         run_the_guest(&memory, &device);
//!         engine.stop()
//!     })?;
//!     Ok(())
//! }
//! ```
//!
//! `examples/two_guests.rs` is a VMM that does all of it.
//!
//! Whatever changes what guest memory is made of goes through the engine:
//! [`engine::Engine::discard`] (a balloon, free page reporting), [`engine::Engine::change`] (locks,
//! protection, advice), [`engine::Engine::set_guest_memory`] (memory that is plugged in or out), and
//! [`engine::Engine::disable`] before a device gets hold of guest pages.
//!
//! A VMM whose memory is none of `vm-memory`'s, or that others change behind its back, puts the parts
//! together itself, as the library for QEMU does: [`engine::Memory::insert_region`], which is
//! `unsafe`, [`engine::Sharing`], [`engine::serve_faults`] and [`engine::Guest`]. It must say so before
//! it discards guest memory, unmaps it, or gives it to a device that holds on to pages:
//! [`engine::Memory::before_discard`], [`engine::Memory::remove_region`] and
//! [`engine::Memory::disable`]. The lock of [`engine::Sharing::memory`] must be held until it
//! has discarded or unmapped the memory. Where that is much of the guest's memory,
//! [`engine::Sharing::make_ordinary`] before keeps the guest from waiting for all of it.
//!
//! # Versions
//!
//! Semantic versioning holds for what is public without the feature `cli`; while the version
//! begins with 0, the second number is the major one. `daemon` and `operator` are there for
//! the binaries and may change with every release. The types of `vm-memory`
//! ([`vm_memory`]) and `vm-device` ([`vm_device`]) are part of it: a new major version of theirs is
//! one of this crate. A newer compiler may be asked for with a minor version. What is said between processes has versions of its own: the wire format
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

pub use vm_device;
pub use vm_memory;
