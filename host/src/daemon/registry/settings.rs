// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What operators have set, for all, for groups and for VMs: noted, and kept to.
//!
//! Lock order: as in the module above.

use super::super::limits::ScopeLimits;
use super::super::runtime::UndoneFile;
use super::super::vm::Vm;
use super::{Pause, Registry, SharedGroup, store_name_of};
use crate::protocol::{
    FileKey, LimitChanges, Limits, Mode, Policies, Policy, PolicyChanges, Scope,
};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, PoisonError};

impl Registry {
    /// Notes that VMs are paused or not, those in existence and those to come.
    pub(in super::super) fn set_paused(
        &self,
        scope: &Scope,
        vms: &[Arc<Vm>],
        pause: Pause,
    ) -> io::Result<()> {
        let paused = pause.is_paused();
        let mut inner = self.inner();
        let mut state = inner.state.clone();
        match scope {
            Scope::All => {
                state.all_paused = paused;
                state.paused_groups.clear();
            }
            Scope::Group(group) if paused => {
                state.paused_groups.insert(group.clone());
            }
            Scope::Group(group) => {
                state.paused_groups.remove(group);
            }
            Scope::Vm(_) => {}
        }
        self.runtime.save_state(&state)?;
        inner.state = state;
        vms.iter()
            .try_for_each(|vm| vm.set_pause(&self.runtime, pause))
    }

    /// Files of these VMs, and of those to come in this scope, that were undone by this name or have
    /// it as their id.
    pub(in super::super) fn undone_files(
        &self,
        scope: &Scope,
        vms: &[Arc<Vm>],
        name: &str,
    ) -> BTreeMap<FileKey, String> {
        let mut files: BTreeMap<_, _> = vms
            .iter()
            .flat_map(|vm| vm.undone_files_named(name))
            .collect();
        let in_scope = |of: &Option<String>| match scope {
            Scope::All => true,
            Scope::Group(group) => of.as_ref() == Some(group),
            Scope::Vm(_) => false,
        };
        let noted = &self.inner().state.undone_files;
        let noted = noted.iter().filter(|(of, _)| in_scope(of));
        files.extend(
            noted
                .filter(|(_, file)| file.is(name))
                .map(|(_, it)| (it.file, it.name.clone())),
        );
        files
    }

    /// Notes files as undone or not, for VMs in existence and those to come.
    pub(in super::super) fn set_files_undone(
        &self,
        scope: &Scope,
        vms: &[Arc<Vm>],
        files: &BTreeMap<FileKey, String>,
        undone: bool,
    ) -> io::Result<()> {
        let mut inner = self.inner();
        let mut state = inner.state.clone();
        let of = match scope {
            Scope::All => Some(None),
            Scope::Group(group) => Some(Some(group.clone())),
            Scope::Vm(_) => None,
        };
        if let Some(of) = of {
            let in_scope = |it: &Option<String>| of.is_none() || *it == of;
            state
                .undone_files
                .retain(|(it, file)| !(in_scope(it) && files.contains_key(&file.file)));
            if undone {
                let entries = files.iter().map(|it| (of.clone(), UndoneFile::from(it)));
                state.undone_files.extend(entries);
            }
        }
        self.runtime.save_state(&state)?;
        inner.state = state;
        vms.iter().try_for_each(|vm| {
            vm.change_undone_files(&self.runtime, |list| {
                list.retain(|it| !files.contains_key(&it.file));
                if undone {
                    list.extend(files.iter().map(UndoneFile::from));
                }
            })
        })
    }

    /// Notes that no file is undone any more.
    pub(in super::super) fn clear_undone_files(
        &self,
        scope: &Scope,
        vms: &[Arc<Vm>],
    ) -> io::Result<()> {
        let mut inner = self.inner();
        let mut state = inner.state.clone();
        match scope {
            Scope::All => state.undone_files.clear(),
            Scope::Group(group) => {
                let other = |it: &Option<String>| it.as_ref() != Some(group);
                state.undone_files.retain(|(it, _)| other(it));
            }
            Scope::Vm(_) => {}
        }
        self.runtime.save_state(&state)?;
        inner.state = state;
        vms.iter()
            .try_for_each(|vm| vm.change_undone_files(&self.runtime, Vec::clear))
    }

