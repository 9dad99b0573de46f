// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory of the store's file that belongs to no page.

use super::super::PAGE;
use super::super::adoption::Adoption;
use super::Group;
use crate::protocol::spans;
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
        let pages = self.index.len() as u64;
        let most = pages + pages / STRAY_PART + STRAY_PAGES;
        if self.file.allocated_bytes()? / PAGE as u64 <= most {
            return Ok(false);
        }
        // While a file is taken over, all that was there at first is in the index, announced or
        // not. One VM that never announces must not keep what others touch.
        let adopted = self.adoption.as_ref().map(Adoption::pages);
        let mut used = adopted.cloned().unwrap_or_default();
        for vm in self.vms.values() {
            used |= &vm.granted;
        }
        // Every page is one of these. Should one not be, nothing may go: it may be mapped.
        if used.len() != pages {
            return Err(io::Error::other(format!(
                "{pages} pages, of which {} are granted or adopted",
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
