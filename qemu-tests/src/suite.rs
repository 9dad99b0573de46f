//! Runs scenarios and says for each how it went.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{
    artifacts::Artifacts,
    interrupt, progress,
    scenarios::{self, Scenario, Skip, Stage, Tier},
    world::Host,
};

/// How one scenario went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it must.
    Passed,
    /// It did not.
    Failed(String),
    /// It could not run here.
    Skipped(String),
}

/// All verdicts so far.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Tally {
    /// Counts a verdict and prints its line.
    pub fn record(&mut self, host: &str, name: &str, verdict: &Verdict, took: Duration) {
        let text = match verdict {
            Verdict::Passed => {
                self.passed += 1;
                "ok".to_owned()
            }
            Verdict::Failed(reason) => {
                self.failed += 1;
                format!("FAILED: {reason}")
            }
            Verdict::Skipped(reason) => {
                self.skipped += 1;
                format!("skipped: {reason}")
            }
        };
        println!("{host}::{name} … {text} ({:.1} s)", took.as_secs_f64());
    }

    /// Whether nothing failed and something ran.
    pub fn good(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }

    /// The closing line.
    pub fn line(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

/// Which scenarios are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// Those that this tier includes.
    pub tier: Tier,
    /// If there are any: those whose name contains one of these, of whatever tier.
    pub filters: &'a [String],
    /// If it is there: these alone, and of these tiers.
    pub among: Option<&'a [(&'a str, Tier)]>,
}

impl Choice<'_> {
    fn wants(self, scenario: &Scenario) -> bool {
        let tier = match self.among {
            Some(among) => {
                let found = among.iter().find(|(name, _)| *name == scenario.name);
                found.map(|(_, tier)| *tier)
            }
            None => Some(scenario.tier),
        };
        tier.is_some_and(|tier| self.wants_called(scenario.name, tier))
    }

    /// Whether something of this name and tier is wanted.
    pub fn wants_called(self, name: &str, tier: Tier) -> bool {
        if self.filters.is_empty() {
            self.tier.includes(tier)
        } else {
            self.filters.iter().any(|filter| name.contains(filter))
        }
    }
}

/// Runs every scenario that is wanted; verdicts are those of what is called `on`.
pub fn run(
    on: &str,
    artifacts: &Artifacts,
    host: Host,
    choice: Choice<'_>,
    logs: Option<&Path>,
    tally: &mut Tally,
) -> Result<()> {
    let wanted = |scenario: &&Scenario| choice.wants(scenario);
    let mut stage: Option<Stage> = None;
    for scenario in scenarios::ALL.iter().filter(wanted) {
        interrupt::check()?;
        progress::now(scenario.name);
        if let Some(reason) = reason_to_skip(scenario.name, artifacts.debug) {
            let verdict = Verdict::Skipped(reason.to_owned());
            tally.record(on, scenario.name, &verdict, Duration::ZERO);
            continue;
        }
        let start = Instant::now();
        let result = match &mut stage {
            Some(stage) => stage.play(scenario),
            None => {
                Stage::new(artifacts, host, logs).and_then(|new| stage.insert(new).play(scenario))
            }
        };
        // Ctrl-C is nobody's failure.
        interrupt::check()?;
        let verdict = match result {
            Ok(()) => Verdict::Passed,
            Err(error) if error.is::<Skip>() => Verdict::Skipped(error.to_string()),
            Err(error) => {
                // Whatever it left behind must not fail the next one.
                stage = None;
                Verdict::Failed(format!("{error:#}"))
            }
        };
        tally.record(on, scenario.name, &verdict, start.elapsed());
    }
    if let Some(stage) = stage {
        let start = Instant::now();
        let verdict = stage.close().map_or_else(
            |error| Verdict::Failed(format!("{error:#}")),
            |()| Verdict::Passed,
        );
        tally.record(on, "everything_ends_cleanly", &verdict, start.elapsed());
    }
    Ok(())
}

/// Why a scenario is not played on this kernel.
fn reason_to_skip(name: &str, has_detectors: bool) -> Option<&'static str> {
    let found = scenarios::NOT_WITH_DETECTORS
        .iter()
        .find(|(not_played, _)| has_detectors && *not_played == name);
    found.map(|(_, reason)| *reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_counted() {
        let mut tally = Tally::default();
        assert!(!tally.good(), "nothing ran");
        let zero = Duration::ZERO;
        tally.record("tcg", "a", &Verdict::Passed, zero);
        tally.record("tcg", "b", &Verdict::Skipped("no".into()), zero);
        assert!(tally.good());
        tally.record("tcg", "c", &Verdict::Failed("why".into()), zero);
        assert!(!tally.good());
        assert_eq!(tally.line(), "1 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn a_tier_has_those_below_it_and_a_filter_reaches_all() {
        let scenario = |tier| Scenario {
            name: "a_name",
            tier,
            guests: 0,
            run: |_| Ok(()),
        };
        let words = |words: &[&str]| words.iter().map(|&it| it.to_owned()).collect::<Vec<_>>();
        let wants = |tier, filters: &[&str], of| {
            let filters = &words(filters);
            let among = None;
            Choice {
                tier,
                filters,
                among,
            }
            .wants(&scenario(of))
        };
        assert!(wants(Tier::Usual, &[], Tier::Smoke));
        assert!(wants(Tier::Usual, &[], Tier::Usual));
        assert!(!wants(Tier::Usual, &[], Tier::Deep));
        assert!(!wants(Tier::Deep, &[], Tier::Debug));
        assert!(wants(Tier::Debug, &[], Tier::Debug));
        assert!(wants(Tier::Debug, &[], Tier::Smoke));
        assert!(wants(Tier::Debug, &[], Tier::Usual));
        assert!(!wants(Tier::Debug, &[], Tier::Deep));
        assert!(wants(Tier::Smoke, &["other", "name"], Tier::Deep));
        assert!(!wants(Tier::Deep, &["other"], Tier::Smoke));
    }

    #[test]
    fn with_an_older_qemu_some_are_played_and_of_other_tiers() {
        let wanted = |tier, filters: &[String]| -> Vec<_> {
            let choice = Choice {
                tier,
                filters,
                among: Some(scenarios::WITH_AN_OLDER_QEMU),
            };
            let all = scenarios::ALL.iter();
            all.filter(|scenario| choice.wants(scenario))
                .map(|scenario| scenario.name)
                .collect()
        };
        assert_eq!(
            wanted(Tier::Usual, &[]),
            ["machines_of_every_kind_share"],
            "what every change waits for"
        );
        let named = scenarios::WITH_AN_OLDER_QEMU.iter().map(|(name, _)| *name);
        assert_eq!(wanted(Tier::Deep, &[]), named.collect::<Vec<_>>());
        assert_eq!(
            wanted(Tier::Smoke, &["share".into()]).len(),
            wanted(Tier::Deep, &[])
                .iter()
                .filter(|name| name.contains("share"))
                .count()
        );
        assert!(wanted(Tier::Deep, &["ten_thousand".into()]).is_empty());
    }

    #[test]
    fn what_is_left_out_with_detectors_exists_and_is_played_without() {
        for (name, reason) in scenarios::NOT_WITH_DETECTORS {
            assert!(scenarios::ALL.iter().any(|it| it.name == *name), "{name}");
            assert_eq!(reason_to_skip(name, true), Some(*reason));
            assert_eq!(reason_to_skip(name, false), None);
        }
        assert_eq!(reason_to_skip("two_guests_share", true), None);
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = scenarios::ALL
            .iter()
            .map(|scenario| scenario.name)
            .collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), scenarios::ALL.len());
    }
}
