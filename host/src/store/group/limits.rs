// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a group and its VMs may take, and what they were granted of it.

use super::{Group, Vm};
use crate::protocol::StorePage;
use roaring::RoaringBitmap;

/// What a group may take of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Canonical pages of the whole group.
    pub store_pages: u64,
    /// Canonical pages granted, each VM's counted by itself.
    pub granted_pages: u64,
    /// Pages noted for one VM. Further ones are not noted, so they are shared only when
    /// somebody else notes them.
    pub sightings_per_vm: usize,
    /// Files of which pages are noted for one VM.
    pub files_per_vm: usize,
    /// Leaves of the index in which these are noted. A leaf has up to 64 pages, of one 256 MiB
    /// of a file: pages that lie further apart take one each.
    pub leaves_per_vm: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            store_pages: u64::MAX,
            granted_pages: u64::MAX,
            // 16 GiB of page cache; takes about 64 MiB when it is full.
            sightings_per_vm: 1 << 22,
            files_per_vm: 1 << 18,
            // One for each file, and one for 16 pages, which all have where pages lie together.
            // Takes about as much again, however they lie.
            leaves_per_vm: 1 << 19,
        }
    }
}

/// What one VM may take of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmLimits {
    /// Canonical pages that it has published.
    pub store_pages: u64,
    /// Canonical pages granted to it.
    pub granted_pages: u64,
}

impl Default for VmLimits {
    fn default() -> Self {
        Self {
            store_pages: u64::MAX,
            granted_pages: u64::MAX,
        }
    }
}

impl Group {
    /// Changes what the group may take. What it has stays.
    pub fn set_limits(&mut self, store_pages: u64, granted_pages: u64) {
        self.limits.store_pages = store_pages;
        self.limits.granted_pages = granted_pages;
    }

    /// Changes what a VM may take. What it has stays.
    pub fn set_vm_limits(&mut self, vm: u32, limits: VmLimits) {
        // One that has ended meanwhile takes nothing more.
        if let Some(vm) = self.vms.get_mut(&vm) {
            vm.limits = limits;
        }
    }

    /// Counts pages of a publication that came faster than a VM or its group may publish.
    pub fn refuse_for_pace(&mut self, vm: u32, pages: u32) {
        self.store_full += u64::from(pages);
        self.limit(vm, pages);
    }

    /// How many pages more a VM may be granted.
    pub(super) fn room(&self, vm: u32) -> u64 {
        if self.estimate.is_some() {
            return 0;
        }
        let of_vm = self.vms.get(&vm).map_or(0, |vm| {
            vm.limits.granted_pages.saturating_sub(vm.granted.len())
        });
        of_vm.min(self.limits.granted_pages.saturating_sub(self.granted))
    }

    /// Whether a VM may be granted a page, or is already; counts it if not.
    pub(super) fn admits(&mut self, vm: u32, store: StorePage) -> bool {
        let granted = |vm: &Vm| vm.granted.contains(store);
        let admitted = self.room(vm) > 0 || self.vms.get(&vm).is_some_and(granted);
        self.limit(vm, u32::from(!admitted));
        admitted
    }

    /// Counts pages that a limit has kept from a VM.
    pub(super) fn limit(&mut self, vm: u32, pages: u32) {
        if self.estimate.is_some() {
            return;
        }
        if let Some(vm) = self.vms.get_mut(&vm) {
            vm.limited += u64::from(pages);
        }
    }

    pub(super) fn grant(&mut self, vm: u32, store: StorePage) {
        let Some(page) = self.index.page_mut(store) else {
            return;
        };
        let vm = self.vms.entry(vm).or_default();
        if let Some(renewed) = &mut vm.renewed {
            renewed.insert(store);
        }
        if vm.granted.insert(store) {
            page.references += 1;
            self.granted += 1;
            if page.references == 2 {
                self.several.insert(store);
            }
        }
    }

    /// Grants as many pages from `first` on, all of them in the index, as the limits allow;
    /// how many.
    pub(super) fn grant_range(&mut self, vm: u32, first: StorePage, pages: u32) -> u32 {
        let room = self.room(vm);
        let Vm {
            granted, renewed, ..
        } = self.vms.entry(vm).or_default();
        let mut new = RoaringBitmap::new();
        new.insert_range(first..first + pages);
        for page in granted.range(first..first + pages) {
            new.remove(page);
        }
        // The first new page that is one too many.
        let end = u32::try_from(room).ok().and_then(|room| new.select(room));
        let end = end.unwrap_or(first + pages);
        new.remove_range(end..);
        granted.insert_range(first..end);
        if let Some(renewed) = renewed {
            renewed.insert_range(first..end);
        }
        self.granted += new.len();
        for store in new {
            if let Some(page) = self.index.page_mut(store) {
                page.references += 1;
                if page.references == 2 {
                    self.several.insert(store);
                }
            }
        }
        let beyond = first + pages - end;
        self.limit(vm, beyond);
        end - first
    }
}
