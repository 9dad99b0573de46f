//! How much memory comes back when guests that share leave, one after the other.

use std::time::Instant;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    ksm::Ksm,
    systems::System,
    trial::{self, Trial, pause},
};
use crate::{guest::Guest, world::World};

/// What is taken while so many guests are there.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Left {
    /// How many.
    pub guests: u32,
    /// Bytes charged for them and the daemon, without files on disks.
    pub charge: u64,
    /// Of these, the store's.
    pub store: u64,
}

/// Has guests share again what was undone, and end one by one while the others stand still.
pub(super) fn one_by_one(trial: Trial, world: &mut World, ksm: &Ksm) -> Result<Vec<Left>> {
    if trial.system != System::Nothing && !share_again(trial, world, ksm)? {
        return Ok(Vec::new());
    }
    world.guests.iter_mut().try_for_each(Guest::pause)?;
    ksm.stop()?;
    let mut all = vec![look(world)?];
    while let Some(mut guest) = world.guests.pop() {
        guest.kill()?;
        if world.daemon.is_some() {
            wait_forgotten(world, guest.name())?;
        }
        all.push(look(world)?);
    }
    Ok(all)
}

/// False when that has no end.
fn share_again(trial: Trial, world: &mut World, ksm: &Ksm) -> Result<bool> {
    let sampler = trial::sampler(trial, world)?;
    pause(trial::BEFORE)?;
    let scans_before = ksm.progress()?.full_scans;
    let start = sampler.now();
    if trial.system.scope().is_some() {
        world.site.ctl(&["resume", "--all"])?;
    }
    if trial.system.pace().is_some() {
        ksm.start()?;
    }
    let settled = trial::settle(trial, &sampler, start, || {
        Ok(ksm.progress()?.full_scans - scans_before)
    })?;
    sampler.finish()?;
    Ok(settled)
}

/// Waits until the daemon has let go of a machine that is no more.
fn wait_forgotten(world: &World, name: &str) -> Result<()> {
    let deadline = Instant::now() + world.limits.settle;
    while world.site.status()?.vm(name).is_ok() {
        ensure!(Instant::now() < deadline, "the daemon still knows {name}");
        pause(trial::INTERVAL)?;
    }
    Ok(())
}

fn look(world: &World) -> Result<Left> {
    Ok(Left {
        guests: world.guests.len() as u32,
        charge: world.cgroup.charge()?,
        store: world.cgroup.parts()?.shared,
    })
}
