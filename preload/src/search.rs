// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Where guest memory is in a QEMU without KVM, which tells nobody: its monitor is asked, again
//! when the guest speaks of memory that is not known.

#![expect(unsafe_code, reason = "tells the engine where guest memory is")]

use std::path::Path;
use std::time::{Duration, Instant};

use pagefusion_host::engine::{Region, Sharing};

use crate::qmp;
use crate::runtime::Runtime;

/// Between two questions that brought something new.
const SHORTEST: Duration = Duration::from_secs(1);
/// A guest may speak of memory that does not exist.
const LONGEST: Duration = Duration::from_secs(64);

/// When to ask.
#[derive(Debug)]
pub(crate) struct Search {
    asked: Option<Instant>,
    pause: Duration,
    /// Pages reported outside of known memory when it was last asked.
    outside: u64,
}

impl Search {
    pub(crate) fn new() -> Self {
        Self {
            asked: None,
            pause: SHORTEST,
            outside: 0,
        }
    }

    /// Whether to ask now, `outside` pages having been reported that are not known.
    fn is_due(&mut self, now: Instant, outside: u64) -> bool {
        let due = match self.asked {
            None => true,
            Some(asked) => outside > self.outside && now >= asked + self.pause,
        };
        if due {
            self.asked = Some(now);
            self.outside = outside;
        }
        due
    }

    /// Whether it brought something new.
    fn note(&mut self, new: bool) {
        self.pause = if new {
            SHORTEST
        } else {
            LONGEST.min(self.pause * 2)
        };
    }

    /// Asks if it is time; whether memory was found that was not known before.
    pub(crate) fn ask(
        &mut self,
        socket: &Path,
        runtime: &Runtime,
        sharing: &Sharing,
        outside: u64,
    ) -> bool {
        if !self.is_due(Instant::now(), outside) {
            return false;
        }
        runtime.begin_search();
        let found = qmp::guest_memory(socket);
        let mut memory = sharing.memory();
        let unmapped = runtime.end_search(&memory);
        let new = match found {
            Ok(regions) => {
                let is_there = |region: &Region| {
                    let there = region.addresses();
                    unmapped
                        .iter()
                        .all(|it| it.end <= there.start || there.end <= it.start)
                };
                let there: Vec<Region> = regions.into_iter().filter(is_there).collect();
                // SAFETY: QEMU says that they are guest memory, and what it has unmapped since it was
                // asked is left out; while `memory` is locked it unmaps nothing. Its calls that
                // unmap, move or replace memory come by this library, which tells the engine before.
                unsafe { memory.set_regions(&there) }.unwrap_or_else(|e| {
                    log::error!("taking over guest memory: {e}");
                    false
                })
            }
            Err(e) => {
                log::warn!("{e}");
                // QEMU may be busy; the guest rings again.
                if memory.bytes() == 0 {
                    self.asked = None;
                }
                false
            }
        };
        self.note(new);
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_asked_at_first_and_when_something_is_unknown_but_not_all_the_time() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut search = Search::new();
        assert!(search.is_due(start, 5));
        search.note(true);
        assert!(!search.is_due(after(100), 5), "nothing is unknown");
        assert!(search.is_due(after(100), 6));
        search.note(false);
        // A guest that speaks of nonsense waits longer and longer.
        let mut asked = 0;
        for second in 101..1000 {
            if search.is_due(after(second), second) {
                search.note(false);
                asked += 1;
            }
        }
        assert!((5..20).contains(&asked), "asked {asked} times");
        search.note(true);
        assert!(search.is_due(after(2000), 3000));
        assert!(!search.is_due(after(2000), 3001));
        search.note(true);
        assert!(search.is_due(after(2001), 3002));
    }
}
