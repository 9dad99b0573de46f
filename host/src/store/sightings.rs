// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages that one reporter has and nobody else: a hash each, and who it was.
//!
//! Hashes are kept in leaves of 64 file pages, which the place (VM, file, page) leads to by a
//! tree and the hash by a table of 4-byte references. With half-full leaves a page takes
//! about 16 bytes with all overhead, with leaves of one page about 90.
//!
//! No two entries have the same hash: a second reporter publishes instead.

use super::files::{FileId, Files};
use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use std::collections::BTreeMap;
use std::hash::BuildHasher;

/// Pages of one leaf.
const LEAF: u64 = 64;
/// Most leaves: a reference is leaf and bit in 32 bits.
const MAX_LEAVES: usize = 1 << 26;

/// Who has a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reporter {
    pub(super) vm: u32,
    pub(super) file: FileId,
    pub(super) page: u64,
}

#[derive(Debug, Default)]
struct Leaf {
    vm: u32,
    file: FileId,
    number: u64,
    /// Which pages have a hash.
    present: u64,
    /// Their hashes in order.
    hashes: Vec<u64>,
}

impl Leaf {
    fn rank(&self, bit: u32) -> usize {
        (self.present & ((1 << bit) - 1)).count_ones() as usize
    }

    fn hash(&self, bit: u32) -> Option<u64> {
        (self.present >> bit & 1 == 1).then(|| self.hashes[self.rank(bit)])
    }
}

#[derive(Debug, Default)]
struct VmSightings {
    leaves: HashMap<FileId, BTreeMap<u64, u32>>,
    pages: usize,
}

/// Sightings of a trust group.
#[derive(Debug, Default)]
pub(super) struct Sightings {
    leaves: Vec<Leaf>,
    free: Vec<u32>,
    by_hash: HashTable<u32>,
    by_vm: HashMap<u32, VmSightings>,
    hasher: DefaultHashBuilder,
    pages: usize,
}

impl Sightings {
    /// Who has a page with this hash.
    pub(super) fn find(&self, hash: u64) -> Option<Reporter> {
        let spread = self.hasher.hash_one(hash);
        let &reference = self
            .by_hash
            .find(spread, |&at| hash_of(&self.leaves, at) == Some(hash))?;
        let leaf = &self.leaves[(reference / LEAF as u32) as usize];
        let page = leaf.number * LEAF + u64::from(reference % LEAF as u32);
        Some(Reporter {
            vm: leaf.vm,
            file: leaf.file,
            page,
        })
    }

    /// Notes a page whose hash nobody has. What was noted for the same place is replaced.
    /// Returns whether there was room.
    pub(super) fn insert(&mut self, files: &mut Files, reporter: Reporter, hash: u64) -> bool {
        debug_assert!(self.find(hash).is_none(), "a second reporter publishes");
        // Held, so that replacing its only page does not forget the file.
        files.hold_sighting(reporter.file);
        self.remove(files, reporter);
        let inserted = self.insert_new(files, reporter, hash);
        files.drop_sighting(reporter.file);
        inserted
    }

    fn insert_new(&mut self, files: &mut Files, reporter: Reporter, hash: u64) -> bool {
        let Reporter { vm, file, page } = reporter;
        if self.free.is_empty() && self.leaves.len() == MAX_LEAVES {
            return false;
        }
        let (number, bit) = (page / LEAF, (page % LEAF) as u32);
        let of_vm = self.by_vm.entry(vm).or_default();
        let of_file = of_vm.leaves.entry(file).or_default();
        let index = match of_file.get(&number) {
            Some(&index) => index,
            None => {
                let index = self.free.pop().unwrap_or_else(|| {
                    self.leaves.push(Leaf::default());
                    (self.leaves.len() - 1) as u32
                });
                self.leaves[index as usize] = Leaf {
                    vm,
                    file,
                    number,
                    present: 0,
                    hashes: Vec::new(),
                };
                files.hold_sighting(file);
                of_file.insert(number, index);
                index
            }
        };
        let leaf = &mut self.leaves[index as usize];
        leaf.hashes.insert(leaf.rank(bit), hash);
        leaf.present |= 1 << bit;
        of_vm.pages += 1;
        self.pages += 1;
        let Self {
            by_hash,
            leaves,
            hasher,
            ..
        } = self;
        by_hash.insert_unique(hasher.hash_one(hash), index * LEAF as u32 + bit, |&at| {
            hasher.hash_one(hash_of(leaves, at).unwrap_or_default())
        });
        true
    }

