//! What the module counts: numbers that must meet, with each other and with the host's.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{
    Stage,
    shared_files::{SharedFiles, with_disk},
    steps::{answered, wait_until},
};
use crate::{guest::Guest, world::World};

const LIMIT: Duration = Duration::from_secs(120);
/// Why the host may refuse a page.
const REASONS: [&str; 12] = [
    "malformed",
    "unknown_file",
    "outside_memory",
    "unsuitable_memory",
    "different",
    "mapping_limit",
    "store_full",
    "paused",
    "no_store",
    "host_error",
    "too_many_files",
    "revoked",
];

pub(super) fn agree(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        world.guests[0].set("max_sleep_millisecs", "100")?;
        // What guests have written of what is shared is known once the daemon has had them look.
        world.site.tidy_every(Some(1));
        restart(world)?;
        files.are_shared(world)?;
        meet(world)?;
        waits_are_counted(world, &mut files)?;
        files_that_are_gone_are_not(world, &mut files)?;

        world.daemon.take().context("no daemon")?.kill()?;
        refused(world, &mut files, "pages_refused_no_store")?;
        restart(world)?;
        files.are_shared(world)?;
        meet(world)?;
        files.are_right(world)?;
        world.site.tidy_every(None);
        restart(world)
    })
}

fn restart(world: &mut World) -> Result<()> {
    if let Some(daemon) = world.daemon.take() {
        daemon.kill()?;
    }
    world.daemon = Some(world.site.start(&world.cgroup)?);
    Ok(())
}

/// A page at a time: the pass waits for the host after each.
fn waits_are_counted(world: &mut World, files: &mut SharedFiles) -> Result<()> {
    let guest = &mut world.guests[0];
    guest.set("max_inflight_pages", "1")?;
    let before = guest.counter("ring_full_waits")?;
    files.add(world)?;
    let guest = &mut world.guests[0];
    guest.wait_passes(1, LIMIT)?;
    let waits = guest.counter("ring_full_waits")? - before;
    ensure!(waits > 0, "no wait, with a page in flight at most");
    guest.set("max_inflight_pages", "8192")
}

fn files_that_are_gone_are_not(world: &mut World, files: &mut SharedFiles) -> Result<()> {
    const FILES: u64 = 3;
    let tracked = |world: &mut World| world.guests[0].counter("files_tracked");
    let before = tracked(world)?;
    let mut paths = Vec::new();
    for _ in 0..FILES {
        paths.push(files.add(world)?);
    }
    world.guests[0].wait_passes(1, LIMIT)?;
    let with_them = tracked(world)?;
    ensure!(
        with_them >= before + FILES,
        "{with_them} files are known, and {before} were before {FILES} more"
    );
    for path in paths {
        files.remove(world, &path)?;
    }
    wait_until("files that are gone are forgotten", || {
        Ok(tracked(world)? + FILES <= with_them)
    })
}

/// The host refuses a file for this reason, and is said to.
fn refused(world: &mut World, files: &mut SharedFiles, reason: &str) -> Result<()> {
    let before = world.guests[0].counter(reason)?;
    files.add_unshared(world)?;
    let guest = &mut world.guests[0];
    wait_until(reason, || Ok(guest.counter(reason)? > before))
}

/// In a guest that has come to rest.
fn meet(world: &mut World) -> Result<()> {
    let guest = &mut world.guests[0];
    // The kernel's own pages are eligible and not looked for in files.
    guest.set("kernel_text", "0")?;
    guest.wait_passes(3, LIMIT)?;
    guest.set("run", "0")?;
    answered(guest)?;
    let name = guest.name().to_owned();
    let (mut host, mut said) = (0, 0);
    let meet = wait_until("both to say the same", || {
        host = world.status()?.vm(&name)?.pages_shared;
        said = world.guests[0].counter("pages_shared")?;
        Ok(said == host)
    });
    meet.with_context(|| format!("the host says {host} pages are shared, the guest {said}"))?;

    let host = world.status()?.vm(&name)?.pages_reported;
    let guest = &mut world.guests[0];
    let [
        seen,
        eligible,
        reported,
        acknowledged,
        shared,
        refused,
        last,
        longest,
        runs,
    ] = [
        "pages_seen",
        "pages_eligible",
        "pages_reported",
        "pages_acknowledged",
        "pages_shared",
        "pages_refused",
        "last_pass_usecs",
        "max_pass_usecs",
        "runs_reported",
    ]
    .map(|name| guest.counter(name));
    let (seen, eligible) = (seen?, eligible?);
    ensure!(
        eligible > 0 && eligible <= seen,
        "{eligible} pages of {seen} are eligible"
    );
    let (reported, acknowledged, shared) = (reported?, acknowledged?, shared?);
    ensure!(
        acknowledged == reported && host == reported,
        "{reported} pages were reported, {acknowledged} answered, the host counts {host}"
    );
    ensure!(
        shared > 0 && shared <= acknowledged,
        "{shared} pages are shared of {acknowledged} that were answered"
    );
    let runs = runs?;
    ensure!(
        runs > 0 && runs <= reported,
        "{runs} runs of {reported} pages"
    );
    let (last, longest) = (last?, longest?);
    ensure!(
        last > 0 && last <= longest,
        "the last pass took {last} us and the longest {longest} us"
    );
    let (refused, by_reason) = (refused?, by_reason(guest)?);
    ensure!(
        refused == by_reason,
        "{refused} pages were refused, and {by_reason} for a reason"
    );
    guest.set("kernel_text", "1")?;
    guest.set("run", "1")
}

fn by_reason(guest: &mut Guest) -> Result<u64> {
    let mut sum = 0;
    for reason in REASONS {
        sum += guest.counter(&format!("pages_refused_{reason}"))?;
    }
    Ok(sum)
}
