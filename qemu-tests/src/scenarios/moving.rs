//! A running guest goes on in another QEMU.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    Stage,
    shared_files::{SharedFiles, with_disk},
    steps::{has_another_host, wait_until, with_reports_in_flight},
};
use crate::{
    guest::Guest,
    interrupt,
    world::{Small, World},
};

const LIMIT: Duration = Duration::from_secs(180);
/// Bytes per second of a migration that is to last, of what nobody has asked for: an hour for a small guest.
const SLOW: u64 = 1 << 16;
/// Between two looks at a migration.
const SLICE: Duration = Duration::from_millis(50);

pub(super) fn restored_from_a_file_twice(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let uri = format!("file:{}", world.directory().join("state").display());
        let mut saved = world.guests.remove(0);
        let instance = saved.counter("host_instance")?;
        // What lies on overlays is read and saved like everything else.
        migrate(&mut saved, &uri)?;
        saved.kill()?;
        for last in [false, true] {
            let guest = take_in(world, &small, &uri, &saved)?;
            world.guests.insert(0, guest);
            awake(world, instance)?;
            files.are_right(world)?;
            files.are_shared(world)?;
            if !last {
                saved.take_over(&world.guests[0]);
                world.guests.remove(0).kill()?;
            }
        }
        files.add(world)?;
        files.are_right(world)
    })
}

pub(super) fn migrated_while_it_runs(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        // There and back again, the second time with reports in flight.
        for busy in [false, true] {
            let standstill = busy.then(|| with_reports_in_flight(world, &mut files));
            let standstill = standstill.transpose()?;
            goes_on_elsewhere(world, &small, standstill)?;
            files.are_right(world)?;
            files.are_shared(world)?;
            files.add(world)?;
        }
        files.are_right(world)
    })
}

/// The guest has a module in it, and nothing yet that somebody else has.
pub(super) fn migrated_before_anything_was_shared(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        goes_on_elsewhere(world, &small, ())?;
        let mut files = SharedFiles::hold(world, seed)?;
        files.are_right(world)?;
        files.add(world)?;
        files.are_right(world)
    })
}

/// The first guest goes on in another QEMU. What `standstill` has kept standing still goes on when it has gone.
fn goes_on_elsewhere<T>(world: &mut World, small: &Small, standstill: T) -> Result<()> {
    let uri = format!("unix:{}", world.directory().join("migration").display());
    let mut before = world.guests.remove(0);
    let instance = before.counter("host_instance")?;
    let mut guest = incoming(world, small)?;
    guest.monitor("migrate-incoming", json!({ "uri": uri }))?;
    migrate(&mut before, &uri)?;
    // Its engine answers reports of a guest that is gone.
    drop(standstill);
    before.kill()?;
    guest.take_over(&before);
    world.guests.insert(0, guest);
    awake(world, instance)
}

/// The guest runs in the other QEMU before its memory is there, which comes when it is touched. Meanwhile nothing is
/// shared, and an operator is told why; afterwards everything is.
pub(super) fn migrated_by_postcopy(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let uri = format!("unix:{}", world.directory().join("migration").display());
        for busy in [false, true] {
            if busy {
                files.add_unshared(world)?;
            }
            let mut before = world.guests.remove(0);
            let instance = before.counter("host_instance")?;
            let mut guest = incoming(world, &small)?;
            for side in [&mut before, &mut guest] {
                let postcopy = json!([{ "capability": "postcopy-ram", "state": true }]);
                side.monitor(
                    "migrate-set-capabilities",
                    json!({ "capabilities": postcopy }),
                )?;
            }
            guest.monitor("migrate-incoming", json!({ "uri": uri }))?;
            // So slowly that what the guest wants is what comes, for as long as anybody looks.
            bandwidth(&mut before, SLOW)?;
            before.monitor("migrate", json!({ "uri": uri }))?;
            reaches(&mut before, "active")?;
            before.monitor("migrate-start-postcopy", json!({}))?;
            reaches(&mut before, "postcopy-active")?;
            guest.take_over(&before);
            world.guests.insert(0, guest);
            awake(world, instance)?;
            shares_nothing_for_postcopy(world)?;
            files.are_right(world)?;
            let state = before.monitor("query-migrate", json!({}))?;
            ensure!(
                state["status"] == "postcopy-active",
                "nothing was left to come: {state}"
            );

            bandwidth(&mut before, 0)?;
            reaches(&mut before, "completed")?;
            before.kill()?;
            files.are_right(world)?;
            files.are_shared(world)?;
            files.add(world)?;
            files.are_right(world)?;
        }
        Ok(())
    })
}

