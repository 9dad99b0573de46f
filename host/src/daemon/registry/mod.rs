// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which VMs and groups there are: made, adopted, ended.
//!
//! Lock order: a group's `applying`, then either the registry or the group's store. The registry is
//! never held while a store is waited for: whoever holds that keeps up its own group, and no other.
//!
//! A VM that has ended is *ending* until its store has let go of all that it had. Until then its
//! name is taken and its group's store stays; nobody else finds it.

mod settings;

use super::error::DaemonError;
use super::pace::Pace;
use super::process::Process;
use super::runtime::{Runtime, State, UndoneFile, VmRecord};
use super::vm::{self, Vm};
use crate::protocol::{ControlRequest, FileKey, Limits, Scope, Undo};
use crate::store::{self, Group, StoreFile};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a new VM waits for one of the same name to have ended.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a daemon that stops waits for VMs to have ended.
const LAST_WAIT: Duration = Duration::from_secs(60);
/// Longest name of a VM or group.
const MAX_NAME: usize = 64;

/// A group's store, and how fast it may grow.
#[derive(Clone, Debug)]
pub(super) struct SharedGroup {
    store: Arc<Mutex<Group>>,
    pub(super) pace: Arc<Pace>,
    limits: Arc<Mutex<Limits>>,
    learning: Arc<AtomicBool>,
    /// Held from looking up what is noted for the group until it keeps to that, so that what is
    /// noted last holds in the end.
    applying: Arc<Mutex<()>>,
}

impl SharedGroup {
    fn new(store: Group) -> Self {
        Self {
            store: Arc::new(Mutex::new(store)),
            pace: Arc::default(),
            limits: Arc::default(),
            learning: Arc::default(),
            applying: Arc::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Group> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells one group from another.
    pub(super) fn key(&self) -> usize {
        Arc::as_ptr(&self.store) as usize
    }

    /// What holds for it now.
    pub(super) fn limits(&self) -> Limits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Only learns from now on, or shares; whether that is new.
    fn set_learning(&self, learning: bool) -> bool {
        self.lock().set_learning(learning);
        self.learning.swap(learning, Ordering::Relaxed) != learning
    }

    fn apply_limits(&self, limits: Limits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        self.pace.set_rate(limits.publish_rate);
        let (store, granted) = (vm::pages(limits.max_store), vm::pages(limits.max_overlays));
        self.lock().set_limits(store, granted);
    }
}

#[derive(Debug)]
struct Inner {
    vms: BTreeMap<u32, Arc<Vm>>,
    /// Those whose process has ended, and whose store has not let go of all that they had.
    ending: BTreeMap<u32, Arc<Vm>>,
    /// By name of the store file, which tells named groups from those of single VMs.
    groups: BTreeMap<String, SharedGroup>,
    state: State,
    /// Whether the host is short of memory.
    under_pressure: bool,
    /// VMs of groups that have begun or ended to learn, and have not been told.
    changed: BTreeSet<u32>,
}

/// All that the daemon knows.
#[derive(Debug)]
pub(super) struct Registry {
    runtime: Runtime,
    /// For groups that the operator has set none for.
    max_store: Option<u64>,
    inner: Mutex<Inner>,
    /// Told whenever a VM is not ending any more.
    ended: Condvar,
}

/// Whether a VM shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// It does.
    Running,
    /// Nothing more; overlays stay.
    Paused,
    /// Nothing, not what it shared before either.
    Undone,
}

impl Pause {
    pub(super) fn is_paused(self) -> bool {
        self != Self::Running
    }

    /// What an engine is told to have it so.
    pub(super) fn request(self) -> ControlRequest {
        match self {
            Self::Running => ControlRequest::Resume,
            Self::Paused => ControlRequest::Pause,
            Self::Undone => ControlRequest::Undo(Undo::All),
        }
    }
}

/// Who asks for a VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) pid: i32,
    pub(super) uid: u32,
}

impl Registry {
    /// Takes over the VMs that lived under an earlier daemon.
    pub(super) fn adopt(mut runtime: Runtime, max_store: Option<u64>) -> Result<Self, DaemonError> {
        let failed = DaemonError::system("cannot adopt the VMs of the daemon before this one");
        // What one VM alone maps is given back with it. So nothing is removed before all are
        // known to live or to have ended.
        let (mut living, mut ended) = (Vec::new(), Vec::new());
        for record in runtime.records().map_err(&failed)? {
            match Process::open(record.pid) {
                Ok(process) if process.start_time() == record.start_time => {
                    living.push((record, process));
                }
                Ok(_) => ended.push(record.number),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    ended.push(record.number);
                }
                Err(error) => return Err(failed(cannot_tell(&record, &error))),
            }
        }
        ended.iter().for_each(|number| runtime.remove_vm(*number));
        let numbers: BTreeSet<_> = living.iter().map(|(record, _)| record.number).collect();
        runtime.remove_leftovers().map_err(&failed)?;
        runtime.remove_other_vms(&numbers).map_err(&failed)?;
        let stores = living
            .iter()
            .map(|(record, _)| runtime.store_path(&store_name(record)));
        runtime
            .remove_other_stores(&stores.collect())
            .map_err(&failed)?;

