// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The figures of the host as OpenMetrics text, made anew from a [`Status`] for every look.
//! `docs/metrics.md` explains each of them.

use crate::protocol::{GroupStatus, Status, VmStatus};
use crate::store::PAGE;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::atomic::AtomicU64;

/// What the text is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The values are names of VMs and groups, which hold nothing that would need escaping, and
/// names that are our own.
type Labels = Vec<(&'static str, String)>;

/// All figures.
pub(super) fn text(status: &Status) -> Result<String, fmt::Error> {
    let mut figures = Figures(Registry::with_prefix("pagefusion"));
    figures.of_host(status);
    figures.of_groups(&status.groups);
    figures.of_vms(&status.vms);
    figures.of_engines(&status.vms);
    let mut text = String::new();
    encode(&mut text, &figures.0)?;
    Ok(text)
}

struct Figures(Registry);

impl Figures {
    fn gauge(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, f64)>) {
        let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in samples {
            family.get_or_create(&labels).set(value);
        }
        self.0.register(name, help, family);
    }

    fn counter(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        let family = Family::<Labels, Counter<f64, AtomicU64>>::default();
        for (labels, value) in samples {
            family.get_or_create(&labels).inc_by(value);
        }
        self.0.register(name, help, family);
    }

    fn of_host(&mut self, status: &Status) {
        let version = vec![("version", status.version.clone())];
        self.gauge("build", "Version of the daemon", [(version, 1.0)]);
        let host = |value: f64| [(Labels::new(), value)];
        self.gauge(
            "saved_bytes",
            "Memory saved on this host, net",
            host(status.bytes_saved as f64),
        );
        self.gauge(
            "metadata_bytes",
            "Memory that sharing itself takes",
            host(status.bytes_metadata as f64),
        );
        self.gauge("vms", "Living VMs", host(status.vms.len() as f64));
    }

    fn of_groups(&mut self, groups: &[GroupStatus]) {
        let mut of_groups = |name: &str, help: &str, value: fn(&GroupStatus) -> f64| {
            let samples = groups
                .iter()
                .map(|group| (labels_of_group(group), value(group)));
            self.gauge(name, help, samples);
        };
        of_groups("group_vms", "Living VMs", |it| it.vms as f64);
        of_groups("group_saved_bytes", "Memory saved, net", |it| {
            it.bytes_saved as f64
        });
        of_groups(
            "group_metadata_bytes",
            "Memory that sharing itself takes",
            |it| it.bytes_metadata as f64,
        );
        of_groups(
            "group_shared_bytes",
            "Guest memory on canonical pages",
            |it| bytes(it.pages_shared),
        );
        of_groups("group_store_bytes", "Canonical pages", |it| {
            bytes(it.store_pages)
        });
        of_groups(
            "group_granted_bytes",
            "Canonical pages that VMs may map",
            |it| bytes(it.pages_granted),
        );
        of_groups(
            "group_remembered_bytes",
            "Pages that only one VM has",
            |it| bytes(it.pages_remembered),
        );
        of_groups(
            "group_adopting",
            "1 while VMs of an earlier daemon are still to say what they map",
            |it| f64::from(u8::from(it.adopting)),
        );
        let full = groups
            .iter()
            .map(|group| (labels_of_group(group), group.pages_store_full as f64));
        self.counter(
            "group_store_full_pages",
            "Pages that did not get into the store for want of room",
            full,
        );
    }

    fn of_vms(&mut self, vms: &[VmStatus]) {
        let mut of_vms = |name: &str, help: &str, value: fn(&VmStatus) -> f64| {
            let samples = vms.iter().map(|vm| (labels_of(vm), value(vm)));
            self.gauge(name, help, samples);
        };
        of_vms("vm_connected", "1 while its engine is connected", |it| {
            f64::from(u8::from(it.connected))
        });
        of_vms("vm_paused", "1 while the operator has paused it", |it| {
            f64::from(u8::from(it.paused))
        });
        of_vms(
            "vm_guest_attached",
            "1 while a guest module is attached",
            |it| f64::from(u8::from(it.engine.guest_attached)),
        );
        of_vms(
            "vm_disabled",
            "1 while its engine says that it cannot share",
            // Of one that says nothing this is not known.
            |it| f64::from(u8::from(it.connected && it.engine.disabled.is_some())),
        );
        of_vms(
            "vm_memory_bytes",
            "Guest memory that the engine knows",
            |it| it.engine.memory_bytes as f64,
        );
        of_vms("vm_shared_bytes", "Guest memory on canonical pages", |it| {
            bytes(it.engine.pages_shared)
        });
        of_vms(
            "vm_broken_bytes",
            "Guest memory that was, and was written since",
            |it| bytes(it.engine.pages_broken),
        );
        of_vms(
            "vm_granted_bytes",
            "Canonical pages that it may map",
            |it| bytes(it.pages_granted),
        );
        of_vms(
            "vm_published_bytes",
            "Canonical pages that it has put into the store",
            |it| bytes(it.pages_published),
        );
        of_vms("vm_overlays", "Runs on canonical pages", |it| {
            it.engine.overlays as f64
        });
        of_vms("vm_mappings", "Mappings of its process", |it| {
            it.engine.mappings as f64
        });
        of_vms("vm_mappings_limit", "Most mappings of its process", |it| {
            it.engine.mappings_limit as f64
        });
    }

    fn of_engines(&mut self, vms: &[VmStatus]) {
        let mut of_vms = |name: &str, help: &str, value: fn(&VmStatus) -> f64| {
            let samples = vms.iter().map(|vm| (labels_of(vm), value(vm)));
            self.counter(name, help, samples);
        };
        of_vms(
            "vm_reported_pages",
            "Pages that the guest has reported",
            |it| it.engine.pages_reported as f64,
        );
        of_vms(
            "vm_remembered_pages",
            "Pages noted because nobody else had them",
            |it| it.engine.pages_remembered as f64,
        );
        of_vms(
            "vm_spared_pages",
            "Pages not shared for the sake of huge pages",
            |it| it.engine.pages_spared as f64,
        );
        of_vms(
            "vm_limited_pages",
            "Pages that a limit has kept from it",
            |it| it.pages_limited as f64,
        );
        of_vms(
            "vm_guest_errors",
            "Records of the guest that made no sense",
            |it| it.engine.guest_errors as f64,
        );
        of_vms(
            "vm_guest_passes",
            "Passes that the guest has told of",
            |it| it.engine.guest_passes as f64,
        );
        of_vms("vm_cpu_seconds", "CPU time of the engine", |it| {
            it.engine.cpu_seconds
        });
        let refused = vms.iter().flat_map(|vm| {
            vm.engine.refusals.iter().map(|(reason, &pages)| {
                let mut labels = labels_of(vm);
                labels.push(("reason", reason.clone()));
                (labels, pages as f64)
            })
        });
        self.counter("vm_refused_pages", "Pages refused, by reason", refused);
    }
}

