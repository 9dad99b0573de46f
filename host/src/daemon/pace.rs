// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How fast a VM or a group may put pages into the store.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Least rate, bytes a second: a whole publication within a second.
pub(super) const SLOWEST: u64 = (crate::protocol::MAX_PUBLISH_PAGES * crate::store::PAGE) as u64;
/// What has not been used may be used later, for this long.
const BURST: Duration = Duration::from_secs(1);
/// Longest wait. Engines give up after five seconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// A rate, and when what was taken so far is paid for. What is beyond it waits; nothing is
/// lost unless the wait would be too long.
#[derive(Debug)]
pub(super) struct Pace {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rate: Option<u64>,
    paid_at: Instant,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                rate: None,
                // What was not used before counts as saved up.
                paid_at: Instant::now()
                    .checked_sub(BURST)
                    .unwrap_or_else(Instant::now),
            }),
        }
    }
}

impl Pace {
    /// Bytes a second; `None` is any.
    pub(super) fn set_rate(&self, rate: Option<u64>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.rate = rate.map(|rate| rate.max(SLOWEST));
    }

    /// Takes `bytes`, and says how long to wait first; `None` when that is too long.
    pub(super) fn take(&self, bytes: usize) -> Option<Duration> {
        self.take_at(bytes, Instant::now())
    }

    fn take_at(&self, bytes: usize, now: Instant) -> Option<Duration> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(rate) = state.rate else {
            return Some(Duration::ZERO);
        };
        let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let paid_at = state.paid_at.max(earliest) + cost;
        let wait = paid_at.saturating_duration_since(now);
        if wait > PATIENCE {
            return None;
        }
        state.paid_at = paid_at;
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_slow_never_waits_and_who_is_fast_is_held_to_the_rate() {
        let pace = Pace::default();
        let begin = Instant::now() + Duration::from_secs(10);
        assert_eq!(pace.take_at(usize::MAX / 2, begin), Some(Duration::ZERO));
        pace.set_rate(Some(SLOWEST));
        let all = SLOWEST as usize;
        // A second's worth was saved up.
        assert_eq!(pace.take_at(all, begin), Some(Duration::ZERO));
        assert_eq!(pace.take_at(all, begin), Some(Duration::from_secs(1)));
        assert_eq!(pace.take_at(all, begin), Some(Duration::from_secs(2)));
        // That is refused and costs nothing.
        assert_eq!(pace.take_at(all, begin), None);
        let later = begin + Duration::from_secs(2);
        assert_eq!(pace.take_at(all, later), Some(Duration::from_secs(1)));
        let idle = begin + Duration::from_secs(60);
        assert_eq!(pace.take_at(all, idle), Some(Duration::ZERO));
    }
}
