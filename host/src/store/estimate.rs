// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What sharing would bring, counted without sharing: who has which content.

use crate::protocol::FileKey;
use std::collections::{BTreeMap, HashMap};

/// Every reported page, and how often its content was reported. About 60 bytes a page.
#[derive(Debug, Default)]
pub(super) struct Estimate {
    seen: HashMap<u32, Seen>,
    reporters: HashMap<u64, u32>,
    shared: u64,
    contents: u64,
}

#[derive(Debug, Default)]
struct Seen {
    files: HashMap<FileKey, BTreeMap<u64, u64>>,
    pages: usize,
}

impl Estimate {
    /// Guest pages that would be on canonical ones, those of the first reporters included.
    pub(super) fn shared(&self) -> u64 {
        self.shared
    }

    /// Canonical pages that this would take.
    pub(super) fn contents(&self) -> u64 {
        self.contents
    }

    /// A VM has this content at this page of a file. At most `pages` and `files` are noted for
    /// one VM.
    pub(super) fn note(
        &mut self,
        (vm, file, page): (u32, &FileKey, u64),
        hash: u64,
        (pages, files): (usize, usize),
    ) {
        let seen = self.seen.entry(vm).or_default();
        if seen.files.len() >= files && !seen.files.contains_key(file) {
            return;
        }
        let of_file = seen.files.entry(*file).or_default();
        if seen.pages >= pages && !of_file.contains_key(&page) {
            return;
        }
        match of_file.insert(page, hash) {
            Some(old) if old == hash => return,
            Some(old) => self.drop_one(old),
            None => seen.pages += 1,
        }
        let reporters = self.reporters.entry(hash).or_default();
        *reporters += 1;
        match *reporters {
            1 => {}
            2 => {
                self.shared += 2;
                self.contents += 1;
            }
            _ => self.shared += 1,
        }
    }

    /// A VM does not have pages `start .. end` of a file any more.
    pub(super) fn forget(&mut self, vm: u32, file: &FileKey, start: u64, end: u64) {
        let Some(seen) = self.seen.get_mut(&vm) else {
            return;
        };
        let Some(of_file) = seen.files.get_mut(file) else {
            return;
        };
        if start >= end {
            return;
        }
        // All else of the file is left alone: guests withdraw single pages of large ones.
        let pages: Vec<u64> = of_file.range(start..end).map(|(&page, _)| page).collect();
        let gone: Vec<u64> = pages
            .iter()
            .filter_map(|page| of_file.remove(page))
            .collect();
        seen.pages -= gone.len();
        if of_file.is_empty() {
            seen.files.remove(file);
        }
        gone.into_iter().for_each(|hash| self.drop_one(hash));
    }

    /// A VM has ended.
    pub(super) fn remove_vm(&mut self, vm: u32) {
        let seen = self.seen.remove(&vm).unwrap_or_default();
        let hashes = seen.files.into_values().flat_map(BTreeMap::into_values);
        hashes.for_each(|hash| self.drop_one(hash));
    }

    /// Estimate of the memory taken, bytes.
    pub(super) fn bytes(&self) -> usize {
        let pages: usize = self.seen.values().map(|seen| seen.pages).sum();
        pages * 32 + self.reporters.capacity() * (size_of::<(u64, u32)>() + 1)
    }

    fn drop_one(&mut self, hash: u64) {
        let Some(reporters) = self.reporters.get_mut(&hash) else {
            return;
        };
        *reporters -= 1;
        match *reporters {
            0 => {
                self.reporters.remove(&hash);
            }
            1 => {
                self.shared -= 2;
                self.contents -= 1;
            }
            _ => self.shared -= 1,
        }
    }
}
