//! A module with nothing to do, and what ends that.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Stage, knobs::uptime};
use crate::{
    guest::{Accelerator, Guest, SYSFS},
    protocol::Op,
    settle::settle,
    world::{Host, World},
};

const FILE_PAGES: u64 = 256;
/// A long sleep: without a wake-up nothing would be reported while a scenario lasts.
const HOUR: &str = "3600000";
/// From the first touch of a file to its report, by the guest's clock. The module's own limit is a second; a host that
/// is busy elsewhere gets the rest.
const AT_ONCE: Duration = Duration::from_secs(5);
/// Longer than two passes are apart when the last one has found something new.
const ASLEEP: Duration = Duration::from_millis(2500);
/// Passes without news after which the sleep does not double any more.
const IDLE_PASSES: u64 = 20;
const LIMIT: Duration = Duration::from_secs(300);
/// Services of a Debian guest do something new every few minutes.
const TRIES: u32 = 4;

pub(super) fn a_new_file_is_reported_at_once(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let guest = &mut stage.world.guests[0];
    let (fresh, cached) = ("/var/tmp/pf-quiet-fresh", "/var/tmp/pf-quiet-cached");
    for (path, seed) in [(fresh, seed), (cached, seed + 1)] {
        guest.request::<Value>(Op::WritePattern {
            path: path.into(),
            seed,
            offset: 0,
            bytes: FILE_PAGES * 4096,
        })?;
    }
    guest.request::<Value>(Op::Evict)?;
    guest.output(&["cat", cached])?;
    for path in [fresh, cached] {
        fall_asleep(guest, HOUR)?;
        known_programs_wake_nobody(guest)?;

        let reported = guest.counter("pages_reported")?;
        let touched = uptime(guest)?;
        guest.request::<Value>(Op::Hold { path: path.into() })?;
        guest
            .request::<u64>(Op::WaitCounter {
                path: format!("{SYSFS}/pages_reported"),
                at_least: reported + FILE_PAGES / 2,
                timeout_ms: 60_000,
            })
            .with_context(|| path.to_owned())?;
        let took = uptime(guest)? - touched;
        ensure!(took <= AT_ONCE, "{path} was reported after {took:?}");
        eprintln!("{path}: reported after {took:?}");
    }
    for path in [fresh, cached] {
        guest.request::<Value>(Op::Release { path: path.into() })?;
        guest.request::<Value>(Op::Delete { path: path.into() })?;
    }
    hurry(guest)?;
    settle(&mut stage.world, Instant::now())?;
    stage.files_are_right()
}

/// What everybody uses already does not end the module's sleep. Something new that a service does meanwhile may: then it
/// is tried again, which would not help if it were the programs.
fn known_programs_wake_nobody(guest: &mut Guest) -> Result<()> {
    for _ in 0..TRIES {
        for _ in 0..5 {
            guest.output(&["cat", "/etc/hostname"])?;
        }
        if stays_asleep(guest)? {
            return Ok(());
        }
        // It was woken, or has slept for an hour.
        fall_asleep(guest, HOUR)?;
    }
    bail!("the module was awake after known programs, {TRIES} times of {TRIES}")
}

/// Whether the module makes no pass for longer than any but a long sleep lasts.
fn stays_asleep(guest: &mut Guest) -> Result<bool> {
    let (passes, since) = (guest.counter("full_scans")?, uptime(guest)?);
    while uptime(guest)? - since < ASLEEP {
        crate::interrupt::check()?;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(guest.counter("full_scans")? == passes)
}

/// Puts a module that is not asleep to sleep for `longest` milliseconds, so that nothing but a wake-up ends it.
fn fall_asleep(guest: &mut Guest, longest: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        // Every pass that finds nothing doubles the sleep, and the shortest sleep is soon doubled often enough.
        guest.set("sleep_millisecs", "10")?;
        guest.set("max_sleep_millisecs", "10")?;
        guest.wait_passes(IDLE_PASSES, LIMIT)?;
        guest.set("max_sleep_millisecs", longest)?;
        guest.set("sleep_millisecs", "1000")?;
        // The pass under way may end with the old sleep.
        if stays_asleep(guest)? || stays_asleep(guest)? {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "passes do not become rare");
    }
}

/// The guest's time in which an idle module is watched, at least.
const WATCHED: Duration = Duration::from_secs(600);
/// The longest sleep of an idle module then.
const LONGEST: Duration = Duration::from_secs(60);
/// What it may use of one CPU.
const SHARE: f64 = 0.0005;
/// From the first touch of a file to its report, where a busy host does not count.
const SECOND: Duration = Duration::from_secs(1);
/// Uses up all idle time, so that the guest's clock does not run away while it waits for the host.
const SPIN: &str = "chrt -i 0 sh -c 'while :; do :; done' > /dev/null 2>&1 & echo $!";

pub(super) fn an_idle_guest_spends_next_to_nothing(stage: &mut Stage) -> Result<()> {
    idle(stage, "")
}

