// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Why a VM shares so little: causes in the order in which they take effect, each with what
//! to do about it.

use super::{human_bytes, human_pages};
use crate::engine::Unsuitable;
use crate::protocol::{Limits, Mode, Status, VmStatus};
use serde::Serialize;

/// One cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cause {
    /// Name for programs.
    pub cause: String,
    /// Guest pages that are not shared because of it, where that is known.
    pub pages: Option<u64>,
    /// What is the matter.
    pub text: String,
    /// What to do, unless nothing is wrong.
    pub cure: Option<String>,
}

/// What is known of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Name of the VM.
    pub vm: String,
    /// Its process.
    pub pid: i32,
    /// Its trust group.
    pub group: Option<String>,
    /// Pages its guest has reported, ever.
    pub pages_reported: u64,
    /// Pages it shares.
    pub pages_shared: u64,
    /// The causes; those behind one that stops everything are left out.
    pub causes: Vec<Cause>,
}

/// Finds the VM with this name, number or process.
pub fn find<'a>(status: &'a Status, which: &str) -> Option<&'a VmStatus> {
    let vms = || status.vms.iter();
    let number = which.parse::<u32>().ok();
    vms()
        .find(|vm| vm.name == which)
        .or_else(|| vms().find(|vm| number == Some(vm.id)))
        .or_else(|| vms().find(|vm| number.is_some() && number == u32::try_from(vm.pid).ok()))
}

/// Explains one VM.
pub fn explain(status: &Status, vm: &VmStatus) -> Explanation {
    let mut causes = Vec::new();
    match stopped(vm) {
        Some(cause) => causes.push(cause),
        None => {
            limits(status, vm, &mut causes);
            pages(vm, &mut causes);
        }
    }
    Explanation {
        vm: vm.name.clone(),
        pid: vm.pid,
        group: vm.group.clone(),
        pages_reported: vm.engine.pages_reported,
        pages_shared: vm.engine.pages_shared,
        causes,
    }
}

/// The explanation as a person reads it.
pub fn explanation_text(explanation: &Explanation) -> String {
    let Explanation {
        vm,
        pid,
        group,
        pages_reported,
        pages_shared,
        causes,
    } = explanation;
    let group = group.as_ref().map_or_else(
        || "no trust group".to_owned(),
        |group| format!("trust group {group}"),
    );
    let mut text = format!(
        "{vm} (process {pid}, {group}) shares {}; its guest has reported {}.\n",
        human_pages(*pages_shared),
        human_pages(*pages_reported),
    );
    if causes.is_empty() {
        text += "Nothing is in its way.\n";
    }
    for (number, cause) in (1..).zip(causes) {
        let pages = cause
            .pages
            .map_or_else(String::new, |pages| format!(" ({})", human_pages(pages)));
        text += &format!("\n{number}. {}{pages}: {}\n", cause.cause, cause.text);
        if let Some(cure) = &cause.cure {
            text += &format!("   → {cure}\n");
        }
    }
    text
}

fn cause(name: &str, text: impl Into<String>, cure: impl Into<String>) -> Cause {
    let cure = cure.into();
    Cause {
        cause: name.into(),
        pages: None,
        text: text.into(),
        cure: Some(cure).filter(|cure| !cure.is_empty()),
    }
}

/// What keeps the VM from sharing anything new at all: the first link that is missing between
/// the guest and the store.
fn stopped(vm: &VmStatus) -> Option<Cause> {
    let name = &vm.name;
    if vm.device == Some(false) {
        return Some(cause(
            "no-device",
            "the VMM has not connected the pagefusion device",
            "start QEMU by: pagefusionctl run -- qemu-system-x86_64 …, which adds the device",
        ));
    }
    if !vm.connected {
        let said = vm.engine.disabled.as_deref().unwrap_or("it is silent");
        return Some(cause(
            "no-engine",
            format!("no engine answers from the VMM ({said})"),
            "look for pagefusion in QEMU's standard error (PAGEFUSION_LOG=info), and start the \
             VM again with the library that belongs to the daemon",
        ));
    }
    if let Some(reason) = &vm.engine.disabled {
        return Some(cause("disabled", reason.as_str(), cure_of_disabled(reason)));
    }
    if vm.paused {
        return Some(cause(
            "paused",
            "the operator has paused sharing, or undone it",
            format!("pagefusionctl resume --vm {name}"),
        ));
    }
    if !vm.engine.guest_attached {
        return Some(cause(
            "no-guest",
            "no guest module is attached",
            "in the guest: insmod pagefusion.ko, and look into its kernel log",
        ));
    }
    None
}

