//! How mapped files lie in memory, and how cost grows with what is shared.

use std::collections::BTreeMap;

use comfy_table::Table;

use super::{MIB, cell, finish, table};
use crate::bench::compare::{
    conclusions::{Group, Spread, run_lengths},
    results::{Results, Run},
    systems::System,
    workloads::Workload,
};

/// How mapped files lie in memory, in percent of their pages.
pub(super) fn lengths(groups: &BTreeMap<(Workload, System), Group<'_>>) -> Table {
    let mut table = table(&[
        "pages in a run",
        "1",
        "2–3",
        "4–7",
        "8–15",
        "16–31",
        "32–63",
        "64 and more",
        "pages",
        "runs",
    ]);
    for (name, runs) in run_lengths(groups) {
        let pages = |lengths: &[u64]| lengths.iter().sum::<u64>() as f64;
        let spread = |value: &dyn Fn(&[u64]) -> f64| {
            let mut values: Vec<_> = runs.iter().map(|lengths| value(lengths)).collect();
            cell(Spread::of(&mut values), |value| format!("{value:.0}"))
        };
        let mut row = vec![name];
        for class in 0..7 {
            let last = if class == 6 { usize::MAX } else { class };
            row.push(spread(&|lengths| {
                let of_class = lengths.iter().enumerate();
                let of_class = of_class.filter(|(at, _)| (class..=last).contains(at));
                of_class.map(|(_, pages)| *pages).sum::<u64>() as f64 / pages(lengths) * 100.0
            }));
        }
        row.push(spread(&|lengths| pages(lengths)));
        row.push(runs.len().to_string());
        table.add_row(row);
    }
    table
}

pub(super) fn growth(results: &Results) -> String {
    let mut table = table(&[
        "pagefusion, `readonly`",
        "pages in a run",
        "saved, MiB",
        "99% after, s",
        "µs for each page",
        "host's CPU, µs for each page",
        "metadata, % of saved",
        "of mapped files",
        "runs",
    ]);
    for ((workload, system), group) in results.groups() {
        if system != System::Readonly {
            continue;
        }
        let pages = |run: &Run| run.bytes() / 4096.0;
        table.add_row([
            workload.to_string(),
            cell(
                group.spread(|run| {
                    let folios = run.folios?;
                    Some(folios.pages as f64 / folios.runs as f64)
                }),
                |value| format!("{value:.1}"),
            ),
            cell(group.spread(|run| Some(run.bytes() / MIB)), |value| {
                format!("{value:.0}")
            }),
            cell(
                group.spread(|run| run.seconds_to.map(|to| to[2])),
                |value| format!("{value:.2}"),
            ),
            cell(
                group.spread(|run| run.seconds_to.map(|to| to[2] * 1e6 / pages(run))),
                |value| format!("{value:.1}"),
            ),
            cell(
                group.spread(|run| Some(run.host_seconds_to_99 * 1e6 / pages(run))),
                |value| format!("{value:.1}"),
            ),
            cell(
                group.spread(|run| Some(run.overhead() / run.bytes() * 100.0)),
                |value| format!("{value:.1}"),
            ),
            cell(
                group.spread(|run| Some(run.oracle?.mapped.share() * 100.0)),
                |value| format!("{value:.1}%"),
            ),
            group.runs.len().to_string(),
        ]);
    }
    if table.row_count() > 1 {
        finish(table)
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_pages_are_parts_of_all_pages() {
        let run = |lengths: &[&[u64]]| -> Run {
            let mut run = crate::bench::compare::conclusions::tests::run(
                Workload::Aged,
                System::Readonly,
                1.0,
                1.0,
            );
            run.run_lengths = lengths.iter().map(|lengths| lengths.to_vec()).collect();
            run
        };
        let results = Results {
            runs: vec![run(&[&[0, 0, 0, 100], &[25, 75]]), run(&[&[0, 100]])],
            ..Results::default()
        };
        let text = finish(lengths(&results.groups()));
        let row = |name: &str| text.lines().find(|line| line.contains(name)).unwrap();
        let cells = |name| -> Vec<&str> { row(name).split('|').map(str::trim).collect() };
        let before = cells("2 Debian guests that have worked for long, before");
        assert_eq!(
            before[2..6],
            ["0 (0–0)", "50 (0–100)", "0 (0–0)", "50 (0–100)"]
        );
        let after = cells("2 Debian guests that have worked for long ");
        assert_eq!(after[2..5], ["25", "75", "0"]);
        assert_eq!(after[9..11], ["100", "1"]);
    }
}
