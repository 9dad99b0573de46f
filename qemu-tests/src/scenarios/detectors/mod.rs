//! What only a kernel with detectors can tell: that nothing is used which is not there, nothing is lost, no lock is
//! taken in the wrong order, and no failure leads to another. Whatever a detector finds is on the console and fails the
//! scenario.
//!
//! The guests are Debian's files without its services, with two processors each.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    Stage,
    plug::{ROOM_FOR_MEMORY, plug_in},
    steps::{each, hold, renice, spec, unit},
};
use crate::{
    console,
    guest::{Guest, SYSFS},
    integrity::Integrity,
    interrupt,
    protocol::{Kin, Op},
    settle::settle,
    world::World,
};

const STRESS: &str = include_str!("stress.py");
const FAILURES: &str = include_str!("failures.py");
/// Tells the stress to end.
const STOP: &str = "/tmp/stress-stop";
/// Puts the agent, whose child this is, before everybody else, and what it starts.
const FIRST: &str = "renice -n -20 -p $(ls /proc/$PPID/task)";
/// What two processes with one address space map.
const TWINS_MAP: &str = "/usr/bin/python3";
const MODULE: &str = "/run/pagefusion/pagefusion.ko";

/// How often the module is loaded and unloaded while its guest is busy.
const LOADS: u32 = 500;
/// Seconds, at most, between changes of a kind while that happens. Without pauses a round takes twice as long, nearly all
/// of it waiting for a processor.
const PAUSE: f64 = 1.0;
/// Files that each guest maps all the time.
const HELD: usize = 60;
/// Between two looks.
const SLICE: Duration = Duration::from_secs(2);
/// How long everything happens at once.
const STRESSED: Duration = Duration::from_secs(600);
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

