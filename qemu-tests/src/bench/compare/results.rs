//! What was found.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{cgroup::Parts, protocol::FolioCount};

use super::{
    churn::Churned, leave::Left, oracle::Oracle, requests::Served, systems::System,
    workloads::Workload,
};

/// Everything a benchmark has found.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Results {
    /// Where.
    pub machine: Machine,
    /// What it comes to, once there is enough.
    #[serde(default)]
    pub ratios: Ratios,
    /// Every run, in the order in which they were made.
    pub runs: Vec<Run>,
    /// How long requests took, likewise.
    #[serde(default)]
    pub served: Vec<Served>,
    /// What a load did that changes what is shared, likewise.
    #[serde(default)]
    pub churned: Vec<Churned>,
}

/// Where it was measured.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub processor: String,
    /// How many of them.
    pub cpus: usize,
    /// Memory.
    pub memory_mib: u64,
    /// The host's kernel.
    pub kernel: String,
    /// `/sys/kernel/mm/transparent_hugepage/enabled`, the word in brackets.
    pub huge_pages: String,
    /// The guests' kernel.
    pub guest_kernel: String,
    /// QEMU's version.
    pub qemu: String,
    /// How guests' CPUs run.
    pub accelerator: String,
    /// Of what: the version of runs that name none themselves, or the last of several.
    pub pagefusion: String,
}

/// One run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Run {
    /// The version it was made with; runs of before this was noted have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pagefusion: Option<String>,
    /// What the guests did.
    pub workload: Workload,
    /// The packages of another version in the image of one of them, under that workload.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packages: Vec<String>,
    /// What shared their memory.
    pub system: System,
    /// The guests' clocks counted instructions: their CPU time is a count, and nothing else of this run means anything.
    #[serde(default)]
    pub counted: bool,
    /// Seconds from the start of sharing until 50, 90 and 99% of what was saved in the end; absent where nothing was
    /// saved.
    pub seconds_to: Option<[f64; 3]>,
    /// Whether the end was waited for, and not given up.
    pub settled: bool,
    /// Seconds until it was seen that no more comes.
    pub seconds: f64,
    /// Rounds of KSM until then.
    pub full_scans: u64,
    /// Bytes by which the charge was lower then than at the start.
    pub saved: i64,
    /// Bytes by which the charge rose when guests stood still and all sharing was undone.
    pub saved_by_undo: i64,
    /// The host's CPU seconds until 99% of it.
    pub host_seconds_to_99: f64,
    /// And until the end.
    pub host_seconds: f64,
    /// How long those who used it were ready to run until 99%, and had no CPU because somebody else had it, as far as
    /// these waits add up: the machine was not quiet where this is much.
    pub waited_seconds: f64,
    /// What was charged at the start and at the end.
    pub charged: [Parts; 2],
    /// CPU seconds of the module's threads in all guests until then, by the guests' own clocks.
    pub guest_seconds: f64,
    /// When no more comes.
    pub rest: Rest,
    /// Pages that the guests reported.
    pub pages_reported: u64,
    /// Bytes that the sharing itself takes, as it says itself; KSM's are not charged to anybody.
    pub metadata: u64,
    /// KSM's part of it, where pagefusion says of its own.
    #[serde(default)]
    pub ksm_metadata: u64,
    /// Anonymous memory of VMMs and daemon that is not the guests' and holds no code, in bytes, at the start and at the
    /// end.
    #[serde(default)]
    pub heap: [u64; 2],
    /// How the files lie in the first guest's memory, under a workload of files.
    #[serde(default)]
    pub folios: Option<FolioCount>,
    /// How many pages of mapped files lay in runs of one page, of 2 and 3, of 4 to 7 and so on in the first guest's
    /// memory, under a workload of Debian guests: after the boot, and after they had worked, where they had.
    #[serde(default)]
    pub run_lengths: Vec<Vec<u64>>,
    /// What was taken when all sharing had begun again and guests left one after the other: before, and after each. Older
    /// results do not have it, nor do those of systems that take minutes.
    #[serde(default)]
    pub left: Vec<Left>,
    /// What could have been shared.
    pub oracle: Option<Oracle>,
    /// Seconds and bytes saved, from the start on.
    pub series: Vec<(f64, i64)>,
}

/// What it costs when nothing more is to be found.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Rest {
    /// How long that was looked at.
    pub seconds: f64,
    /// The host's CPU seconds.
    pub host_seconds: f64,
    /// The guests'.
    pub guest_seconds: f64,
}

/// Answers, each from medians; absent where a run is missing.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Ratios {
    /// (a): KSM's time to 99%, as shipped, divided by ours.
    pub time_vs_ksm_shipped: Option<f64>,
    /// (a): the same of KSM without limits.
    pub time_vs_ksm_unlimited: Option<f64>,
    /// (a): our CPU seconds for each GiB saved, host and guest, divided by those of KSM without limits.
    pub cpu_vs_ksm_unlimited_a: Option<f64>,
    /// (b): the same.
    pub cpu_vs_ksm_unlimited_b: Option<f64>,
    /// (a): our CPU time when nothing more is found, divided by that of KSM as shipped.
    pub settled_cpu_vs_ksm_shipped: Option<f64>,
    /// (a): the part of mapped read-only page cache that is shared, of what could be.
    pub oracle_share_a: Option<f64>,
    /// (b): the same.
    pub oracle_share_b: Option<f64>,
    /// (c): the same.
    pub oracle_share_c: Option<f64>,
    /// (b): kernel's and own metadata, as a fraction of what is saved.
    pub metadata_share_b: Option<f64>,
    /// Time for each page, of the size where it is highest divided by that where it is lowest.
    pub growth_per_page: Option<f64>,
    /// CPU time for each page, likewise.
    pub growth_cpu_per_page: Option<f64>,
}

