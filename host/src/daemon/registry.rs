// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which VMs and groups there are: made, adopted, ended.
//!
//! Lock order: registry, then one group. Neither is held while anybody is waited for.

use super::error::DaemonError;
use super::process::Process;
use super::runtime::{Runtime, State, VmRecord};
use super::vm::Vm;
use crate::protocol::Scope;
use crate::store::{Group, Limits, StoreFile};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Longest name of a VM or group.
const MAX_NAME: usize = 64;

type SharedGroup = Arc<Mutex<Group>>;

#[derive(Debug)]
struct Inner {
    vms: BTreeMap<u32, Arc<Vm>>,
    /// By name of the store file, which tells named groups from those of single VMs.
    groups: BTreeMap<String, SharedGroup>,
    state: State,
}

/// All that the daemon knows.
#[derive(Debug)]
pub(super) struct Registry {
    runtime: Runtime,
    limits: Limits,
    inner: Mutex<Inner>,
}

/// Who asks for a VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) pid: i32,
    pub(super) uid: u32,
}

impl Registry {
    /// Takes over the VMs that lived under an earlier daemon.
    pub(super) fn adopt(runtime: Runtime, limits: Limits) -> Result<Self, DaemonError> {
        let failed = DaemonError::system("cannot adopt the VMs of the daemon before this one");
        let mut living = Vec::new();
        for record in runtime.records().map_err(&failed)? {
            match Process::open(record.pid) {
                Ok(process) if process.start_time() == record.start_time => {
                    living.push((record, process));
                }
                _ => runtime.remove_vm(record.number),
            }
        }
        let numbers: BTreeSet<_> = living.iter().map(|(record, _)| record.number).collect();
        runtime.remove_other_vms(&numbers).map_err(&failed)?;
        let stores = living
            .iter()
            .map(|(record, _)| runtime.store_path(&store_name(record)));
        runtime
            .remove_other_stores(&stores.collect())
            .map_err(&failed)?;

        let mut state = runtime.state();
        // Should the state be lost, at least no living VM's number is used again.
        state.next_vm = state.next_vm.max(numbers.last().map_or(1, |last| last + 1));
        let mut members = BTreeMap::<String, Vec<&VmRecord>>::new();
        for (record, _) in &living {
            members.entry(store_name(record)).or_default().push(record);
        }
        let mut groups = BTreeMap::new();
        for (name, members) in members {
            let may_map = members.iter().filter(|it| it.engine_seen);
            let waiting = may_map.map(|it| it.number).collect();
            let mut group = open_group(&runtime, &name, limits, waiting).map_err(&failed)?;
            members.iter().for_each(|it| group.add_vm(it.number));
            groups.insert(name, Arc::new(Mutex::new(group)));
        }
        let mut vms = BTreeMap::new();
        for (record, process) in living {
            let store = groups[&store_name(&record)].clone();
            let vm = Vm::new(&runtime, record, process, store, false).map_err(&failed)?;
            log::info!("adopted VM {} ({})", vm.number, vm.name);
            vms.insert(vm.number, Arc::new(vm));
        }
        Ok(Self {
            runtime,
            limits,
            inner: Mutex::new(Inner { vms, groups, state }),
        })
    }

    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    pub(super) fn vms(&self) -> Vec<Arc<Vm>> {
        self.inner().vms.values().cloned().collect()
    }

    pub(super) fn vm(&self, number: u32) -> Option<Arc<Vm>> {
        self.inner().vms.get(&number).cloned()
    }

    /// Makes the calling process a VM.
    pub(super) fn create(
        &self,
        caller: Caller,
        name: Option<String>,
        group: Option<String>,
    ) -> Result<Arc<Vm>, String> {
        for name in name.iter().chain(&group) {
            check_name(name)?;
        }
        let process = Process::open(caller.pid).map_err(|error| error.to_string())?;
        let mut inner = self.inner();
        if inner.vms.values().any(|vm| vm.process.pid() == caller.pid) {
            return Err(format!("process {} is a VM already", caller.pid));
        }
        let number = inner.state.next_vm;
        let name = name.unwrap_or_else(|| format!("vm{number}"));
        if inner.vms.values().any(|vm| vm.name == name) {
            return Err(format!("a VM named {name} is running; choose another name"));
        }
        inner.state.next_vm += 1;
        let paused = inner.state.all_paused
            || group
                .as_ref()
                .is_some_and(|group| inner.state.paused_groups.contains(group));
        let record = VmRecord {
            number,
            name,
            group,
            pid: caller.pid,
            start_time: process.start_time(),
            uid: caller.uid,
            paused,
            engine_seen: false,
        };
        let vm = self.add(&mut inner, record, process).map_err(|error| {
            self.runtime.remove_vm(number);
            format!("cannot prepare the VM: {error}")
        })?;
        log::info!("VM {number} ({}) is process {}", vm.name, caller.pid);
        Ok(vm)
    }

