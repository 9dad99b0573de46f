//! What becomes of sharing, and what it costs, when guests change what they share: packages are installed again,
//! something is compiled, caches are dropped.

use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{
    ksm::Ksm,
    oracle::{self, Oracle},
    systems::System,
    trial::{self, Trial, at, pause},
    workloads::everybody,
};
use crate::{guest::Guest, world::World};

const SCRIPT: &str = include_str!("churn.py");
/// From the end of what guests do to the look at what is shared then, and for as long at first.
const AFTER: Duration = Duration::from_secs(20);

/// What the guests do, in this order.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Nothing; sharing begins.
    Begin,
    /// Packages are installed again, which replaces their files by others of the same bytes, and services start again.
    Upgrade,
    /// A part of Python's library is compiled, and a program in C.
    Compile,
    /// What caches can let go of is dropped.
    Drop,
}

impl Step {
    pub(super) const ALL: [Self; 4] = [Self::Begin, Self::Upgrade, Self::Compile, Self::Drop];

    /// What the script calls it.
    fn name(self) -> Option<&'static str> {
        match self {
            Self::Begin => None,
            Self::Upgrade => Some("upgrade"),
            Self::Compile => Some("compile"),
            Self::Drop => Some("drop"),
        }
    }
}

/// One step of a run.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Change {
    /// Which.
    pub step: Step,
    /// Seconds until it was done in all guests.
    pub seconds: f64,
    /// The host's CPU seconds for sharing, from its beginning to the look, which is 20 s after its end.
    pub host_seconds: f64,
    /// What could be shared then, and is.
    pub oracle: Oracle,
}

/// One run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Churned {
    /// The version it was made with; runs of before this was noted have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pagefusion: Option<String>,
    /// What shared the guests' memory.
    pub system: System,
    /// Everything that happened.
    pub changes: Vec<Change>,
}

/// Runs it.
pub(super) fn run(trial: Trial, world: &mut World, ksm: &Ksm) -> Result<Churned> {
    everybody(&mut world.guests, SCRIPT, |_| vec!["prepare".to_owned()])?;
    if trial.system.scope().is_some() {
        trial::wait_withdrawn(world)?;
    }
    let mut changes = Vec::new();
    for step in Step::ALL {
        changes.push(change(trial, step, world, ksm)?);
    }
    Ok(Churned {
        pagefusion: None,
        system: trial.system,
        changes,
    })
}

fn change(trial: Trial, step: Step, world: &mut World, ksm: &Ksm) -> Result<Change> {
    let sampler = trial::sampler(trial, world)?;
    let from = sampler.now();
    if trial.system.pace().is_some() {
        ksm.start()?;
    }
    let seconds = match step.name() {
        None => {
            if trial.system.scope().is_some() {
                let mut guests = world.guests.iter_mut();
                guests.try_for_each(|guest| guest.set("run", "1"))?;
            }
            0.0
        }
        Some(name) => everybody(&mut world.guests, SCRIPT, |_| vec![name.to_owned()])?,
    };
    pause(AFTER)?;
    let to = sampler.now();
    let samples = sampler.finish()?;
    let census = oracle::census(&mut world.guests)?;
    world.guests.iter_mut().try_for_each(Guest::pause)?;
    ksm.stop()?;
    let oracle = oracle::look(&mut world.guests, trial.workload.memory_mib(), &census)?;
    world.guests.iter_mut().try_for_each(Guest::resume)?;
    let sharing = at(&samples, to).sharing() - at(&samples, from).sharing();
    Ok(Change {
        step,
        seconds,
        host_seconds: sharing as f64 / 1e9,
        oracle,
    })
}