    /// Changes limits, those of VMs and groups to come included.
    pub(in super::super) fn set_limits(
        &self,
        scope: &Scope,
        vms: &[Arc<Vm>],
        each_vm: bool,
        changes: LimitChanges,
        policy: PolicyChanges,
    ) -> io::Result<()> {
        let mut inner = self.inner();
        if let Scope::Vm(_) = scope {
            vms.iter()
                .try_for_each(|vm| vm.change_limits(&self.runtime, changes))?;
        } else {
            let mut state = inner.state.clone();
            state.limits.change_policy(scope, policy);
            state.limits.change(scope, each_vm, changes);
            self.runtime.save_state(&state)?;
            inner.state = state;
        }
        let stores: Vec<_> = match scope {
            Scope::All => inner.groups.values().cloned().collect(),
            Scope::Group(group) => {
                let store = inner.groups.get(&store_name_of(0, Some(group)));
                store.into_iter().cloned().collect()
            }
            Scope::Vm(_) => vms.iter().map(|vm| vm.group_store.clone()).collect(),
        };
        drop(inner);
        stores.iter().for_each(|store| self.apply_limits_of(store));
        Ok(())
    }

    /// Whether it matters to any group whether the host is short of memory.
    pub(in super::super) fn heeds_pressure(&self) -> bool {
        let inner = self.inner();
        let mut groups = inner.vms.values().map(|vm| vm.group.as_deref());
        groups.any(|group| inner.state.limits.policy_of(group).policy == Some(Policy::Pressure))
    }

    /// Whether the host was found short of memory.
    pub(in super::super) fn is_under_pressure(&self) -> bool {
        self.inner().under_pressure
    }

    /// Notes whether the host is short of memory; whether that is new.
    pub(in super::super) fn set_pressure(&self, under_pressure: bool) -> bool {
        let mut inner = self.inner();
        let new = inner.under_pressure != under_pressure;
        inner.under_pressure = under_pressure;
        if new {
            log::info!(
                "the host is {}",
                if under_pressure {
                    "short of memory"
                } else {
                    "not short of memory any more"
                }
            );
            drop(inner);
            self.apply_limits();
        }
        new
    }

    /// When a group shares.
    pub(in super::super) fn policy_of(&self, group: Option<&str>) -> Policies {
        self.inner().state.limits.policy_of(group)
    }

    /// What is a group's own, and not set for all.
    pub(in super::super) fn own_settings(&self, group: Option<&str>) -> ScopeLimits {
        self.inner().state.limits.own(group)
    }

    /// VMs whose groups have begun or ended to learn since this was last asked.
    pub(in super::super) fn take_changed(&self) -> Vec<Arc<Vm>> {
        let mut inner = self.inner();
        let changed = std::mem::take(&mut inner.changed);
        changed
            .iter()
            .filter_map(|number| inner.vms.get(number).cloned())
            .collect()
    }

    /// Has every group and VM keep to what is noted.
    pub(super) fn apply_limits(&self) {
        let groups: Vec<_> = self.inner().groups.values().cloned().collect();
        groups.iter().for_each(|group| self.apply_limits_of(group));
    }

    /// Has a group and its VMs keep to what is noted.
    pub(super) fn apply_limits_of(&self, group_store: &SharedGroup) {
        let applying = group_store.applying.lock();
        let _applying = applying.unwrap_or_else(PoisonError::into_inner);
        let inner = self.inner();
        let in_group = |vm: &&Arc<Vm>| vm.group_store.key() == group_store.key();
        let vms: Vec<_> = inner.vms.values().filter(in_group).cloned().collect();
        let Some(group) = vms.first().map(|vm| vm.group.clone()) else {
            return;
        };
        let group = group.as_deref();
        let limits = &inner.state.limits;
        let default = Limits {
            max_store: self.max_store,
            ..Limits::default()
        };
        let of_group = limits.of_group(group).or(default);
        let of_vms: Vec<_> = vms
            .iter()
            .map(|vm| limits.of_vm(group, vm.own_limits()))
            .collect();
        let policy = limits.policy_of(group);
        let waits = policy.policy == Some(Policy::Pressure) && !inner.under_pressure;
        drop(inner);

        let learning = policy.mode == Some(Mode::WouldSave) || waits;
        if group_store.set_learning(learning) {
            let numbers = vms.iter().map(|vm| vm.number);
            self.inner().changed.extend(numbers);
        }
        group_store.apply_limits(of_group);
        for (vm, limits) in vms.iter().zip(of_vms) {
            vm.apply_limits(limits);
            vm.set_split_huge_pages(policy.split_huge_pages.unwrap_or_default());
        }
    }
}
