//! What follows from runs: their medians and spread, and the ratios.

use std::collections::BTreeMap;

use super::{
    results::{Ratios, Results, Run},
    systems::System,
    workloads::Workload,
};

/// The runs of one system under one workload.
#[derive(Clone, Debug)]
pub(super) struct Group<'a> {
    pub(super) runs: Vec<&'a Run>,
    /// Instructions of the guests' module threads, one as one nanosecond.
    pub(super) instructions: Option<f64>,
    /// Such seconds in a second of theirs in emulation.
    pub(super) rate: Option<f64>,
}

impl Group<'_> {
    /// Median, least and most of what `value` says of each run.
    pub(super) fn spread(&self, value: impl Fn(&Run) -> Option<f64>) -> Option<Spread> {
        let mut values: Vec<_> = self.runs.iter().filter_map(|run| value(run)).collect();
        Spread::of(&mut values)
    }

    fn median(&self, value: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
        self.spread(value).map(|spread| spread.median)
    }

    /// Seconds until 99%; at least, where a run was given up.
    fn time(&self) -> Option<f64> {
        self.median(|run| match run.settled {
            true => run.seconds_to.map(|to| to[2]),
            false => Some(run.seconds),
        })
    }

    /// CPU seconds of host and guests for each GiB saved. Guests count in instructions where that is known.
    pub(super) fn cpu_per_gib(&self) -> Option<Spread> {
        self.spread(|run| {
            let guest = match self.instructions {
                Some(seconds) => seconds,
                None if run.guest_seconds == 0.0 => 0.0,
                None => return None,
            };
            Some((run.host_seconds_to_99 + guest) / run.gib())
        })
    }

    /// The host's part of it.
    pub(super) fn host_cpu_per_gib(&self) -> Option<Spread> {
        self.spread(|run| Some(run.host_seconds_to_99 / run.gib()))
    }

    /// What it costs when no more comes, as a fraction of one CPU.
    pub(super) fn rest(&self) -> Option<Spread> {
        self.spread(|run| {
            let rest = run.rest;
            let guests = match self.rate {
                Some(rate) => rest.guest_seconds * rate,
                None => rest.guest_seconds,
            };
            (rest.seconds > 0.0).then(|| (rest.host_seconds + guests) / rest.seconds)
        })
    }

    fn share(&self) -> Option<f64> {
        self.median(|run| Some(run.oracle?.mapped.share()))
    }
}

/// What several runs say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
    pub(super) runs: usize,
}

impl Spread {
    pub(super) fn of(values: &mut [f64]) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values {
            [] => return None,
            _ if values.len() % 2 == 0 => f64::midpoint(values[middle - 1], values[middle]),
            _ => values[middle],
        };
        Some(Self {
            median,
            least: values[0],
            most: values[values.len() - 1],
            runs: values.len(),
        })
    }
}

