//! Daemon and QEMUs die at any moment.

use std::{
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, ensure};

use super::{
    Stage,
    shared_files::{SharedFiles, with_disk},
    steps::wait_until,
};
use crate::{
    pattern::Numbers,
    world::{Small, World},
};

/// Sets the seed, to see again what one has shown.
const SEED: &str = "PAGEFUSION_SEED";
const KILLS: u64 = 10;
const GUESTS: usize = 3;
/// Within so many milliseconds after something new, one is killed.
const MOMENTS: u64 = 1500;

pub(super) fn whatever_is_killed_the_rest_is_right(stage: &mut Stage) -> Result<()> {
    let seed = match std::env::var(SEED) {
        Ok(seed) => seed.parse().with_context(|| format!("{SEED}={seed}"))?,
        Err(_) => SystemTime::UNIX_EPOCH.elapsed()?.as_secs(),
    };
    println!("{SEED}={seed}");
    let small = with_disk(&stage.world)?;
    let first = stage.seed();
    // In the end nothing may be left of anybody.
    stage.world.guests.clear();
    let played = play(&mut stage.world, &small, Numbers::new(seed), first);
    stage.world.guests.clear();
    played.with_context(|| format!("{SEED}={seed}"))
}

fn play(world: &mut World, small: &Small, mut numbers: Numbers, first: u64) -> Result<()> {
    world.start_small_sharers(small, GUESTS)?;
    for guest in &mut world.guests {
        guest.load_hurried_module()?;
    }
    let mut files = SharedFiles::hold(world, first)?;
    for _ in 0..KILLS {
        files.add_unshared(world)?;
        let kind = numbers.below(3);
        let (kills_daemon, kills_guest) = (kind != 0, kind != 1);
        thread::sleep(Duration::from_millis(numbers.below(MOMENTS)));
        let victim = numbers.below(GUESTS as u64) as usize;
        let daemon_first = numbers.below(2) == 0;
        if kills_daemon && daemon_first {
            world.daemon.take().context("no daemon")?.kill()?;
        }
        if kills_guest {
            world.guests.remove(victim).kill()?;
        }
        if kills_daemon && !daemon_first {
            world.daemon.take().context("no daemon")?.kill()?;
        }
        files.are_right(world)?;
        if kills_daemon {
            world.daemon = Some(world.site.start(&world.cgroup)?);
        }
        if kills_guest {
            let mut guest = world.launch_small_sharer(small)?;
            guest.wait_agent(world.limits.boot)?;
            guest.load_hurried_module()?;
            files.hold_in(&mut guest)?;
            world.guests.insert(victim, guest);
        }
    }
    files.are_shared(world)?;
    files.are_right(world)?;
    world.healthy()?;

    for mut guest in world.guests.drain(..) {
        guest.kill()?;
    }
    wait_until(
        "the store is empty",
        || Ok(world.status()?.store_pages == 0),
    )?;
    let status = world.status()?;
    ensure!(
        status.pages_shared == 0,
        "{} pages are shared by nobody",
        status.pages_shared
    );
    Ok(())
}
