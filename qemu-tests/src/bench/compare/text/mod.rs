//! Results as tables, for a terminal and for the document.

mod churn;
mod growth;
mod left;
mod requests;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};

use self::{
    churn::churned,
    growth::{growth, lengths},
    left::left,
    requests::served,
};
pub(super) use self::{churn::churned_line, requests::served_line};
use super::{
    conclusions::{Group, Spread},
    oracle::{Class, Oracle},
    results::{Results, Run},
    systems::System,
};
use crate::report::grouped;

/// Between these lines a document has what [`insert`] writes.
const BEGIN: &str = "<!-- results: begin -->";
const END: &str = "<!-- results: end -->";
const MIB: f64 = (1 << 20) as f64;
/// Where there is nothing to say.
const NONE: &str = "–";

/// One run in one line.
pub(super) fn line(run: &Run) -> String {
    let time = run.seconds_to.map_or_else(
        || "nothing".to_owned(),
        |to| format!("99% after {:.2} s", to[2]),
    );
    let share = run.oracle.map_or_else(String::new, |oracle| {
        format!(", {:.1}% of mapped files", oracle.mapped.share() * 100.0)
    });
    format!(
        "{:.1} MiB saved, {time}, {:.3} s of the host's CPU, {:.3} s of the guests'{share}",
        run.bytes() / MIB,
        run.host_seconds_to_99,
        run.guest_seconds,
    )
}

/// The document with these results in it.
pub(super) fn insert(document: &str, results: &Results) -> Result<String> {
    let (before, rest) = document
        .split_once(BEGIN)
        .with_context(|| format!("the document has no {BEGIN}"))?;
    let (_, after) = rest
        .split_once(END)
        .with_context(|| format!("the document has no {END}"))?;
    Ok(format!(
        "{before}{BEGIN}\n\n{}\n{END}{after}",
        tables(results)
    ))
}

/// All tables.
pub(super) fn tables(results: &Results) -> String {
    let mut text = machine(results);
    text += "\n### Answers\n\n";
    text += &ratios(results);
    let groups = results.groups();
    let mut workloads: Vec<_> = groups.keys().map(|(workload, _)| *workload).collect();
    workloads.dedup();
    for workload in &workloads {
        let systems: Vec<_> = groups
            .iter()
            .filter(|((of, _), _)| of == workload)
            .map(|((_, system), group)| (*system, group))
            .collect();
        // One alone is a line of the growth.
        if systems.len() > 1 {
            text += &format!("\n### {workload}\n\n");
            text += &savings(&systems);
            text += "\n";
            text += &cpu(&systems);
            text += "\n";
            text += &classes(&systems);
        }
    }
    if !results.served.is_empty() {
        text += "\n### Requests to guests that share\n\n";
        text += &served(&results.served);
    }
    if !results.churned.is_empty() {
        text += "\n### When guests change what they share\n\n";
        text += &churned(&results.churned);
    }
    let left = left(&groups);
    if !left.is_empty() {
        text += "\n### When guests leave\n\n";
        text += &left;
    }
    let lengths = lengths(&groups);
    if lengths.row_count() > 1 {
        text += "\n### Runs of mapped files in a guest's memory\n\n";
        text += &finish(lengths);
    }
    let growth = growth(results);
    if !growth.is_empty() {
        text += "\n### Growth\n\n";
        text += &growth;
    }
    text
}

fn machine(results: &Results) -> String {
    let machine = &results.machine;
    format!(
        "{} CPUs ({}), {} MiB of memory, Linux {} with huge pages set to `{}`; guests under {}, \
         QEMU {}, kernel {}; pagefusion {}.\n",
        machine.cpus,
        machine.processor,
        grouped(machine.memory_mib),
        machine.kernel,
        machine.huge_pages,
        machine.accelerator,
        machine.qemu,
        machine.guest_kernel,
        versions(results),
    )
}

fn runs(count: u64) -> String {
    match count {
        1 => "1 run".to_owned(),
        count => format!("{} runs", grouped(count)),
    }
}

/// All versions that runs were made with, in the order of the first of each.
fn versions(results: &Results) -> String {
    let mut counts: Vec<(Option<&str>, u64)> = Vec::new();
    for version in results.versions() {
        match counts.iter_mut().find(|(known, _)| *known == version) {
            Some((_, count)) => *count += 1,
            None => counts.push((version, 1)),
        }
    }
    let each = counts.iter().map(|(version, count)| match version {
        Some(version) => format!("{version} ({})", runs(*count)),
        // The file's is that of the last of them.
        None => format!(
            "{} or before ({}, of which no version was noted)",
            results.machine.pagefusion,
            runs(*count)
        ),
    });
    each.collect::<Vec<_>>().join(", ")
}

