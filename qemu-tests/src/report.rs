//! The demo's result, for people and for programs.

use comfy_table::{Cell, CellAlignment, Color, Table, presets::UTF8_FULL_CONDENSED};
use serde::{Deserialize, Serialize};

/// Everything the demo found.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Report {
    /// Kind of host: `tcg`, `kvm-lab` or `kvm`.
    pub host: String,
    /// The guests' kernel.
    pub kernel: String,
    /// QEMU's version.
    pub qemu: String,
    /// Number of guests.
    pub vms: u64,
    /// Pages reported by all guests.
    pub pages_reported: u64,
    /// Guest pages mapped on the store.
    pub pages_shared: u64,
    /// Canonical pages they are mapped on.
    pub store_pages: u64,
    /// What our counters say the undo costs; the rise of the charge must agree with it.
    pub bytes_saved: i64,
    /// Metadata that stays when sharing is undone, and is not in `bytes_saved`.
    pub bytes_metadata_kept: i64,
    /// The memory cgroup's charge with sharing.
    pub charge_shared: u64,
    /// And without.
    pub charge_unshared: u64,
    /// Distinct frames with sharing.
    pub frames_shared: u64,
    /// And without.
    pub frames_unshared: u64,
    /// From the last module load to 95% of the final sharing.
    pub seconds_to_95_percent: f64,
    /// From the resumption after the undo until 95% of it was back.
    pub seconds_to_rebuild: f64,
    /// Comparisons made.
    pub integrity_checks: u64,
    /// Those that failed.
    pub integrity_errors: u64,
    /// Per guest.
    pub guests: Vec<GuestReport>,
}

/// One guest's line.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct GuestReport {
    /// Its name.
    pub name: String,
    /// Pages it reported.
    pub pages_reported: u64,
    /// Shared now.
    pub pages_shared: u64,
    /// Only it has them.
    pub pages_remembered: u64,
    /// Refused, for a reason.
    pub pages_refused: u64,
    /// Shared once, written to since.
    pub pages_broken: u64,
    /// From power-on to running services.
    pub seconds_to_services: f64,
}

impl Report {
    /// The table.
    pub fn table(&self) -> String {
        let mut guests = Table::new();
        guests.load_preset(UTF8_FULL_CONDENSED);
        guests.set_header([
            "guest",
            "reported",
            "shared",
            "only here",
            "refused",
            "broken",
            "ready after",
        ]);
        for guest in &self.guests {
            let pages = [
                guest.pages_reported,
                guest.pages_shared,
                guest.pages_remembered,
                guest.pages_refused,
                guest.pages_broken,
            ];
            let cells = std::iter::once(Cell::new(&guest.name))
                .chain(pages.map(|pages| Cell::new(grouped(pages))))
                .chain([Cell::new(format!("{:.1} s", guest.seconds_to_services))]);
            guests.add_row(cells);
        }
        align_right(&mut guests);

        let mut host = Table::new();
        host.load_preset(UTF8_FULL_CONDENSED);
        host.set_header(["host memory", "with sharing", "without", "saved"]);
        let charge = self.charge_unshared as i64 - self.charge_shared as i64;
        let row = |name: &str, with: u64, without: u64| {
            let saved = without as i64 - with as i64;
            let colour = if saved > 0 { Color::Green } else { Color::Red };
            [
                Cell::new(name),
                Cell::new(mib(with as i64)),
                Cell::new(mib(without as i64)),
                Cell::new(mib(saved)).fg(colour),
            ]
        };
        host.add_row(row(
            "memory cgroup's charge",
            self.charge_shared,
            self.charge_unshared,
        ));
        host.add_row(row(
            "distinct frames",
            self.frames_shared * 4096,
            self.frames_unshared * 4096,
        ));
        let agreement = (self.bytes_saved - charge) as f64 / charge as f64 * 100.0;
        host.add_row([
            "our own counters",
            "",
            "",
            &format!("{} ({agreement:+.2}%)", mib(self.bytes_saved)),
        ]);
        align_right(&mut host);

        let errors = match self.integrity_errors {
            0 => "none wrong".to_owned(),
            wrong => format!("{wrong} WRONG"),
        };
        format!(
            "{} guests on {}, kernel {}, QEMU {}\n\n{guests}\n\n{host}\n\n\
             {} guest pages on {} canonical ones\n\
             95% of that {:.1} s after the last module was loaded; built again {:.1} s after the undo\n\
             {} of metadata, which an undo keeps, to be subtracted\n\
             {} integrity checks, {errors}\n",
            self.vms,
            self.host,
            self.kernel,
            self.qemu,
            grouped(self.pages_shared),
            grouped(self.store_pages),
            self.seconds_to_95_percent,
            self.seconds_to_rebuild,
            mib(self.bytes_metadata_kept),
            grouped(self.integrity_checks),
        )
    }
}

fn align_right(table: &mut Table) {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

fn mib(bytes: i64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// A number with a comma after every three digits.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn the_table_shows_what_matters() {
        let report = Report {
            host: "tcg".into(),
            vms: 2,
            pages_shared: 12_345,
            charge_shared: 100 << 20,
            charge_unshared: 150 << 20,
            bytes_saved: 49 << 20,
            integrity_checks: 7,
            guests: vec![GuestReport {
                name: "vm1".into(),
                pages_reported: 6133,
                ..GuestReport::default()
            }],
            ..Report::default()
        };
        let table = report.table();
        for text in [
            "vm1",
            "6,133",
            "12,345",
            "50.0 MiB",
            "49.0 MiB (-2.00%)",
            "7 integrity checks, none wrong",
        ] {
            assert!(table.contains(text), "{text} is not in\n{table}");
        }
        assert!(
            Report {
                integrity_errors: 3,
                ..report
            }
            .table()
            .contains("3 WRONG")
        );
    }

    #[test]
    fn the_promised_fields_are_there() {
        let json = serde_json::to_value(Report::default()).unwrap();
        for field in [
            "host",
            "kernel",
            "qemu",
            "vms",
            "pages_reported",
            "pages_shared",
            "bytes_saved",
            "charge_shared",
            "charge_unshared",
            "frames_shared",
            "frames_unshared",
            "seconds_to_95_percent",
            "integrity_checks",
            "integrity_errors",
        ] {
            assert!(json.get(field).is_some(), "{field}");
        }
    }
}
