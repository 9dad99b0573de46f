// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whether the host is short of memory.

use std::fs;
use std::time::{Duration, Instant};

/// Between two looks.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);
/// Pressure has ended when there was none for so long.
const CALM: Duration = Duration::from_secs(60);

/// From when on the host is short of memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PressureThresholds {
    /// Percent of the last ten seconds in which somebody waited for memory (`some avg10` of
    /// `/proc/pressure/memory`).
    pub waiting: f64,
    /// Percent of the host's memory that is available, or less.
    pub available: f64,
}

impl Default for PressureThresholds {
    fn default() -> Self {
        Self {
            waiting: 5.0,
            available: 10.0,
        }
    }
}

/// Follows the pressure. It begins at once and ends late, so that a group does not go to and
/// fro.
#[derive(Debug)]
pub(super) struct Pressure {
    thresholds: PressureThresholds,
    last: Option<Instant>,
}

impl Pressure {
    pub(super) fn new(thresholds: PressureThresholds) -> Self {
        Self {
            thresholds,
            last: None,
        }
    }

    /// Looks at the host: whether it is short of memory.
    pub(super) fn look(&mut self) -> bool {
        let waiting = fs::read_to_string("/proc/pressure/memory");
        let waiting = waiting.ok().and_then(|text| parse_pressure(&text));
        let available = fs::read_to_string("/proc/meminfo");
        let available = available.ok().and_then(|text| parse_available(&text));
        self.judge(waiting, available, Instant::now())
    }

    fn judge(&mut self, waiting: Option<f64>, available: Option<f64>, now: Instant) -> bool {
        let short = waiting.is_some_and(|it| it >= self.thresholds.waiting)
            || available.is_some_and(|it| it <= self.thresholds.available);
        if short {
            self.last = Some(now);
        }
        self.last.is_some_and(|last| now - last < CALM)
    }
}

fn parse_pressure(text: &str) -> Option<f64> {
    let some = text.lines().find(|line| line.starts_with("some "))?;
    let average = some.split(' ').find_map(|it| it.strip_prefix("avg10="))?;
    average.parse().ok()
}

fn parse_available(text: &str) -> Option<f64> {
    let kibibytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok()
    };
    Some(kibibytes("MemAvailable:")? / kibibytes("MemTotal:")? * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let text = "some avg10=2.50 avg60=1.00 avg300=0.10 total=5\nfull avg10=9.00 total=1\n";
        assert_eq!(parse_pressure(text), Some(2.5));
        let text = "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   250 kB\n";
        assert_eq!(parse_available(text), Some(25.0));
        assert_eq!((parse_pressure(""), parse_available("")), (None, None));
    }

    #[test]
    fn pressure_begins_at_once_and_ends_late() {
        let mut pressure = Pressure::new(PressureThresholds::default());
        let begin = Instant::now();
        let mut at = |seconds, waiting, available| {
            let now = begin + Duration::from_secs(seconds);
            pressure.judge(Some(waiting), Some(available), now)
        };
        assert!(!at(0, 4.9, 10.1));
        assert!(at(1, 5.0, 50.0));
        assert!(at(2, 0.0, 50.0));
        assert!(at(3, 0.0, 10.0));
        assert!(at(62, 0.0, 50.0));
        assert!(!at(63, 0.0, 50.0));
    }
}