        let mut state = runtime.state().map_err(&failed)?;
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
            let mut group = open_group(&runtime, &name, waiting).map_err(&failed)?;
            members.iter().for_each(|it| group.add_vm(it.number));
            groups.insert(name, SharedGroup::new(group));
        }
        let mut vms = BTreeMap::new();
        runtime.set_adopting(true);
        for (record, process) in living {
            let store = groups[&store_name(&record)].clone();
            let vm = Vm::new(&runtime, record, process, store, false).map_err(&failed)?;
            log::info!("adopted VM {} ({})", vm.number, vm.name);
            vms.insert(vm.number, Arc::new(vm));
        }
        runtime.set_adopting(false);
        let registry = Self {
            runtime,
            max_store,
            inner: Mutex::new(Inner {
                vms,
                ending: BTreeMap::new(),
                groups,
                state,
                under_pressure: false,
                changed: BTreeSet::new(),
            }),
            ended: Condvar::new(),
        };
        registry.apply_limits();
        Ok(registry)
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
        if let Some(name) = &name {
            let is_ending = |inner: &mut Inner| inner.ending.values().any(|vm| vm.name == *name);
            let waited = self.ended.wait_timeout_while(inner, PATIENCE, is_ending);
            let (guard, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            inner = guard;
            if waited.timed_out() {
                return Err(format!(
                    "a VM named {name} has ended, and its store is busy; try again"
                ));
            }
        }
        if inner.vms.values().any(|vm| vm.process.pid() == caller.pid) {
            return Err(format!("process {} is a VM already", caller.pid));
        }
        let number = inner.state.next_vm;
        let all = || inner.vms.values().chain(inner.ending.values());
        let is_taken = |name: &str| all().any(|vm| vm.name == name);
        let name = match name {
            Some(name) if is_taken(&name) => {
                return Err(format!("a VM named {name} is running; choose another name"));
            }
            Some(name) => name,
            None => free_name(number, is_taken),
        };
        inner.state.next_vm += 1;
        let paused = inner.state.all_paused
            || group
                .as_ref()
                .is_some_and(|group| inner.state.paused_groups.contains(group));
        let mut undone_files = Vec::new();
        for (of, file) in &inner.state.undone_files {
            if of.is_none() || *of == group {
                insert(&mut undone_files, file.clone());
            }
        }
        let record = VmRecord {
            number,
            name,
            group,
            pid: caller.pid,
            start_time: process.start_time(),
            uid: caller.uid,
            paused,
            undone: false,
            undone_files,
            limits: Limits::default(),
            engine_seen: false,
        };
        let vm = self.add(&mut inner, record, process).map_err(|error| {
            self.runtime.remove_vm(number);
            format!("cannot prepare the VM: {error}")
        })?;
        drop(inner);
        vm.store().add_vm(number);
        self.apply_limits_of(&vm.group_store);
        log::info!("VM {number} ({}) is process {}", vm.name, caller.pid);
        Ok(vm)
    }

    /// Takes a VM out whose process has ended; [`Self::finish_end`] must follow, and may have to
    /// wait for its store.
    pub(super) fn begin_end(&self, number: u32) -> Option<Arc<Vm>> {
        let mut inner = self.inner();
        let vm = inner.vms.remove(&number)?;
        inner.ending.insert(number, vm.clone());
        drop(inner);
        vm.close();
        Some(vm)
    }

    /// Forgets a VM that was taken out.
    pub(super) fn finish_end(&self, vm: &Vm) {
        vm.store().end_vm(vm.number);
        let mut inner = self.inner();
        inner.ending.remove(&vm.number);
        self.drop_if_unused(&mut inner, &vm.store_name());
        self.runtime.remove_vm(vm.number);
        drop(inner);
        log::info!("VM {} ({}) has ended", vm.number, vm.name);
        self.ended.notify_all();
    }

    /// Waits until all that was taken out is forgotten, but not for ever: the next daemon does what
    /// is left.
    pub(super) fn wait_for_ends(&self) {
        let is_ending = |inner: &mut Inner| !inner.ending.is_empty();
        let waited = self
            .ended
            .wait_timeout_while(self.inner(), LAST_WAIT, is_ending);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        for vm in inner.ending.values() {
            log::warn!(
                "the store of VM {} ({}) is busy; leaving",
                vm.number,
                vm.name
            );
        }
    }

    /// VMs in a scope; an error when it names something that does not exist.
    pub(super) fn in_scope(&self, scope: &Scope) -> Result<Vec<Arc<Vm>>, String> {
        let vms = self.vms();
        let in_group = |vm: &&Arc<Vm>, group| vm.group.as_ref() == Some(group);
        let found: Vec<_> = match scope {
            Scope::All => return Ok(vms),
            Scope::Group(group) => vms
                .iter()
                .filter(|vm| in_group(vm, group))
                .cloned()
                .collect(),
            Scope::Vm(vm) => {
                // Somebody may have another's number for a name.
                let is_name = vms.iter().any(|it| it.name == *vm);
                let is_meant = |it: &&Arc<Vm>| match is_name {
                    true => it.name == *vm,
                    false => vm.parse() == Ok(it.number),
                };
                vms.iter().filter(is_meant).cloned().collect()
            }
        };
        match (scope, found.is_empty()) {
            (Scope::Group(name), true) => Err(match vms.iter().any(|vm| vm.name == *name) {
                true => format!("no VM of a group {name} is running; {name} is a VM"),
                false => format!("no VM of the group {name} is running"),
            }),
            (Scope::Vm(name), true) => Err(match vms.iter().any(|vm| in_group(&vm, name)) {
                true => format!("no VM {name} is running; {name} is a group: --group {name}"),
                false => format!("no VM {name} is running"),
            }),
            _ => Ok(found),
        }
    }

    /// VMs in a scope, of which there need not be any where something is noted for a group.
    pub(super) fn in_noted_scope(&self, scope: &Scope) -> Result<Vec<Arc<Vm>>, String> {
        let is_noted = match scope {
            Scope::Group(group) => {
                let state = &self.inner().state;
                state.paused_groups.contains(group)
                    || state
                        .undone_files
                        .iter()
                        .any(|(of, _)| of.as_ref() == Some(group))
            }
            _ => false,
        };
        self.in_scope(scope)
            .or_else(|error| if is_noted { Ok(Vec::new()) } else { Err(error) })
    }

    fn add(&self, inner: &mut Inner, record: VmRecord, process: Process) -> io::Result<Arc<Vm>> {
        self.runtime.save_state(&inner.state)?;
        self.runtime.save_record(&record)?;
        let (number, name) = (record.number, store_name(&record));
        let group = match inner.groups.get(&name) {
            Some(group) => group.clone(),
            None => SharedGroup::new(new_group(&self.runtime, &name)?),
        };
        let vm = Arc::new(Vm::new(
            &self.runtime,
            record,
            process,
            group.clone(),
            true,
        )?);
        inner.groups.insert(name, group);
        inner.vms.insert(number, vm.clone());
        Ok(vm)
    }

    /// Gives up a store that has no VM, not even one that is about to join it or is ending.
    fn drop_if_unused(&self, inner: &mut Inner, name: &str) {
        let mut vms = inner.vms.values().chain(inner.ending.values());
        if !vms.any(|vm| vm.store_name() == name) && inner.groups.remove(name).is_some() {
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

impl UndoneFile {
    /// Whether `name` is what it was undone by, with its directories or without, or its id.
    pub(super) fn is(&self, name: &str) -> bool {
        self.name == name || self.name.rsplit('/').next() == Some(name) || self.file.id() == name
    }
}

impl From<(&FileKey, &String)> for UndoneFile {
    fn from((file, name): (&FileKey, &String)) -> Self {
        Self {
            file: *file,
            name: name.clone(),
        }
    }
}

fn insert(files: &mut Vec<UndoneFile>, file: UndoneFile) {
    if !files.iter().any(|it| it.file == file.file) {
        files.push(file);
    }
}

fn cannot_tell(record: &VmRecord, error: &io::Error) -> io::Error {
    io::Error::other(format!(
        "cannot tell whether process {} of VM {} ({}) is running: {error}; nothing was removed, \
         start the daemon again when this is cured",
        record.pid, record.number, record.name
    ))
}

fn open_group(runtime: &Runtime, name: &str, waiting: HashSet<u32>) -> io::Result<Group> {
    let file = StoreFile::open(&runtime.store_path(name))?;
    Group::new(file, store::Limits::default(), waiting)
}

/// A group of which there is no VM yet. What has its name is of no use to anybody.
fn new_group(runtime: &Runtime, name: &str) -> io::Result<Group> {
    let path = runtime.store_path(name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => result?,
    }
    Group::new(
        StoreFile::create(&path)?,
        store::Limits::default(),
        HashSet::new(),
    )
}

fn store_name(record: &VmRecord) -> String {
    store_name_of(record.number, record.group.as_deref())
}

pub(super) fn store_name_of(number: u32, group: Option<&str>) -> String {
    match group {
        Some(group) => format!("group-{group}"),
        None => format!("vm-{number}"),
    }
}

/// A name for a VM that was given none.
fn free_name(number: u32, is_taken: impl Fn(&str) -> bool) -> String {
    let mut names = (number..).map(|number| format!("vm{number}"));
    names.find(|name| !is_taken(name)).unwrap_or_default()
}

pub(super) fn check_name(name: &str) -> Result<(), String> {
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
