// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What an operator has VMs do: noted first, so that it holds for engines that connect later
//! and for the next daemon, then told to the engines that are there.

use super::control::{self, Answer, SLOW};
use super::files;
use super::pace::SLOWEST;
use super::registry::{Pause, Registry, check_name};
use super::vm::Vm;
use crate::protocol::{
    ControlReply, ControlRequest, FileKey, FileSpan, Limit, LimitChanges, Outcome, PolicyChanges,
    Scope, Undo,
};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

/// Most files in one request: far fewer than the longest message has room for.
const MOST_FILES: usize = 8192;

/// Turns everything back; sharing stays off.
pub(super) fn undo_all(registry: &Registry, scope: &Scope) -> Result<Outcome, String> {
    let vms = registry.in_scope(scope)?;
    noted(registry.set_paused(scope, &vms, Pause::Undone))?;
    Ok(tell_pause(&vms, Pause::Undone, true))
}

/// Shares nothing more; what is shared stays.
pub(super) fn pause(registry: &Registry, scope: &Scope) -> Result<Outcome, String> {
    let vms = registry.in_scope(scope)?;
    noted(registry.set_paused(scope, &vms, Pause::Paused))?;
    Ok(tell_pause(&vms, Pause::Paused, false))
}

/// Shares again, files that were undone one by one included.
pub(super) fn resume(registry: &Registry, scope: &Scope) -> Result<Outcome, String> {
    let vms = registry.in_noted_scope(scope)?;
    noted(registry.clear_undone_files(scope, &vms))?;
    noted(registry.set_paused(scope, &vms, Pause::Running))?;
    Ok(tell_pause(&vms, Pause::Running, false))
}

/// Turns files back; they stay unshared.
pub(super) fn undo_files(
    registry: &Registry,
    scope: &Scope,
    name: &str,
) -> Result<Outcome, String> {
    let vms = registry.in_scope(scope)?;
    let of_vms = files::named(&vms, name);
    let found: BTreeMap<_, _> = of_vms.iter().flatten().map(owned).collect();
    if found.is_empty() {
        return Err(format!(
            "no VM shares pages of a file {name}; pagefusionctl files shows names and ids"
        ));
    }
    noted(registry.set_files_undone(scope, &vms, &found, true))?;
    let requests = of_vms
        .iter()
        .map(|own| ControlRequest::Undo(Undo::Files(files_for(own, &found))));
    Ok(tell_each(&vms, requests, true))
}

fn owned((file, name): (&FileKey, &String)) -> (FileKey, String) {
    (*file, name.clone())
}

/// What one VM is told to undo: what it shares, and, as it may have begun to share more since it
/// was asked, what others do, as long as the request is not too long for its engine.
fn files_for(own: &BTreeMap<FileKey, String>, all: &BTreeMap<FileKey, String>) -> Vec<FileKey> {
    let others = all.keys().filter(|file| !own.contains_key(file));
    own.keys().chain(others).take(MOST_FILES).copied().collect()
}

/// Shares files again that were undone one by one.
pub(super) fn resume_files(
    registry: &Registry,
    scope: &Scope,
    id: &str,
) -> Result<Outcome, String> {
    let vms = registry.in_noted_scope(scope)?;
    let found = registry.undone_files(scope, &vms, id);
    if found.is_empty() {
        return Err(format!(
            "no file {id} was undone; give the id or the name that it was undone by, or resume \
             without --file"
        ));
    }
    noted(registry.set_files_undone(scope, &vms, &found, false))?;
    let whole = |file| FileSpan {
        file,
        page: 0,
        pages: 0,
    };
    let spans = found.into_keys().take(MOST_FILES).map(whole).collect();
    Ok(tell(&vms, &ControlRequest::Report { spans }, false))
}

/// Turns guest frames back.
pub(super) fn undo_pages(
    registry: &Registry,
    scope: &Scope,
    what: Undo,
) -> Result<Outcome, String> {
    if !matches!(scope, Scope::Vm(_)) {
        return Err("guest frames are those of one VM: name it with --vm".into());
    }
    let vms = registry.in_scope(scope)?;
    Ok(tell(&vms, &ControlRequest::Undo(what), true))
}

