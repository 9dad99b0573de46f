// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Figures for the operator.

use super::{EngineStatus, FileKey, Limits, Mode, Policies, Policy, SplitHugePages};
use serde::{Deserialize, Serialize};

/// The whole host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Trust groups with a living VM or a page in store.
    pub groups: Vec<GroupStatus>,
    /// Living VMs.
    pub vms: Vec<VmStatus>,
    /// Sum over the VMs.
    pub pages_shared: u64,
    /// Sum over the groups.
    pub store_pages: u64,
    /// Memory kept back from the kernel by sharing, bytes, less store and metadata.
    pub bytes_saved: i64,
    /// Memory that sharing itself takes, bytes: index, mappings, page tables, rings.
    pub bytes_metadata: u64,
    /// Whether the host is short of memory, as the policy `pressure` sees it.
    pub under_pressure: bool,
}

/// One trust group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name; VMs without a group have one each, named after the VM.
    pub name: String,
    /// Number of the VM whose own it is; `None` for a trust group, which may have the same name.
    pub vm: Option<u32>,
    /// Living VMs.
    pub vms: usize,
    /// Canonical pages.
    pub store_pages: u64,
    /// Pages of VMs on them.
    pub pages_shared: u64,
    /// Pages noted and in one VM only.
    pub pages_remembered: u64,
    /// Pages that did not get into the store for want of room, ever.
    pub pages_store_full: u64,
    /// Whether it shares.
    pub mode: Mode,
    /// When.
    pub policy: Policy,
    /// Whether it splits huge pages.
    pub split_huge_pages: SplitHugePages,
    /// What of these three is its own; the rest is inherited.
    pub own_policies: Policies,
    /// While it only learns: pages that would be shared, those of first reporters included.
    pub pages_would_share: Option<u64>,
    /// While it only learns: memory that this would save, bytes, less canonical pages.
    pub bytes_would_save: Option<i64>,
    /// What the group as a whole may take.
    pub limits: Limits,
    /// What of that is its own; the rest is inherited.
    pub own_limits: Limits,
    /// Canonical pages granted to its VMs, each VM's counted by itself.
    pub pages_granted: u64,
    /// Whether VMs of an earlier daemon are still to say what they map.
    pub adopting: bool,
    /// As in [`Status`].
    pub bytes_saved: i64,
    /// As in [`Status`].
    pub bytes_metadata: u64,
}

impl GroupStatus {
    /// Whether it is this VM's, which may have no trust group.
    pub fn is_of(&self, vm: &VmStatus) -> bool {
        match &vm.group {
            Some(group) => self.vm.is_none() && self.name == *group,
            None => self.vm == Some(vm.id),
        }
    }
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Number.
    pub id: u32,
    /// Name.
    pub name: String,
    /// Trust group.
    pub group: Option<String>,
    /// Process.
    pub pid: i32,
    /// Whether its VMM has the device; `None` when the VM is older than the daemon.
    pub device: Option<bool>,
    /// Whether its engine is connected.
    pub connected: bool,
    /// Whether the operator has paused it.
    pub paused: bool,
    /// Files that the operator has undone.
    pub files_undone: usize,
    /// Canonical pages that its process may map.
    pub pages_granted: u64,
    /// Canonical pages that it has put into the store.
    pub pages_published: u64,
    /// Pages that a limit has kept from it, ever.
    pub pages_limited: u64,
    /// What it may take.
    pub limits: Limits,
    /// What of that is its own; the rest is inherited.
    pub own_limits: Limits,
    /// The engine's counters, all zero while it is not connected.
    #[serde(flatten)]
    pub engine: EngineStatus,
}

/// A file in one trust group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FileStatus {
    /// What a guest calls it; guests may call anything so. Empty when none does any more.
    pub name: String,
    /// [`FileKey`] as text; names this very file to [`super::Selection::File`].
    pub id: String,
    /// Trust group, named as in [`GroupStatus`].
    pub group: String,
    /// As in [`GroupStatus`].
    pub vm: Option<u32>,
    /// VMs that share pages of it.
    pub vms: usize,
    /// Pages of VMs on canonical ones.
    pub pages_shared: u64,
    /// Pages that were, and were written since.
    pub pages_broken: u64,
    /// Canonical pages.
    pub store_pages: u64,
    /// Memory that sharing it saves, bytes, less its canonical pages and its part of the
    /// group's metadata.
    pub bytes_saved: i64,
}

impl FileKey {
    /// The identity as text: file system, inode, generation, size, time and kind.
    pub fn id(&self) -> String {
        let Self {
            fs_uuid,
            inode,
            size,
            mtime_ns,
            generation,
            kind,
        } = self;
        let uuid: String = fs_uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{uuid}-{inode:x}-{generation:x}-{size:x}-{mtime_ns:x}-{kind:x}")
    }
}