fn grown([before, after]: [u64; 2]) -> f64 {
    after as f64 - before as f64
}

const GIB: f64 = (1_u64 << 30) as f64;

impl Results {
    /// Results of this machine; what is added to them must be of the same.
    pub(super) fn go_on(mut self, machine: Machine) -> Result<Self> {
        if self.versions().next().is_none() {
            self.machine = machine.clone();
        }
        ensure!(
            self.machine.same_host(&machine),
            "the results to add to are of another machine or other versions: {:?}",
            self.machine
        );
        Ok(self)
    }

    /// All of them, made with this version.
    pub(super) fn made_with(mut self, version: &str) -> Self {
        version.clone_into(&mut self.machine.pagefusion);
        let runs = self.runs.iter_mut().map(|run| &mut run.pagefusion);
        let served = self.served.iter_mut().map(|served| &mut served.pagefusion);
        let churned = self
            .churned
            .iter_mut()
            .map(|churned| &mut churned.pagefusion);
        for of_run in runs.chain(served).chain(churned) {
            *of_run = Some(version.to_owned());
        }
        self
    }

    /// The version of each run of any kind.
    pub(super) fn versions(&self) -> impl Iterator<Item = Option<&str>> {
        let runs = self.runs.iter().map(|run| &run.pagefusion);
        let served = self.served.iter().map(|served| &served.pagefusion);
        let churned = self.churned.iter().map(|churned| &churned.pagefusion);
        let all = runs.chain(served).chain(churned);
        all.map(|version| version.as_deref())
    }
}

impl Run {
    /// Bytes saved, by the charge's fall.
    pub fn bytes(&self) -> f64 {
        self.saved as f64
    }

    /// Bytes that sharing really took: what the kernel and all heaps grew by, or what it says itself where that is
    /// more.
    pub fn overhead(&self) -> f64 {
        let own = self.charged_to_the_kernel() + grown(self.heap);
        own.max(self.metadata as f64) + self.ksm_metadata as f64
    }

    /// The kernel's part of that: page tables and mappings, and what KSM notes of pages.
    pub fn kernel_overhead(&self) -> f64 {
        match (self.system.pace(), self.system.scope()) {
            (Some(_), None) => self.overhead(),
            _ => self.charged_to_the_kernel() + self.ksm_metadata as f64,
        }
    }

    fn charged_to_the_kernel(&self) -> f64 {
        grown(self.charged.map(|parts| parts.kernel))
    }

    pub(super) fn gib(&self) -> f64 {
        self.bytes() / GIB
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::compare::conclusions::tests::run;

    fn machine(memory_mib: u64, pagefusion: &str) -> Machine {
        Machine {
            memory_mib,
            pagefusion: pagefusion.to_owned(),
            ..Machine::default()
        }
    }

    #[test]
    fn what_is_added_is_of_the_same_machine_and_does_not_rename_what_is_there() {
        let empty = Results::default().go_on(machine(1024, "old")).unwrap();
        assert_eq!(empty.machine, machine(1024, "old"));
        let workload = Workload::Boot { guests: 2 };
        let some = Results {
            runs: vec![run(workload, System::Readonly, 1.0, 1.0)],
            ..empty
        };
        let more = some.clone().go_on(machine(1024, "new")).unwrap();
        assert_eq!(more.machine.pagefusion, "old");
        assert!(some.go_on(machine(2048, "old")).is_err());
        let served = Results {
            machine: machine(1024, "old"),
            served: vec![Served {
                pagefusion: None,
                system: System::Nothing,
                web: Vec::new(),
                database: Vec::new(),
            }],
            ..Results::default()
        };
        assert!(served.clone().go_on(machine(2048, "old")).is_err());
        let named = served.made_with("new");
        assert!(named.versions().all(|version| version == Some("new")));
        assert_eq!(named.machine, machine(1024, "new"));
    }

    #[test]
    fn metadata_is_the_kernel_s_and_our_own() {
        let mut run = run(Workload::Mixed, System::Readonly, 1.0, 1.0);
        run.charged[1].kernel = 30;
        (run.heap, run.metadata) = ([1, 71], 60);
        assert_eq!((run.kernel_overhead(), run.overhead()), (30.0, 100.0));
        (run.system, run.ksm_metadata) = (System::ReadonlyKsm, 640);
        assert_eq!((run.kernel_overhead(), run.overhead()), (670.0, 740.0));
        (run.system, run.ksm_metadata, run.metadata) = (System::KsmTuned, 0, 640);
        assert_eq!((run.kernel_overhead(), run.overhead()), (640.0, 640.0));
    }

    #[test]
    fn runs_of_before_name_no_version_and_still_do_not_when_written_again() {
        let mut run = run(Workload::Mixed, System::Clean, 1.0, 1.0);
        run.pagefusion = None;
        let json = serde_json::to_string(&run).unwrap();
        assert!(!json.contains("pagefusion"), "{json}");
        let read: Run = serde_json::from_str(&json).unwrap();
        assert_eq!(read.pagefusion, None);
    }
}
