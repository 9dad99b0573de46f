//! What to measure, as an operator says it.

use std::{path::PathBuf, time::Duration};

use super::{plan::Wanted, systems::System, workloads::Workload};

/// What to compare.
#[derive(Debug, clap::Args)]
pub struct Compare {
    /// What fits five minutes.
    #[arg(long)]
    quick: bool,
    /// Write the results to this file, after every run.
    #[arg(long)]
    pub(super) json: Option<PathBuf>,
    /// Go on with the results that are in that file.
    #[arg(long, requires = "json")]
    pub(super) add: bool,
    /// Two guests that map so many MiB of files each; may be given more than once.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(64..=65536))]
    files: Vec<u32>,
    /// So many Debian guests; may be given more than once.
    #[arg(long, value_name = "GUESTS", value_parser = clap::value_parser!(u32).range(2..=64))]
    boot: Vec<u32>,
    /// Two Debian guests of different images.
    #[arg(long)]
    mixed: bool,
    /// Two Debian guests, the second of an image made anew with the files of this package in place of its own; may be
    /// given more than once.
    #[arg(long, value_name = "DEB")]
    pub(super) apart: Vec<PathBuf>,
    /// Two Debian guests that have worked for long.
    #[arg(long)]
    aged: bool,
    /// How long requests to two Debian guests take.
    #[arg(long)]
    requests: bool,
    /// What a load does that changes what two Debian guests share.
    #[arg(long)]
    churn: bool,
    /// Who shares; may be given more than once.
    #[arg(long, value_enum)]
    system: Vec<System>,
    /// Runs of each.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// Seconds to look at each when no more comes.
    #[arg(long, value_name = "SECONDS")]
    rest: Option<u64>,
    /// Do not count instructions in guests.
    #[arg(long)]
    no_count: bool,
}

impl Compare {
    pub(super) fn wanted(&self) -> Wanted {
        let mut wanted = if self.quick {
            Wanted::quick()
        } else {
            Wanted::full()
        };
        let files = self.files.iter().map(|&mib| Workload::Files { mib });
        let boot = self.boot.iter().map(|&guests| Workload::Boot { guests });
        let mixed = self.mixed.then_some(Workload::Mixed);
        let apart = (!self.apart.is_empty()).then_some(Workload::Apart);
        let aged = self.aged.then_some(Workload::Aged);
        let workloads: Vec<_> = files
            .chain(boot)
            .chain(aged)
            .chain(mixed)
            .chain(apart)
            .collect();
        if self.requests || self.churn || !workloads.is_empty() {
            wanted.workloads = workloads;
            wanted.requests = self.requests;
            wanted.churn = self.churn;
        }
        if !self.system.is_empty() {
            wanted.systems.clone_from(&self.system);
        }
        wanted.runs = self.runs.unwrap_or(wanted.runs);
        wanted.rest = self.rest.map_or(wanted.rest, Duration::from_secs);
        wanted.counted &= !self.no_count;
        wanted
    }
}