/// Changes limits, and when groups share; also of VMs and groups to come.
pub(super) fn set(
    registry: &Registry,
    scope: &Scope,
    each_vm: bool,
    changes: LimitChanges,
    policy: PolicyChanges,
) -> Result<Outcome, String> {
    if matches!(changes.publish_rate, Some(Limit::Bytes(rate)) if rate < SLOWEST) {
        return Err(format!(
            "the publish rate cannot be below {SLOWEST} bytes a second, which one request of an \
             engine may have; pause sharing instead"
        ));
    }
    if let Scope::Group(group) = scope {
        // It may be one to come, and no other can.
        check_name(group)?;
    }
    if matches!(scope, Scope::Vm(_)) && !policy.is_empty() {
        return Err(
            "mode, policy and huge pages are a group's: set them for a group, or all".into(),
        );
    }
    let vms = match scope {
        Scope::Vm(_) => registry.in_scope(scope)?,
        // Limits may come before the VMs.
        _ => registry.in_scope(scope).unwrap_or_default(),
    };
    noted(registry.set_limits(scope, &vms, each_vm, changes, policy))?;
    for vm in &vms {
        // Nobody waits for the answer, as with limits.
        vm.tell_split_huge_pages();
    }
    rescan(registry);
    Ok(Outcome {
        vms: vms.len(),
        failed: Vec::new(),
    })
}

/// Has guests report everything again where learning has begun or ended.
pub(super) fn rescan(registry: &Registry) {
    for vm in registry.take_changed() {
        // Nobody waits for the answer: the guest reports whenever it is ready.
        vm.ask_for_everything();
    }
}

fn noted(result: io::Result<()>) -> Result<(), String> {
    result.map_err(|error| {
        format!("cannot note it in the runtime directory, so nothing was done: {error}")
    })
}

/// Tells every engine at once and waits for all. `must_reach` those that may map pages.
fn tell(vms: &[Arc<Vm>], request: &ControlRequest, must_reach: bool) -> Outcome {
    tell_each(vms, vms.iter().map(|_| request.clone()), must_reach)
}

/// The same with a request for each.
fn tell_each(
    vms: &[Arc<Vm>],
    requests: impl Iterator<Item = ControlRequest>,
    must_reach: bool,
) -> Outcome {
    let asked = vms.iter().zip(requests);
    let asked = asked.map(|(vm, request)| vm.control.ask(request));
    wait_for_all(vms, asked.collect(), must_reach)
}

/// The same with what is noted of each, which another operator may have changed since.
fn tell_pause(vms: &[Arc<Vm>], order: Pause, must_reach: bool) -> Outcome {
    let asked = vms.iter().map(|vm| vm.tell_pause(order));
    wait_for_all(vms, asked.collect(), must_reach)
}

fn wait_for_all(
    vms: &[Arc<Vm>],
    asked: Vec<Option<Receiver<Answer>>>,
    must_reach: bool,
) -> Outcome {
    let deadline = Instant::now() + SLOW;
    let mut failed = Vec::new();
    for (vm, answer) in vms.iter().zip(asked) {
        let left = deadline.saturating_duration_since(Instant::now());
        let result = match answer.map(|answer| control::wait(&answer, left)) {
            Some(Ok(ControlReply::Done)) => Ok(()),
            Some(Ok(ControlReply::Error(reason)) | Err(reason)) => Err(reason),
            Some(Ok(_)) => Err("the engine answers nonsense".into()),
            // Without an engine nothing is shared, unless it has lost its connection.
            None if must_reach && may_share(vm) => {
                Err("its engine is not connected; it will be told when it is".into())
            }
            None => Ok(()),
        };
        if let Err(reason) = result {
            // A VM that has ended meanwhile shares nothing.
            if !vm.process.has_ended() {
                failed.push((vm.name.clone(), reason));
            }
        }
    }
    Outcome {
        vms: vms.len(),
        failed,
    }
}

fn may_share(vm: &Vm) -> bool {
    let store = vm.store();
    store.vm_statistics(vm.number).granted > 0 || store.is_waiting_for(vm.number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::MAX_MESSAGE;

    #[test]
    fn one_vm_cannot_make_requests_to_others_too_long() {
        let file = |inode| FileKey {
            fs_uuid: [255; 16],
            inode,
            size: u64::MAX,
            mtime_ns: u64::MAX,
            generation: u32::MAX,
            kind: u32::MAX,
        };
        let named = |inodes: std::ops::Range<u64>| -> BTreeMap<_, _> {
            inodes.map(|it| (file(u64::MAX - it), "x".into())).collect()
        };
        let (own, all) = (named(0..3), named(0..100_000));
        let files = files_for(&own, &all);
        assert!(own.keys().eq(&files[..3]));
        let request = ControlRequest::Undo(Undo::Files(files));
        assert!(postcard::to_stdvec(&request).unwrap().len() < MAX_MESSAGE);
        // As long as nobody overdoes it, every VM hears of all.
        assert_eq!(files_for(&own, &named(0..9)).len(), 9);
    }
}
