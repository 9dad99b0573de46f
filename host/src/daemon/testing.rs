// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What unit tests of the daemon begin with.

use super::registry::{Caller, Registry};
use super::runtime::Runtime;
use tempfile::TempDir;

/// Directories of a daemon, which outlast it.
pub(super) struct Place(TempDir);

impl Place {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir_in("/dev/shm").unwrap())
    }

    /// What a daemon knows that begins here.
    pub(super) fn registry(&self) -> Registry {
        let of = |name| self.0.path().join(name);
        let runtime = Runtime::open(&of("run"), &of("store")).unwrap();
        Registry::adopt(runtime, None).unwrap()
    }
}

/// A process of our own that asks the daemon.
pub(super) fn caller(pid: u32) -> Caller {
    Caller {
        pid: pid as i32,
        uid: rustix::process::geteuid().as_raw(),
    }
}
