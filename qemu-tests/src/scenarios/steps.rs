//! What most scenarios do with guests and files.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::shared_files::SharedFiles;
use crate::{
    guest::Guest,
    interrupt,
    protocol::{MountSpec, Op},
    standstill::Standstill,
    world::World,
};

/// How long a guest may believe in a host that has ended.
const NOTICED: Duration = Duration::from_secs(30);
/// How long something may take to come.
const LIMIT: Duration = Duration::from_secs(120);
/// The thread of the engine that answers.
const RING: &str = "pf-ring";

pub(super) fn spec(kind: &str, source: &str, target: &str, data: &str) -> MountSpec {
    MountSpec {
        kind: kind.into(),
        source: source.into(),
        target: target.into(),
        data: data.into(),
    }
}

/// How many pages of what both guests hold mapped are the same memory of the host, and of how many.
pub(super) fn same(world: &mut World, name: &str) -> Result<(usize, usize)> {
    let (first, second) = world.pair()?;
    let (first, second) = (first.host_frames(name)?, second.host_frames(name)?);
    let pairs = first.iter().zip(&second);
    let same = pairs.filter(|(one, other)| one == other && **one != 0);
    Ok((same.count(), first.len()))
}

/// Waits until nearly all of it is the same memory.
pub(super) fn all_same(world: &mut World, name: &str) -> Result<()> {
    wait_same(world, name, |same, all| same * 20 >= all * 19)
}

/// Waits until no page of a file that is held is the same memory in both guests.
pub(super) fn none_same(world: &mut World, name: &str) -> Result<()> {
    wait_same(world, name, |same, _| same == 0)
}

/// Waits until so many of the pages of a file are the same memory in both guests.
fn wait_same(world: &mut World, name: &str, so_many: impl Fn(usize, usize) -> bool) -> Result<()> {
    let deadline = Instant::now() + world.limits.settle;
    loop {
        interrupt::check()?;
        world.healthy()?;
        let (same, all) = same(world, name)?;
        if so_many(same, all) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!(
                "{name}: {same} of {all} pages are the same memory in two guests\n{}",
                world.account()
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub(super) fn each(world: &mut World, mut act: impl FnMut(&mut Guest) -> Result<()>) -> Result<()> {
    world.guests.iter_mut().try_for_each(&mut act)
}

pub(super) fn write(
    guest: &mut Guest,
    path: &str,
    seed: u64,
    offset: u64,
    bytes: u64,
) -> Result<()> {
    let path = path.into();
    unit(
        guest,
        Op::WritePattern {
            path,
            seed,
            offset,
            bytes,
        },
    )
}

pub(super) fn hold(guest: &mut Guest, path: &str) -> Result<()> {
    unit(guest, Op::Hold { path: path.into() })
}

pub(super) fn release(guest: &mut Guest, path: &str) -> Result<()> {
    unit(guest, Op::Release { path: path.into() })
}

pub(super) fn unmount(guest: &mut Guest, target: &str) -> Result<()> {
    let target = target.into();
    unit(guest, Op::Unmount { target })
}

pub(super) fn unit(guest: &mut Guest, op: Op) -> Result<()> {
    guest.request::<Value>(op).map(drop)
}

/// By itself the module's thread would wait for a moment when nobody else wants to run.
pub(super) fn renice(guest: &mut Guest, nice: i32) -> Result<()> {
    let name = "pagefusion".to_owned();
    unit(guest, Op::Renice { name, nice })
}

/// The guest has noticed that its host is another one now.
pub(super) fn has_another_host(guest: &mut Guest, before: u64) -> Result<()> {
    let deadline = Instant::now() + NOTICED;
    loop {
        interrupt::check()?;
        let now = guest.counter("host_instance")?;
        if now != 0 && now != before {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "after {NOTICED:?} the guest still believes in host {now}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Something is reported to the first guest's engine, which stands still and has not answered.
pub(super) fn with_reports_in_flight(
    world: &mut World,
    files: &mut SharedFiles,
) -> Result<Standstill> {
    // Nothing is under way in the thread: it may have locked what others wait for.
    world.guests[0].wait_passes(2, LIMIT)?;
    answered(&mut world.guests[0])?;
    let standstill = Standstill::of(world.guests[0].pid(), RING)?;
    files.add_unshared(world)?;
    let sleeper = &mut world.guests[0];
    wait_until("reports are in flight", || {
        Ok(sleeper.counter("pages_in_flight")? > 0)
    })?;
    Ok(standstill)
}

/// The module has let go of all that was reported: it leaves behind only what a host has claimed, and says so.
pub(super) fn nothing_is_abandoned(guest: &mut Guest) -> Result<()> {
    let log: Vec<String> = guest.request(Op::KernelLog)?;
    let said = log.iter().find(|line| line.contains("they stay"));
    ensure!(said.is_none(), "the module has left pages behind: {said:?}");
    Ok(())
}

/// Waits until the host has answered all that was reported.
pub(super) fn answered(guest: &mut Guest) -> Result<()> {
    wait_until("the host has answered", || {
        Ok(guest.counter("pages_in_flight")? == 0)
    })
}

/// Waits until something has come.
pub(super) fn wait_until(what: &str, mut has_come: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !has_come()? {
        interrupt::check()?;
        ensure!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
