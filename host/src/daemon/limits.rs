// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which limits hold for whom, and who shares when. A VM's own go before those of its group for each VM, and those
//! before those of the host; in the same way a group's own before those for every group.

use crate::protocol::{LimitChanges, Limits, Policies, PolicyChanges, Scope};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Limits of a scope: of a group as a whole, and of each VM in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ScopeLimits {
    pub(super) group: Limits,
    pub(super) each_vm: Limits,
    pub(super) policy: Policies,
}

/// All limits but those of single VMs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct HostLimits {
    all: ScopeLimits,
    groups: BTreeMap<String, ScopeLimits>,
}

impl HostLimits {
    /// Changes limits of all groups or of one.
    pub(super) fn change(&mut self, scope: &Scope, each_vm: bool, changes: LimitChanges) {
        let limits = match scope {
            Scope::All => &mut self.all,
            Scope::Group(group) => self.groups.entry(group.clone()).or_default(),
            Scope::Vm(_) => return,
        };
        let limits = if each_vm {
            &mut limits.each_vm
        } else {
            &mut limits.group
        };
        limits.change(changes);
        let none = ScopeLimits::default();
        self.groups.retain(|_, limits| *limits != none);
    }

    /// Changes when all groups or one share.
    pub(super) fn change_policy(&mut self, scope: &Scope, changes: PolicyChanges) {
        match scope {
            Scope::All => self.all.policy.change(changes),
            Scope::Group(group) => {
                let limits = self.groups.entry(group.clone()).or_default();
                limits.policy.change(changes);
            }
            Scope::Vm(_) => {}
        }
    }

    /// When a group shares.
    pub(super) fn policy_of(&self, group: Option<&str>) -> Policies {
        self.own(group).policy.or(self.all.policy)
    }

    /// What holds for a group, `None` being that of a VM without one.
    pub(super) fn of_group(&self, group: Option<&str>) -> Limits {
        self.own(group).group.or(self.all.group)
    }

    /// What holds for a VM that has limits of its `own`.
    pub(super) fn of_vm(&self, group: Option<&str>, own: Limits) -> Limits {
        own.or(self.own(group).each_vm).or(self.all.each_vm)
    }

    /// What is a group's own.
    pub(super) fn own(&self, group: Option<&str>) -> ScopeLimits {
        group
            .and_then(|group| self.groups.get(group).copied())
            .unwrap_or_default()
    }
}
