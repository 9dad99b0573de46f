//! How much memory came back when guests left.

use std::collections::BTreeMap;

use super::{MIB, cell, finish, table};
use crate::bench::compare::{
    conclusions::Group, leave::Left, systems::System, workloads::Workload,
};

/// Nothing where nobody has looked.
pub(super) fn left(groups: &BTreeMap<(Workload, System), Group<'_>>) -> String {
    let mut table = table(&[
        "charged, MiB",
        "",
        "with all guests",
        "with one",
        "with none",
        "the store's part: with all",
        "with one",
        "with none",
        "runs",
    ]);
    for ((workload, system), group) in groups {
        let of = |guests: u32, value: fn(&Left) -> u64| {
            let spread = group.spread(|run| {
                let left = run.left.iter().find(|left| left.guests == guests)?;
                Some(value(left) as f64 / MIB)
            });
            cell(spread, |value| format!("{value:.0}"))
        };
        let runs = group.runs.iter().filter(|run| !run.left.is_empty()).count();
        if runs == 0 {
            continue;
        }
        let mut row = vec![workload.to_string(), system.name().to_owned()];
        for value in [|left: &Left| left.charge, |left: &Left| left.store] {
            row.extend([workload.guests(), 1, 0].map(|guests| of(guests, value)));
        }
        row.push(runs.to_string());
        table.add_row(row);
    }
    match table.row_count() {
        0 => String::new(),
        _ => finish(table),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::compare::{conclusions::tests::run, results::Results};

    #[test]
    fn rows_are_of_runs_in_which_guests_left() {
        let workload = Workload::Boot { guests: 4 };
        let mut results = Results {
            runs: vec![run(workload, System::Readonly, 1.0, 1.0)],
            ..Results::default()
        };
        assert_eq!(left(&results.groups()), "", "older results");
        let mut run = run(workload, System::Readonly, 1.0, 1.0);
        run.left = (0..=4)
            .rev()
            .map(|guests| Left {
                guests,
                charge: u64::from(guests * 100 + 10) << 20,
                store: u64::from(guests.min(1) * 50) << 20,
            })
            .collect();
        results.runs.push(run);
        let text = left(&results.groups());
        let row = text.lines().last().unwrap();
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        assert_eq!(cells[3..10], ["410", "110", "10", "50", "50", "0", "1"]);
    }
}
