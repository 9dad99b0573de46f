// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Figures as a person reads them.

use crate::protocol::{FileStatus, GroupStatus, Limits, Mode, Status, VmStatus};
use crate::store::PAGE;
use clap::ValueEnum;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

/// Bytes with a unit, three digits or so: `1.4 GiB`, `-12 MiB`, `0 B`.
pub fn human_bytes(bytes: i64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value.abs() >= 999.5 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value.abs() < 99.95);
    format!("{value:.digits$} {}", units[unit])
}

/// The whole host: groups, VMs, and what it comes to.
pub fn status_text(status: &Status) -> String {
    if status.vms.is_empty() {
        return "No VM is running. Start one with: pagefusionctl run --group NAME -- \
                qemu-system-x86_64 …\n"
            .into();
    }
    let groups = groups_text(status);
    let saved = human_bytes(status.bytes_saved);
    let metadata = human_bytes(i64::try_from(status.bytes_metadata).unwrap_or(i64::MAX));
    format!(
        "{groups}\n{}\nSaved: {saved}, with {metadata} for index, mappings and rings subtracted.\n",
        vms_text(status)
    )
}

/// The trust groups.
pub fn groups_text(status: &Status) -> String {
    let mut groups = table(&["Group", "VMs", "Shared", "Store", "Only one has", "Saved"]);
    for group in &status.groups {
        groups.add_row(row(
            &[&group_title(&group.name, group.vm)],
            &[
                group.vms.to_string(),
                human_pages(group.pages_shared),
                human_pages(group.store_pages),
                human_pages(group.pages_remembered),
                human_bytes(group.bytes_saved),
            ],
        ));
    }
    let mut text = format!("{groups}\n");
    for group in &status.groups {
        if let (Some(pages), Some(bytes)) = (group.pages_would_share, group.bytes_would_save) {
            text += &format!(
                "{}: only learns ({}); would share {} and save {} more, before mappings\n",
                group_title(&group.name, group.vm),
                learning(status, group),
                human_pages(pages),
                human_bytes(bytes),
            );
        }
    }
    for group in &status.groups {
        // What is set for all is not told again for each VM without a group.
        if group.vm.is_none() {
            text += &settings_text(&group.name, &group_settings(group));
        }
    }
    text
}

/// What something is set to, by the name that `set` has for it, and whether that is its own. The
/// default goes without saying.
type Setting = (&'static str, String, bool);

fn group_settings(group: &GroupStatus) -> Vec<Setting> {
    fn setting<T: ValueEnum + Default + PartialEq>(
        name: &'static str,
        value: T,
        own: Option<T>,
    ) -> Option<Setting> {
        let is_told = own.is_some() || value != T::default();
        let word = value.to_possible_value().filter(|_| is_told)?;
        Some((name, word.get_name().into(), own.is_some()))
    }
    let own = &group.own_policies;
    let policies = [
        setting("mode", group.mode, own.mode),
        setting("policy", group.policy, own.policy),
        setting(
            "split-huge-pages",
            group.split_huge_pages,
            own.split_huge_pages,
        ),
    ];
    let limits = limit_settings(&group.limits, &group.own_limits);
    policies.into_iter().flatten().chain(limits).collect()
}

fn limit_settings(limits: &Limits, own: &Limits) -> impl Iterator<Item = Setting> {
    let all = [
        ("max-store", limits.max_store, own.max_store),
        ("max-overlays", limits.max_overlays, own.max_overlays),
        ("publish-rate", limits.publish_rate, own.publish_rate),
    ];
    all.into_iter().filter_map(|(name, bytes, own)| {
        let bytes = human_bytes(i64::try_from(bytes?).unwrap_or(i64::MAX));
        Some((name, bytes, own.is_some()))
    })
}

/// A line, or nothing if nothing is set.
fn settings_text(title: &str, settings: &[Setting]) -> String {
    if settings.is_empty() {
        return String::new();
    }
    let words: Vec<_> = settings
        .iter()
        .map(|(name, value, is_own)| {
            let inherited = if *is_own { "" } else { " (inherited)" };
            format!("{name} {value}{inherited}")
        })
        .collect();
    format!("{title}: set: {}\n", words.join(", "))
}

/// What a group is called. A VM that has none is not taken for a group of its name: there is no
/// space in names.
pub(super) fn group_title(name: &str, vm: Option<u32>) -> String {
    match vm {
        None => name.into(),
        Some(_) => format!("VM {name}"),
    }
}

/// Why a group only learns.
fn learning(status: &Status, group: &GroupStatus) -> &'static str {
    match (group.mode, status.under_pressure) {
        (Mode::WouldSave, _) => "mode would-save",
        (Mode::Share, false) => "policy pressure, and the host is not short of memory",
        (Mode::Share, true) => "for a moment yet",
    }
}

/// Files, in the order they come.
pub fn files_text(files: &[FileStatus]) -> String {
    let titles = ["File", "Group", "VMs", "Shared", "Broken", "Store", "Saved"];
    let mut table = table(&titles);
    for file in files {
        let name = if file.name.is_empty() {
            format!("({})", file.id)
        } else {
            printable(&file.name)
        };
        table.add_row(row(
            &[&name, &group_title(&file.group, file.vm)],
            &[
                file.vms.to_string(),
                human_pages(file.pages_shared),
                human_pages(file.pages_broken),
                human_pages(file.store_pages),
                human_bytes(file.bytes_saved),
            ],
        ));
    }
    format!("{table}\n")
}