/// Bytes per second of what comes unasked, and before the guest leaves; 0 is as many as there can be.
fn bandwidth(guest: &mut Guest, bytes: u64) -> Result<()> {
    let limits = json!({ "max-bandwidth": bytes, "max-postcopy-bandwidth": bytes });
    guest.monitor("migrate-set-parameters", limits).map(drop)
}

/// The status says that nothing is shared, and why.
fn shares_nothing_for_postcopy(world: &mut World) -> Result<()> {
    let name = world.guests[0].name().to_owned();
    wait_until("the status tells of postcopy", || {
        let vm = world.status()?.vm(&name)?.clone();
        ensure!(
            vm.pages_shared == 0,
            "{} pages are shared while QEMU has userfaultfd",
            vm.pages_shared
        );
        Ok(vm.disabled.is_some_and(|why| why.contains("postcopy")))
    })
}

/// Back to an earlier state without leaving QEMU, with something reported before it was saved and something after.
pub(super) fn loaded_again_in_the_same_qemu(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        files.add_unshared(world)?;
        snapshot(&mut world.guests[0], "savevm")?;
        files.are_shared(world)?;
        for _ in 0..2 {
            let later = files.add(world)?;
            snapshot(&mut world.guests[0], "loadvm")?;
            // It was never there.
            files.forget(&later);
            files.are_right(world)?;
            files.are_shared(world)?;
        }
        files.add(world)?;
        files.are_right(world)
    })
}

/// Saves a guest in its disk, or takes it back from there.
fn snapshot(guest: &mut Guest, command: &str) -> Result<()> {
    let answer = guest.human_monitor(&format!("{command} state"))?;
    ensure!(answer.is_empty(), "{command}: {answer}");
    Ok(())
}

/// A QEMU that waits to be told where a guest comes from.
fn incoming(world: &mut World, small: &Small) -> Result<Guest> {
    let small = Small {
        arguments: vec!["-incoming".into(), "defer".into()],
        ..small.clone()
    };
    world.launch_small_sharer(&small)
}

/// Goes on with a guest that was saved.
fn take_in(world: &mut World, small: &Small, uri: &str, saved: &Guest) -> Result<Guest> {
    let mut guest = incoming(world, small)?;
    guest.monitor("migrate-incoming", json!({ "uri": uri }))?;
    guest.take_over(saved);
    Ok(guest)
}

/// Has a guest leave its QEMU, which stops it in the end.
fn migrate(guest: &mut Guest, uri: &str) -> Result<()> {
    guest.monitor("migrate", json!({ "uri": uri }))?;
    reaches(guest, "completed")
}

/// Waits for this state of a migration.
fn reaches(guest: &mut Guest, wanted: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        interrupt::check()?;
        let state = guest.monitor("query-migrate", json!({}))?;
        match &state["status"] {
            Value::String(status) if status == wanted => return Ok(()),
            Value::String(status) if status == "failed" => bail!("migration failed: {state}"),
            _ if Instant::now() >= deadline => bail!("migration takes too long: {state}"),
            _ => std::thread::sleep(SLICE),
        }
    }
}

/// It runs, and knows that its host is another one.
fn awake(world: &mut World, instance: u64) -> Result<()> {
    let guest = world.guests.first_mut().context("no guest")?;
    guest.wait_event("RESUME", LIMIT)?;
    has_another_host(guest, instance)
}
