//! The bench's result, for people and for programs.

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, presets::UTF8_FULL_CONDENSED};
use serde::Serialize;

use super::{fit, measure::Measured};
use crate::{artifacts::Artifacts, report::grouped};

/// What a pass is taken to consist of: itself, pages in large folios, single pages, VMAs, processes.
const PARTS: usize = 5;

/// Everything the bench found.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// The guest's kernel.
    pub kernel: String,
    /// QEMU's version.
    pub qemu: String,
    /// A pass over a page in a large folio that was reported and is still there.
    pub instructions_per_unchanged_page_large: f64,
    /// The same of a single page that is contiguous with no other.
    pub instructions_per_unchanged_page_single: f64,
    /// A page in a large folio in the pass that reports it.
    pub instructions_per_new_page: f64,
    /// The same of a single page, each of which is a report of its own.
    pub instructions_per_new_page_single: f64,
    /// A VMA, whether or not it maps a file.
    pub instructions_per_vma: f64,
    /// A process, besides its VMAs.
    pub instructions_per_process: f64,
    /// A pass that finds nothing to look at.
    pub instructions_per_pass: f64,
    /// The longest time any process's mmap lock was held.
    pub longest_mmap_lock_hold_instructions: u64,
    /// Memory of the tracker for each page it tracks, where that is most.
    pub tracker_bytes_per_page: f64,
    /// How far the worst line is from the sum of these parts, as a fraction of it.
    pub worst_deviation: f64,
    /// What was measured.
    pub rows: Vec<Row>,
}

/// One load.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Mapped files.
    pub mib: u64,
    /// Processes that map them.
    pub processes: u64,
    /// Pages in one folio, on average.
    pub pages_per_folio: f64,
    /// Pages contiguous in memory, on average.
    pub pages_per_run: f64,
    /// Pages of these files.
    pub pages: u64,
    /// Address spaces visited.
    pub mms: u64,
    /// VMAs visited.
    pub vmas: u64,
    /// A pass without changes.
    pub instructions_unchanged: u64,
    /// The same by the sum of the parts.
    pub instructions_by_parts: f64,
    /// The pass that reported everything.
    pub instructions_first: u64,
    /// What it cost for each page.
    pub instructions_per_new_page: f64,
    /// Longest hold of an mmap lock.
    pub longest_mmap_lock_hold_instructions: u64,
    /// Memory of the tracker for each page.
    pub tracker_bytes_per_page: f64,
}

fn parts(measured: &Measured) -> [f64; PARTS] {
    let pages = measured.pages as f64;
    let (large, single) = if measured.load.singly {
        (0.0, pages)
    } else {
        (pages, 0.0)
    };
    [
        1.0,
        large,
        single,
        measured.vmas as f64,
        measured.mms as f64,
    ]
}

