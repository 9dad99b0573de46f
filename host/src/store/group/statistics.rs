// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a group has to say of itself and its VMs.

use super::super::estimate::Estimate;
use super::Group;
use crate::protocol::FileKey;
use std::collections::BTreeMap;

/// Figures of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupStatistics {
    /// Canonical pages.
    pub store_pages: u64,
    /// Pages noted that only one reporter has.
    pub remembered: u64,
    /// Files that either belong to.
    pub files: u64,
    /// Memory of the index, bytes, estimated.
    pub index_bytes: u64,
    /// Pages that could not be written or were refused by a limit, ever.
    pub store_full: u64,
    /// Whether VMs of an earlier daemon are still to announce what they map.
    pub adopting: bool,
    /// While only learning: pages that would be shared, and canonical pages for that.
    pub would_share: Option<(u64, u64)>,
}

/// Figures of one VM in a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmStatistics {
    /// Canonical pages granted to it.
    pub granted: u64,
    /// Canonical pages it has published.
    pub published: u64,
    /// Pages noted for it.
    pub remembered: u64,
    /// Pages that a limit has kept from it, ever.
    pub limited: u64,
}

impl Group {
    /// Figures of the group.
    pub fn statistics(&self) -> GroupStatistics {
        let granted: u64 = self
            .vms
            .values()
            .map(|vm| &vm.granted)
            .chain([&self.several])
            .map(|pages| pages.serialized_size() as u64)
            .sum();
        let estimate = self.estimate.as_ref().map_or(0, Estimate::bytes);
        let index = self.index.bytes() + self.files.bytes() + self.sightings.bytes() + estimate;
        GroupStatistics {
            store_pages: self.index.len() as u64,
            remembered: self.sightings.len() as u64,
            files: self.files.len() as u64,
            index_bytes: index as u64 + granted,
            store_full: self.store_full,
            adopting: self.adoption.is_some(),
            would_share: self
                .estimate
                .as_ref()
                .map(|estimate| (estimate.shared(), estimate.contents())),
        }
    }

    /// Canonical pages by the file they belong to. Those of an earlier daemon that nobody has
    /// announced yet belong to none.
    pub fn pages_by_file(&self) -> BTreeMap<FileKey, u64> {
        self.index.pages_by_file(&self.files)
    }

    /// Figures of one VM.
    pub fn vm_statistics(&self, vm: u32) -> VmStatistics {
        self.vms
            .get(&vm)
            .map_or_else(VmStatistics::default, |it| VmStatistics {
                granted: it.granted.len(),
                published: it.published,
                remembered: self.sightings.pages_of(vm) as u64,
                limited: it.limited,
            })
    }
}