/// Where the host cannot interrupt the guest, which has to look by itself.
pub(super) fn an_idle_guest_without_interrupts(stage: &mut Stage) -> Result<()> {
    idle(stage, "pci=nomsi")
}

/// In a guest whose clock counts instructions, and passes the time at once when there is nothing to do.
fn idle(stage: &mut Stage, kernel_arguments: &str) -> Result<()> {
    let host = Host {
        accelerator: Accelerator::Counted,
        nested: false,
    };
    let mut world = World::new(&stage.world.artifacts, host, None)?;
    world.start_files(1, kernel_arguments)?;
    world.guests[0].wait_agent(world.limits.boot)?;
    let guest = &mut world.guests[0];
    let spinner = guest.output(&["sh", "-c", SPIN])?;
    let path = "/var/tmp/pf-quiet";
    guest.request::<Value>(Op::WritePattern {
        path: path.into(),
        seed: 77,
        offset: 0,
        bytes: FILE_PAGES * 4096,
    })?;
    guest.load_hurried_module()?;
    guest.wait_passes(5, LIMIT)?;
    guest.output(&["kill", spinner.trim()])?;

    fall_asleep(guest, &LONGEST.as_millis().to_string())?;
    let reported = guest.counter("pages_reported")?;
    let (since, cpu) = (uptime(guest)?, guest.counter("cpu_usecs")?);
    let passes = guest.counter("full_scans")?;
    let deadline = Instant::now() + LIMIT;
    while uptime(guest)? - since < WATCHED {
        ensure!(Instant::now() < deadline, "the guest is not idle");
        crate::interrupt::check()?;
        std::thread::sleep(Duration::from_millis(200));
    }
    let used = Duration::from_micros(guest.counter("cpu_usecs")? - cpu);
    let passes = guest.counter("full_scans")? - passes;
    let watched = uptime(guest)? - since;
    let share = used.as_secs_f64() / watched.as_secs_f64();
    eprintln!(
        "{used:?} of CPU in {watched:?} with {passes} passes: {:.4}%",
        share * 100.0
    );
    ensure!(passes > 0, "no pass in {watched:?}");
    // The sleep doubles from a second to the longest, and stays so.
    let doublings = u64::from(LONGEST.as_secs().ilog2()) + 1;
    let most = watched.as_secs() / LONGEST.as_secs() + 1 + doublings;
    ensure!(
        passes <= most,
        "{passes} passes in {watched:?}, {most} were expected at most"
    );
    let more = guest.counter("pages_reported")? - reported;
    ensure!(
        more == 0,
        "{more} pages were reported where nothing changes"
    );
    ensure!(
        share <= SHARE,
        "an idle module uses {:.4}% of a CPU",
        share * 100.0
    );

    fall_asleep(guest, HOUR)?;
    guest.output(&["sh", "-c", SPIN])?;
    let reported = guest.counter("pages_reported")?;
    let touched = uptime(guest)?;
    guest.request::<Value>(Op::Hold { path: path.into() })?;
    guest.request::<u64>(Op::WaitCounter {
        path: format!("{SYSFS}/pages_reported"),
        at_least: reported + FILE_PAGES / 2,
        timeout_ms: 60_000,
    })?;
    let took = uptime(guest)? - touched;
    eprintln!("{path}: reported after {took:?}");
    ensure!(took <= SECOND, "{path} was reported after {took:?}");
    world.close()
}

fn hurry(guest: &mut Guest) -> Result<()> {
    guest.set("sleep_millisecs", "100")?;
    guest.set("max_sleep_millisecs", "500")
}

pub(super) fn memory_pressure_shrinks_the_tracker(stage: &mut Stage) -> Result<()> {
    let guest = &mut stage.world.guests[0];
    guest.wait_passes(1, LIMIT)?;
    let (bytes, pages) = (
        guest.counter("tracker_bytes")?,
        guest.counter("pages_tracked")?,
    );
    let shrinks = guest.counter("shrinks")?;
    // Dropping what can be reclaimed besides the page cache asks every shrinker.
    guest.request::<Value>(Op::Write {
        path: "/proc/sys/vm/drop_caches".into(),
        data: "2".into(),
    })?;
    guest
        .request::<u64>(Op::WaitCounter {
            path: format!("{SYSFS}/shrinks"),
            at_least: shrinks + 1,
            timeout_ms: 60_000,
        })
        .context("nobody asked for memory")?;
    let left = guest.counter("tracker_bytes")?;
    ensure!(
        left <= bytes * 6 / 10,
        "{left} of {bytes} bytes are left of the tracker"
    );
    stage.files_are_right()?;
    let guest = &mut stage.world.guests[0];
    let deadline = Instant::now() + LIMIT;
    while guest.counter("pages_tracked")? < pages * 8 / 10 {
        ensure!(
            Instant::now() < deadline,
            "the tracker was not built again: {} of {pages} pages",
            guest.counter("pages_tracked")?
        );
        guest.wait_passes(1, LIMIT)?;
    }
    settle(&mut stage.world, Instant::now())?;
    stage.files_are_right()
}