/// What a guest calls something, without what a terminal would take for a command.
fn printable(name: &str) -> String {
    let escaped = |c: char| {
        // Marks that turn the direction of what follows, and ends of lines.
        let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        let plain = !c.is_control() && !turns;
        let text = if plain {
            c.to_string()
        } else {
            c.escape_unicode().to_string()
        };
        text.chars().collect::<Vec<_>>()
    };
    name.chars().flat_map(escaped).collect()
}

/// The VMs, and below the table why some of them share little.
pub fn vms_text(status: &Status) -> String {
    let titles = [
        "VM", "Name", "Group", "State", "PID", "Reported", "Shared", "Broken", "Refused", "CPU",
    ];
    let mut vms = table(&titles);
    let mut notes = String::new();
    for vm in &status.vms {
        let engine = &vm.engine;
        vms.add_row(row(
            &[
                &vm.id.to_string(),
                &vm.name,
                vm.group.as_deref().unwrap_or("-"),
                state(vm),
            ],
            &[
                vm.pid.to_string(),
                human_pages(engine.pages_reported),
                human_pages(engine.pages_shared),
                human_pages(engine.pages_broken),
                human_pages(engine.pages_refused),
                format!("{:.1} s", engine.cpu_seconds),
            ],
        ));
        if let Some(reason) = &engine.disabled {
            notes += &format!("{}: {reason}\n", vm.name);
        }
        let refusals: Vec<_> = engine
            .refusals
            .iter()
            .map(|(reason, count)| format!("{reason} {}", human_pages(*count)))
            .collect();
        if !refusals.is_empty() {
            notes += &format!("{}: refused: {}\n", vm.name, refusals.join(", "));
        }
        // What is inherited is the same for all, or for all of a group.
        let mut settings: Vec<_> = limit_settings(&vm.limits, &vm.own_limits).collect();
        settings.retain(|(_, _, is_own)| *is_own);
        notes += &settings_text(&vm.name, &settings);
    }
    format!("{vms}\n{notes}")
}

/// The one word for how a VM is.
pub(super) fn state(vm: &VmStatus) -> &'static str {
    if vm.paused {
        "paused"
    } else if !vm.connected {
        "no engine"
    } else if vm.engine.disabled.is_some() {
        "disabled"
    } else if !vm.engine.guest_attached {
        "no guest"
    } else {
        "sharing"
    }
}

/// Pages as [`human_bytes`].
pub fn human_pages(pages: u64) -> String {
    human_bytes(
        i64::try_from(pages)
            .unwrap_or(i64::MAX)
            .saturating_mul(PAGE as i64),
    )
}

fn table(titles: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(titles);
    table
}

/// Words to the left, figures to the right.
fn row(words: &[&str], figures: &[String]) -> Vec<Cell> {
    let words = words.iter().map(Cell::new);
    let figures = figures
        .iter()
        .map(|it| Cell::new(it).set_alignment(CellAlignment::Right));
    words.chain(figures).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 KiB"),
            (4096, "4.0 KiB"),
            (-12 << 20, "-12.0 MiB"),
            (1 << 30, "1.0 GiB"),
            (300 << 20, "300 MiB"),
            (i64::MAX, "8388608 TiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human_bytes(bytes), text);
        }
    }

    #[test]
    fn a_guest_cannot_write_to_the_terminal() {
        let file = FileStatus {
            name: "lib\u{1b}[2J\u{202e}c.so".into(),
            ..FileStatus::default()
        };
        let text = files_text(&[file]);
        assert!(text.contains("lib\\u{1b}[2J\\u{202e}c.so"), "{text}");
    }

    #[test]
    fn a_vm_without_a_group_is_not_the_group_of_its_name() {
        let group = |vm| GroupStatus {
            name: "g".into(),
            vm,
            pages_would_share: Some(1),
            bytes_would_save: Some(0),
            ..GroupStatus::default()
        };
        let text = groups_text(&Status {
            groups: vec![group(None), group(Some(3))],
            ..Status::default()
        });
        for begin in [" g ", " VM g ", "g: only learns", "VM g: only learns"] {
            let lines = text.lines().filter(|it| it.starts_with(begin));
            assert_eq!(lines.count(), 1, "{begin:?} in\n{text}");
        }
        let file = FileStatus {
            group: "g".into(),
            vm: Some(3),
            ..FileStatus::default()
        };
        let text = files_text(&[file]);
        assert!(text.contains(" VM g "), "{text}");
    }

    #[test]
    fn what_hinders_a_vm_is_named() {
        let mut vm = VmStatus {
            name: "web".into(),
            ..VmStatus::default()
        };
        vm.engine.disabled = Some("the engine does not answer".into());
        vm.engine.refusals.insert("mapping-limit".into(), 256);
        let text = vms_text(&Status {
            vms: vec![vm],
            ..Status::default()
        });
        assert!(text.contains("web: the engine does not answer\n"), "{text}");
        assert!(
            text.contains("web: refused: mapping-limit 1.0 MiB\n"),
            "{text}"
        );
    }
}