fn bytes(pages: u64) -> f64 {
    pages as f64 * PAGE as f64
}

/// A VM without a group has one label more, so that it is told from a group of its name.
fn labels_of_group(group: &GroupStatus) -> Labels {
    let mut labels = vec![("group", group.name.clone())];
    if group.vm.is_some() {
        labels.push(("vm", group.name.clone()));
    }
    labels
}

fn labels_of(vm: &VmStatus) -> Labels {
    vec![
        ("vm", vm.name.clone()),
        ("group", vm.group.clone().unwrap_or_default()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const DOCS: &str = include_str!("../../../docs/metrics.md");

    fn status() -> Status {
        let mut vm = VmStatus {
            name: "web".into(),
            group: Some("g".into()),
            pages_granted: 2,
            ..VmStatus::default()
        };
        vm.engine.refusals.insert("different".into(), 7);
        vm.engine.cpu_seconds = 1.5;
        Status {
            version: "1".into(),
            vms: vec![vm],
            groups: vec![GroupStatus {
                name: "g".into(),
                bytes_saved: -5,
                ..GroupStatus::default()
            }],
            ..Status::default()
        }
    }

    /// Names and types as they are given out.
    fn given() -> BTreeMap<String, String> {
        let text = text(&status()).unwrap();
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let name_and_type = |line: &str| {
            let (name, kind) = line.split_once(' ').unwrap();
            let ending = if kind == "counter" { "_total" } else { "" };
            (format!("{name}{ending}"), kind.to_owned())
        };
        types.map(name_and_type).collect()
    }

    #[test]
    fn every_metric_is_explained_and_every_explained_one_is_there() {
        let rows = DOCS
            .lines()
            .filter(|line| line.starts_with("| `pagefusion_"));
        let documented: BTreeMap<_, _> = rows
            .map(|row| {
                let mut cells = row.split('|').map(str::trim).skip(1);
                let name = cells.next().unwrap().trim_matches('`').to_owned();
                let kind = cells.next().unwrap().to_owned();
                let labels = cells.next().unwrap();
                let meaning = cells.next().unwrap();
                assert!(!labels.is_empty() && !meaning.is_empty(), "{row}");
                (name, kind)
            })
            .collect();
        assert_eq!(documented, given());
    }

    #[test]
    fn a_vm_without_a_group_is_not_the_group_of_its_name() {
        let mut status = status();
        status.groups[0].pages_store_full = 3;
        status.groups.push(GroupStatus {
            name: "g".into(),
            vm: Some(7),
            bytes_saved: 9,
            pages_store_full: 4,
            ..GroupStatus::default()
        });
        let text = text(&status).unwrap();
        for line in [
            "pagefusion_group_saved_bytes{group=\"g\"} -5.0",
            "pagefusion_group_saved_bytes{group=\"g\",vm=\"g\"} 9.0",
            "pagefusion_group_store_full_pages_total{group=\"g\"} 3.0",
            "pagefusion_group_store_full_pages_total{group=\"g\",vm=\"g\"} 4.0",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn of_an_engine_that_says_nothing_it_is_not_known_that_it_cannot_share() {
        let disabled = |connected: bool| {
            let mut status = status();
            status.vms[0].connected = connected;
            status.vms[0].engine.disabled = Some("why".into());
            let line = "pagefusion_vm_disabled{vm=\"web\",group=\"g\"} ";
            let text = text(&status).unwrap();
            text.lines()
                .find_map(|it| it.strip_prefix(line))
                .map(str::to_owned)
        };
        assert_eq!(disabled(true).as_deref(), Some("1.0"));
        assert_eq!(disabled(false).as_deref(), Some("0.0"));
    }

    #[test]
    fn values_and_labels_are_written_as_the_format_wants_them() {
        let text = text(&status()).unwrap();
        for line in [
            "pagefusion_group_saved_bytes{group=\"g\"} -5.0",
            "pagefusion_vm_granted_bytes{vm=\"web\",group=\"g\"} 8192.0",
            "pagefusion_vm_refused_pages_total{vm=\"web\",group=\"g\",reason=\"different\"} 7.0",
            "pagefusion_vm_cpu_seconds_total{vm=\"web\",group=\"g\"} 1.5",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