impl Results {
    /// All runs by workload and system.
    pub(super) fn groups(&self) -> BTreeMap<(Workload, System), Group<'_>> {
        let mut groups = BTreeMap::new();
        for run in self.runs.iter().filter(|run| !run.counted) {
            let rate = self.rate(run.workload, run.system);
            groups
                .entry((run.workload, run.system))
                .or_insert_with(|| Group {
                    runs: Vec::new(),
                    instructions: rate.and_then(|rate| {
                        Some(self.guest_seconds(run.workload, run.system, false)? * rate)
                    }),
                    rate,
                })
                .runs
                .push(run);
        }
        groups
    }

    fn guest_seconds(&self, workload: Workload, system: System, counted: bool) -> Option<f64> {
        let chosen = self.runs.iter().filter(|run| {
            run.counted == counted && run.workload == workload && run.system == system
        });
        let mut values: Vec<_> = chosen.map(|run| run.guest_seconds).collect();
        Spread::of(&mut values).map(|spread| spread.median)
    }

    /// How many instructions, one as one nanosecond, were in a second of emulation, under this workload where they
    /// were counted, else under the largest where they were.
    fn rate(&self, workload: Workload, system: System) -> Option<f64> {
        let counted = self.runs.iter().filter(|run| run.counted);
        let (here, elsewhere): (Vec<_>, Vec<_>) = counted
            .filter(|run| run.system == system || run.system == System::Readonly)
            .partition(|run| run.workload == workload && run.system == system);
        let chosen = here
            .first()
            .or(elsewhere.iter().max_by_key(|run| run.workload))?;
        let (workload, system) = (chosen.workload, chosen.system);
        let emulated = self.guest_seconds(workload, system, false)?;
        Some(self.guest_seconds(workload, system, true)? / emulated)
    }

    /// Works out the ratios.
    pub(super) fn conclude(&mut self) {
        let ratios = self.work_out();
        self.ratios = ratios;
    }

    fn work_out(&self) -> Ratios {
        let groups = self.groups();
        let keys = || groups.keys().map(|(workload, _)| *workload);
        // The largest of each kind at which the two that matter most were compared.
        let compared = |workload: &Workload| {
            [System::Readonly, System::KsmUnlimited]
                .iter()
                .all(|system| groups.contains_key(&(*workload, *system)))
        };
        let chosen = |wanted: fn(Workload) -> bool| {
            let mut all: Vec<_> = keys().filter(|workload| wanted(*workload)).collect();
            all.dedup();
            let best = all.iter().rev().find(|workload| compared(workload));
            best.or(all.last()).copied()
        };
        let a = chosen(|workload| matches!(workload, Workload::Files { .. }));
        let b = chosen(|workload| matches!(workload, Workload::Boot { .. }));
        let c = chosen(|workload| workload == Workload::Mixed);
        let group = |workload: Option<Workload>, system| groups.get(&(workload?, system));
        let over = |above: Option<f64>, below: Option<f64>| Some(above? / below?);
        let time = |system| group(a, system).and_then(Group::time);
        let cpu = |workload, system| {
            let spread = group(workload, system)?.cpu_per_gib()?;
            Some(spread.median)
        };
        let cpu_ratio = |workload| {
            over(
                cpu(workload, System::Readonly),
                cpu(workload, System::KsmUnlimited),
            )
        };
        let rest = |system| group(a, system)?.rest().map(|rest| rest.median);
        let share = |workload| group(workload, System::Readonly).and_then(Group::share);
        let per_page = |value: fn(&Run) -> Option<f64>| {
            let mut values = Vec::new();
            for ((workload, system), group) in &groups {
                if let (Workload::Files { .. }, System::Readonly) = (workload, system) {
                    let each = |run: &Run| Some(value(run)? / run.bytes());
                    values.extend(group.median(each));
                }
            }
            values.sort_by(f64::total_cmp);
            (values.len() > 1).then(|| values[values.len() - 1] / values[0])
        };
        Ratios {
            time_vs_ksm_shipped: over(time(System::KsmShipped), time(System::Readonly)),
            time_vs_ksm_unlimited: over(time(System::KsmUnlimited), time(System::Readonly)),
            cpu_vs_ksm_unlimited_a: cpu_ratio(a),
            cpu_vs_ksm_unlimited_b: cpu_ratio(b),
            settled_cpu_vs_ksm_shipped: over(rest(System::Readonly), rest(System::KsmShipped)),
            oracle_share_a: share(a),
            oracle_share_b: share(b),
            oracle_share_c: share(c),
            metadata_share_b: group(b, System::Readonly)
                .and_then(|group| group.median(|run| Some(run.overhead() / run.bytes()))),
            growth_per_page: per_page(|run| run.seconds_to.map(|to| to[2])),
            growth_cpu_per_page: per_page(|run| Some(run.host_seconds_to_99)),
        }
    }
}