/// Each allocation fails in turn: of loading the module, of its passes, of withdrawing everything, of setting a knob. It
/// gets along, or says no.
pub(super) fn any_allocation_may_fail(stage: &mut Stage) -> Result<()> {
    with_detectors(stage, |world| {
        let guest = &mut world.guests[0];
        // Whoever does not get memory says so with a trace, on the console as well; its log is looked at instead.
        quiet(guest, true)?;
        fail(guest, "knobs")?;
        fail(guest, "thread")?;
        // The walk of inodes and what is remembered of address spaces that several processes have need memory as well.
        let (kind, path) = (Kin::Twins, Some(TWINS_MAP.to_owned()));
        unit(guest, Op::Kin { kind, path })?;
        guest.set("scope", "clean")?;
        fail(guest, "thread")?;
        fail(guest, "withdraw")?;
        guest.set("scope", "readonly")?;
        unit(guest, Op::Kin { kind, path: None })?;
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

/// The module comes and goes, at any moment of its passes, while processes and files do.
pub(super) fn loads_and_unloads_under_load(stage: &mut Stage) -> Result<()> {
    with_detectors(stage, |world| {
        let stress = Stress::start(world, 1, PAUSE)?;
        // Who loads and unloads waits for the kernel often enough; all the others run meanwhile.
        world.guests[0].output(&["sh", "-c", FIRST])?;
        let began = Instant::now();
        let mut took = [Duration::ZERO; 3];
        for round in 0..LOADS {
            if round % 10 == 0 {
                let [unload, load, reported] = took;
                eprintln!(
                    "{round} times in {:?}: unload {unload:?}, load {load:?}, reported {reported:?}",
                    began.elapsed()
                );
            }
            world.healthy()?;
            let guest = &mut world.guests[0];
            let mut part = Instant::now();
            let mut next = |index: usize| {
                took[index] += part.elapsed();
                part = Instant::now();
            };
            guest
                .unload_module()
                .with_context(|| format!("unload, round {round}"))?;
            next(0);
            guest
                .load_hurried_module()
                .with_context(|| format!("load, round {round}"))?;
            // At once, or at another moment of the first pass each time.
            let reported = if round % 4 == 0 {
                u64::from(round % 50) * 40
            } else {
                0
            };
            renice(guest, -20)?;
            if round % 2 == 1 {
                guest.set("scope", "clean")?;
            }
            next(1);
            let op = Op::WaitCounter {
                path: format!("{SYSFS}/pages_reported"),
                at_least: reported,
                timeout_ms: 120_000,
            };
            guest.request_for::<u64>(op, LIMIT, |_| {})?;
            next(2);
        }
        eprintln!("{LOADS} times in {:?}", began.elapsed());
        stress.end(world)?;
        settle(world, Instant::now())?;
        files_are_right(world)
    })
}

/// For ten minutes, half of them with all cached files in scope, in two guests that share; then they share on, and what
/// they read is right.
pub(super) fn everything_at_once_leaves_no_trace(stage: &mut Stage) -> Result<()> {
    with_detectors(stage, |world| {
        each(world, |guest| renice(guest, 0))?;
        let stress = Stress::start(world, 2, 0.0)?;
        for scope in ["readonly", "clean"] {
            each(world, |guest| guest.set("scope", scope))?;
            under(&stress, world).context(scope)?;
        }
        stress.end(world)?;
        settle(world, Instant::now())?;
        files_are_right(world)
    })
}

/// Half of the time, and until each guest has made a pass that began meanwhile.
fn under(stress: &Stress, world: &mut World) -> Result<()> {
    let before = passes(world)?;
    let began = Instant::now();
    loop {
        let after = passes(world)?;
        // One may have been under way.
        let enough = |(before, after): (&u64, u64)| after >= before + 2;
        let all = before.iter().zip(after.clone()).all(enough);
        if all && began.elapsed() >= STRESSED / 2 {
            eprintln!("passes: {before:?} before, {after:?} afterwards");
            return Ok(());
        }
        ensure!(
            began.elapsed() < LIMIT,
            "no pass comes to its end: {before:?}, {after:?}"
        );
        interrupt::check()?;
        world.healthy()?;
        stress.goes_on(world)?;
        std::thread::sleep(SLICE);
    }
}

/// How many each guest has made.
fn passes(world: &mut World) -> Result<Vec<u64>> {
    let guests = world.guests.iter_mut();
    guests.map(|guest| guest.counter("full_scans")).collect()
}

/// The stress in the first guests.
struct Stress {
    guests: usize,
}

impl Stress {
    fn start(world: &mut World, guests: usize, pause: f64) -> Result<Self> {
        const START: &str = r#"rm -f /tmp/stress-stop /tmp/stress-status
            (setsid python3 -c "$0" "$1" "$2" > /tmp/stress-log 2>&1; echo $? > /tmp/stress-status) > /dev/null 2>&1 &"#;
        for (seed, guest) in world.guests[..guests].iter_mut().enumerate() {
            let (seed, pause) = (seed.to_string(), pause.to_string());
            guest.output(&["sh", "-c", START, STRESS, &seed, &pause])?;
        }
        Ok(Self { guests })
    }

    /// Fails when it has ended by itself.
    fn goes_on(&self, world: &mut World) -> Result<()> {
        for guest in &mut world.guests[..self.guests] {
            let ended = guest.run(&["test", "-e", "/tmp/stress-status"])?;
            if ended.status == Some(0) {
                let said = guest.output(&["cat", "/tmp/stress-status", "/tmp/stress-log"])?;
                anyhow::bail!("{}: the stress has ended: {said}", guest.name());
            }
        }
        Ok(())
    }

    fn end(self, world: &mut World) -> Result<()> {
        self.goes_on(world)?;
        for guest in &mut world.guests[..self.guests] {
            guest.output(&["touch", STOP])?;
            let wait = "while [ ! -e /tmp/stress-status ]; do sleep 0.1; done; cat /tmp/stress-status /tmp/stress-log";
            let said = guest.run_for(&["sh", "-c", wait], LIMIT)?.stdout;
            eprintln!("{}: the stress: {said}", guest.name());
            everything_came_about(&said).with_context(|| guest.name().to_owned())?;
            guest.output(&["sh", "-c", "rm -rf /var/tmp/stress-*"])?;
        }
        Ok(())
    }
}

/// Fails when the stress did, or when something of it never happened.
fn everything_came_about(said: &str) -> Result<()> {
    let (status, kinds) = said.split_once('\n').unwrap_or_default();
    ensure!(status == "0" && !kinds.is_empty(), "{said}");
    for line in kinds.lines() {
        let times = line
            .split_once(" times: ")
            .with_context(|| line.to_owned())?;
        ensure!(times.0 != "0", "the stress never did this: {}", times.1);
    }
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
    // What fills the log must not push out what is looked for. With a host that is busy, a thread of the kernel's that
    // gives way to others may be held up for longer than RCU's usual 21 seconds; a CPU that is held is found
    // by the detector of soft lockups before. Grace periods, several to each unload, are ended by threads that
    // everything else runs beside.
    for _ in 0..2 {
        world.start_files_with(
            2,
            "log_buf_len=8M kmemleak=on rcupdate.rcu_cpu_stall_timeout=240 rcutree.kthread_prio=1",
            &ROOM_FOR_MEMORY,
        )?;
    }
    let boot = world.limits.boot;
    each(world, |guest| guest.wait_agent(boot).map(drop))?;
    // Nothing else is sure to be movable, and with it to go away again.
    each(world, |guest| plug_in(guest).map(drop))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stress_that_leaves_something_out_is_none() {
        assert!(everything_came_about("0\n3 times: map\n1 times: CPU off\n").is_ok());
        assert!(everything_came_about("0\n3 times: map\n0 times: CPU off\n").is_err());
        assert!(everything_came_about("0\n").is_err());
        assert!(everything_came_about("1\n3 times: map\n").is_err());
        assert!(everything_came_about("0\nsomething is wrong\n").is_err());
    }
}