fn ratios(results: &Results) -> String {
    let ratios = &results.ratios;
    let mut table = table(&["question", "ratio", "found", "target"]);
    let mut row = |question: &str, name: &str, value: Option<f64>, target: &str| {
        let value = value.map_or_else(|| NONE.to_owned(), significant);
        table.add_row([question, &format!("`{name}`"), &value, target]);
    };
    row(
        "(a) time to 99%, times as fast as KSM as shipped",
        "time_vs_ksm_shipped",
        ratios.time_vs_ksm_shipped,
        "≥ 200",
    );
    row(
        "(a) the same, KSM without limits",
        "time_vs_ksm_unlimited",
        ratios.time_vs_ksm_unlimited,
        "≥ 5",
    );
    row(
        "(a) CPU for each GiB saved, part of that of KSM without limits",
        "cpu_vs_ksm_unlimited_a",
        ratios.cpu_vs_ksm_unlimited_a,
        "≤ 0.125",
    );
    row(
        "(b) the same",
        "cpu_vs_ksm_unlimited_b",
        ratios.cpu_vs_ksm_unlimited_b,
        "≤ 0.1",
    );
    row(
        "(a) CPU when settled, part of that of KSM as shipped",
        "settled_cpu_vs_ksm_shipped",
        ratios.settled_cpu_vs_ksm_shipped,
        "≤ 0.02",
    );
    row(
        "(a) shared, of mapped read-only page cache that could be",
        "oracle_share_a",
        ratios.oracle_share_a,
        "≥ 0.99",
    );
    row(
        "(b) the same",
        "oracle_share_b",
        ratios.oracle_share_b,
        "≥ 0.99",
    );
    row(
        "(c) the same",
        "oracle_share_c",
        ratios.oracle_share_c,
        "≥ 0.97",
    );
    row(
        "(b) metadata, part of what is saved",
        "metadata_share_b",
        ratios.metadata_share_b,
        "≤ 0.03",
    );
    row(
        "time for each page, largest size to smallest",
        "growth_per_page",
        ratios.growth_per_page,
        "≤ 1.2",
    );
    row(
        "the host's CPU for each page, likewise",
        "growth_cpu_per_page",
        ratios.growth_cpu_per_page,
        "≤ 1.2",
    );
    finish(table)
}

type Systems<'a> = [(System, &'a Group<'a>)];

fn savings(systems: &Systems<'_>) -> String {
    let mut table = table(&[
        "",
        "saved, MiB",
        "by frames",
        "50% after, s",
        "90%",
        "99%",
        "of mapped files",
        "of clean page cache",
        "of all memory",
        "runs",
    ]);
    for (system, group) in systems {
        let oracle = |class: fn(&Oracle) -> Class| {
            let share = group.spread(|run| Some(class(run.oracle.as_ref()?).share() * 100.0));
            cell(share, |value| format!("{value:.1}%"))
        };
        let time = |index: usize| {
            let given_up = group.runs.iter().find(|run| !run.settled);
            match given_up {
                Some(run) => format!("not within {:.0}", run.seconds),
                None => cell(
                    group.spread(|run| run.seconds_to.map(|to| to[index])),
                    |value| format!("{value:.2}"),
                ),
            }
        };
        let quiet = *system == System::Nothing;
        let time = |index| if quiet { NONE.to_owned() } else { time(index) };
        table.add_row([
            system.name().to_owned(),
            cell(group.spread(|run| Some(run.bytes() / MIB)), |value| {
                format!("{value:.0}")
            }),
            cell(
                group.spread(|run| Some(run.oracle?.all.shared as f64 * 4096.0 / MIB)),
                |value| format!("{value:.0}"),
            ),
            time(0),
            time(1),
            time(2),
            oracle(|oracle| oracle.mapped),
            oracle(|oracle| oracle.clean),
            oracle(|oracle| oracle.all),
            group.runs.len().to_string(),
        ]);
    }
    finish(table)
}

