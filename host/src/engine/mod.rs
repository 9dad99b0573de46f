// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The engine: guest reports in, overlays out.
//!
//! [`Engine`] is all of it for one VM, for VMMs that have `vm-memory`. What it is made of:
//!
//! [`Sharing`] works on the memory of the process it is in: it asks a
//! [`PageStore`](crate::store::PageStore), compares, and maps canonical pages over guest
//! memory. [`Guest`] drives it from the device's ring. None starts threads, logs anywhere
//! but to [`log`], or keeps global state.

mod attributes;
mod audit;
mod changes;
mod embedded;
mod errors;
mod faults;
mod files;
mod guest;
mod guest_memory;
mod huge_pages;
mod mapped;
mod mappings;
mod memory;
mod numa;
mod overcommit;
mod overlays;
mod pagemap;
mod regions;
mod requests;
mod restore;
mod ring;
mod shared_memory;
mod sharing;
mod store_view;
mod tidy;
mod transaction;
mod uffd;
mod unsplit;
mod usage;
mod waiters;
mod window;
mod written;

/// What threads meet at; the tests of such files put `loom`'s in place of these.
mod primitives {
    pub(super) use std::sync::Mutex;
    pub(super) use std::sync::atomic::{AtomicBool, Ordering};
}

pub use attributes::{Attributes, Unsuitable};
pub use audit::{Audit, audit};
pub use embedded::Engine;
pub use faults::serve_faults;
pub use guest::{Guest, Progressed};
pub use huge_pages::{Spared, WORTHWHILE_PAGES};
pub use mappings::{MappingBudget, mappings_now};
pub use memory::{Memory, Refusal, WINDOW_PAGES};
pub use numa::MemoryPolicy;
pub use overlays::{Overlay, Overlays};
pub use regions::{Piece, Region, Regions};
pub use ring::{Attachment, Batch, Claimed, RingConsumer, RingError};
pub use shared_memory::{SharedMemory, Words};
pub use sharing::{ReportedRun, Sharing};
pub use store_view::StoreView;
pub use tidy::{Tidier, tidy};
pub use uffd::{Event, Uffd, UffdError};
pub use usage::file_uses;
pub use window::{WINDOW_MAPPINGS, Wanted};
