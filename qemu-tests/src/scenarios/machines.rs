//! Kinds of machines, and devices by which a guest's memory comes and goes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    Stage,
    shared_files::{SharedFiles, with_disk},
    steps::{hold, write},
};
use crate::{
    guest::{Guest, HIGH},
    integrity::Integrity,
    interrupt,
    pattern::Expected,
    protocol::Op,
    world::{Small, World},
};

const LIMIT: Duration = Duration::from_secs(120);
/// Between two looks.
const SLICE: Duration = Duration::from_millis(100);
const MIB: u64 = 1 << 20;
const MACHINES: [&str; 2] = ["pc", "q35"];
/// Memory that is left alone, and what of its reason an operator must find.
const LEFT_ALONE: [(&str, &str); 3] = [
    ("memory-backend-memfd,share=on", "share=on"),
    ("memory-backend-memfd,share=off", "backed by a file"),
    ("memory-backend-ram,share=on", "share=on"),
];
/// How much the balloon leaves to a guest.
const LEFT: u64 = 256 * MIB;
/// What a guest has without further arguments.
const WHOLE: u64 = 384 * MIB;
/// What virtio-mem brings.
const MORE: u64 = 256 * MIB;

/// With more memory than lies below 4 GiB, where a guest's kernel takes what is above first.
pub(super) fn machines_of_every_kind_share(stage: &mut Stage) -> Result<()> {
    for machine in MACHINES {
        large_machine(stage, machine).context(machine)?;
    }
    Ok(())
}

fn large_machine(stage: &mut Stage, machine: &str) -> Result<()> {
    let seed = stage.seed();
    let small = Small {
        arguments: on_memory(machine, "memory-backend-ram", "5G"),
        ..with_disk(&stage.world)?
    };
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let path = files.add(world)?;
        for guest in &mut world.guests {
            above(guest, path.clone())?;
        }
        let sums = files.rewrite(&mut world.guests[0], &path, seed + 500, MIB)?;
        files.are_right(world)?;
        is_own(world, &path, &sums)?;
        world.site.ctl(&["undo", "--all"])?;
        let shared = world.status()?.pages_shared;
        ensure!(shared == 0, "{shared} pages are shared after the undo");
        files.are_right(world)?;
        is_own(world, &path, &sums)?;
        world.site.ctl(&["resume", "--all"])?;
        files.are_shared(world)?;
        files.are_right(world)?;
        is_own(world, &path, &sums)
    })
}

/// A file is in each guest what that has made of it.
fn is_own(world: &mut World, path: &str, sums: &[String]) -> Result<()> {
    let mut integrity = Integrity::default();
    for (guest, sum) in world.guests.iter_mut().zip(sums) {
        integrity.file(guest, path, sum)?;
        integrity.held(guest, path, sum)?;
    }
    integrity.verdict()
}

fn on_memory(machine: &str, backend: &str, size: &str) -> Vec<String> {
    let machine = format!("{machine},memory-backend=memory");
    let backend = format!("{backend},id=memory,size={size}");
    ["-machine", &machine, "-m", size, "-object", &backend]
        .map(String::from)
        .into()
}

/// Others may map it, or it is not what an overlay could be undone to: the guest runs on, and `pagefusionctl` says why.
pub(super) fn memory_with_a_file_is_left_alone(stage: &mut Stage) -> Result<()> {
    for (backend, why) in LEFT_ALONE {
        left_alone(stage, backend, why).context(backend)?;
    }
    Ok(())
}

fn left_alone(stage: &mut Stage, backend: &str, why: &str) -> Result<()> {
    let seed = stage.seed();
    let small = Small {
        arguments: on_memory("pc", backend, "384M"),
        ..Small::default()
    };
    stage.with_small_pair(&small, |world| {
        let path = "/tmp/left-alone";
        let sum = Expected::new(seed, MIB).sha256();
        for guest in 0..world.guests.len() {
            let name = world.guests[guest].name().to_owned();
            write(&mut world.guests[guest], path, seed, 0, MIB)?;
            hold(&mut world.guests[guest], path)?;
            let deadline = Instant::now() + LIMIT;
            let disabled = loop {
                interrupt::check()?;
                let vm = world.status()?.vm(&name)?.clone();
                ensure!(vm.pages_shared == 0, "{} are shared", vm.pages_shared);
                if let Some(why) = vm.disabled {
                    break why;
                }
                ensure!(Instant::now() < deadline, "no reason is given");
                std::thread::sleep(SLICE);
            };
            ensure!(disabled.contains(why), "the reason is: {disabled}");
        }
        let mut integrity = Integrity::default();
        for guest in &mut world.guests {
            integrity.file(guest, path, &sum)?;
            integrity.held(guest, path, &sum)?;
        }
        integrity.verdict()
    })
}