/// Reasons name what is wrong in the VMM; most end only with the VM.
fn cure_of_disabled(reason: &str) -> &'static str {
    const CURES: [(&str, &str); 10] = [
        // This one says it itself.
        ("overcommit_memory", ""),
        (
            "share=on",
            "start the VM with memory of its own: without share=on, vhost-user and virtiofsd",
        ),
        (
            "hugetlbfs",
            "start the VM without -mem-path and memory-backend-file on hugetlbfs",
        ),
        (
            "backed by a file",
            "start the VM without -mem-path, memory-backend-file and memory-backend-memfd",
        ),
        ("mlock", "start the VM without -overcommit mem-lock=on"),
        (
            "VFIO",
            "start the VM without assigned devices; those that are hold on to its memory",
        ),
        ("vfio", "start the VM without assigned devices"),
        (
            "guest_memfd",
            "start the VM without memory of its guest's own (confidential guests)",
        ),
        (
            "libblkio",
            "start the VM without QEMU's blkio drivers (-blockdev driver=io_uring, nvme-io_uring or virtio-blk-…)",
        ),
        (
            "userfaultfd",
            "end what uses userfaultfd in the VMM (postcopy migration, background snapshot), \
             then start the VM again",
        ),
    ];
    let known = CURES.iter().find(|(word, _)| reason.contains(word));
    known.map_or(
        "start the VM again without what the reason names",
        |(_, cure)| cure,
    )
}

fn limits(status: &Status, vm: &VmStatus, causes: &mut Vec<Cause>) {
    if vm.group.is_none() {
        causes.push(cause(
            "no-group",
            "without a trust group it shares only what it has twice itself",
            "start it with --group NAME, as the VMs that it may share with",
        ));
    } else if status.vms.iter().filter(|it| it.group == vm.group).count() < 2 {
        causes.push(cause(
            "alone",
            "it is the only VM of its trust group",
            "start others with the same --group",
        ));
    }
    let group = status.groups.iter().find(|it| it.is_of(vm));
    if let Some(learning) = group.filter(|it| it.pages_would_share.is_some()) {
        let scope = match &vm.group {
            Some(group) => format!("--group {group}"),
            None => "--all".to_owned(),
        };
        causes.push(if learning.mode == Mode::WouldSave {
            cause(
                "would-save",
                "its group only counts what sharing would bring",
                format!("pagefusionctl set {scope} --mode share"),
            )
        } else {
            cause(
                "no-pressure",
                "its group shares only while the host is short of memory",
                format!("pagefusionctl set {scope} --policy always"),
            )
        });
    }
    if vm.pages_limited > 0 {
        causes.push(Cause {
            pages: Some(vm.pages_limited),
            ..cause(
                "limit",
                format!(
                    "were kept from it by a limit, its own ({}) or its group's ({})",
                    limits_text(&vm.limits),
                    limits_text(&group.map_or_else(Default::default, |it| it.limits)),
                ),
                format!(
                    "pagefusionctl set --vm {} --max-overlays SIZE --max-store SIZE, or --group",
                    vm.name
                ),
            )
        });
    }
    if vm.files_undone > 0 {
        causes.push(cause(
            "files-undone",
            format!("the operator has undone {} files", vm.files_undone),
            format!("pagefusionctl resume --vm {}", vm.name),
        ));
    }
}

fn limits_text(limits: &Limits) -> String {
    let named = [
        ("store", limits.max_store),
        ("overlays", limits.max_overlays),
        ("publish rate", limits.publish_rate),
    ];
    let set: Vec<_> = named
        .into_iter()
        .filter_map(|(name, bytes)| {
            let bytes = i64::try_from(bytes?).unwrap_or(i64::MAX);
            Some(format!("{name} {}", human_bytes(bytes)))
        })
        .collect();
    if set.is_empty() {
        "none".into()
    } else {
        set.join(", ")
    }
}

