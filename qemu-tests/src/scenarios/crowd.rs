//! More processes than anybody has.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{
    Stage,
    filesystems::shared_pages,
    steps::{each, hold, unit, write},
};
use crate::{
    guest::{Guest, Mode},
    protocol::{Kin, Op},
    world::Small,
};

const PROCESSES: u64 = 10_000;
/// The system's own processes besides them.
const OTHERS: u64 = 200;
const MEMORY_MIB: u32 = 6144;
const LIMIT: Duration = Duration::from_secs(900);

/// Forks processes that wait for a line each. The shell stays with them until all are released.
const BOMB: &str = r#"
mkfifo /tmp/crowd && exec 3<>/tmp/crowd && cd /tmp || exit 1
i=0
while [ $i -lt "$0" ]; do (read line <&3) & i=$((i + 1)); done
: > /tmp/crowd-is-there
wait
"#;
/// Forks processes that end at once, as long as a file is there.
const CHURN: &str = ": > /tmp/churn; while [ -e /tmp/churn ]; do (:); (:); (:); (:); done";

pub(super) fn ten_thousand_processes(stage: &mut Stage) -> Result<()> {
    let world = &mut stage.world;
    let from = world.guests.len();
    let image = world.artifacts.guest_image.clone();
    world.start(Mode::Bare, MEMORY_MIB, vec![image])?;
    let guest = &mut world.guests[from];
    guest.wait_agent(world.limits.boot)?;
    guest.load_hurried_module()?;
    guest.wait_passes(1, LIMIT)?;
    let alone = guest.counter("mms_visited")?;

    // While they come, passes go on.
    let began = Instant::now();
    background(guest, BOMB, &PROCESSES.to_string())?;
    let mut passes = 0;
    while !there(guest, "/tmp/crowd-is-there")? {
        ensure!(began.elapsed() < LIMIT, "the processes are stalled");
        guest.wait_passes(1, LIMIT).context("passes are stalled")?;
        passes += 1;
    }
    let forked = began.elapsed();

    // All of them, each once.
    guest.wait_passes(2, LIMIT)?;
    let (seen, skipped) = (guest.counter("mms_visited")?, guest.counter("mms_skipped")?);
    ensure!(
        (PROCESSES..=PROCESSES + alone + OTHERS).contains(&(seen + skipped)),
        "{seen} address spaces were visited and {skipped} left out, of {PROCESSES} and {alone}"
    );
    let pass_usecs = guest.counter("last_pass_usecs")?;

    // While others come and go, the walk comes to its end and sees all that stay.
    background(guest, CHURN, "")?;
    guest
        .wait_passes(3, LIMIT)
        .context("passes are stalled by short-lived processes")?;
    let seen = guest.counter("mms_visited")? + guest.counter("mms_skipped")?;
    ensure!(
        (PROCESSES..=PROCESSES + alone + OTHERS).contains(&seen),
        "{seen} address spaces were visited while others came and went"
    );
    guest.output(&["rm", "/tmp/churn"])?;
    eprintln!(
        "{PROCESSES} processes in {forked:?}, {passes} passes meanwhile; a pass over them {pass_usecs} us, longest hold of an mmap lock {} ns",
        guest.counter("max_mmap_lock_nsecs")?
    );
    guest.unload_module()?;
    guest.healthy()?;
    let mut guest = world.guests.remove(from);
    guest.kill()
}

/// Starts a shell that nobody waits for.
fn background(guest: &mut Guest, script: &str, argument: &str) -> Result<()> {
    let detach = r#"setsid sh -c "$0" "$1" > /dev/null 2>&1 &"#;
    guest
        .output(&["sh", "-c", detach, script, argument])
        .map(drop)
}

fn there(guest: &mut Guest, path: &str) -> Result<bool> {
    Ok(guest.run(&["test", "-e", path])?.status == Some(0))
}

/// Whoever has it: what is mapped in it is shared.
pub(super) fn every_address_space_is_visited_once(stage: &mut Stage) -> Result<()> {
    const KINDS: [Kin; 5] = [
        Kin::Threads,
        Kin::WithoutLeader,
        Kin::TwinsWithoutLeader,
        Kin::Twins,
        Kin::Borrower,
    ];
    const BYTES: u64 = 1 << 20;
    let seed = stage.seed();
    stage.with_small_pair(&Small::default(), |world| {
        each(world, |guest| guest.set("max_sleep_millisecs", "100"))?;
        for (index, kind) in KINDS.into_iter().enumerate() {
            let path = format!("/tmp/pf-kin-{index}");
            each(world, |guest| {
                write(guest, &path, seed + index as u64, 0, BYTES)?;
                guest.set("run", "1")
            })?;
            let (first, second) = world.pair()?;
            hold(second, &path)?;
            let alone = visited(first)?;
            let kin = |path| Op::Kin { kind, path };
            unit(first, kin(Some(path.clone())))?;
            let with_kin = visited(first)?;
            ensure!(
                with_kin == alone + 1,
                "{kind:?} with one address space: {with_kin} were visited, and {alone} without them"
            );
            let shared = shared_pages(world, "readonly", &[path])?;
            ensure!(
                shared[0].0 * 20 >= shared[0].1 * 19,
                "{kind:?}: {} of {} pages are shared",
                shared[0].0,
                shared[0].1
            );
            unit(&mut world.guests[0], kin(None))?;
        }
        Ok(())
    })
}

/// Address spaces that a pass visits. One whose lock it could not have at first is counted again.
fn visited(guest: &mut Guest) -> Result<u64> {
    // The pass under way may not have seen what is there now.
    guest.wait_passes(1, LIMIT)?;
    let mut least = u64::MAX;
    for _ in 0..3 {
        guest.wait_passes(1, LIMIT)?;
        let visited = guest.counter("mms_visited")?;
        least = least.min(visited);
    }
    Ok(least)
}
