// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What goes wrong on the host, and is said seldom.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use pagefusion_abi::wire::reason;

use super::memory::Refusal;

/// How often something went wrong for one guest.
#[derive(Debug, Default)]
pub(super) struct HostErrors {
    times: AtomicU64,
}

impl HostErrors {
    /// What a guest is told of an error; the operator hears of it now and then.
    pub(super) fn refuse(&self, what: &str, error: &io::Error) -> Refusal {
        let times = self.times.fetch_add(1, Ordering::Relaxed) + 1;
        // Guests decide how often they come here.
        if times.is_power_of_two() {
            log::warn!("{what}: {error} ({times} such errors so far)");
        }
        reason::HOST_ERROR
    }
}
