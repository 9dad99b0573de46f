// SPDX-License-Identifier: GPL-2.0

//! A look at a file's page cache that takes no references: cheap, and proof of nothing.
//!
//! Lock: the RCU read lock, inside the one call, for at most 512 entries of its array.

use crate::bindings as helpers;
use crate::file::CachedFile;
use crate::leaf::MAX_PAGE;
use crate::sight::Sight;
use kernel::alloc::KVec;
use kernel::prelude::*;

/// Most sights of one look. There are no more entries of a page cache in one.
const MOST_SIGHTS: usize = 512;

/// Room for what a look sees.
pub(crate) struct Look {
    sights: KVec<Sight>,
}

impl Look {
    pub(crate) fn new() -> Result<Self> {
        let sights = KVec::from_elem(Sight::default(), MOST_SIGHTS, GFP_KERNEL)?;
        Ok(Self { sights })
    }

    /// Looks at the pages of `file` in `*next..end` and moves `next` behind those it has seen
    /// all of; to `end` when there is nothing more. What is cached at `next` or behind it may be
    /// among the sights, too. `end` is [`MAX_PAGE`] at most.
    pub(crate) fn at(&mut self, file: &CachedFile<'_>, next: &mut u64, end: u64) -> &[Sight] {
        if *next >= end {
            return &[];
        }
        let mut index = *next as usize;
        // SAFETY: The mapping is valid while the file is, and there is room for as many sights as
        // we say. The call looks at the mapping's array alone, under RCU, which keeps its nodes;
        // it neither reads nor changes a folio, so it does not matter whether one still exists.
        let seen = unsafe {
            helpers::pagefusion_look(
                file.mapping(),
                &mut index,
                (end.min(MAX_PAGE) - 1) as usize,
                self.sights.as_mut_ptr(),
                self.sights.len() as u32,
            )
        };
        *next = (index as u64).clamp(*next, end);
        self.sights.get(..seen as usize).unwrap_or_default()
    }
}
