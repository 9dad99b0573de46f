// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Why the daemon cannot start, each with what to do about it.

use std::io;
use std::path::PathBuf;

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The runtime directory cannot be made or written.
    #[error(
        "cannot use the runtime directory {}: {source}; \
         run as root or choose another with --runtime-dir", .path.display()
    )]
    RuntimeDirectory {
        /// What was tried.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// Socket addresses have 108 bytes.
    #[error(
        "the runtime directory {} has too long a path for the sockets in it; \
         choose one of at most {max} bytes with --runtime-dir", .path.display()
    )]
    PathTooLong {
        /// The directory.
        path: PathBuf,
        /// Longest path.
        max: usize,
    },
    /// Another daemon has the directory.
    #[error(
        "another pagefusiond uses {}; stop it first, or give this one a directory of its own",
        .path.display()
    )]
    AlreadyRunning {
        /// The directory.
        path: PathBuf,
    },
    /// The store directory cannot be made or written.
    #[error(
        "cannot use the store directory {}: {source}; it must be on a tmpfs that this user may \
         write, choose one with --store-dir", .path.display()
    )]
    StoreDirectory {
        /// What was tried.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// Others may have put something into a directory, or may still.
    #[error(
        "{} {found}, so that others may write what VMs share, or take its place: {cure}",
        .path.display()
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
        /// What to do about it.
        cure: String,
    },
    /// The store would be on a disk.
    #[error(
        "the store directory {} is not on a tmpfs, and a store on a disk cannot save memory; \
         choose one below /dev/shm or mount a tmpfs there: \
         mount -t tmpfs -o mode=700 tmpfs {}",
        .path.display(), .path.display()
    )]
    NotTmpfs {
        /// The directory.
        path: PathBuf,
    },
    /// Metrics cannot be given out there.
    #[error(
        "cannot listen on {address} for metrics: {source}; choose another address with --metrics"
    )]
    MetricsAddress {
        /// What was asked for.
        address: std::net::SocketAddr,
        /// What went wrong.
        source: io::Error,
    },
    /// The kernel refused something else.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What went wrong.
        source: io::Error,
    },
}

impl DaemonError {
    pub(super) fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}