/// How mapped files lay in guests' memory, for each workload and moment of it where that was looked at, whatever shared
/// it afterwards.
pub(super) fn run_lengths(
    groups: &BTreeMap<(Workload, System), Group<'_>>,
) -> Vec<(String, Vec<Vec<u64>>)> {
    let mut found: BTreeMap<(Workload, usize), Vec<Vec<u64>>> = BTreeMap::new();
    for ((workload, _), group) in groups {
        for run in &group.runs {
            for (moment, lengths) in run.run_lengths.iter().enumerate() {
                let all = found.entry((*workload, moment)).or_default();
                all.push(lengths.clone());
            }
        }
    }
    let named = found.into_iter().map(|((workload, moment), all)| {
        let name = match (workload, moment) {
            (Workload::Aged, 0) => format!("{workload}, before"),
            _ => workload.to_string(),
        };
        (name, all)
    });
    named.collect()
}

/// When `fraction` of the last value was reached first.
pub(super) fn time_to(series: &[(f64, i64)], last: i64, fraction: f64) -> Option<f64> {
    let wanted = last as f64 * fraction;
    let reached = series.iter().find(|(_, saved)| *saved as f64 >= wanted);
    (last > 0).then(|| reached.map(|(at, _)| *at)).flatten()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        bench::compare::{
            oracle::{Class, Oracle},
            results::Rest,
        },
        cgroup::Parts,
    };

    const A: Workload = Workload::Files { mib: 1024 };
    const B: Workload = Workload::Boot { guests: 2 };

    /// A run that saved 1 GiB: 99% after so many seconds, for so many CPU seconds of the host.
    pub(in super::super) fn run(
        workload: Workload,
        system: System,
        seconds: f64,
        host_seconds: f64,
    ) -> Run {
        Run {
            pagefusion: None,
            workload,
            packages: Vec::new(),
            system,
            counted: false,
            seconds_to: Some([seconds / 2.0, seconds * 0.9, seconds]),
            settled: true,
            seconds: seconds * 3.0,
            full_scans: 0,
            saved: 1 << 30,
            saved_by_undo: 1 << 30,
            host_seconds_to_99: host_seconds,
            host_seconds: host_seconds * 2.0,
            waited_seconds: 0.0,
            charged: [Parts::default(); 2],
            guest_seconds: 0.0,
            rest: Rest {
                seconds: 10.0,
                host_seconds: host_seconds / 10.0,
                guest_seconds: 0.0,
            },
            pages_reported: 0,
            metadata: 1 << 24,
            ksm_metadata: 0,
            heap: [0; 2],
            folios: None,
            run_lengths: Vec::new(),
            left: Vec::new(),
            oracle: None,
            series: Vec::new(),
        }
    }

    fn ratios(runs: Vec<Run>) -> Ratios {
        let mut results = Results {
            runs,
            ..Results::default()
        };
        results.conclude();
        results.ratios
    }

    #[test]
    fn the_time_to_a_part_is_when_it_was_reached_first() {
        let series = [
            (0.1, -5),
            (0.2, 50),
            (0.3, 98),
            (0.4, 99),
            (0.5, 97),
            (0.6, 100),
        ];
        assert_eq!(time_to(&series, 100, 0.5), Some(0.2));
        assert_eq!(time_to(&series, 100, 0.99), Some(0.4));
        assert_eq!(time_to(&series, 1000, 0.5), None, "never reached");
        assert_eq!(time_to(&series, 0, 0.99), None, "nothing was saved");
    }

    #[test]
    fn the_median_is_in_the_middle() {
        let spread = |values: &[f64]| Spread::of(&mut values.to_vec());
        let of = |median, least, most, runs| Spread {
            median,
            least,
            most,
            runs,
        };
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[5.0, 1.0, 2.0]), Some(of(2.0, 1.0, 5.0, 3)));
        assert_eq!(spread(&[4.0, 1.0]), Some(of(2.5, 1.0, 4.0, 2)));
    }

    #[test]
    fn times_are_compared_by_medians() {
        let ratios = ratios(vec![
            run(A, System::Readonly, 1.0, 1.0),
            run(A, System::Readonly, 2.0, 1.0),
            run(A, System::Readonly, 9.0, 1.0),
            run(A, System::KsmUnlimited, 10.0, 10.0),
            run(A, System::KsmShipped, 400.0, 8.0),
        ]);
        assert_eq!(ratios.time_vs_ksm_unlimited, Some(5.0));
        assert_eq!(ratios.time_vs_ksm_shipped, Some(200.0));
        assert_eq!(ratios.settled_cpu_vs_ksm_shipped, Some(0.125));
        assert_eq!(ratios.oracle_share_b, None);
    }

    #[test]
    fn a_run_that_was_given_up_took_as_long_as_it_was_looked_at() {
        let mut theirs = run(A, System::KsmShipped, 100.0, 8.0);
        (theirs.settled, theirs.seconds) = (false, 480.0);
        let ratios = ratios(vec![run(A, System::Readonly, 2.0, 1.0), theirs]);
        assert_eq!(ratios.time_vs_ksm_shipped, Some(240.0));
    }

    #[test]
    fn the_guests_count_in_instructions_where_these_were_counted() {
        let mut ours = run(A, System::Readonly, 1.0, 1.0);
        ours.guest_seconds = 8.0;
        let mut counted = ours.clone();
        (counted.counted, counted.guest_seconds) = (true, 0.5);
        let theirs = run(A, System::KsmUnlimited, 1.0, 10.0);
        let both = [ours.clone(), theirs.clone()];
        assert_eq!(
            ratios(both.to_vec()).cpu_vs_ksm_unlimited_a,
            None,
            "emulated time is nobody's"
        );
        let mut all = both.to_vec();
        all.push(counted);
        assert_eq!(ratios(all.clone()).cpu_vs_ksm_unlimited_a, Some(0.15));

        // Where they were not, by what an emulated second was elsewhere: a sixteenth.
        let mut boot = run(B, System::Readonly, 1.0, 0.5);
        boot.guest_seconds = 4.0;
        all.extend([boot, run(B, System::KsmUnlimited, 1.0, 10.0)]);
        assert_eq!(ratios(all).cpu_vs_ksm_unlimited_b, Some(0.075));
    }

    #[test]
    fn cpu_time_is_for_what_was_saved() {
        let ours = run(A, System::Readonly, 1.0, 1.0);
        let mut theirs = run(A, System::KsmUnlimited, 1.0, 10.0);
        theirs.saved *= 2;
        let ratios = ratios(vec![ours, theirs]);
        assert_eq!(ratios.cpu_vs_ksm_unlimited_a, Some(0.2));
    }

    #[test]
    fn growth_is_by_page_and_from_the_best_size_to_the_worst() {
        let of = |mib, seconds, host_seconds| {
            let mut run = run(
                Workload::Files { mib },
                System::Readonly,
                seconds,
                host_seconds,
            );
            run.saved = i64::from(mib) << 20;
            run
        };
        let ratios = ratios(vec![
            of(256, 0.5, 0.25),
            of(512, 0.75, 0.5),
            of(1024, 1.5, 1.5),
        ]);
        let close = |found: Option<f64>, wanted: f64| (found.unwrap() - wanted).abs() < 1e-9;
        assert!(close(ratios.growth_per_page, 4.0 / 3.0));
        assert!(close(ratios.growth_cpu_per_page, 1.5));
    }

    #[test]
    fn shares_are_of_what_could_be() {
        let mut b = run(B, System::Readonly, 1.0, 1.0);
        let mapped = Class {
            shareable: 200,
            shared: 199,
            ..Class::default()
        };
        b.oracle = Some(Oracle {
            mapped,
            ..Oracle::default()
        });
        let ratios = ratios(vec![b]);
        assert_eq!(ratios.oracle_share_b, Some(0.995));
        assert_eq!(ratios.metadata_share_b, Some(1.0 / 64.0));
    }

    #[test]
    fn the_promised_ratios_are_there() {
        let json = serde_json::to_value(Results::default()).unwrap();
        for name in [
            "time_vs_ksm_shipped",
            "time_vs_ksm_unlimited",
            "cpu_vs_ksm_unlimited_a",
            "cpu_vs_ksm_unlimited_b",
            "settled_cpu_vs_ksm_shipped",
            "oracle_share_a",
            "oracle_share_b",
            "oracle_share_c",
            "metadata_share_b",
            "growth_per_page",
        ] {
            assert!(json["ratios"].get(name).is_some(), "{name}");
        }
    }
}