    /// Forgets a VM whose process has ended.
    pub(super) fn end(&self, number: u32) {
        let mut inner = self.inner();
        let Some(vm) = inner.vms.remove(&number) else {
            return;
        };
        vm.close();
        vm.store().end_vm(number);
        self.drop_if_empty(&mut inner, &store_name_of(number, vm.group.as_deref()));
        self.runtime.remove_vm(number);
        log::info!("VM {number} ({}) has ended", vm.name);
    }

    /// VMs in a scope; an error when it names something that does not exist.
    pub(super) fn in_scope(&self, scope: &Scope) -> Result<Vec<Arc<Vm>>, String> {
        let vms = self.vms();
        let found: Vec<_> = match scope {
            Scope::All => return Ok(vms),
            Scope::Group(group) => vms
                .into_iter()
                .filter(|vm| vm.group.as_ref() == Some(group))
                .collect(),
            Scope::Vm(vm) => vms
                .into_iter()
                .filter(|it| it.name == *vm || vm.parse() == Ok(it.number))
                .collect(),
        };
        match (scope, found.is_empty()) {
            (Scope::Group(group), true) => Err(format!("no VM of the group {group} is running")),
            (Scope::Vm(vm), true) => Err(format!("no VM {vm} is running")),
            _ => Ok(found),
        }
    }

    /// Notes that VMs are paused or not, those in existence and those to come.
    pub(super) fn set_paused(
        &self,
        scope: &Scope,
        vms: &[Arc<Vm>],
        paused: bool,
    ) -> io::Result<()> {
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
            .try_for_each(|vm| vm.set_paused(&self.runtime, paused))
    }

    fn add(&self, inner: &mut Inner, record: VmRecord, process: Process) -> io::Result<Arc<Vm>> {
        self.runtime.save_state(&inner.state)?;
        self.runtime.save_record(&record)?;
        let (number, name) = (record.number, store_name(&record));
        let group = match inner.groups.get(&name) {
            Some(group) => group.clone(),
            None => {
                let group = open_group(&self.runtime, &name, self.limits, HashSet::new())?;
                Arc::new(Mutex::new(group))
            }
        };
        let vm = Arc::new(Vm::new(
            &self.runtime,
            record,
            process,
            group.clone(),
            true,
        )?);
        vm.store().add_vm(number);
        inner.groups.insert(name, group);
        inner.vms.insert(number, vm.clone());
        Ok(vm)
    }

    fn drop_if_empty(&self, inner: &mut Inner, name: &str) {
        let is_empty = |group: &SharedGroup| {
            group
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_empty()
        };
        if inner.groups.get(name).is_some_and(is_empty) {
            inner.groups.remove(name);
            let path = self.runtime.store_path(name);
            if let Err(error) = std::fs::remove_file(&path) {
                log::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open_group(
    runtime: &Runtime,
    name: &str,
    limits: Limits,
    waiting: HashSet<u32>,
) -> io::Result<Group> {
    Group::new(StoreFile::open(&runtime.store_path(name))?, limits, waiting)
}

fn store_name(record: &VmRecord) -> String {
    store_name_of(record.number, record.group.as_deref())
}

fn store_name_of(number: u32, group: Option<&str>) -> String {
    match group {
        Some(group) => format!("group-{group}"),
        None => format!("vm-{number}"),
    }
}

fn check_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(allowed) {
        return Err(format!(
            "{name:?} is no name: use 1 to {MAX_NAME} letters, digits, '-', '_' and '.'"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_directory() {
        for name in ["", "a/b", "../x", "a b", "ä", &"x".repeat(65)] {
            assert!(check_name(name).is_err(), "{name}");
        }
        assert!(check_name("web-1.prod_a").is_ok());
        // Dots alone are fine behind the prefix that every store file has.
        assert_eq!(store_name_of(1, Some("..")), "group-..");
    }
}
