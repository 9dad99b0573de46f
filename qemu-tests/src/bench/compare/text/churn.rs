//! What became of sharing when guests changed what they share.

use super::{MIB, NONE, cell, finish, table};
use crate::bench::compare::{
    churn::{Change, Churned, Step},
    conclusions::Spread,
    oracle::{Class, Oracle},
    systems::System,
};

/// One run of changes in one line.
pub(in super::super) fn churned_line(churned: &Churned) -> String {
    let changes = churned.changes.iter().map(|change| {
        let share = change.oracle.mapped.share() * 100.0;
        format!(
            "{} {:.1} s, {:.2} s of the host's CPU, {share:.1}% of mapped files",
            step(change.step),
            change.seconds,
            change.host_seconds
        )
    });
    changes.collect::<Vec<_>>().join("; ")
}

fn step(step: Step) -> &'static str {
    match step {
        Step::Begin => "sharing begins",
        Step::Upgrade => "packages installed",
        Step::Compile => "compiled",
        Step::Drop => "caches dropped",
    }
}

pub(super) fn churned(all: &[Churned]) -> String {
    let mut table = table(&[
        "",
        "",
        "took, s",
        "host, s",
        "of mapped files",
        "of clean page cache",
        "of all memory",
        "shared, MiB",
        "runs",
    ]);
    let mut systems: Vec<_> = all.iter().map(|churned| churned.system).collect();
    systems.sort_unstable();
    systems.dedup();
    for which in Step::ALL {
        for &system in &systems {
            let changes: Vec<_> = all
                .iter()
                .filter(|churned| churned.system == system)
                .filter_map(|churned| churned.changes.iter().find(|it| it.step == which))
                .collect();
            let spread = |value: &dyn Fn(&Change) -> f64, digits: usize, unit: &str| {
                let mut values: Vec<_> = changes.iter().map(|it| value(it)).collect();
                cell(Spread::of(&mut values), |value| {
                    format!("{value:.digits$}{unit}")
                })
            };
            let quiet = system == System::Nothing;
            let unless = |not: bool, text: String| if not { NONE.to_owned() } else { text };
            let share = |class: fn(&Oracle) -> Class| {
                let share = spread(&|it| class(&it.oracle).share() * 100.0, 1, "%");
                unless(quiet, share)
            };
            table.add_row([
                step(which).to_owned(),
                system.name().to_owned(),
                unless(which == Step::Begin, spread(&|it| it.seconds, 1, "")),
                unless(quiet, spread(&|it| it.host_seconds, 2, "")),
                share(|oracle| oracle.mapped),
                share(|oracle| oracle.clean),
                share(|oracle| oracle.all),
                spread(&|it| it.oracle.all.shared as f64 * 4096.0 / MIB, 0, ""),
                changes.len().to_string(),
            ]);
        }
    }
    finish(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_of_one_step_under_one_system() {
        let run = |system, shared| {
            let class = Class {
                frames: 4096,
                shareable: 1024,
                shared,
                ..Class::default()
            };
            let change = Change {
                step: Step::Upgrade,
                seconds: 12.0,
                host_seconds: 1.5,
                oracle: Oracle {
                    all: class,
                    mapped: class,
                    ..Oracle::default()
                },
            };
            Churned {
                pagefusion: None,
                system,
                changes: vec![change],
            }
        };
        let all = [
            run(System::Readonly, 512),
            run(System::Nothing, 0),
            run(System::Readonly, 1024),
        ];
        let text = churned(&all);
        let rows: Vec<_> = text
            .lines()
            .filter(|line| line.contains("packages installed"))
            .collect();
        assert_eq!(rows.len(), 2, "{text}");
        assert!(
            rows[0].contains("nothing") && !rows[0].contains('%'),
            "{text}"
        );
        assert!(rows[1].contains("75.0% (50.0%–100.0%)"), "{text}");
        assert!(rows[1].contains(" 3 (2–4) "), "{text}");
    }
}
