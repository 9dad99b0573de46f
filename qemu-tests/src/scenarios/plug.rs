//! What may be plugged into a machine and pulled out of it while its guest shares.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{
    Stage,
    shared_files::{SharedFiles, with_disk},
    steps::{has_another_host, nothing_is_abandoned, unit, with_reports_in_flight},
};
use crate::{
    guest::Guest,
    interrupt,
    protocol::Op,
    world::{Small, World},
};

const LIMIT: Duration = Duration::from_secs(120);
/// Between two looks.
const SLICE: Duration = Duration::from_millis(100);
const PCI: &str = "/sys/bus/pci";
const MEMORY: &str = "/sys/devices/system/memory";
/// What a machine is started with in which memory is to be plugged. Merged with the size that every guest has.
pub(super) const ROOM_FOR_MEMORY: [&str; 2] = ["-m", "slots=2,maxmem=2G"];
/// What is plugged in.
const DIMM_MIB: u64 = 256;

/// By the guest, which is all the same to the module. That QEMU takes the device away cannot be tried here: where
/// QEMU delivers its interrupts by itself (TCG), its main loop then goes on polling an eventfd that it has closed.
pub(super) fn device_taken_away_and_found_again(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let guest = &mut world.guests[0];
        let before = guest.counter("host_instance")?;
        let reported = guest.counter("pages_reported")?;
        remove_device(guest)?;
        ensure!(
            guest.counter("host_instance")? == 0,
            "the module believes in a host without a device"
        );
        files.are_right(world)?;
        shares_nothing(world)?;

        let guest = &mut world.guests[0];
        write_one(guest, format!("{PCI}/rescan"))?;
        // The engine in QEMU is the same as before.
        has_another_host(guest, 0)?;
        ensure!(guest.counter("host_instance")? == before, "another engine");
        files.are_shared(world)?;
        files.add(world)?;
        let guest = &mut world.guests[0];
        guest.wait_passes(1, LIMIT)?;
        // What was not known any more was told again, which is less: nothing is asked for twice.
        let sum = guest.counter("pages_reported")?;
        ensure!(
            sum > reported,
            "{reported} pages had been reported with the device before, and {sum} in all"
        );
        files.are_right(world)
    })
}

/// The guest lets our device go.
fn remove_device(guest: &mut Guest) -> Result<()> {
    let mut bound: Vec<String> = guest.request(Op::List {
        path: format!("{PCI}/drivers/pagefusion"),
    })?;
    bound.retain(|entry| entry.contains(':'));
    let device = bound.pop().context("no device is bound")?;
    write_one(guest, format!("{PCI}/devices/{device}/remove"))
}

/// `ivshmem-plain` has no doorbell and no interrupt: each side looks at the memory now and then.
pub(super) fn plain_device(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        for guest in &mut world.guests {
            let before = guest.counter("host_instance")?;
            remove_device(guest)?;
            let path = guest.device_memory()?;
            guest.monitor(
                "object-add",
                json!({
                    "qom-type": "memory-backend-file",
                    "id": "shared",
                    "size": std::fs::metadata(&path)?.len(),
                    "mem-path": path,
                    "share": true,
                }),
            )?;
            guest.monitor(
                "device_add",
                json!({ "driver": "ivshmem-plain", "id": "plain", "memdev": "shared", "master": "on" }),
            )?;
            has_another_host(guest, 0)?;
            ensure!(guest.counter("host_instance")? == before, "another engine");
        }
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        // What the host asks for arrives as well.
        files.are_undone_and_shared_again(world)?;
        files.are_right(world)?;

        // QEMU takes it away, from a guest that waits for answers. It cannot show this memory twice.
        let standstill = with_reports_in_flight(world, &mut files)?;
        let guest = &mut world.guests[0];
        guest.monitor("device_del", json!({ "id": "plain" }))?;
        guest.wait_event("DEVICE_DELETED", LIMIT)?;
        ensure!(
            guest.counter("host_instance")? == 0 && guest.counter("pages_in_flight")? == 0,
            "the module believes in a host without a device"
        );
        nothing_is_abandoned(guest)?;
        files.are_right(world)?;
        drop(standstill);
        files.are_right(world)
    })
}

fn write_one(guest: &mut Guest, path: String) -> Result<()> {
    let data = "1".into();
    unit(guest, Op::Write { path, data })
}