fn cpu(systems: &Systems<'_>) -> String {
    let mut table = table(&[
        "",
        "host, s to 99%",
        "waited, s",
        "guests, s of instructions",
        "guests, s emulated",
        "s for each GiB",
        "settled, % of a CPU",
        "in so many s",
        "metadata, MiB",
        "of it the kernel's",
    ]);
    for (system, group) in systems {
        if *system == System::Nothing {
            continue;
        }
        let ours = system.scope().is_some();
        let guests = |text: String| if ours { text } else { NONE.to_owned() };
        table.add_row([
            system.name().to_owned(),
            cell(group.spread(|run| Some(run.host_seconds_to_99)), |value| {
                format!("{value:.2}")
            }),
            cell(group.spread(|run| Some(run.waited_seconds)), |value| {
                format!("{value:.2}")
            }),
            guests(
                group
                    .instructions
                    .map_or_else(|| NONE.to_owned(), |seconds| format!("{seconds:.3}")),
            ),
            guests(cell(group.spread(|run| Some(run.guest_seconds)), |value| {
                format!("{value:.2}")
            })),
            cell(group.cpu_per_gib(), |value| format!("{value:.2}")),
            cell(group.rest(), |value| format!("{:.3}", value * 100.0)),
            cell(group.spread(|run| Some(run.rest.seconds)), |value| {
                format!("{value:.0}")
            }),
            cell(group.spread(|run| Some(run.overhead() / MIB)), |value| {
                format!("{value:.1}")
            }),
            cell(
                group.spread(|run| Some(run.kernel_overhead() / MIB)),
                |value| format!("{value:.1}"),
            ),
        ]);
    }
    finish(table)
}

/// What could be shared, as found in the first run of ours, or of whoever there is.
fn classes(systems: &Systems<'_>) -> String {
    let of = |wanted: fn(&System) -> bool| {
        let mut chosen = systems.iter().filter(|(system, _)| wanted(system));
        chosen.find_map(|(system, group)| {
            let oracle = group.runs.iter().find_map(|run| run.oracle)?;
            Some((system, oracle))
        })
    };
    let found = of(|system| system.scope().is_some()).or_else(|| of(|_| true));
    let Some((system, oracle)) = found else {
        return String::new();
    };
    let shared = format!("shared, {}", system.name());
    let mut table = table(&[
        "could be shared, pages",
        "frames",
        "not needed",
        "of these, within a guest",
        "between guests",
        "frames of zeros",
        &shared,
    ]);
    // Most of it is free memory: it says something only where somebody shares there.
    let other = oracle.other.filter(|other| other.shared > 0);
    for (name, class) in [
        ("page cache in read-only mappings", Some(oracle.mapped)),
        ("all clean page cache", Some(oracle.clean)),
        ("memory of processes", Some(oracle.anonymous)),
        ("the rest: kernel, tmpfs, free memory", other),
        ("all memory", Some(oracle.all)),
    ] {
        let Some(class) = class else { continue };
        table.add_row([
            name.to_owned(),
            grouped(class.frames),
            grouped(class.shareable),
            grouped(class.within),
            grouped(class.shareable - class.within),
            grouped(class.zero),
            grouped(class.shared),
        ]);
    }
    finish(table)
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header(header);
    table
}

fn finish(mut table: Table) -> String {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{table}\n")
}

/// The median, and least and most where there are several.
fn cell(spread: Option<Spread>, show: impl Fn(f64) -> String) -> String {
    let Some(spread) = spread else {
        return NONE.to_owned();
    };
    let median = show(spread.median);
    if spread.runs == 1 {
        return median;
    }
    format!("{median} ({}–{})", show(spread.least), show(spread.most))
}