/// A file that is held lies for the most part above 4 GiB.
fn above(guest: &mut Guest, path: String) -> Result<()> {
    let frames: Vec<u64> = guest.request(Op::HeldFrames { path })?;
    let above = frames.iter().filter(|frame| **frame >= HIGH).count();
    ensure!(
        above > frames.len() / 2,
        "{above} of {} pages lie above 4 GiB",
        frames.len()
    );
    Ok(())
}

/// Pages that were shared are reported as free, then more are taken by the balloon; none of them shows what was in the
/// store, and what is left is right.
pub(super) fn a_balloon_takes_what_was_shared(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = Small {
        modules: &["virtio_balloon"],
        arguments: vec![
            "-device".into(),
            "virtio-balloon-pci,id=balloon,free-page-reporting=on".into(),
        ],
        ..with_disk(&stage.world)?
    };
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        free_pages_are_empty(world, &mut files)?;
        files.are_right(world)?;
        balloon(&mut world.guests[0], LEFT)?;
        files.are_right(world)?;
        balloon(&mut world.guests[0], WHOLE)?;
        files.add(world)?;
        files.are_shared(world)?;
        files.are_right(world)
    })
}

/// Frees what the first guest shares in 32 MiB, and waits until the host has most of it back.
fn free_pages_are_empty(world: &mut World, files: &mut SharedFiles) -> Result<()> {
    let mut given = Vec::new();
    let mut paths = Vec::new();
    for _ in 0..16 {
        let path = files.add(world)?;
        let guest = &mut world.guests[0];
        given.extend(guest.request::<Vec<u64>>(Op::HeldFrames { path: path.clone() })?);
        paths.push(path);
    }
    let shared = world.guests[0].host_frames_at(&given)?;
    for path in &paths {
        files.remove(world, path)?;
    }
    let guest = &mut world.guests[0];
    let deadline = Instant::now() + LIMIT;
    let empty = loop {
        interrupt::check()?;
        guest.healthy()?;
        let now = guest.host_frames_at(&given)?;
        let empty: Vec<usize> = (0..given.len()).filter(|at| now[*at] == 0).collect();
        if empty.len() > given.len() / 2 {
            break empty;
        }
        ensure!(
            Instant::now() < deadline,
            "the host has {} of {} free pages back",
            empty.len(),
            given.len()
        );
        std::thread::sleep(SLICE);
    };
    // QEMU reads each, as a guest that takes it into use would.
    for at in empty {
        let now = guest.host_frames_of(given[at], 1)?;
        ensure!(
            now != [shared[at]],
            "frame {:#x}, which was given back, shows a page of the store",
            given[at]
        );
    }
    Ok(())
}

/// Leaves so many bytes to a guest, and waits until it is so.
fn balloon(guest: &mut Guest, bytes: u64) -> Result<()> {
    guest.monitor("balloon", json!({ "value": bytes }))?;
    until(guest, "the balloon", |guest| {
        let now = guest.monitor("query-balloon", json!({}))?;
        Ok((now["actual"] == bytes, now))
    })
}

/// Memory comes and goes in blocks of 2 MiB.
pub(super) fn virtio_mem_brings_and_takes_memory(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = Small {
        modules: &["virtio_mem"],
        // Into use at once, and for nothing that could not be moved out again.
        kernel_arguments: "memhp_default_state=online_movable".into(),
        arguments: [
            "-m",
            "maxmem=2G",
            "-object",
            "memory-backend-ram,id=more,size=512M",
            "-device",
            "virtio-mem-pci,id=mem,memdev=more,requested-size=0",
        ]
        .map(String::from)
        .into(),
        ..with_disk(&stage.world)?
    };
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        for _ in 0..2 {
            request_memory(&mut world.guests[0], MORE)?;
            let path = files.add(world)?;
            above(&mut world.guests[0], path)?;
            files.are_right(world)?;
            request_memory(&mut world.guests[0], 0)?;
            files.are_right(world)?;
            files.are_shared(world)?;
        }
        files.add(world)?;
        files.are_right(world)
    })
}

/// Has virtio-mem bring so many bytes, and waits until it is so.
fn request_memory(guest: &mut Guest, bytes: u64) -> Result<()> {
    guest.monitor(
        "qom-set",
        json!({ "path": "/machine/peripheral/mem", "property": "requested-size", "value": bytes }),
    )?;
    until(guest, "virtio-mem", |guest| {
        let devices = guest.monitor("query-memory-devices", json!({}))?;
        let size = &devices[0]["data"]["size"];
        Ok((*size == bytes, devices))
    })
}

fn until(
    guest: &mut Guest,
    what: &str,
    mut look: impl FnMut(&mut Guest) -> Result<(bool, Value)>,
) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        interrupt::check()?;
        guest.healthy()?;
        let (done, state) = look(guest)?;
        if done {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{what} is at {state}");
        std::thread::sleep(SLICE);
    }
}