fn pages(vm: &VmStatus, causes: &mut Vec<Cause>) {
    let engine = &vm.engine;
    let mut refusals: Vec<_> = engine.refusals.iter().filter(|it| *it.1 > 0).collect();
    refusals.sort_by_key(|(_, pages)| std::cmp::Reverse(**pages));
    for (reason, &pages) in refusals {
        let name = format!("refused-{reason}");
        let unsuitable = Unsuitable::ALL.into_iter().find(|it| it.name() == reason);
        let cause = match unsuitable.map(|it| it.to_string()) {
            Some(why) => {
                let text = format!("lie in memory that is left alone: {why}");
                cause(&name, text, cure_of_disabled(&why))
            }
            None => {
                let (text, cure) = refusal(reason);
                self::cause(&name, text, cure)
            }
        };
        causes.push(Cause {
            pages: Some(pages),
            ..cause
        });
    }
    if engine.pages_broken > 0 {
        causes.push(Cause {
            pages: Some(engine.pages_broken),
            ..cause(
                "broken",
                "were shared, and the guest has written them since",
                "",
            )
        });
    }
    if engine.pages_remembered > 0 {
        causes.push(Cause {
            pages: Some(engine.pages_remembered),
            ..cause(
                "only-here",
                "no other VM of the group had these pages when they were reported",
                "none needed: they are shared as soon as another VM has them",
            )
        });
    }
    if engine.pages_spared > 0 {
        let group = vm.group.as_ref();
        let scope = group.map_or_else(|| "--all".into(), |group| format!("--group {group}"));
        causes.push(Cause {
            pages: Some(engine.pages_spared),
            ..cause(
                "spared",
                "could have been shared, and were left alone so that huge pages stay whole",
                format!("pagefusionctl set {scope} --split-huge-pages always"),
            )
        });
    }
    if engine.pages_reported == 0 {
        causes.push(cause(
            "nothing-reported",
            "the guest has reported nothing yet",
            "in the guest: /sys/kernel/pagefusion/run must be 1, and pages_eligible above 0",
        ));
    }
}

