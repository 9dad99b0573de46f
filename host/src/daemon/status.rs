// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Figures for the operator.

use super::control::{self, QUICK};
use super::device::Device;
use super::registry::Registry;
use super::vm::Vm;
use crate::protocol::{ControlReply, ControlRequest, EngineStatus, GroupStatus, Status, VmStatus};
use crate::store::PAGE;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Kernel memory of one mapping: `struct vm_area_struct`, 184 to 256 bytes by kernel version
/// and configuration (`vm_area_struct` in /proc/slabinfo), and its share of a maple tree
/// node (256 bytes for up to 16). Measured per overlay: about 230 bytes.
const MAPPING_BYTES: u64 = 256;

/// Asks every engine at once and adds up.
pub(super) fn collect(registry: &Registry) -> Status {
    let vms = registry.vms();
    let asked: Vec<_> = vms
        .iter()
        .map(|vm| vm.control.ask(ControlRequest::Status))
        .collect();
    let deadline = Instant::now() + QUICK;
    let mut status = Status {
        version: env!("CARGO_PKG_VERSION").into(),
        ..Status::default()
    };
    for (vm, answer) in vms.iter().zip(asked) {
        let answer = answer.map(|answer| {
            control::wait(
                &answer,
                deadline.saturating_duration_since(Instant::now()).max(
                    // An answer that is there is taken even after the deadline.
                    Duration::from_millis(1),
                ),
            )
        });
        status.vms.push(vm_status(vm, answer));
    }
    add_groups(&mut status, &vms);
    status
}

fn vm_status(vm: &Vm, answer: Option<Result<ControlReply, String>>) -> VmStatus {
    let (connected, engine) = match answer {
        Some(Ok(ControlReply::Status(engine))) => (true, *engine),
        Some(Ok(ControlReply::Error(reason))) => (true, disabled(reason)),
        Some(Ok(ControlReply::Done)) => (false, disabled("the engine answers nonsense".into())),
        Some(Err(reason)) => (false, disabled(reason)),
        None => (false, disabled("no engine is connected".into())),
    };
    VmStatus {
        id: vm.number,
        name: vm.name.clone(),
        group: vm.group.clone(),
        pid: vm.process.pid(),
        connected,
        paused: vm.is_paused(),
        engine,
    }
}

fn disabled(reason: String) -> EngineStatus {
    EngineStatus {
        disabled: Some(reason),
        ..EngineStatus::default()
    }
}

fn add_groups(status: &mut Status, vms: &[Arc<Vm>]) {
    // VMs with the same store, by where it is in memory.
    let mut groups = BTreeMap::<usize, (GroupStatus, u64)>::new();
    for (vm, engine) in vms.iter().zip(status.vms.iter().map(|vm| &vm.engine)) {
        let (group, metadata) = groups
            .entry(Arc::as_ptr(&vm.store) as usize)
            .or_insert_with(|| {
                let store = vm.store().statistics();
                let name = vm.group.clone().unwrap_or_else(|| vm.name.clone());
                let group = GroupStatus {
                    name,
                    store_pages: store.store_pages,
                    pages_remembered: store.remembered,
                    ..GroupStatus::default()
                };
                (group, store.index_bytes)
            });
        group.vms += 1;
        group.pages_shared += engine.pages_shared;
        *metadata += engine.overlay_mappings * MAPPING_BYTES
            + vm.device.as_ref().map_or(0, Device::allocated_bytes);
    }
    for (mut group, metadata) in groups.into_values() {
        let pages = group.pages_shared as i64 - group.store_pages as i64;
        group.bytes_saved = pages * PAGE as i64 - metadata as i64;
        status.pages_shared += group.pages_shared;
        status.store_pages += group.store_pages;
        status.bytes_saved += group.bytes_saved;
        status.bytes_metadata += metadata;
        status.groups.push(group);
    }
    status
        .groups
        .sort_by(|one, other| one.name.cmp(&other.name));
}
