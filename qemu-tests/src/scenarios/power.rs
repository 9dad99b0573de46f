//! A guest sleeps, in its memory or on its disk, or becomes another kernel.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    Stage,
    filesystems::image,
    shared_files::{SharedFiles, with_disk},
    steps::{answered, has_another_host, unit, wait_until, with_reports_in_flight},
};
use crate::{
    guest::{Guest, Pending},
    protocol::{NextKernel, Op},
    standstill::Standstill,
    world::{Small, World},
};

const LIMIT: Duration = Duration::from_secs(120);
/// A host that is well has answered by then.
const ANSWERED: Duration = Duration::from_secs(10);
/// A busy host may take long to make an image.
const TRIES: u32 = 3;
/// Room for a hibernated guest.
const SWAP_BYTES: u64 = 256 << 20;
const SWAP: &str = "vdb";
/// Has the kernel say on its console how far it is with falling asleep.
const TALKATIVE: &str = "loglevel=7";
/// What it says when processes are frozen and threads like the module's are to be.
const FREEZES: &str = "Freezing remaining freezable tasks";

pub(super) fn suspended_to_memory(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let sleeper = &mut world.guests[0];
        let asleep = sleep_in(sleeper, "mem")?;
        sleeper.wait_event("SUSPEND", LIMIT)?;
        wake(sleeper, asleep)?;
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        files.are_right(world)
    })
}

/// Wakes it from its memory.
fn wake(sleeper: &mut Guest, asleep: Pending) -> Result<()> {
    sleeper.monitor("system_wakeup", json!({}))?;
    sleeper.wait_event("WAKEUP", LIMIT)?;
    woken(sleeper, asleep)
}

/// The pass would take longer than the kernel waits for a thread to freeze.
pub(super) fn suspended_in_the_middle_of_a_pass(stage: &mut Stage) -> Result<()> {
    /// After each of them the pass rests for 10 ms.
    const FILES: u64 = 4000;
    /// The pass is among them after so many more reports.
    const SOME: u64 = 50;
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let sleeper = &mut world.guests[0];
        sleeper.set("scope", "clean")?;
        sleeper.wait_passes(2, LIMIT)?;
        let retracted = sleeper.counter("pages_retracted")?;
        sleeper.set("run", "0")?;
        unit(
            sleeper,
            Op::ManyFiles {
                directory: "/tmp/many".into(),
                seed: seed + 100,
                files: FILES,
            },
        )?;
        answered(sleeper)?;
        sleeper.set("pages_to_scan", "1")?;
        let name = sleeper.name().to_owned();
        let reported = |world: &World| world.status()?.vm(&name).map(|vm| vm.pages_reported);
        let before = reported(world)?;
        world.guests[0].set("run", "1")?;
        wait_until("the pass has come to the many files", || {
            Ok(reported(world)? >= before + SOME)
        })?;
        let sleeper = &mut world.guests[0];
        let asleep = sleep_in(sleeper, "mem")?;
        sleeper.wait_event("SUSPEND", LIMIT)?;
        // The number of passes would not tell: the kernel thaws processes first and locks file
        // systems afterwards, which ends a pass that holds some of them.
        let told = reported(world)? - before;
        ensure!(told < FILES, "the pass was over: it reported {told} pages");
        let sleeper = &mut world.guests[0];
        wake(sleeper, asleep)?;

        sleeper.set("pages_to_scan", "65536")?;
        sleeper.wait_passes(2, LIMIT)?;
        nothing_is_lost(sleeper)?;
        let tracked = sleeper.counter("files_tracked")?;
        ensure!(tracked >= FILES, "it remembers {tracked} files only");
        let gone = sleeper.counter("pages_retracted")? - retracted;
        ensure!(gone == 0, "{gone} pages were withdrawn");
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        files.are_right(world)
    })
}

/// A host that does not answer keeps no guest awake.
pub(super) fn suspended_while_the_host_stands_still(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let standstill = with_reports_in_flight(world, &mut files)?;
        let sleeper = &mut world.guests[0];
        let asleep = sleep_in(sleeper, "mem")?;
        sleeper.wait_event("SUSPEND", LIMIT)?;
        wake(sleeper, asleep)?;
        let revocations = sleeper.counter("revocations")?;
        ensure!(revocations > 0, "the host does not count as standing still");
        drop(standstill);
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        files.are_right(world)
    })
}

/// Reports of a guest that nobody has answered and nobody will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lost {
    pages: u64,
    /// How often reports were taken back since the host stood still; these were not answered either.
    revocations: u64,
}

const NOTHING_LOST: Lost = Lost {
    pages: 0,
    revocations: 0,
};