/// What a refusal of the engine means, and what to do about it.
fn refusal(reason: &str) -> (&'static str, &'static str) {
    match reason {
        "different" => (
            "the bytes changed while they were looked at",
            "none needed for a few; many mean that programs write to files that others run",
        ),
        "mapping-limit" => (
            "the VMM is near the kernel's limit of mappings for a process",
            "sysctl -w vm.max_map_count=1048576, then pagefusionctl undo and resume this VM",
        ),
        "store-full" => (
            "the store had no room, or a limit was reached",
            "give the tmpfs more (mount -o remount,size=… /dev/shm), start the daemon with a larger \
             --max-store, or see pagefusionctl set --max-store and --publish-rate",
        ),
        "paused" => (
            "came while sharing was paused",
            "none needed: after resume they are reported again",
        ),
        "no-store" => (
            "came while the daemon was away",
            "none needed: they are reported again when it is back",
        ),
        "unsuitable-memory" => (
            "lie in guest memory that the VMM was changing when they were reported",
            "none needed: they are reported again when it has ended",
        ),
        "outside-memory" => (
            "lie outside of the guest memory that the engine knows",
            "none needed for memory that was just added: without KVM, QEMU is asked for it again \
             within about a minute",
        ),
        "malformed" | "unknown-file" => (
            "the guest's reports make no sense",
            "load the module that belongs to this version in the guest",
        ),
        "too-many-files" => (
            "the guest names more files than are kept",
            "in the guest: let fewer files be mapped, or reload the module",
        ),
        "host-error" => (
            "the host's kernel refused to share them",
            "QEMU's standard error says what failed (PAGEFUSION_LOG=warn)",
        ),
        "revoked" => (
            "the guest took the report back before it was looked at",
            "none needed: it reports them again",
        ),
        _ => (
            "refused for a reason that this program does not know",
            "use the pagefusionctl that belongs to the daemon",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::GroupStatus;
    use pagefusion_abi::wire::reason;

    fn sharing() -> VmStatus {
        let mut vm = VmStatus {
            id: 7,
            name: "web".into(),
            group: Some("g".into()),
            pid: 4242,
            device: Some(true),
            connected: true,
            ..VmStatus::default()
        };
        vm.engine.guest_attached = true;
        vm.engine.pages_reported = 100;
        vm
    }

    fn causes(vm: VmStatus) -> Vec<String> {
        let other = VmStatus {
            group: vm.group.clone(),
            ..VmStatus::default()
        };
        let status = Status {
            vms: vec![vm.clone(), other],
            ..Status::default()
        };
        let explained = explain(&status, &vm);
        explained.causes.into_iter().map(|it| it.cause).collect()
    }

    #[test]
    fn the_first_missing_link_is_the_cause() {
        let mut vm = sharing();
        assert_eq!(causes(vm.clone()), [""; 0]);
        vm.engine.pages_remembered = 3;
        assert_eq!(causes(vm.clone()), ["only-here"]);
        vm.engine.pages_spared = 3;
        assert_eq!(causes(vm.clone()), ["only-here", "spared"]);
        vm.engine.guest_attached = false;
        assert_eq!(causes(vm.clone()), ["no-guest"]);
        vm.paused = true;
        assert_eq!(causes(vm.clone()), ["paused"]);
        vm.engine.disabled = Some("guest memory is locked (mlock)".into());
        assert_eq!(causes(vm.clone()), ["disabled"]);
        vm.connected = false;
        assert_eq!(causes(vm.clone()), ["no-engine"]);
        vm.device = Some(false);
        assert_eq!(causes(vm), ["no-device"]);
    }

    #[test]
    fn a_vm_is_not_taken_for_the_group_of_its_name() {
        let group = |vm, learns: bool| GroupStatus {
            name: "web".into(),
            vm,
            mode: if learns { Mode::WouldSave } else { Mode::Share },
            pages_would_share: learns.then_some(0),
            ..GroupStatus::default()
        };
        let alone = VmStatus {
            group: None,
            ..sharing()
        };
        let member = VmStatus {
            id: 8,
            name: "other".into(),
            group: Some("web".into()),
            ..sharing()
        };
        for (groups, learns) in [
            ([group(None, true), group(Some(7), false)], [false, true]),
            ([group(Some(7), true), group(None, false)], [true, false]),
        ] {
            let status = Status {
                vms: vec![alone.clone(), member.clone()],
                groups: groups.into(),
                ..Status::default()
            };
            for (vm, learns) in status.vms.iter().zip(learns) {
                let explained = explain(&status, vm);
                let found = explained.causes.iter().any(|it| it.cause == "would-save");
                assert_eq!(found, learns, "{explained:?}");
            }
        }
    }

    #[test]
    fn what_was_refused_most_comes_first() {
        let mut vm = sharing();
        vm.group = None;
        vm.engine.refusals.insert("different".into(), 1);
        vm.engine.refusals.insert("mapping-limit".into(), 9);
        vm.engine.pages_broken = 2;
        let expected = [
            "no-group",
            "refused-mapping-limit",
            "refused-different",
            "broken",
        ];
        assert_eq!(causes(vm), expected);
    }

    #[test]
    fn every_reason_has_a_sentence_and_a_cure() {
        let unknown = refusal("unknown");
        for code in 1..reason::COUNT as u8 {
            assert_ne!(
                refusal(reason::name(code)),
                unknown,
                "{}",
                reason::name(code)
            );
        }
    }

    #[test]
    fn a_vm_is_found_by_name_number_or_process() {
        let status = Status {
            vms: vec![sharing()],
            ..Status::default()
        };
        for which in ["web", "7", "4242"] {
            assert!(find(&status, which).is_some(), "{which}");
        }
        assert!(find(&status, "8").is_none());
    }

    #[test]
    fn memory_that_is_left_alone_beside_other_memory_is_named_with_its_cure() {
        let mut cures = Vec::new();
        for unsuitable in Unsuitable::ALL {
            let mut vm = sharing();
            vm.engine.refusals.insert(unsuitable.name().into(), 1);
            let causes = explain(&Status::default(), &vm).causes;
            let cause = causes.iter().find(|it| it.pages == Some(1)).unwrap();
            assert_eq!(cause.cause, format!("refused-{}", unsuitable.name()));
            assert!(cause.text.ends_with(&unsuitable.to_string()), "{cause:?}");
            cures.push(cause.cure.clone().unwrap());
        }
        let named = |word: &str| cures.iter().any(|cure| cure.contains(word));
        assert!(named("without share=on") && named("mem-lock") && named("confidential"));
    }

    #[test]
    fn the_text_has_cause_and_cure() {
        let mut vm = sharing();
        vm.engine.refusals.insert("mapping-limit".into(), 256);
        let text = explanation_text(&explain(&Status::default(), &vm));
        assert!(text.contains("refused-mapping-limit (1.0 MiB)"), "{text}");
        assert!(text.contains("→ sysctl -w vm.max_map_count"), "{text}");
    }
}
