//! Which runs are made, and in which order.

use std::time::Duration;

use super::{systems::System, trial::Trial, workloads::Workload};

/// What to measure.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// What the guests do, in this order.
    pub(super) workloads: Vec<Workload>,
    /// Whether requests are looked at, too.
    pub(super) requests: bool,
    /// Whether a load that changes what is shared is, too.
    pub(super) churn: bool,
    /// Those who share; none for all that fit the workload.
    pub(super) systems: Vec<System>,
    /// Runs of each.
    pub(super) runs: u32,
    /// Whether guests count their instructions, too.
    pub(super) counted: bool,
    /// How long to look at each when no more comes.
    pub(super) rest: Duration,
}

impl Wanted {
    /// What fits five minutes: two systems, and what could be shared.
    pub(super) fn quick() -> Self {
        Self {
            workloads: vec![Workload::Files { mib: 128 }],
            requests: false,
            churn: false,
            systems: vec![System::KsmUnlimited, System::Readonly],
            runs: 1,
            counted: true,
            rest: Duration::from_secs(5),
        }
    }

    /// Everything.
    pub(super) fn full() -> Self {
        Self {
            workloads: vec![
                Workload::Files { mib: 1024 },
                Workload::Boot { guests: 2 },
                Workload::Aged,
                Workload::Mixed,
                Workload::Files { mib: 256 },
                Workload::Files { mib: 512 },
                Workload::Files { mib: 2048 },
                Workload::Files { mib: 4096 },
                Workload::Boot { guests: 4 },
                Workload::Boot { guests: 8 },
                Workload::Boot { guests: 16 },
            ],
            requests: true,
            churn: true,
            systems: Vec::new(),
            runs: 5,
            counted: true,
            rest: Duration::from_secs(60),
        }
    }
}

/// Those of which one run must do: it takes minutes.
const ONCE: [System; 3] = [System::KsmShipped, System::KsmAdvisor, System::ReadonlyKsm];

fn systems(workload: Workload) -> Vec<System> {
    use System::{
        Clean, KsmAdvisor, KsmShipped, KsmTuned, KsmUnlimited, Nothing, Readonly, ReadonlyKsm,
    };
    match workload {
        Workload::Files { mib: 1024 } => vec![
            Nothing,
            Readonly,
            KsmUnlimited,
            Clean,
            KsmTuned,
            ReadonlyKsm,
            KsmShipped,
            KsmAdvisor,
        ],
        // How the cost grows.
        Workload::Files { .. } => vec![Readonly],
        Workload::Boot { guests: 2 } => {
            vec![Nothing, Readonly, KsmUnlimited, Clean, ReadonlyKsm]
        }
        Workload::Boot { .. } => vec![Readonly, KsmUnlimited],
        Workload::Aged | Workload::Mixed | Workload::Apart => vec![Readonly, KsmUnlimited, Clean],
    }
}

/// All runs. The systems take turns, so that what changes with time changes for all of them.
pub(super) fn trials(wanted: &Wanted) -> Vec<Trial> {
    let mut trials = Vec::new();
    for workload in &wanted.workloads {
        let systems = if wanted.systems.is_empty() {
            systems(*workload)
        } else {
            wanted.systems.clone()
        };
        let mut add = |system, counted| {
            trials.push(Trial {
                workload: *workload,
                system,
                counted,
                rest: wanted.rest,
            });
        };
        for round in 0..wanted.runs {
            for system in &systems {
                if round == 0 || !ONCE.contains(system) {
                    add(*system, false);
                }
            }
        }
        // Booting a whole system takes too long like that.
        let countable =
            wanted.counted && matches!(workload, Workload::Files { mib } if *mib <= 1024);
        for system in systems {
            if countable && system.scope().is_some() && system.pace().is_none() {
                add(system, true);
            }
        }
    }
    trials
}

/// Under whom it is looked how long requests take, in this order.
pub(super) fn served(wanted: &Wanted) -> Vec<System> {
    in_turns(wanted, wanted.requests)
}

/// Under whom it is looked what a load does that changes what is shared, in this order.
pub(super) fn churned(wanted: &Wanted) -> Vec<System> {
    in_turns(wanted, wanted.churn)
}

fn in_turns(wanted: &Wanted, chosen: bool) -> Vec<System> {
    if !chosen {
        return Vec::new();
    }
    let usual = [System::Nothing, System::Readonly, System::KsmUnlimited];
    let systems = match &wanted.systems[..] {
        [] => &usual,
        systems => systems,
    };
    (0..wanted.runs).flat_map(|_| systems).copied().collect()
}

impl Trial {
    /// What it is called while it runs.
    pub(super) fn title(&self) -> String {
        let name = self.system.name();
        if self.counted {
            format!("{name}, instructions in the guests")
        } else {
            name.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_take_turns() {
        let wanted = Wanted {
            runs: 2,
            counted: false,
            ..Wanted::quick()
        };
        let order: Vec<_> = trials(&wanted).iter().map(|trial| trial.system).collect();
        use System::{KsmUnlimited, Readonly};
        assert_eq!(order, [KsmUnlimited, Readonly, KsmUnlimited, Readonly]);
    }

    #[test]
    fn only_guests_of_ours_count_instructions() {
        let trials = trials(&Wanted::quick());
        let counted: Vec<_> = trials.iter().filter(|trial| trial.counted).collect();
        assert_eq!(counted.len(), 1);
        assert_eq!(counted[0].system, System::Readonly);
    }

    #[test]
    fn ours_is_beside_ksm_without_limits_for_any_number_of_guests() {
        let trials = trials(&Wanted::full());
        for guests in [2, 4, 8, 16] {
            for system in [System::Readonly, System::KsmUnlimited] {
                let workload = Workload::Boot { guests };
                let mut all = trials.iter();
                let found = all.any(|it| it.workload == workload && it.system == system);
                assert!(found, "{guests} guests, {system:?}");
            }
        }
    }

    #[test]
    fn a_run_of_many_minutes_is_made_once() {
        let trials = trials(&Wanted::full());
        let a = Workload::Files { mib: 1024 };
        let count = |system| {
            let of_system = |trial: &&Trial| trial.workload == a && trial.system == system;
            trials.iter().filter(of_system).count()
        };
        assert_eq!(count(System::KsmShipped), 1);
        assert_eq!(count(System::KsmUnlimited), 5);
    }
}