/// The first guest takes leave, and its engine some time.
fn shares_nothing(world: &World) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        interrupt::check()?;
        let shared = world.status()?.vm(world.guests[0].name())?.pages_shared;
        if shared == 0 {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{shared} pages stay shared without a device"
        );
        std::thread::sleep(SLICE);
    }
}

pub(super) fn memory_plugged_in_and_pulled_out(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = Small {
        arguments: ROOM_FOR_MEMORY.map(String::from).into(),
        ..with_disk(&stage.world)?
    };
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let first_frame = plug_in(&mut world.guests[0])?;
        // Movable memory is what a kernel takes first for files.
        let path = files.add(world)?;
        let guest = &mut world.guests[0];
        let frames: Vec<u64> = guest.request(Op::HeldFrames { path })?;
        let inside = frames.iter().filter(|frame| **frame >= first_frame).count();
        ensure!(
            inside > frames.len() / 2,
            "{inside} of {} pages lie in the memory that came",
            frames.len()
        );
        files.are_right(world)?;

        // The guest moves all that is in there, what it shares and what it has just reported.
        let guest = &mut world.guests[0];
        guest.monitor("device_del", json!({ "id": "dimm" }))?;
        guest.wait_event("DEVICE_DELETED", LIMIT)?;
        guest.monitor("object-del", json!({ "id": "extra" }))?;
        files.are_right(world)?;
        files.are_shared(world)?;
        files.add(world)?;
        files.are_right(world)
    })
}

/// Plugs memory in and waits until the guest uses it; its first frame.
pub(super) fn plug_in(guest: &mut Guest) -> Result<u64> {
    let blocks = |guest: &mut Guest| -> Result<Vec<String>> {
        let mut names: Vec<String> = guest.request(Op::List {
            path: MEMORY.into(),
        })?;
        names.retain(|name| {
            name.strip_prefix("memory")
                .is_some_and(|rest| rest.parse::<u64>().is_ok())
        });
        Ok(names)
    };
    let read = |guest: &mut Guest, name: &str| -> Result<String> {
        let path = format!("{MEMORY}/{name}");
        let text: String = guest.request(Op::Read { path })?;
        Ok(text.trim().to_owned())
    };
    let block_bytes = u64::from_str_radix(&read(guest, "block_size_bytes")?, 16)?;
    let before = blocks(guest)?;
    let size = DIMM_MIB << 20;
    // Into use at once, and for nothing that could not be moved out again.
    let path = format!("{MEMORY}/auto_online_blocks");
    let data = "online_movable".into();
    unit(guest, Op::Write { path, data })?;
    guest.monitor(
        "object-add",
        json!({ "qom-type": "memory-backend-ram", "id": "extra", "size": size }),
    )?;
    guest.monitor(
        "device_add",
        json!({ "driver": "pc-dimm", "id": "dimm", "memdev": "extra" }),
    )?;
    let deadline = Instant::now() + LIMIT;
    let new = loop {
        interrupt::check()?;
        let mut new = Vec::new();
        for name in blocks(guest)? {
            if !before.contains(&name) && read(guest, &format!("{name}/state"))? == "online" {
                new.push(name);
            }
        }
        if new.len() as u64 == size / block_bytes {
            break new;
        }
        ensure!(
            Instant::now() < deadline,
            "the guest uses {} blocks of memory more",
            new.len()
        );
        std::thread::sleep(SLICE);
    };
    let mut first = u64::MAX;
    for name in new {
        let index = u64::from_str_radix(&read(guest, &format!("{name}/phys_index"))?, 16)?;
        first = first.min(index * block_bytes / 4096);
    }
    Ok(first)
}

/// Interrupts of devices like ours are off: the guest looks by itself.
pub(super) fn without_interrupts(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = Small {
        kernel_arguments: "pci=nomsi".into(),
        ..with_disk(&stage.world)?
    };
    stage.with_small_pair(&small, |world| {
        for guest in &mut world.guests {
            let interrupts: String = guest.request(Op::Read {
                path: "/proc/interrupts".into(),
            })?;
            ensure!(
                !interrupts.contains("pagefusion"),
                "it has an interrupt: {interrupts}"
            );
        }
        let mut files = SharedFiles::hold(world, seed)?;
        files.are_right(world)?;
        // What the host asks for arrives as well.
        files.are_undone_and_shared_again(world)?;
        files.add(world)?;
        files.are_right(world)
    })
}
