//! What can go wrong outside this program, each with its cause and its cure.
//!
//! Everything else travels as a plain [`anyhow::Error`]; these are the cases a
//! user can do something about, so each has a text that says what.

use std::{io, path::PathBuf};

use crate::space::human;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error(
        "no network: {host} cannot be reached ({detail})\n  \
         Everything fetched so far is kept. Check the connection (or the proxy in /etc/apt/apt.conf.d) and run the same command again."
    )]
    NoNetwork { host: String, detail: String },

    #[error(
        "not enough disk space: {what} needs {}, {} has {} free\n  \
         Free some space, or set PAGEFUSION_CACHE to a directory on a larger disk, and run the same command again.",
        human(*needed), place.display(), human(*free)
    )]
    DiskTooSmall {
        what: String,
        needed: u64,
        free: u64,
        place: PathBuf,
    },

    #[error(
        "the disk that holds {} became full while {what} was made\n  \
         What was half made has been removed. Free some space, or set PAGEFUSION_CACHE to a directory on a larger disk, and run the same command again.",
        place.display()
    )]
    DiskFull { what: String, place: PathBuf },

    #[error(
        "{package} has vanished from {mirror}, and nothing of the same series has taken its place\n  \
         Pin a series that the mirror still has: change xtask/src/kernel.rs or xtask/src/sets.rs, then run `cargo xtask pins`."
    )]
    Vanished { package: String, mirror: String },

    #[error(
        "the checksum of {file} is wrong: pinned {expected}, received {actual}\n  \
         The file was thrown away. A proxy or a broken mirror may have changed it: run the same command again; \
         if it stays, do not trust this network."
    )]
    Checksum {
        file: String,
        expected: String,
        actual: String,
    },

    #[error(
        "{set} was built by \"{wanted}\", but the tools are \"{found}\"\n  \
         Rust crate hashes depend on the very compiler. Renew the pins of kernel and tools together: `cargo xtask pins`."
    )]
    RustcDiffers {
        set: String,
        wanted: String,
        found: String,
    },

    #[error(
        "these packages are missing on this machine, and installing them takes root: {packages}\n  \
         Run this, then the same cargo command again:\n\n{command}\n"
    )]
    PackagesMissing { packages: String, command: String },

    #[error("{what} failed ({status}); the end of its output:\n{tail}\n  The whole output is in {}.", log.display())]
    Command {
        what: String,
        status: String,
        tail: String,
        log: PathBuf,
    },

    #[error(
        "interrupted; nothing half made is left behind, and the same command goes on where this one stopped"
    )]
    Interrupted,
}

/// True if `error` says, however deep, that the disk is full.
pub(crate) fn is_disk_full(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        if let Some(io) = cause.downcast_ref::<io::Error>() {
            return io.kind() == io::ErrorKind::StorageFull
                || io.raw_os_error() == Some(rustix::io::Errno::DQUOT.raw_os_error());
        }
        matches!(cause.downcast_ref::<Trouble>(), Some(Trouble::Command { tail, .. })
            if tail.contains("No space left on device") || tail.contains("Disk quota exceeded"))
    })
}
