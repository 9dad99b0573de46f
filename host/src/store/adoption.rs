// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Taking over a store file whose index was lost with its daemon.
//!
//! Every page that is in the file may be mapped by a VM that has not said so yet. All are
//! kept until each VM that lived under the old daemon has announced what it maps, or ended.

use super::file::StoreFile;
use super::{PAGE, hash_page, whole_pages};
use crate::protocol::StorePage;
use roaring::RoaringBitmap;
use std::collections::HashSet;
use std::io;

/// Pages read at once while taking over.
const BATCH: usize = 64;

#[derive(Debug)]
pub(super) struct Adoption {
    /// Pages that were there at the beginning.
    pages: RoaringBitmap,
    /// VMs that have not announced all they map.
    waiting: HashSet<u32>,
}

impl Adoption {
    /// Begins to adopt `file`, in which VMs `waiting` map pages. Calls `found` for each page
    /// with its content hash.
    pub(super) fn begin(
        file: &StoreFile,
        seed: u64,
        waiting: HashSet<u32>,
        mut found: impl FnMut(StorePage, u64),
    ) -> io::Result<Self> {
        let mut pages = RoaringBitmap::new();
        let mut buffer = vec![0; BATCH * PAGE];
        for range in file.data()? {
            pages.insert_range(range.clone());
            for first in range.clone().step_by(BATCH) {
                let count = BATCH.min((range.end - first) as usize);
                file.read(first, &mut buffer[..count * PAGE])?;
                for (bytes, page) in whole_pages(&buffer[..count * PAGE]).zip(first..) {
                    found(page, hash_page(seed, bytes));
                }
            }
        }
        Ok(Self { pages, waiting })
    }

    /// Pages that were there at the beginning. All are kept until the end.
    pub(super) fn pages(&self) -> &RoaringBitmap {
        &self.pages
    }

    /// Whether the page must be kept though nobody is known to map it.
    pub(super) fn keeps(&self, page: StorePage) -> bool {
        self.pages.contains(page)
    }

    pub(super) fn is_waiting_for(&self, vm: u32) -> bool {
        self.waiting.contains(&vm)
    }

    /// A VM has announced all, or ended.
    pub(super) fn settle(&mut self, vm: u32) {
        self.waiting.remove(&vm);
    }

    /// When every VM has settled, all pages that were there at the beginning.
    pub(super) fn finished(&self) -> Option<&RoaringBitmap> {
        self.waiting.is_empty().then_some(&self.pages)
    }
}
