// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How much of what was overlaid still is: the kernel breaks overlays on its own when the
//! guest writes, and only the page tables know.

use std::io;

use super::mappings::mappings_in;
use super::memory::WINDOW_PAGES;
use super::pagemap::Pagemap;
use super::sharing::Sharing;
use crate::store::PAGE;

/// What overlays are worth now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Pages that lie on store pages.
    pub intact: u64,
    /// Pages the guest has written since; they have a copy of their own.
    pub broken: u64,
    /// Overlays that continue no other.
    pub overlays: u64,
    /// Mappings of the whole process.
    pub mappings: u64,
    /// Mappings that guest memory is cut into, beyond what it would be without overlays.
    pub overlay_mappings: u64,
}

/// Looks at every overlay, without holding up anybody: an overlay that comes or goes
/// meanwhile may or may not be counted.
pub fn audit(sharing: &Sharing) -> io::Result<Audit> {
    let (overlays, ranges): (Vec<(usize, usize)>, _) = {
        let memory = sharing.memory();
        let overlays = memory
            .overlays()
            .iter()
            .map(|(at, o)| (at, o.pages as usize));
        (overlays.collect(), memory.overlaid_ranges())
    };
    let mut pagemap = Pagemap::open()?;
    let mappings = mappings_in(&ranges)?;
    let mut audit = Audit {
        overlays: overlays.len() as u64,
        mappings: mappings.all as u64,
        overlay_mappings: mappings.added as u64,
        ..Audit::default()
    };
    for (address, pages) in overlays {
        for from in (0..pages).step_by(WINDOW_PAGES) {
            let count = WINDOW_PAGES.min(pages - from);
            let intact = pagemap.intact_lately(address + from * PAGE, count)?;
            let intact = u64::from(intact.count_ones());
            audit.intact += intact;
            audit.broken += count as u64 - intact;
        }
    }
    Ok(audit)
}
