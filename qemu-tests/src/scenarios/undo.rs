//! What an undo leaves behind in QEMU.

use std::{fs, ops::Range};

use anyhow::{Context, Result, ensure};

use super::{
    Stage,
    shared_files::{SharedFiles, with_disk},
    steps::answered,
};
use crate::{
    guest::Guest,
    integrity::Integrity,
    world::{Small, World},
};

/// What the first guest writes of one file.
const WRITTEN: u64 = 64;
/// Memory of a small guest.
const MIB: u32 = 384;

/// A mapping in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Vma {
    range: Range<u64>,
    /// Its protection, and what is mapped there.
    access: String,
    path: String,
}

impl Vma {
    fn pages(&self) -> u64 {
        (self.range.end - self.range.start) / 4096
    }
}

/// Guest memory is one mapping before anything is shared, and the same after an undo. Where the guest has written what
/// was shared, the page stays where the kernel has put it, in a mapping of the store's file.
pub(super) fn leaves_no_overlay(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    let others = std::mem::take(&mut stage.world.guests);
    let played = play(&mut stage.world, &small, seed);
    stage.world.guests = others;
    stage.world.site.ctl(&["resume", "--all"])?;
    played
}

fn play(world: &mut World, small: &Small, seed: u64) -> Result<()> {
    world.start_small_sharers(small, 2)?;
    let before = all(world)?;
    for vmas in &before {
        ensure!(
            vmas.iter().all(|vma| vma.path.is_empty()),
            "guest memory is not anonymous: {vmas:?}"
        );
    }
    for guest in &mut world.guests {
        guest.load_hurried_module()?;
    }
    let mut files = SharedFiles::hold(world, seed)?;
    let written = files.add(world)?;
    for (sharing, before) in all(world)?.iter().zip(&before) {
        ensure!(sharing.len() > before.len(), "no overlay is mapped");
    }
    let bytes = WRITTEN * 4096;
    let sums = files.rewrite(&mut world.guests[0], &written, seed + 500, bytes)?;
    for guest in &mut world.guests {
        guest.wait_passes(2, world.limits.settle)?;
        answered(guest)?;
    }

    world.site.ctl(&["undo", "--all"])?;
    let shared = world.status()?.pages_shared;
    ensure!(shared == 0, "{shared} pages are shared after the undo");
    let after = all(world)?;
    ensure!(
        after[1] == before[1],
        "guest memory that nobody has written was {:?}, and is {:?}",
        before[1],
        after[1]
    );
    let left = after[0].iter().filter(|vma| !vma.path.is_empty());
    let left: u64 = left.map(Vma::pages).sum();
    ensure!(
        left > 0 && left <= WRITTEN,
        "{left} pages are mapped from the store, and {WRITTEN} were written: {:?}",
        after[0]
    );
    files.are_right(world)?;
    let mut integrity = Integrity::default();
    for (guest, sum) in world.guests.iter_mut().zip(&sums) {
        integrity.file(guest, &written, sum)?;
        integrity.held(guest, &written, sum)?;
    }
    integrity.verdict()?;
    for guest in &mut world.guests {
        guest.unload_module()?;
        guest.healthy()?;
        guest.kill()?;
    }
    world.guests.clear();
    Ok(())
}

fn all(world: &mut World) -> Result<Vec<Vec<Vma>>> {
    world.guests.iter_mut().map(of_guest).collect()
}

/// The mappings that a guest's memory is made of.
fn of_guest(guest: &mut Guest) -> Result<Vec<Vma>> {
    let pieces = guest.memory(MIB)?;
    let (_, address, frames) = *pieces.first().context("a guest without memory")?;
    let memory = address..address + frames * 4096;
    let maps = fs::read_to_string(format!("/proc/{}/maps", guest.pid()))?;
    let mut vmas = Vec::new();
    let mut next = memory.start;
    for line in maps.lines() {
        let vma = parse(line).with_context(|| format!("a line of maps: {line}"))?;
        if vma.range.start >= memory.end || vma.range.end <= memory.start {
            continue;
        }
        ensure!(
            vma.range.start <= next,
            "no memory from {next:#x} to {line}"
        );
        next = vma.range.end;
        vmas.push(vma);
    }
    ensure!(next >= memory.end, "no memory from {next:#x}");
    Ok(vmas)
}

fn parse(line: &str) -> Option<Vma> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    let access = fields.next()?.to_owned();
    let path = fields.nth(3).unwrap_or_default().trim().to_owned();
    Some(Vma {
        range: start..end,
        access,
        path,
    })
}
