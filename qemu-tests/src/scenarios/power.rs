//! A guest sleeps, in its memory or on its disk, or becomes another kernel.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    Stage,
    filesystems::image,
    shared_files::{SharedFiles, with_disk},
    steps::{has_another_host, unit},
};
use crate::{
    guest::{Guest, Pending},
    protocol::{NextKernel, Op},
    world::{Small, World},
};

const LIMIT: Duration = Duration::from_secs(120);
/// Room for a hibernated guest.
const SWAP_BYTES: u64 = 256 << 20;
const SWAP: &str = "vdb";

pub(super) fn suspended_to_memory(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let sleeper = &mut world.guests[0];
        let asleep = sleep_in(sleeper, "mem")?;
        sleeper.wait_event("SUSPEND", LIMIT)?;
        sleeper.monitor("system_wakeup", json!({}))?;
        sleeper.wait_event("WAKEUP", LIMIT)?;
        woken(sleeper, asleep)?;
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        files.are_right(world)
    })
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
        hibernate(world, &sleeper, false)?;
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        // The kernel that wakes it may have the module, too.
        hibernate(world, &sleeper, true)?;
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        files.are_right(world)
    })
}

fn hibernate(world: &mut World, small: &Small, with_module: bool) -> Result<()> {
    let mut sleeper = world.guests.remove(0);
    unit(
        &mut sleeper,
        Op::Write {
            path: "/sys/power/disk".into(),
            data: "shutdown".into(),
        },
    )?;
    let instance = sleeper.counter("host_instance")?;
    let asleep = sleep_in(&mut sleeper, "disk")?;
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
        let limit = world.limits.boot;
        let first = &mut world.guests[0];
        // It answers only when it failed.
        let _never = first.begin(Op::Kexec(next))?;
        first.wait_agent(limit).context("start another kernel")?;
        first.load_hurried_module()?;
        files.hold_in(first)?;
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        files.are_right(world)
    })
}
