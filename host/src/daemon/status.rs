// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Figures for the operator.

use super::control::{self, QUICK};
use super::registry::Registry;
use super::vm::Vm;
use crate::device::PagefusionDevice;
use crate::engine::Unsuitable;
use crate::protocol::{ControlReply, ControlRequest, EngineStatus, GroupStatus, Status, VmStatus};
use crate::store::PAGE;
use pagefusion_abi::wire::{self, reason};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Kernel memory of one mapping besides its `struct vm_area_struct`: whom that is charged to (8
/// bytes), and a share of a maple tree node (256 bytes for up to 16; measured 21).
const MAPPING_EXTRA: u64 = 8 + 21;
/// A `struct vm_area_struct` where the kernel does not tell: 184 to 256 bytes by version and
/// configuration.
const MAPPING_USUAL: u64 = 224;
/// Kernel memory per canonical page besides the page: its place in the page cache of the store,
/// in nodes of 592 bytes for 64 pages.
const CANONICAL_EXTRA: u64 = 592 / 64;

/// Most characters of a text that an engine says.
const LONGEST_TEXT: usize = 256;

/// Most pages that one engine can have: no process has room for more. Sums over VMs and files
/// stay far below what numbers hold.
pub(super) const MOST_PAGES: u64 = 1 << 36;

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
    status.under_pressure = registry.is_under_pressure();
    add_groups(registry, &mut status, &vms);
    status
}

fn vm_status(vm: &Vm, answer: Option<Result<ControlReply, String>>) -> VmStatus {
    let last = |reason: String| EngineStatus {
        disabled: Some(reason),
        ..vm.last_heard()
    };
    let (connected, engine) = match answer {
        Some(Ok(ControlReply::Status(engine))) => {
            vm.hear(&engine);
            (true, *engine)
        }
        Some(Ok(ControlReply::Error(reason))) => (true, last(reason)),
        Some(Ok(_)) => (false, last("the engine answers nonsense".into())),
        Some(Err(reason)) => (false, last(reason)),
        None => (false, last("no engine is connected".into())),
    };
    let store = vm.store().vm_statistics(vm.number);
    VmStatus {
        id: vm.number,
        name: vm.name.clone(),
        group: vm.group.clone(),
        pid: vm.process.pid(),
        device: vm.has_connected_device(),
        connected,
        paused: vm.pause().is_paused(),
        files_undone: vm.undone_files().len(),
        pages_granted: store.granted,
        pages_published: store.published,
        pages_limited: store.limited,
        limits: vm.limits(),
        own_limits: vm.own_limits(),
        engine,
    }
}

/// Names that are ours, numbers that can be counted with and texts without control characters: an engine may say anything, and
/// others show it to people and programs.
pub(super) fn tamed(mut engine: EngineStatus) -> EngineStatus {
    let of_reports = |name: &str| (0..reason::COUNT as u8).any(|code| reason::name(code) == name);
    let of_memory = |name: &str| Unsuitable::ALL.iter().any(|it| it.name() == name);
    let mut refusals = BTreeMap::new();
    for (name, pages) in engine.refusals {
        let name = if of_reports(&name) || of_memory(&name) {
            name
        } else {
            "unknown".into()
        };
        let sum: &mut u64 = refusals.entry(name).or_default();
        *sum = sum.saturating_add(pages);
    }
    engine.refusals = refusals;
    let texts = std::iter::once(&mut engine.memory_source).chain(&mut engine.disabled);
    texts.for_each(tame_text);
    for pages in [
        &mut engine.pages_shared,
        &mut engine.pages_broken,
        &mut engine.overlay_mappings,
    ] {
        *pages = (*pages).min(MOST_PAGES);
    }
    // JSON has no other numbers, and readers of one VM's would lose all VMs.
    for seconds in [&mut engine.seconds_sharing, &mut engine.cpu_seconds] {
        if !seconds.is_finite() || *seconds < 0.0 {
            *seconds = 0.0;
        }
    }
    engine
}

/// Leaves no more of a file's name than guests report: its end.
pub(super) fn tame_name(name: &mut String) {
    let least = name.len().saturating_sub(wire::MAX_NAME);
    let begin = (least..=name.len()).find(|&at| name.is_char_boundary(at));
    name.drain(..begin.unwrap_or_default());
}

/// Leaves a text that can be shown.
pub(super) fn tame_text(text: &mut String) {
    text.retain(|c| !c.is_control());
    if let Some((end, _)) = text.char_indices().nth(LONGEST_TEXT) {
        text.truncate(end);
    }
}

/// What an operator calls the group of a VM, and the VM's number if it has none: a VM without one is
/// its own, and its name may be a group's.
pub(super) fn group_of(vm: &Vm) -> (String, Option<u32>) {
    match &vm.group {
        Some(group) => (group.clone(), None),
        None => (vm.name.clone(), Some(vm.number)),
    }
}

/// Kernel memory of one mapping.
fn mapping_bytes() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let figure = |name: &str| -> Option<u64> {
            let path = format!("/sys/kernel/slab/vm_area_struct/{name}");
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        // With what is left over in each slab.
        let of_slab = || {
            let bytes = PAGE.checked_shl(figure("order")?.try_into().ok()?)? as u64;
            bytes.checked_div(figure("objs_per_slab")?)
        };
        of_slab().unwrap_or(MAPPING_USUAL) + MAPPING_EXTRA
    })
}

