// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Keeps this process away from `vm.max_map_count`.

use std::fs;
use std::io::{self, BufRead};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Part of the limit that is left to the VMM itself.
const HEADROOM_DIVISOR: usize = 8;
const HEADROOM_LEAST: usize = 1024;

/// How many runs are let in between two looks at the clock.
const LOOK: u32 = 32;
/// After which the operator may have changed the limit, and the VMM its own mappings.
const OLD: Duration = Duration::from_secs(1);
/// While few mappings are added, a count is believed so long for each that there is: what guests
/// change now and then, all their life, must not cost a count each time.
const EACH: Duration = Duration::from_millis(3);

/// Counts mappings without reading `/proc` for each: adds the most a change can cause, and
/// counts truly when that sum comes near the limit, and now and then.
#[derive(Debug)]
pub struct MappingBudget {
    limit: usize,
    looked_at: Instant,
    counted: usize,
    counted_at: Instant,
    added: usize,
    asked: u32,
}

impl MappingBudget {
    /// Reads the kernel's limit and counts what is there.
    pub fn new() -> io::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            limit: limit_now()?,
            looked_at: now,
            counted: mappings_now()?,
            counted_at: now,
            added: 0,
            asked: 0,
        })
    }

    /// The kernel's limit.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The limit that overlays respect.
    pub fn usable(&self) -> usize {
        self.limit
            .saturating_sub(HEADROOM_LEAST.max(self.limit / HEADROOM_DIVISOR))
    }

    /// Whether a run of `pages` may cost `mappings` more. As the budget shrinks, only longer
    /// runs are let in, so that what is left saves most.
    pub(super) fn admits(&mut self, pages: usize, mappings: usize) -> bool {
        self.asked = (self.asked + 1) % LOOK;
        // Only when enough was added since for the truth to differ.
        let is_near =
            self.counted + self.added + mappings > self.usable() / 4 * 3 && self.has_added_many();
        if self.asked == 0 && self.looked_at.elapsed() > OLD {
            self.looked_at = Instant::now();
            self.limit = limit_now().unwrap_or(self.limit);
        }
        if is_near || (self.asked == 0 && self.counted_at.elapsed() > self.believed()) {
            self.recount();
        }
        let used = self.counted + self.added + mappings;
        let usable = self.usable();
        let shortest = match used {
            _ if used > usable => return false,
            _ if used > usable / 8 * 7 => 16,
            _ if used > usable / 4 * 3 => 4,
            _ => 1,
        };
        pages >= shortest
    }

    /// Whether `mappings` more leave the VMM its part.
    pub(super) fn has_room(&mut self, mappings: usize) -> bool {
        let fits = |this: &Self| this.counted + this.added + mappings <= this.usable();
        let is_old = self.counted_at.elapsed() > self.believed();
        if is_old || (!fits(self) && self.has_added_many()) {
            self.recount();
        }
        fits(self)
    }

    /// Notes that at most `mappings` were added.
    pub(super) fn add(&mut self, mappings: usize) {
        self.added += mappings;
    }

    fn has_added_many(&self) -> bool {
        self.added > self.limit / 64
    }

    /// How long a count is believed, as the VMM changes its own mappings.
    fn believed(&self) -> Duration {
        if self.has_added_many() {
            return OLD;
        }
        OLD.max(EACH * self.counted.try_into().unwrap_or(u32::MAX))
    }

    fn recount(&mut self) {
        if let Ok(now) = mappings_now() {
            self.counted = now;
            self.added = 0;
        }
        self.counted_at = Instant::now();
    }
}

fn limit_now() -> io::Result<usize> {
    let limit = fs::read_to_string("/proc/sys/vm/max_map_count")?;
    limit.trim().parse().map_err(io::Error::other)
}

/// Mappings of this process now.
pub fn mappings_now() -> io::Result<usize> {
    Ok(mappings_in(&[])?.all)
}

/// Mappings of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mappings {
    /// All of them.
    pub(super) all: usize,
    /// How many certain ranges are cut into, beyond one each.
    pub(super) added: usize,
}

/// Counts mappings, and those that overlap `ranges`, which are sorted and do not touch.
pub(super) fn mappings_in(ranges: &[Range<usize>]) -> io::Result<Mappings> {
    let mut mappings = Mappings::default();
    each_mapping(|mapping| {
        let next = ranges.partition_point(|range| range.end <= mapping.start);
        let inside = ranges
            .get(next)
            .is_some_and(|range| range.start < mapping.end);
        mappings.all += 1;
        mappings.added += usize::from(inside);
    })?;
    mappings.added = mappings.added.saturating_sub(ranges.len());
    Ok(mappings)
}

fn each_mapping(mut each: impl FnMut(Range<usize>)) -> io::Result<()> {
    let file = fs::File::open("/proc/self/maps")?;
    let mut reader = io::BufReader::with_capacity(1 << 16, file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        let address = |text: &str| usize::from_str_radix(text, 16).ok();
        let range = text
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        if let Some((Some(start), Some(end))) = range.map(|(s, e)| (address(s), address(e))) {
            each(start..end);
        }
        line.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_of_many_is_believed_longer_until_many_were_added() {
        let mut budget = MappingBudget {
            limit: 65_530,
            counted: 20_000,
            ..MappingBudget::new().unwrap()
        };
        assert_eq!(budget.believed(), Duration::from_secs(60));
        budget.add(65_530 / 64 + 1);
        assert_eq!(budget.believed(), OLD);
        (budget.counted, budget.added) = (100, 0);
        assert_eq!(budget.believed(), OLD);
    }
}
