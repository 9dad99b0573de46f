//! What only a kernel with detectors can tell: that nothing is used which is not there, nothing is lost, no lock is
//! taken in the wrong order, and no failure leads to another. Whatever a detector finds is on the console and fails the
//! scenario.
//!
//! The guests are Debian's files without its services, with two processors each.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{
    Stage,
    steps::{each, hold, spec, unit},
};
use crate::{
    console, guest::Guest, integrity::Integrity, protocol::Op, settle::settle, world::World,
};

const FAILURES: &str = include_str!("failures.py");
const MODULE: &str = "/run/pagefusion/pagefusion.ko";

/// Files that each guest maps all the time.
const HELD: usize = 60;
/// The longest that one of these may take.
const LIMIT: Duration = Duration::from_secs(3600);
/// Memory that is lost is found by looking twice, and this much later than it was allocated.
const LOST_AFTER: Duration = Duration::from_secs(6);

/// Where kernels themselves warn when they get no memory, and what of.
const KERNELS_OWN: [(&str, &str); 3] = [
    (
        "kernel/jump_label.c:",
        "that branches of a module that loads cannot be patched",
    ),
    (
        "fs/proc/generic.c:",
        "that an interrupt's file in /proc, which was never made, cannot be removed",
    ),
    (
        "EXT4-fs error",
        "that the file which the failing task let go of last stays until the next check",
    ),
];

/// Each allocation fails in turn: of loading the module, of its passes, of setting a knob. It gets along, or says no.
pub(super) fn any_allocation_may_fail(stage: &mut Stage) -> Result<()> {
    with_detectors(stage, |world| {
        let guest = &mut world.guests[0];
        // Whoever does not get memory says so with a trace, on the console as well; its log is looked at instead.
        quiet(guest, true)?;
        fail(guest, "knobs")?;
        fail(guest, "thread")?;
        guest.unload_module()?;
        fail(guest, "load")?;
        guest.load_hurried_module()?;
        quiet(guest, false)?;
        let found = reports(guest)?;
        ensure!(found.is_empty(), "its kernel has said: {found:#?}");
        guest.set("run", "1")?;
        settle(world, Instant::now())?;
        let status = world.status()?;
        let shared = status.vm(world.guests[0].name())?.pages_shared;
        ensure!(shared > 0, "nothing is shared after all the failures");
        files_are_right(world)
    })
}

fn fail(guest: &mut Guest, what: &str) -> Result<()> {
    let outcome = guest.run_for(&["python3", "-c", FAILURES, what, MODULE], LIMIT)?;
    let (said, wrong) = (outcome.stdout.trim(), outcome.stderr.trim());
    eprintln!("{what}: {said}");
    ensure!(outcome.status == Some(0), "{what}: {said} {wrong}");
    Ok(())
}

/// Plays with two guests that share; afterwards the module is gone from them and has left nothing behind.
fn with_detectors(stage: &mut Stage, play: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    let others = std::mem::take(&mut stage.world.guests);
    let played = start(&mut stage.world)
        .and_then(|()| play(&mut stage.world))
        .and_then(|()| end(&mut stage.world));
    stage.world.guests = others;
    played
}

fn start(world: &mut World) -> Result<()> {
    // What fills the log must not push out what is looked for.
    for _ in 0..2 {
        world.start_files(2, "log_buf_len=8M kmemleak=on")?;
    }
    let boot = world.limits.boot;
    each(world, |guest| guest.wait_agent(boot).map(drop))?;
    hold_libraries(world)?;
    each(world, |guest| {
        let debugfs = spec("debugfs", "debugfs", "/sys/kernel/debug", "");
        unit(guest, Op::Mount(debugfs))?;
        let detectors: Vec<String> = guest.request(Op::List {
            path: "/sys/kernel/debug".into(),
        })?;
        for detector in ["kmemleak", "failslab"] {
            ensure!(
                detectors.iter().any(|it| it == detector),
                "this kernel has no {detector}; the scenario needs `cargo xtask test --kernel debug`"
            );
        }
        write(guest, "/sys/kernel/debug/kmemleak", "scan=off")?;
        write(guest, "/sys/kernel/debug/kmemleak", "clear")?;
        guest.load_hurried_module()
    })?;
    settle(world, Instant::now()).map(drop)
}

/// Without services, nobody maps much.
fn hold_libraries(world: &mut World) -> Result<()> {
    const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
    for guest in &mut world.guests {
        let names: Vec<String> = guest.request(Op::List {
            path: LIBRARIES.into(),
        })?;
        let paths = names.iter().map(|name| format!("{LIBRARIES}/{name}"));
        let libraries = paths.filter(|path| path.contains(".so.") && world.manifest.has(path));
        for path in libraries.take(HELD) {
            hold(guest, &path)?;
        }
    }
    Ok(())
}

fn end(world: &mut World) -> Result<()> {
    each(world, Guest::unload_module)?;
    each(world, |guest| {
        lost(guest)?;
        guest.healthy()?;
        guest.kill()
    })
}

/// Fails when memory has been lost.
fn lost(guest: &mut Guest) -> Result<()> {
    const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
    let since = Instant::now();
    // Twice: what is on its way from one list to another looks lost.
    write(guest, KMEMLEAK, "scan")?;
    while since.elapsed() < LOST_AFTER {
        crate::interrupt::check()?;
        guest.healthy()?;
        std::thread::sleep(Duration::from_millis(200));
    }
    write(guest, KMEMLEAK, "scan")?;
    let found = guest.output(&["cat", KMEMLEAK])?;
    ensure!(
        found.trim().is_empty(),
        "{}: memory was lost: {found}",
        guest.name()
    );
    Ok(())
}

/// Whether the console is spared warnings.
fn quiet(guest: &mut Guest, quiet: bool) -> Result<()> {
    let level = if quiet { "1" } else { "5" };
    write(guest, "/proc/sys/kernel/printk", level)
}

/// Lines of the kernel's log that tell of something wrong with more than the kernel itself. Traces are of those or of
/// allocations that failed.
fn reports(guest: &mut Guest) -> Result<Vec<String>> {
    let log: Vec<String> = guest.request_for(Op::KernelLog, LIMIT, |_| {})?;
    let own = |line: &str| KERNELS_OWN.iter().any(|(site, _)| line.contains(site));
    let wrong = |line: &String| {
        console::fatal(line).is_some_and(|what| what != "Call Trace:") && !own(line)
    };
    Ok(log.into_iter().filter(wrong).collect())
}

fn files_are_right(world: &mut World) -> Result<()> {
    let mut integrity = Integrity::default();
    for guest in &mut world.guests {
        integrity.mapped_files(guest, &world.manifest)?;
    }
    integrity.verdict()
}

fn write(guest: &mut Guest, path: &str, data: &str) -> Result<()> {
    let (path, data) = (path.to_owned(), data.to_owned());
    guest
        .request_for::<Value>(Op::Write { path, data }, LIMIT, |_| {})
        .map(drop)
}
