//! A guest sleeps, or becomes another kernel.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Stage, filesystems::image, shared_files::SharedFiles};
use crate::{
    guest::{Guest, Pending},
    protocol::{NextKernel, Op},
    world::Small,
};

const LIMIT: Duration = Duration::from_secs(120);

pub(super) fn suspended_to_memory(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = Small {
        disks: vec![image(&stage.world, "ext4")?],
        ..Small::default()
    };
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