/// Three digits.
fn significant(value: f64) -> String {
    match value.abs() {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use crate::bench::compare::{conclusions::tests::run, plots, workloads::Workload};

    #[test]
    fn a_document_keeps_what_is_not_between_its_marks() {
        let document = format!("above\n{BEGIN}\nold\n{END}\nbelow\n");
        let new = insert(&document, &Results::default()).unwrap();
        assert!(new.starts_with("above\n") && new.ends_with("\nbelow\n"));
        assert!(!new.contains("old") && new.contains("`oracle_share_a`"));
        assert_eq!(insert(&new, &Results::default()).unwrap(), new);
        assert!(insert("no marks", &Results::default()).is_err());
    }

    #[test]
    fn all_versions_that_runs_were_made_with_are_named() {
        let made_with = |version: Option<&str>| {
            let workload = Workload::Boot { guests: 2 };
            let readonly = System::Readonly;
            let mut run = run(workload, readonly, 1.0, 1.0);
            run.pagefusion = version.map(str::to_owned);
            run
        };
        let mut results = Results {
            runs: [None, Some("new"), None, Some("newer"), Some("new")]
                .map(made_with)
                .to_vec(),
            ..Results::default()
        };
        results.machine.pagefusion = "old".to_owned();
        let all = "pagefusion old or before (2 runs, of which no version was noted), new (2 runs), newer (1 run).";
        let text = machine(&results);
        assert!(text.contains(all), "{text}");
    }

    #[test]
    fn several_runs_show_their_spread() {
        let show = |value: f64| format!("{value:.1}");
        assert_eq!(cell(Spread::of(&mut [2.0]), show), "2.0");
        assert_eq!(
            cell(Spread::of(&mut [3.0, 1.0, 2.0]), show),
            "2.0 (1.0–3.0)"
        );
        assert_eq!(cell(None, show), NONE);
    }

    #[test]
    fn what_is_shared_outside_of_files_and_processes_has_a_row() {
        let workload = Workload::Boot { guests: 2 };
        let mut run = run(workload, System::Readonly, 1.0, 1.0);
        let group = |run: &Run| {
            let results = Results {
                runs: vec![run.clone()],
                ..Results::default()
            };
            let groups = results.groups();
            classes(&[(System::Readonly, &groups[&(workload, System::Readonly)])])
        };
        let class = |shared| Class {
            frames: 4096,
            shareable: 900,
            within: 123,
            shared,
            ..Class::default()
        };
        let mut oracle = Oracle {
            all: class(300),
            mapped: class(200),
            ..Oracle::default()
        };
        run.oracle = Some(oracle);
        assert!(!group(&run).contains("the rest"), "older results");
        oracle.other = Some(class(0));
        run.oracle = Some(oracle);
        assert!(!group(&run).contains("the rest"), "nothing is shared there");
        oracle.other = Some(class(100));
        run.oracle = Some(oracle);
        let text = group(&run);
        let row = text.lines().find(|line| line.contains("the rest"));
        assert!(
            row.is_some_and(|row| row.contains(" 777 ") && row.ends_with(" 100 |")),
            "{text}"
        );
    }

    #[test]
    fn ratios_that_were_written_follow_from_the_runs_beside_them() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../docs/benchmarks/results.json");
        let written: Results = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let follow = super::super::read(&path).unwrap().ratios;
        let shown = |ratios| serde_json::to_value(ratios).unwrap();
        let (written, follow) = (shown(written.ratios), shown(follow));
        for (name, follows) in follow.as_object().unwrap() {
            let (follows, written) = (follows.as_f64(), written[name].as_f64());
            let same = match (follows, written) {
                (Some(follows), Some(written)) => (follows - written).abs() <= follows.abs() * 1e-9,
                other => other == (None, None),
            };
            assert!(same, "{name}: {written:?} is written, {follows:?} follows");
        }
    }

    /// The document and its plots are made of the results beside it.
    #[test]
    fn the_document_says_what_the_results_say() {
        let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        let results = super::super::read(&docs.join("benchmarks/results.json")).unwrap();
        let document = std::fs::read_to_string(docs.join("benchmarks.md")).unwrap();
        let made = insert(&document, &results).unwrap();
        let command = "`cargo xtask bench document` makes of docs/benchmarks/results.json";
        assert!(made == document, "docs/benchmarks.md is not what {command}");
        let drawn = tempfile::tempdir().unwrap();
        plots::draw(&results, drawn.path()).unwrap();
        let pictures = |directory: &std::path::Path| -> BTreeMap<_, _> {
            let entries = std::fs::read_dir(directory).unwrap();
            let paths = entries.map(|entry| entry.unwrap().path());
            let pictures = paths.filter(|path| path.extension() == Some("svg".as_ref()));
            let read = |path: std::path::PathBuf| {
                let name = path.file_name().unwrap().to_owned();
                (name, std::fs::read_to_string(path).unwrap())
            };
            pictures.map(read).collect()
        };
        let (there, drawn) = (pictures(&docs.join("benchmarks")), pictures(drawn.path()));
        assert!(
            there.keys().eq(drawn.keys()),
            "not the plots that {command}"
        );
        for (name, picture) in &drawn {
            assert!(there[name] == *picture, "{name:?} is not what {command}");
        }
    }
}
