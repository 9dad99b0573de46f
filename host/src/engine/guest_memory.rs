// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory as `vm-memory` has it.
//!
//! What lies over guest memory is put there by address, so the memory must stay for as long as it
//! is known here. A [`GuestMemoryMmap`] owns its mappings and counts who uses them: a count of our
//! own keeps them. Any other [`GuestMemory`] only says where it is, and whoever gives it must see
//! to the rest.

#![expect(unsafe_code, reason = "vouches for memory that is kept mapped")]

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vm_memory::{GuestUsize, MemoryRegionAddress};

use super::memory::Memory;
use super::regions::Region;
use crate::store::PAGE;

/// A region of `vm-memory`, kept mapped.
pub(super) struct Kept {
    addresses: Range<usize>,
    /// The region, kept in here; whether anybody else has it, too.
    is_shared: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Kept {
    fn new<B: Bitmap + Send + Sync + 'static>(
        region: Arc<GuestRegionMmap<B>>,
        addresses: Range<usize>,
    ) -> Self {
        Self {
            addresses,
            is_shared: Box::new(move || Arc::strong_count(&region) > 1),
        }
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl Region {
    /// Where the regions of `memory` are in this process. Fails where one is not of whole pages,
    /// or nowhere.
    pub fn all_of(memory: &impl GuestMemory) -> io::Result<Vec<Self>> {
        memory.iter().map(Self::of).collect()
    }

    fn of(region: &impl GuestMemoryRegion) -> io::Result<Self> {
        let (gpa, bytes) = (region.start_addr().raw_value(), region.len());
        let hva = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(io::Error::other)? as usize;
        let page = PAGE as GuestUsize;
        if (gpa | bytes | hva as GuestUsize) % page != 0 {
            let error = format!("guest memory at {gpa:#x} is not of whole pages");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        Ok(Self {
            gfn: gpa / page,
            pages: bytes / page,
            hva,
        })
    }
}

impl Memory {
    /// Makes the regions of `memory` all of guest memory, each with its first frame as its key;
    /// whether there is one that was not known. To be called again when the VMM has plugged memory
    /// in or is about to unplug some.
    ///
    /// Regions are kept mapped as long as they are known. One that has gone and that the guest had
    /// written to while it was shared is kept until this or [`Memory::let_go`] is called with
    /// nobody else using it: until then the VMM may discard it with
    /// [`Memory::before_discard`], which needs to know.
    ///
    /// This is safe since nobody sees the difference: the pages stay mapped with the content that
    /// they have, and what safe code gets of a [`GuestMemoryMmap`] are volatile accesses and
    /// atomics, which bear that a guest writes at any time.
    pub fn set_guest_memory<B>(&mut self, memory: &GuestMemoryMmap<B>) -> io::Result<bool>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let regions = Region::all_of(memory)?;
        for (region, known) in memory.iter().zip(&regions) {
            let (_, region) = memory
                .remove_region(region.start_addr(), region.len())
                .map_err(io::Error::other)?;
            self.kept.push(Kept::new(region, known.addresses()));
        }
        // SAFETY: `kept` has them all until they are known no more, whether this fails or not, and
        // they belong to a guest. They have whole pages, and addresses of this process.
        let new = unsafe { self.set_regions(&regions) };
        self.let_go();
        new
    }

    /// Lets go of regions of [`Memory::set_guest_memory`] that are known no more, if nothing needs
    /// them here.
    pub fn let_go(&mut self) {
        let mut kept = std::mem::take(&mut self.kept);
        // One is enough; the newest stands last.
        for i in (0..kept.len()).rev() {
            let addresses = kept[i].addresses.clone();
            if kept[i + 1..].iter().any(|it| it.addresses == addresses) {
                kept.remove(i);
            }
        }
        kept.retain(|it| {
            let is_known = self.concerns(&it.addresses);
            let is_left = self.written.intersects(&it.addresses) && (it.is_shared)();
            if !is_known && !is_left {
                // It is unmapped next, unless somebody else has it.
                self.written.remove(&it.addresses);
            }
            is_known || is_left
        });
        self.kept = kept;
    }
}
