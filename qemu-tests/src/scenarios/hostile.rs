//! A guest that means ill, in a group with others.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{
    Stage,
    shared_files::{SharedFiles, with_disk},
    steps::{unit, wait_until},
};
use crate::{
    guest::Guest,
    protocol::Op,
    world::{Small, World},
};

const DEVICES: &str = "/sys/bus/pci/devices";
/// Vendor and device.
const OURS: [(&str, &str); 2] = [("vendor", "0x1af4"), ("device", "0x1110")];
const ATTACKS: u64 = 4;
/// What one attack writes, each time followed by a ring.
const ROUNDS: u64 = 400;
const LIMIT: Duration = Duration::from_secs(180);

/// It writes random records, random bytes and random positions while two others share what is new. They read what is
/// right, and so does the rest of the hostile guest, whose memory is overlaid wherever it said and bytes were the same.
pub(super) fn beside_good_ones(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = Small {
        // The kernel lets nobody at a device's memory while a driver has it.
        kernel_arguments: "iomem=relaxed nopat".into(),
        ..with_disk(&stage.world)?
    };
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let mut hostile = world.launch_small_sharer(&small)?;
        hostile.wait_agent(world.limits.boot)?;
        hostile.load_hurried_module()?;
        files.hold_in(&mut hostile)?;
        let of_hostile = files.clone();
        let name = hostile.name().to_owned();
        wait_until("the third guest shares", || {
            Ok(world.status()?.vm(&name)?.pages_shared > 256)
        })?;
        for attack in 0..ATTACKS {
            if attack == ATTACKS / 2 {
                hostile.unload_module()?;
                switch_on(&mut hostile)?;
            }
            let before = world.status()?.vm(&name)?.pages_refused;
            let device = device(&mut hostile)?;
            let scribble = hostile.begin(Op::Scribble {
                device,
                seed: seed + attack,
                rounds: ROUNDS,
            })?;
            let path = files.add(world)?;
            files.are_right(world)?;
            let records: u64 = hostile.finish(scribble, LIMIT, &mut |_| {})?;
            let refused = world.status()?.vm(&name)?.pages_refused;
            ensure!(
                refused > before,
                "the host has looked at nothing of {records} records: {before} pages were refused, now {refused}"
            );
            files.add(world)?;
            files.are_right(world)?;
            of_hostile.are_right_in(&mut hostile)?;
            files.forget(&path);
        }
        still_served(world, &mut hostile)?;
        files.are_shared(world)?;
        hostile.kill()
    })
}

/// As its driver does.
fn switch_on(guest: &mut Guest) -> Result<()> {
    let path = format!("{}/enable", device(guest)?);
    let data = "1".into();
    unit(guest, Op::Write { path, data })
}

/// The device's directory in sysfs.
fn device(guest: &mut Guest) -> Result<String> {
    let names: Vec<String> = guest.request(Op::List {
        path: DEVICES.into(),
    })?;
    for name in names {
        let device = format!("{DEVICES}/{name}");
        let mut is_ours = true;
        for (file, value) in OURS {
            let path = format!("{device}/{file}");
            is_ours &= guest.request::<String>(Op::Read { path })?.trim() == value;
        }
        if is_ours {
            return Ok(device);
        }
    }
    None.context("the guest has no device of ours")
}

/// Its QEMU and its engine live.
fn still_served(world: &World, hostile: &mut Guest) -> Result<()> {
    hostile.healthy()?;
    wait_until("its engine answers", || {
        Ok(world.status()?.vm(hostile.name())?.connected)
    })
}