impl Table {
    pub(super) fn new(artifacts: &Artifacts, measured: &[Measured]) -> Result<Self> {
        let counts: Vec<_> = measured.iter().map(parts).collect();
        let totals: Vec<_> = measured.iter().map(|m| m.unchanged as f64).collect();
        let costs = fit::solve(&counts, &totals).context("the parts of a pass look all alike")?;
        let [pass, large, single, vma, process] = costs;
        let mut rows = Vec::new();
        for (measured, count) in measured.iter().zip(&counts) {
            let by_parts = count.iter().zip(costs).map(|(n, cost)| n * cost).sum();
            let page = if measured.load.singly { single } else { large };
            let news = measured.first.saturating_sub(measured.unchanged) as f64;
            rows.push(Row {
                mib: measured.load.mib,
                processes: measured.load.processes,
                pages_per_folio: measured.folios.pages as f64 / measured.folios.folios as f64,
                pages_per_run: measured.folios.pages as f64 / measured.folios.runs as f64,
                pages: measured.pages,
                mms: measured.mms,
                vmas: measured.vmas,
                instructions_unchanged: measured.unchanged,
                instructions_by_parts: by_parts,
                instructions_first: measured.first,
                instructions_per_new_page: news / measured.tracked as f64 + page,
                longest_mmap_lock_hold_instructions: measured.hold,
                tracker_bytes_per_page: measured.tracker_bytes as f64 / measured.tracked as f64,
            });
        }
        let deviation =
            |row: &Row| (row.instructions_unchanged as f64 / row.instructions_by_parts - 1.0).abs();
        // The largest load of a kind: what comes once for each pass or file weighs least there.
        let new_page = |singly: bool| {
            let of_kind = measured.iter().zip(&rows);
            of_kind
                .filter(|(measured, _)| measured.load.singly == singly)
                .max_by_key(|(measured, _)| measured.pages)
                .map_or(0.0, |(_, row)| row.instructions_per_new_page)
        };
        Ok(Self {
            kernel: artifacts.kernel_release.clone(),
            qemu: artifacts.qemu_version()?,
            instructions_per_unchanged_page_large: large,
            instructions_per_unchanged_page_single: single,
            instructions_per_new_page: new_page(false),
            instructions_per_new_page_single: new_page(true),
            instructions_per_vma: vma,
            instructions_per_process: process,
            instructions_per_pass: pass,
            longest_mmap_lock_hold_instructions: measured
                .iter()
                .map(|m| m.hold)
                .max()
                .unwrap_or_default(),
            tracker_bytes_per_page: rows
                .iter()
                .map(|row| row.tracker_bytes_per_page)
                .fold(0.0, f64::max),
            worst_deviation: rows.iter().map(deviation).fold(0.0, f64::max),
            rows,
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        format!(
            "kernel {}, QEMU {}\n\n{}\n\n{}\n\n{}\n",
            self.kernel,
            self.qemu,
            self.loads(),
            self.costs(),
            self.footer()
        )
    }

    fn loads(&self) -> comfy_table::Table {
        let mut table = comfy_table::Table::new();
        table.load_preset(UTF8_FULL_CONDENSED);
        table.set_header([
            "MiB",
            "processes",
            "VMAs",
            "pages/folio",
            "pages/run",
            "unchanged pass",
            "by parts",
            "new page",
            "lock held",
            "bytes/page",
        ]);
        for row in &self.rows {
            let deviation =
                row.instructions_unchanged as f64 / row.instructions_by_parts * 100.0 - 100.0;
            let cells = [
                row.mib.to_string(),
                row.processes.to_string(),
                grouped(row.vmas),
                format!("{:.1}", row.pages_per_folio),
                format!("{:.1}", row.pages_per_run),
                grouped(row.instructions_unchanged),
                format!("{deviation:+.1}%"),
                format!("{:.0}", row.instructions_per_new_page),
                grouped(row.longest_mmap_lock_hold_instructions),
                format!("{:.2}", row.tracker_bytes_per_page),
            ];
            table.add_row(cells.map(right));
        }
        table
    }

    fn costs(&self) -> comfy_table::Table {
        let mut table = comfy_table::Table::new();
        table.load_preset(UTF8_FULL_CONDENSED);
        table.set_header(["instructions for", "", "at most"]);
        let costs = [
            (
                "an unchanged page in a large folio",
                self.instructions_per_unchanged_page_large,
                Some(40),
            ),
            (
                "an unchanged single page",
                self.instructions_per_unchanged_page_single,
                Some(120),
            ),
            (
                "a new page in a large folio",
                self.instructions_per_new_page,
                None,
            ),
            (
                "a new single page",
                self.instructions_per_new_page_single,
                None,
            ),
            ("a VMA", self.instructions_per_vma, Some(500)),
            ("a process", self.instructions_per_process, None),
            ("a pass", self.instructions_per_pass, None),
        ];
        for (what, cost, most) in costs {
            let most = most.map_or_else(String::new, grouped);
            table.add_row([Cell::new(what), right(format!("{cost:.1}")), right(most)]);
        }
        let hold = self.longest_mmap_lock_hold_instructions;
        table.add_row([
            Cell::new("the longest hold of an mmap lock"),
            right(grouped(hold)),
            right(grouped(20_000)),
        ]);
        table
    }

    fn footer(&self) -> String {
        format!(
            "Instructions of the module's thread as the guest's kernel counts its CPU time, the timer's interrupts\n\
             among them. The costs of a page, a VMA, a process and a pass are those whose sum comes nearest to all\n\
             unchanged passes (least squares of relative deviations); \"by parts\" is how far a pass is from that\n\
             sum, at most {:.1}%. New page: what the first pass took beyond an unchanged one, for each page tracked.",
            self.worst_deviation * 100.0
        )
    }
}

fn right(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}
