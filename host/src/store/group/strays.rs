// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory of the store's file that belongs to no page.

use super::super::PAGE;
use super::Group;
use crate::protocol::spans;
use roaring::RoaringBitmap;
use std::io;

/// Memory of a store beyond its pages that is let be: this many pages, and this part of them.
const STRAY_PAGES: u64 = 256;
const STRAY_PART: u64 = 64;
/// Most ranges cleared of strays before others get hold of the store.
const MAX_CLEARED: usize = 1024;

impl Group {
    /// Gives back memory that belongs to no page: whoever maps the store and touches what lies
    /// between its pages makes the kernel take some, and no limit counts it. Returns whether
    /// there is more to do, which can wait.
    pub fn clear_strays(&mut self) -> bool {
        match self.try_clear_strays() {
            Ok(more) => more,
            Err(error) => {
                log::error!("cannot give memory between the pages back: {error}");
                false
            }
        }
    }

    fn try_clear_strays(&mut self) -> io::Result<bool> {
        // What was there when a file was taken over is in the index until that is over.
        let pages = self.index.len() as u64;
        let most = pages + pages / STRAY_PART + STRAY_PAGES;
        if self.adoption.is_some() || self.file.allocated_bytes()? / PAGE as u64 <= most {
            return Ok(false);
        }
        let mut used = RoaringBitmap::new();
        for vm in self.vms.values() {
            used |= &vm.granted;
        }
        // Every page is granted to somebody. Should one not be, nothing may go: it may be mapped.
        if used.len() != pages {
            return Err(io::Error::other(format!(
                "{pages} pages, of which {} are granted",
                used.len()
            )));
        }
        let end = self.file.pages()?;
        let mut from = std::mem::take(&mut self.cleared);
        used.remove_range(..from);
        used.remove_range(end..);
        let mut cleared = 0;
        for span in spans(&used) {
            if cleared == MAX_CLEARED {
                self.cleared = from;
                return Ok(true);
            }
            if from < span.page {
                self.file.punch(from, span.page - from)?;
                cleared += 1;
            }
            from = span.page + span.pages;
        }
        if from < end {
            self.file.punch(from, end - from)?;
        }
        Ok(false)
    }
}