fn add_groups(registry: &Registry, status: &mut Status, vms: &[Arc<Vm>]) {
    // VMs with the same store, by where it is in memory.
    let mut groups = BTreeMap::<usize, (GroupStatus, u64)>::new();
    for (vm, engine) in vms.iter().zip(status.vms.iter().map(|vm| &vm.engine)) {
        let (group, metadata) = groups.entry(vm.group_store.key()).or_insert_with(|| {
            let store = vm.store().statistics();
            let policy = registry.policy_of(vm.group.as_deref());
            let own = registry.own_settings(vm.group.as_deref());
            let saving =
                |(shared, contents): (u64, u64)| (shared as i64 - contents as i64) * PAGE as i64;
            let (name, number) = group_of(vm);
            let group = GroupStatus {
                name,
                vm: number,
                mode: policy.mode.unwrap_or_default(),
                policy: policy.policy.unwrap_or_default(),
                split_huge_pages: policy.split_huge_pages.unwrap_or_default(),
                own_policies: own.policy,
                pages_would_share: store.would_share.map(|(shared, _)| shared),
                bytes_would_save: store.would_share.map(saving),
                store_pages: store.store_pages,
                pages_remembered: store.remembered,
                pages_store_full: store.store_full,
                adopting: store.adopting,
                limits: vm.group_store.limits(),
                own_limits: own.group,
                ..GroupStatus::default()
            };
            (
                group,
                store.index_bytes + store.store_pages * CANONICAL_EXTRA,
            )
        });
        group.vms += 1;
        group.pages_shared = group.pages_shared.saturating_add(engine.pages_shared);
        group.pages_granted += vm.store().vm_statistics(vm.number).granted;
        let device = vm.device.as_ref();
        let mappings = engine.overlay_mappings.saturating_mul(mapping_bytes());
        *metadata = metadata
            .saturating_add(mappings)
            .saturating_add(device.map_or(0, PagefusionDevice::allocated_bytes));
    }
    for (mut group, metadata) in groups.into_values() {
        group.bytes_saved = saved(group.pages_shared, group.store_pages, metadata);
        group.bytes_metadata = metadata;
        status.pages_shared = status.pages_shared.saturating_add(group.pages_shared);
        status.store_pages += group.store_pages;
        status.bytes_saved = status.bytes_saved.saturating_add(group.bytes_saved);
        status.bytes_metadata = status.bytes_metadata.saturating_add(metadata);
        status.groups.push(group);
    }
    status
        .groups
        .sort_by(|one, other| (&one.name, one.vm).cmp(&(&other.name, other.vm)));
}

/// Bytes that pages save, less what that costs.
fn saved(shared: u64, stored: u64, metadata: u64) -> i64 {
    let pages = i128::from(shared) - i128::from(stored);
    let bytes = pages * PAGE as i128 - i128::from(metadata);
    bytes.clamp(i64::MIN.into(), i64::MAX.into()) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_engine_says_cannot_reach_beyond_its_place() {
        let mut engine = EngineStatus {
            disabled: Some(format!("a\u{1b}[2J\nb{}", "x".repeat(1000))),
            ..EngineStatus::default()
        };
        for (name, pages) in [("different", 1), ("x\"} 7\n", u64::MAX), ("y", 5)] {
            engine.refusals.insert(name.into(), pages);
        }
        (engine.seconds_sharing, engine.cpu_seconds) = (f64::INFINITY, -f64::NAN);
        (engine.pages_shared, engine.overlay_mappings) = (u64::MAX, u64::MAX);
        let engine = tamed(engine);
        assert_eq!((engine.seconds_sharing, engine.cpu_seconds), (0.0, 0.0));
        let counted = (engine.pages_shared, engine.overlay_mappings);
        assert_eq!(counted, (MOST_PAGES, MOST_PAGES));
        let text = engine.disabled.unwrap();
        assert!(
            text.starts_with("a[2Jbx") && text.len() == LONGEST_TEXT,
            "{text}"
        );
        let expected = [("different".into(), 1), ("unknown".into(), u64::MAX)];
        assert_eq!(engine.refusals, BTreeMap::from(expected));
    }

    #[test]
    fn of_a_long_name_the_end_is_left() {
        let tamed = |name: &str| {
            let mut name = name.to_owned();
            tame_name(&mut name);
            name
        };
        assert_eq!(tamed("/usr/lib/a"), "/usr/lib/a");
        let long = tamed(&("x".repeat(1000) + "/b"));
        assert!(long.len() == wire::MAX_NAME && long.ends_with("x/b"));
        // Not in the middle of a character.
        let wide = tamed(&("ä".repeat(200) + "b"));
        assert!(wide.len() == wire::MAX_NAME - 1 && wide.starts_with('ä'));
    }

    #[test]
    fn what_is_saved_stays_a_number() {
        assert_eq!(saved(3, 1, 100), 2 * PAGE as i64 - 100);
        assert_eq!(saved(u64::MAX, 0, 0), i64::MAX);
        assert_eq!(saved(0, u64::MAX, u64::MAX), i64::MIN);
    }
}
