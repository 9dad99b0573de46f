// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Where guest memory is in this process.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::store::PAGE;

/// One gpa → hva range of ordinary guest memory; whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest frame.
    pub gfn: u64,
    /// Length, pages.
    pub pages: u64,
    /// Address in this process, page-aligned.
    pub hva: usize,
}

impl Region {
    /// Addresses of the region in this process.
    pub fn addresses(&self) -> Range<usize> {
        self.hva..self.hva + self.pages as usize * PAGE
    }
}

/// The regions of a VM, by the key its VMM gives them (a KVM slot, say).
#[derive(Debug, Default)]
pub struct Regions {
    by_key: BTreeMap<u64, Region>,
    sorted: Vec<Region>,
}

impl Regions {
    /// Sets or replaces the region `key`.
    pub fn insert(&mut self, key: u64, region: Region) {
        self.by_key.insert(key, region);
        self.sort();
    }

    /// Removes the region `key`.
    pub fn remove(&mut self, key: u64) -> Option<Region> {
        let old = self.by_key.remove(&key);
        self.sort();
        old
    }

    /// The region `key`.
    pub fn get(&self, key: u64) -> Option<Region> {
        self.by_key.get(&key).copied()
    }

    /// The region that has this address of the process, with its key.
    pub fn find(&self, address: usize) -> Option<(u64, Region)> {
        let holds = |r: &Region| r.addresses().contains(&address);
        self.by_key
            .iter()
            .find(|(_, r)| holds(r))
            .map(|(key, r)| (*key, *r))
    }

    /// Keys of all regions that have this address of the process.
    pub(super) fn all_at(&self, address: usize) -> impl Iterator<Item = u64> + '_ {
        let holds = move |(_, r): &(&u64, &Region)| r.addresses().contains(&address);
        self.by_key.iter().filter(holds).map(|(key, _)| *key)
    }

    fn sort(&mut self) {
        self.sorted = self.by_key.values().copied().collect();
        self.sorted.sort_by_key(|r| r.gfn);
    }

    /// Sum of all regions, bytes.
    pub fn bytes(&self) -> u64 {
        self.sorted.iter().map(|r| r.pages * PAGE as u64).sum()
    }

    /// All regions by guest frame.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.sorted.iter()
    }

    /// All regions with their keys.
    pub fn with_keys(&self) -> impl Iterator<Item = (u64, Region)> + '_ {
        self.by_key.iter().map(|(key, region)| (*key, *region))
    }

    /// Cuts guest frames into pieces that are contiguous in this process. What lies outside
    /// of guest memory is left out.
    pub fn pieces(&self, gfn: u64, pages: u64) -> impl Iterator<Item = Piece> + '_ {
        let end = gfn.saturating_add(pages);
        let from = self.sorted.partition_point(|r| r.gfn + r.pages <= gfn);
        self.sorted[from..]
            .iter()
            .take_while(move |r| r.gfn < end)
            .map(move |r| {
                let start = gfn.max(r.gfn);
                let stop = end.min(r.gfn + r.pages);
                Piece {
                    offset: start - gfn,
                    pages: (stop - start) as usize,
                    hva: r.hva + (start - r.gfn) as usize * PAGE,
                }
            })
    }
}

/// Part of a run, contiguous in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Pages from the start of the run.
    pub offset: u64,
    /// Length, pages.
    pub pages: usize,
    /// Address of the first page.
    pub hva: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_regions_and_leave_out_holes() {
        let mut regions = Regions::default();
        regions.insert(
            0,
            Region {
                gfn: 0,
                pages: 16,
                hva: 0x10000,
            },
        );
        regions.insert(
            1,
            Region {
                gfn: 32,
                pages: 16,
                hva: 0x80000,
            },
        );
        let pieces: Vec<_> = regions.pieces(8, 32).collect();
        assert_eq!(
            pieces,
            [
                Piece {
                    offset: 0,
                    pages: 8,
                    hva: 0x10000 + 8 * PAGE
                },
                Piece {
                    offset: 24,
                    pages: 8,
                    hva: 0x80000
                },
            ]
        );
        assert_eq!(regions.pieces(u64::MAX - 1, 4).count(), 0);
        assert_eq!(regions.pieces(16, 16).count(), 0);
    }
}
