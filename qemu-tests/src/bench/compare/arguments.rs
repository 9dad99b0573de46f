//! What to measure, as an operator says it.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use super::{plan::Wanted, systems::System, workloads::Workload};
use crate::{guest::Accelerator, world::Host};

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
    pub(super) fn wanted(&self, host: Host) -> Wanted {
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
        // A guest of KVM's has no clock that counts.
        wanted.counted &= !self.no_count && host.accelerator != Accelerator::Kvm;
        wanted
    }

    /// What to measure, as arguments of a harness elsewhere.
    pub fn arguments(&self) -> Result<Vec<String>> {
        ensure!(self.apart.is_empty(), "packages are not on that host");
        let mut arguments = Vec::new();
        for (name, chosen) in [
            ("--quick", self.quick),
            ("--mixed", self.mixed),
            ("--aged", self.aged),
            ("--requests", self.requests),
            ("--churn", self.churn),
            ("--no-count", self.no_count),
        ] {
            arguments.extend(chosen.then(|| name.to_owned()));
        }
        let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        self.files
            .iter()
            .for_each(|it| add("--files", it.to_string()));
        self.boot
            .iter()
            .for_each(|it| add("--boot", it.to_string()));
        for system in &self.system {
            let value = system
                .to_possible_value()
                .context("a system without a name")?;
            add("--system", value.get_name().to_owned());
        }
        self.runs
            .iter()
            .for_each(|it| add("--runs", it.to_string()));
        self.rest
            .iter()
            .for_each(|it| add("--rest", it.to_string()));
        Ok(arguments)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Harness {
        #[command(flatten)]
        compare: Compare,
    }

    #[test]
    fn a_harness_elsewhere_is_asked_for_the_same() {
        let asked = [
            "--quick --files 64 --files 128 --boot 2 --mixed --aged --requests --churn",
            "--system readonly --system ksm-unlimited --runs 3 --rest 7 --no-count",
        ];
        let parse = |words: &mut dyn Iterator<Item = String>| {
            let program = std::iter::once("bench".to_owned());
            Harness::parse_from(program.chain(words)).compare
        };
        let compare = parse(&mut asked.join(" ").split(' ').map(str::to_owned));
        let again = parse(&mut compare.arguments().unwrap().into_iter());
        assert_eq!(format!("{again:?}"), format!("{compare:?}"));
        let apart = parse(&mut ["--apart", "a.deb"].map(str::to_owned).into_iter());
        assert!(apart.arguments().is_err());
    }
}
