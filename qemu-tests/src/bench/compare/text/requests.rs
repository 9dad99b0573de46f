//! How long requests took.

use super::{NONE, cell, finish, table};
use crate::{
    bench::compare::{
        conclusions::Spread,
        requests::{Latency, Phase, Served},
    },
    report::grouped,
};

/// So many requests have a 99.9th percentile.
const ENOUGH: u64 = 1000;

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
        "",
        "",
        "",
        "due a second",
        "50%, ms",
        "99%",
        "99%, to before",
        "99.9%",
        "requests",
        "runs",
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
                let phase_of =
                    |served, when| of(served).iter().find(|it: &&Latency| it.phase == when);
                let of_system: Vec<_> = all
                    .iter()
                    .filter(|served| served.system == system)
                    .collect();
                let runs: Vec<_> = of_system
                    .iter()
                    .filter_map(|served| phase_of(served, when))
                    .collect();
                if runs.is_empty() {
                    continue;
                }
                let spread = |value: &dyn Fn(&Latency) -> f64, digits: usize| {
                    let mut values: Vec<_> = runs.iter().map(|it| value(it)).collect();
                    cell(Spread::of(&mut values), |value| format!("{value:.digits$}"))
                };
                let milliseconds = |index: usize| spread(&|it| it.microseconds[index] / 1e3, 1);
                // Guests are not equally fast: each is best compared with itself.
                let slower = of_system.iter().filter_map(|served| {
                    let before = phase_of(served, Phase::Before)?;
                    Some(phase_of(served, when)?.microseconds[1] / before.microseconds[1])
                });
                let slower = Spread::of(&mut slower.collect::<Vec<_>>());
                // Of fewer it is the longest.
                let enough = runs.iter().all(|it| it.requests >= ENOUGH);
                let last = if enough {
                    milliseconds(2)
                } else {
                    NONE.to_owned()
                };
                table.add_row([
                    service.to_owned(),
                    phase(when).to_owned(),
                    system.name().to_owned(),
                    spread(&|it| it.requests as f64 / it.seconds, 0),
                    milliseconds(0),
                    milliseconds(1),
                    cell(slower, |value| format!("{value:.2}")),
                    last,
                    grouped(runs.iter().map(|it| it.requests).sum()),
                    runs.len().to_string(),
                ]);
            }
        }
    }
    finish(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::compare::systems::System;

    #[test]
    fn a_row_is_beside_its_own_before_and_shows_no_percentile_of_too_few() {
        let latency = |phase, requests, p99| Latency {
            phase,
            requests,
            seconds: 10.0,
            microseconds: [1e3, p99, 77e3],
        };
        let run = |p99| Served {
            pagefusion: None,
            system: System::Readonly,
            web: vec![
                latency(Phase::Before, 1000, 10e3),
                latency(Phase::Building, 999, p99),
            ],
            database: Vec::new(),
        };
        let text = served(&[run(20e3), run(40e3)]);
        let cells = |phase| -> Vec<&str> {
            let mut rows = text.lines().filter(|line| line.contains("nginx"));
            let row = rows.find(|line| line.contains(phase)).unwrap();
            row.split('|').map(str::trim).skip(6).take(4).collect()
        };
        let before = ["10.0 (10.0–10.0)", "1.00 (1.00–1.00)", "77.0 (77.0–77.0)"];
        assert_eq!(cells("before")[..3], before, "{text}");
        let shared = ["30.0 (20.0–40.0)", "3.00 (2.00–4.00)", NONE, "1,998"];
        assert_eq!(cells("while it is shared"), shared);
    }
}