    /// Forgets one page.
    pub(super) fn remove(&mut self, files: &mut Files, reporter: Reporter) {
        let Reporter { vm, file, page } = reporter;
        self.remove_range(files, vm, file, page, page.saturating_add(1));
    }

    /// Forgets pages `start .. end` of a file in one VM.
    pub(super) fn remove_range(
        &mut self,
        files: &mut Files,
        vm: u32,
        file: FileId,
        start: u64,
        end: u64,
    ) {
        if start >= end {
            return;
        }
        let Some(of_file) = self
            .by_vm
            .get(&vm)
            .and_then(|of_vm| of_vm.leaves.get(&file))
        else {
            return;
        };
        let touched: Vec<_> = of_file
            .range(start / LEAF..=(end - 1) / LEAF)
            .map(|(_, &index)| index)
            .collect();
        for index in touched {
            self.clear(files, index, |page| (start..end).contains(&page));
        }
    }

    /// Forgets all of a VM.
    pub(super) fn remove_vm(&mut self, files: &mut Files, vm: u32) {
        let Some(of_vm) = self.by_vm.get(&vm) else {
            return;
        };
        let touched: Vec<_> = of_vm
            .leaves
            .values()
            .flat_map(|of_file| of_file.values().copied())
            .collect();
        for index in touched {
            self.clear(files, index, |_| true);
        }
        self.by_vm.remove(&vm);
    }

    /// Number of pages noted.
    pub(super) fn len(&self) -> usize {
        self.pages
    }

    /// Number of pages noted for one VM.
    pub(super) fn pages_of(&self, vm: u32) -> usize {
        self.by_vm.get(&vm).map_or(0, |of_vm| of_vm.pages)
    }

    /// Number of files of which pages are noted for one VM.
    pub(super) fn files_of(&self, vm: u32) -> usize {
        self.by_vm.get(&vm).map_or(0, |of_vm| of_vm.leaves.len())
    }

    /// Estimate of the memory taken, bytes.
    pub(super) fn bytes(&self) -> usize {
        let used = self.leaves.len() - self.free.len();
        self.leaves.capacity() * size_of::<Leaf>()
            + self.pages * size_of::<u64>()
            + used * size_of::<(u64, u32)>()
            + self.by_hash.allocation_size()
    }

    fn clear(&mut self, files: &mut Files, index: u32, mut which: impl FnMut(u64) -> bool) {
        let leaf = &self.leaves[index as usize];
        let (vm, file, number) = (leaf.vm, leaf.file, leaf.number);
        let mut bits = leaf.present;
        let mut removed = 0;
        while bits != 0 {
            let bit = bits.trailing_zeros();
            bits &= bits - 1;
            if which(number * LEAF + u64::from(bit)) {
                self.clear_bit(index, bit);
                removed += 1;
            }
        }
        self.pages -= removed;
        let of_vm = self.by_vm.get_mut(&vm).expect("a leaf belongs to a VM");
        of_vm.pages -= removed;
        if self.leaves[index as usize].present == 0 {
            let of_file = of_vm
                .leaves
                .get_mut(&file)
                .expect("a leaf belongs to a file");
            of_file.remove(&number);
            if of_file.is_empty() {
                of_vm.leaves.remove(&file);
            }
            self.leaves[index as usize] = Leaf::default();
            self.free.push(index);
            files.drop_sighting(file);
        }
    }

    fn clear_bit(&mut self, index: u32, bit: u32) {
        let reference = index * LEAF as u32 + bit;
        let leaf = &mut self.leaves[index as usize];
        let rank = leaf.rank(bit);
        let spread = self.hasher.hash_one(leaf.hashes[rank]);
        if let Ok(entry) = self.by_hash.find_entry(spread, |&at| at == reference) {
            entry.remove();
        }
        leaf.hashes.remove(rank);
        leaf.present &= !(1 << bit);
    }
}

fn hash_of(leaves: &[Leaf], reference: u32) -> Option<u64> {
    leaves[(reference / LEAF as u32) as usize].hash(reference % LEAF as u32)
}