fn lost(guest: &mut Guest) -> Result<Lost> {
    // Nothing is reported meanwhile, so that the numbers meet.
    guest.set("run", "0")?;
    let deadline = Instant::now() + ANSWERED;
    let pages = loop {
        crate::interrupt::check()?;
        let reported = guest.counter("pages_reported")?;
        let left = reported.abs_diff(guest.counter("pages_acknowledged")?);
        if left == 0 || Instant::now() >= deadline {
            break left;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    guest.set("run", "1")?;
    let revocations = guest.counter("revocations")?;
    Ok(Lost { pages, revocations })
}

fn nothing_is_lost(guest: &mut Guest) -> Result<()> {
    let lost = lost(guest)?;
    ensure!(lost == NOTHING_LOST, "{lost:?}");
    Ok(())
}

/// Sleeps; the answer comes when it is awake again.
fn sleep_in(guest: &mut Guest, state: &str) -> Result<Pending> {
    guest.begin(Op::Write {
        path: "/sys/power/state".into(),
        data: state.into(),
    })
}

fn woken(guest: &mut Guest, asleep: Pending) -> Result<()> {
    let woken: Value = guest.finish(asleep, LIMIT, &mut |_| {})?;
    ensure!(woken.is_null(), "it woke with {woken}");
    Ok(())
}

pub(super) fn hibernated_and_woken_elsewhere(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let swap = stage.world.directory().join("swap");
    fs::File::create(&swap)?.set_len(SWAP_BYTES)?;
    let drive = format!("if=virtio,format=raw,file={}", swap.display());
    let small = with_disk(&stage.world)?;
    let sleeper = Small {
        arguments: vec!["-drive".into(), drive],
        kernel_arguments: TALKATIVE.into(),
        ..small.clone()
    };
    stage.with_small_pair(&small, |world| {
        // Only one of them has a disk to sleep on.
        world.guests.remove(0).kill()?;
        world.start_small_sharers(&sleeper, 1)?;
        world.guests.swap(0, 1);
        world.guests[0].load_hurried_module()?;
        let device = format!("/dev/{SWAP}");
        unit(&mut world.guests[0], Op::SwapOn { device })?;
        let mut files = SharedFiles::hold(world, seed)?;
        hibernate(world, &sleeper, false, None)?;
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        // The kernel that wakes it may have the module, too.
        hibernate(world, &sleeper, true, None)?;
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        files.are_right(world)?;
        nothing_is_lost(&mut world.guests[0])?;

        let mut before = NOTHING_LOST;
        for _ in 0..TRIES {
            let standstill = with_reports_in_flight(world, &mut files)?;
            hibernate(world, &sleeper, true, Some(standstill))?;
            files.are_right(world)?;
            files.are_shared(world)?;
            let after = lost(&mut world.guests[0])?;
            if after.revocations == before.revocations {
                ensure!(
                    after == before,
                    "the image had reports in flight: {after:?}"
                );
                return Ok(());
            }
            // Before there was an image, the host had not answered for too long.
            before = after;
        }
        bail!("the host has stood still for too long each time: {before:?}")
    })
}

/// An engine that stands still goes on when the module's thread has to freeze.
fn hibernate(
    world: &mut World,
    small: &Small,
    with_module: bool,
    standstill: Option<Standstill>,
) -> Result<()> {
    let mut sleeper = world.guests.remove(0);
    // Whatever fails, it is let go before the machine is dropped, which waits for all its threads.
    let standstill = standstill;
    unit(
        &mut sleeper,
        Op::Write {
            path: "/sys/power/disk".into(),
            data: "shutdown".into(),
        },
    )?;
    let instance = sleeper.counter("host_instance")?;
    let lines = sleeper.console_lines();
    let asleep = sleep_in(&mut sleeper, "disk")?;
    sleeper.wait_line(FREEZES, lines, LIMIT)?;
    drop(standstill);
    sleeper.wait_end(LIMIT).context("hibernate")?;

    let mut guest = world.launch_small_sharer(small)?;
    guest.wait_agent(world.limits.boot)?;
    if with_module {
        guest.load_hurried_module()?;
        guest.wait_passes(1, LIMIT)?;
    }
    guest.take_over(&sleeper);
    let device: String = guest.request(Op::Read {
        path: format!("/sys/class/block/{SWAP}/dev"),
    })?;
    // It answers only when there is nothing to wake.
    let _never = guest.begin(Op::Write {
        path: "/sys/power/resume".into(),
        data: device.trim().into(),
    })?;
    woken(&mut guest, asleep).context("wake from disk")?;
    has_another_host(&mut guest, instance)?;
    world.guests.insert(0, guest);
    Ok(())
}

pub(super) fn another_kernel_by_kexec(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let world = &stage.world;
    let (kernel, initramfs) = (world.artifacts.kernel.clone(), world.initramfs().to_owned());
    let bytes = |path: &Path| -> Result<u64> { Ok(fs::metadata(path)?.len()) };
    let next = NextKernel {
        kernel: "/dev/vdb".into(),
        kernel_bytes: bytes(&kernel)?,
        initramfs: "/dev/vdc".into(),
        initramfs_bytes: bytes(&initramfs)?,
    };
    let small = Small {
        disks: vec![image(world, "ext4")?, kernel, initramfs],
        ..Small::default()
    };
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        start_another_kernel(world, &next, &mut files, false)?;
        start_another_kernel(world, &next, &mut files, true).context("with reports in flight")
    })
}

/// With `in_flight`, what the first guest has reported is looked at when another kernel has its memory.
fn start_another_kernel(
    world: &mut World,
    next: &NextKernel,
    files: &mut SharedFiles,
    in_flight: bool,
) -> Result<()> {
    let standstill = if in_flight {
        Some(with_reports_in_flight(world, files)?)
    } else {
        None
    };
    let limit = world.limits.boot;
    let first = &mut world.guests[0];
    // It answers only when it failed.
    let _never = first.begin(Op::Kexec(next.clone()))?;
    first.wait_agent(limit).context("start another kernel")?;
    drop(standstill);
    first.load_hurried_module()?;
    files.hold_in(first)?;
    files.are_right(world)?;
    files.are_shared(world)?;
    files.add(world)?;
    files.are_right(world)
}
