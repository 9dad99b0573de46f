// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which files save how much. Engines know what is on overlays and what guests call it, the
//! stores know what that costs.

use super::control::{self, QUICK};
use super::registry::Registry;
use super::status;
use super::vm::Vm;
use crate::protocol::{
    ControlReply, ControlRequest, FileKey, FileStatus, FileUse, MAX_FILES, Scope,
};
use crate::store::PAGE;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

/// Most files taken from one engine: more than a guest may announce at a time.
const MOST: usize = 1 << 17;

/// Most files taken from one engine for one name.
const MOST_NAMED: usize = 4096;

/// Files of one group while they are added up.
#[derive(Default)]
struct GroupFiles {
    files: BTreeMap<FileKey, FileStatus>,
    pages_shared: u64,
    bytes_metadata: u64,
}

/// The `limit` files (0: all) that save most for the VMs in a scope.
pub(super) fn collect(
    registry: &Registry,
    scope: &Scope,
    limit: usize,
) -> Result<Vec<FileStatus>, String> {
    if matches!(scope, Scope::Vm(_)) {
        return Err("a page is saved by the group that shares it: name a group, or none".into());
    }
    let vms = registry.in_scope(scope)?;
    let mut groups = BTreeMap::<(String, Option<u32>), GroupFiles>::new();
    for (vm, uses) in vms.iter().zip(uses(&vms)) {
        let of = status::group_of(vm);
        let group = groups.entry(of.clone()).or_default();
        for used in uses {
            let file = group.files.entry(used.file).or_insert_with(|| FileStatus {
                id: used.file.id(),
                group: of.0.clone(),
                vm: of.1,
                ..FileStatus::default()
            });
            if file.name.is_empty() {
                file.name = used.name;
            }
            file.vms += usize::from(used.pages_shared > 0);
            file.pages_shared += used.pages_shared;
            file.pages_broken += used.pages_broken;
            group.pages_shared += used.pages_shared;
        }
    }
    let mut costed = BTreeSet::new();
    for vm in &vms {
        let of = status::group_of(vm);
        if let (Some(group), true) = (groups.get_mut(&of), costed.insert(of)) {
            add_costs(vm, group);
        }
    }
    // By the same rule as in the status of the host, spread over what it was spent for.
    for group in status::collect(registry).groups {
        if let Some(files) = groups.get_mut(&(group.name, group.vm)) {
            files.bytes_metadata = group.bytes_metadata;
        }
    }
    let mut files: Vec<_> = groups.into_values().flat_map(GroupFiles::finish).collect();
    files.sort_by(|one, other| {
        let by_saving = other.bytes_saved.cmp(&one.bytes_saved);
        by_saving.then_with(|| (&one.name, &one.id).cmp(&(&other.name, &other.id)))
    });
    if limit > 0 {
        files.truncate(limit);
    }
    Ok(files)
}

/// Files on overlays of each VM that are called `name`, with their directories or without, or
/// have it as their id; each with its name.
pub(super) fn named(vms: &[Arc<Vm>], name: &str) -> Vec<BTreeMap<FileKey, String>> {
    let matches = |used: &FileUse| {
        used.name == name
            || used.name.rsplit('/').next() == Some(name) && !name.is_empty()
            || used.file.id() == name
    };
    let of_vm = |(vm, uses): (&Arc<Vm>, Vec<FileUse>)| {
        let mut named: BTreeMap<_, _> = uses
            .into_iter()
            .filter(matches)
            .map(|used| (used.file, used.name))
            .collect();
        if let Some((&end, _)) = named.iter().nth(MOST_NAMED) {
            log::warn!(
                "VM {} ({}) has more than {MOST_NAMED} files of one name; the others are kept",
                vm.number,
                vm.name
            );
            named.split_off(&end);
        }
        named
    };
    vms.iter().zip(uses(vms)).map(of_vm).collect()
}

fn add_costs(vm: &Vm, group: &mut GroupFiles) {
    for (file, pages) in vm.store().pages_by_file() {
        if let Some(file) = group.files.get_mut(&file) {
            file.store_pages = pages;
        }
    }
}

impl GroupFiles {
    fn finish(self) -> impl Iterator<Item = FileStatus> {
        let (metadata, all) = (
            i128::from(self.bytes_metadata),
            i128::from(self.pages_shared),
        );
        self.files.into_values().map(move |mut file| {
            let pages = file.pages_shared as i64 - file.store_pages as i64;
            let metadata = match all {
                0 => 0,
                all => metadata * i128::from(file.pages_shared) / all,
            };
            file.bytes_saved = pages * PAGE as i64 - metadata as i64;
            file
        })
    }
}

/// What each VM's engine says, all of them asked at once; nothing of one that does not answer.
fn uses(vms: &[Arc<Vm>]) -> Vec<Vec<FileUse>> {
    let mut uses: Vec<Vec<FileUse>> = vms.iter().map(|_| Vec::new()).collect();
    let mut asking: Vec<usize> = (0..vms.len()).collect();
    while !asking.is_empty() {
        let deadline = Instant::now() + QUICK;
        let asked: Vec<_> = asking
            .into_iter()
            .map(|vm| {
                let after = uses[vm].last().map(|used: &FileUse| used.file);
                (vm, vms[vm].control.ask(ControlRequest::Files { after }))
            })
            .collect();
        asking = Vec::new();
        for (vm, answer) in asked {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(Ok(ControlReply::Files(files))) =
                answer.map(|answer| control::wait(&answer, left))
            else {
                continue;
            };
            let last = uses[vm].last().map(|used| used.file);
            let in_order = files.iter().map(|used| Some(used.file));
            if !std::iter::once(last)
                .chain(in_order)
                .is_sorted_by(|a, b| a < b)
            {
                log::warn!("the engine of VM {} tells of files twice", vms[vm].number);
                continue;
            }
            let more = files.len() >= MAX_FILES && uses[vm].len() < MOST;
            uses[vm].extend(files);
            if more {
                asking.push(vm);
            }
        }
    }
    uses
}
