//! How long requests took.

use super::{cell, finish, table};
use crate::{
    bench::compare::{
        conclusions::Spread,
        requests::{Latency, Phase, Served},
    },
    report::grouped,
};

/// One run of requests in one line.
pub(in super::super) fn served_line(served: &Served) -> String {
    let p99 = |of: &[Latency]| {
        let each = of
            .iter()
            .map(|it| format!("{} {:.1}", phase(it.phase), it.microseconds[1] / 1e3));
        each.collect::<Vec<_>>().join(", ")
    };
    format!(
        "99th percentile, ms: nginx {}; PostgreSQL {}",
        p99(&served.web),
        p99(&served.database)
    )
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Before => "before",
        Phase::Building => "while it is shared",
        Phase::Settled => "settled",
        Phase::Undoing => "while it is undone",
    }
}

pub(super) fn served(all: &[Served]) -> String {
    let mut table = table(&[
        "", "", "", "a second", "50%, ms", "99%", "99.9%", "requests", "runs",
    ]);
    let mut systems: Vec<_> = all.iter().map(|served| served.system).collect();
    systems.sort_unstable();
    systems.dedup();
    type Of = fn(&Served) -> &[Latency];
    let services: [(&str, Of); 2] = [
        ("nginx", |served| &served.web),
        ("PostgreSQL", |served| &served.database),
    ];
    for (service, of) in services {
        for when in [
            Phase::Before,
            Phase::Building,
            Phase::Settled,
            Phase::Undoing,
        ] {
            for &system in &systems {
                let runs: Vec<_> = all
                    .iter()
                    .filter(|served| served.system == system)
                    .filter_map(|served| of(served).iter().find(|it| it.phase == when))
                    .collect();
                if runs.is_empty() {
                    continue;
                }
                let spread = |value: &dyn Fn(&Latency) -> f64, digits: usize| {
                    let mut values: Vec<_> = runs.iter().map(|it| value(it)).collect();
                    cell(Spread::of(&mut values), |value| format!("{value:.digits$}"))
                };
                let milliseconds = |index: usize| spread(&|it| it.microseconds[index] / 1e3, 1);
                table.add_row([
                    service.to_owned(),
                    phase(when).to_owned(),
                    system.name().to_owned(),
                    spread(&|it| it.requests as f64 / it.seconds, 0),
                    milliseconds(0),
                    milliseconds(1),
                    milliseconds(2),
                    grouped(runs.iter().map(|it| it.requests).sum()),
                    runs.len().to_string(),
                ]);
            }
        }
    }
    finish(table)
}
