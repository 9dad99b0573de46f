//! Waits until sharing has found what there is to find.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::{interrupt, world::World};

/// Sharing has settled when it has not changed over this many full passes of every guest.
const QUIET_PASSES: u64 = 3;
/// A running system maps and unmaps files: changes up to this fraction are its own.
const TOLERANCE: f64 = 0.002;
/// How often the counters are looked at; they have no event.
const INTERVAL: Duration = Duration::from_millis(250);

/// How sharing grew.
#[derive(Clone, Debug, Default)]
pub struct Growth {
    samples: Vec<(Duration, u64)>,
}

impl Growth {
    fn add(&mut self, at: Duration, pages: u64) {
        self.samples.push((at, pages));
    }

    /// The pages shared at the end.
    pub fn last(&self) -> u64 {
        self.samples.last().map_or(0, |(_, pages)| *pages)
    }

    /// When it reached `fraction` of its end.
    pub fn time_to(&self, fraction: f64) -> Option<Duration> {
        let wanted = self.last() as f64 * fraction;
        self.samples
            .iter()
            .find(|(_, pages)| *pages as f64 >= wanted && *pages > 0)
            .map(|(at, _)| *at)
    }
}

/// Waits until sharing has settled. Times count from `start`.
pub fn settle(world: &mut World, start: Instant) -> Result<Growth> {
    let deadline = Instant::now() + world.limits.settle;
    let mut growth = Growth::default();
    let mut quiet = Quiet::default();
    loop {
        interrupt::check()?;
        world.healthy()?;
        let status = world.status()?;
        growth.add(start.elapsed(), status.pages_shared);
        let mut passes = Vec::new();
        for guest in &mut world.guests {
            passes.push(guest.counter("full_scans")?);
        }
        if quiet.settled(status.pages_shared, &passes) {
            return Ok(growth);
        }
        if Instant::now() >= deadline {
            bail!(
                "sharing did not settle: {} pages shared, full passes {passes:?}\n{}",
                status.pages_shared,
                world.account()
            );
        }
        thread::sleep(INTERVAL);
    }
}

/// Waits until most of a file that the first two guests hold mapped is the same memory of the
/// host, whatever anybody's counters say.
pub fn same_memory(world: &mut World, path: &str) -> Result<()> {
    let deadline = Instant::now() + world.limits.settle;
    loop {
        interrupt::check()?;
        world.healthy()?;
        let (first, second) = world.pair()?;
        let (first, second) = (first.host_frames(path)?, second.host_frames(path)?);
        let same = first
            .iter()
            .zip(&second)
            .filter(|(a, b)| a == b && **a != 0);
        let (same, all) = (same.count(), first.len());
        if same >= all * 6 / 10 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!(
                "{path}: {same} of {all} pages are the same memory in two guests\n{}",
                world.account()
            );
        }
        thread::sleep(INTERVAL);
    }
}

/// Since when nothing has changed.
#[derive(Debug, Default)]
struct Quiet {
    pages: u64,
    passes: Vec<u64>,
}

impl Quiet {
    fn settled(&mut self, pages: u64, passes: &[u64]) -> bool {
        let allowed = self.pages as f64 * TOLERANCE;
        if self.passes.len() != passes.len() || pages.abs_diff(self.pages) as f64 > allowed {
            self.pages = pages;
            self.passes = passes.to_vec();
            return false;
        }
        passes
            .iter()
            .zip(&self.passes)
            .all(|(now, then)| *now >= then + QUIET_PASSES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_must_have_passed_without_a_change() {
        let mut quiet = Quiet::default();
        assert!(!quiet.settled(1000, &[1, 1]));
        assert!(!quiet.settled(1000, &[9, 3]));
        assert!(
            !quiet.settled(2000, &[9, 9]),
            "a change starts the count again"
        );
        assert!(
            !quiet.settled(2001, &[12, 11]),
            "a small change does not, and one guest is not there yet"
        );
        assert!(quiet.settled(2001, &[12, 12]));
    }

    #[test]
    fn a_slow_drift_is_a_change() {
        let mut quiet = Quiet::default();
        quiet.settled(1000, &[0]);
        assert!(!quiet.settled(1002, &[2]));
        assert!(
            !quiet.settled(1004, &[3]),
            "compared with where the quiet began, not with the last look"
        );
    }

    #[test]
    fn the_time_to_a_fraction_is_that_of_the_first_sample_there() {
        let at = Duration::from_secs;
        let growth = Growth {
            samples: vec![(at(1), 0), (at(2), 50), (at(3), 96), (at(9), 100)],
        };
        assert_eq!(growth.time_to(0.95), Some(at(3)));
        assert_eq!(
            Growth {
                samples: vec![(at(1), 0)]
            }
            .time_to(0.95),
            None
        );
    }
}
